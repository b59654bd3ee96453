"""A run that is stopped and goes on equals one that never stopped, bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jobs import on_small_text, run

from train import metrics
from train.checkpoint import Checkpoints
from train.job import Exit
from train.recipes import make_config
from train.state import abstract_state, make_setup

ROOT = pathlib.Path(__file__).parents[1]
TOTAL, JOIN = 6, 3
EXACT = ("loss", "accuracy", "grad_norm", "lr", "nsp_loss", "tokens")
EXACT += ("eval_loss", "eval_perplexity", "eval_mlm_accuracy", "eval_nsp_loss")


def options(folder: pathlib.Path, **fields):
    """Two phases; adapters join where the second begins.

    Micro-batches and 16-bit moments, because these have most to go wrong: shared copies of the
    weights, gradients added in place, random bits by step.
    """
    given = {
        "seq_len": (16, 24),
        "max_predictions": 3,
        "batch_size": 4,
        "accumulation": (1, 2),
        # Few linears compile fast.
        "sparsity": "layers/1/(attention/output|mlp/up)=2:4; .*=dense",
        "moments": "bfloat16",
        "steps": (JOIN, TOTAL - JOIN),
        "adapter_rank": 0.0156,
        "dropout": 0.1,
        "eval_every": 4,
        "checkpoint_every": 0,
    }
    return on_small_text(folder, **given | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_text):
    path = tmp_path_factory.mktemp("resume")
    shutil.copytree(small_text, path / "text")
    return path


def final_state(config, folder: pathlib.Path, step: int):
    vocab = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    setup = make_setup(config, vocab_size=vocab)
    checkpoints = Checkpoints(folder, keep=config.keep_checkpoints)
    state, key = checkpoints.restore(step, abstract_state(setup, adapters=step > JOIN))
    checkpoints.close()
    return jax.device_get((state.params, state.masks, state.opt_state, state.step)), key


def record(folder: pathlib.Path) -> list[dict]:
    """What metrics.jsonl holds, without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k == "step" or k in EXACT}
        for line in metrics.read(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(folder):
    config = make_config("bert-tiny", **options(folder, run_dir=str(folder / "whole")))
    code, text = run(config)
    assert code == Exit.DONE
    assert f"2 linears, rank 2, joined after step {JOIN}" in text
    return config, folder / "whole"


def test_run_records_every_step_once(whole):
    _, path = whole
    lines = record(path)
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, TOTAL + 1))
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, JOIN, 4, TOTAL]
    assert all({"grad_norm", "lr", "nsp_loss", "tokens"} <= x.keys() for x in lines if "loss" in x)
    assert lines[-2]["tokens"] == 4 * 3 * (16 + 24)


def test_resumed_run_equals_the_uninterrupted_one(folder, whole):
    config, path = whole
    resumed = folder / "resumed"
    again = make_config("bert-tiny", **options(folder, run_dir=str(resumed)))
    # Until adapters join, nothing depends on them.
    without = make_config("bert-tiny", **options(folder, run_dir=str(resumed), adapter_rank=0))
    # At the border of the phases, where adapters join, and inside of the second.
    for config_of_part, stop in ((without, JOIN), (again, JOIN + 1)):
        code, text = run(config_of_part, stop_at=stop)
        assert code == Exit.UNFINISHED
        assert f"saved after step {stop} of {TOTAL}" in text
        if stop == JOIN:  # as if a process had gone on and been killed before it saved
            with (resumed / "metrics.jsonl").open("a") as lines:
                lines.write(f'{{"step": {JOIN}, "eval_loss": 1.0}}\n')
                lines.write(f'{{"step": {JOIN + 1}, "loss": 1.0}}\n')
    code, text = run(again)
    assert code == Exit.DONE
    assert f"Going on after step {JOIN + 1}" in text
    ours, key = final_state(again, resumed, TOTAL)
    theirs, their_key = final_state(config, path, TOTAL)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (where, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(where))
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(their_key))
    assert record(resumed) == record(path)
    assert json.loads((resumed / "config.json").read_text())["adapter_rank"] == again.adapter_rank


def test_running_a_complete_run_again_only_reports(whole):
    config, path = whole
    before = (path / "metrics.jsonl").read_bytes()
    code, text = run(config)
    assert code == Exit.DONE
    assert "is complete" in text
    assert (path / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_with_the_fields_that_differ(folder, whole):
    _, path = whole
    other = make_config(
        "bert-tiny", **options(folder, run_dir=str(path), beta1=0.8, optimizer="lamb", log_every=3)
    )
    with pytest.raises(ValueError, match="another configuration") as error:
        run(other)
    assert "beta1: 0.9 there, 0.8 here" in str(error.value)
    assert "optimizer: adamw there, lamb here" in str(error.value)
    assert "log_every" not in str(error.value)
    assert "--run-dir" in str(error.value)


def test_adapters_that_have_joined_cannot_be_changed(folder, whole):
    _, path = whole
    other = make_config("bert-tiny", **options(folder, run_dir=str(path), adapter_rank=0))
    with pytest.raises(ValueError, match=r"adapter_rank: .* there, 0 here") as error:
        run(other)
    said = f"Adapters can be changed until they join; this checkpoint is of step {TOTAL}."
    assert said in str(error.value)


def test_changed_text_is_refused_where_the_old_tokens_are_gone(folder, whole):
    _, path = whole
    copy = folder / "copy"
    shutil.copytree(path, copy)
    text = folder / "text" / "a.txt"
    before = text.read_text()
    fields = options(folder, run_dir=str(copy), cache_dir=str(folder / "other-cache"))
    try:
        text.write_text(before + "\n\nOne more document. It has two sentences.")
        with pytest.raises(ValueError, match="has changed since"):
            run(make_config("bert-tiny", **fields))
    finally:
        text.write_text(before)


def twenty_steps(folder: pathlib.Path, name: str) -> dict:
    fields = options(folder, run_dir=str(folder / name), checkpoint_every=5)
    fields |= {"seq_len": 16, "steps": 20, "adapter_rank": 0, "dropout": 0.0, "eval_every": 0}
    return fields | {"accumulation": 1, "moments": "float32"}


def command(folder: pathlib.Path, name: str) -> list[str]:
    args = [sys.executable, "-m", "train.pretrain", "--model", "bert-tiny", "--no-tensorboard"]
    for key, value in twenty_steps(folder, name).items():
        if key != "tensorboard":
            values = value if isinstance(value, tuple) else (value,)
            args += ["--" + key.replace("_", "-"), *map(str, values)]
    return args


def start(args: list[str]) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        args, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(process: subprocess.Popen, path: pathlib.Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} didn't appear"
        time.sleep(0.005)


def test_terminated_then_finished(folder):
    """SIGTERM, then to the end, against a run in one go. Killed runs: test_soak, test_train_processes."""
    checkpoints = folder / "terminated" / "checkpoints"
    first = start(command(folder, "terminated"))
    wait_for(first, checkpoints / "5")
    first.terminate()
    out, err = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM, err
    assert "Stopped by SIGTERM" in out
    assert "The same command goes on from there" in out
    reached = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    assert 5 <= reached < 20

    code, text = run(make_config("bert-tiny", **twenty_steps(folder, "terminated")))
    assert code == Exit.DONE
    assert f"Going on after step {reached}" in text
    steps = [x["step"] for x in record(folder / "terminated") if "loss" in x]
    assert steps == list(range(1, 21))

    code, _ = run(make_config("bert-tiny", **twenty_steps(folder, "one-go")))
    assert code == Exit.DONE
    assert record(folder / "terminated") == record(folder / "one-go")
