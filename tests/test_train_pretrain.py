"""The command from end to end, on a tiny model and a few documents."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import job
from train.plan import make_plan
from train.pretrain import main
from train.recipes import make_config
from train.state import init_state, make_setup


@pytest.fixture(scope="module")
def text(tmp_path_factory, small_text):
    folder = tmp_path_factory.mktemp("pretrain")
    shutil.copy(small_text / "a.txt", folder)
    return folder


def options(text, run_dir, **fields):
    fields = {
        "model": "gpt2-nano",
        "data": f"text:{text / '*.txt'}",
        "cache-dir": text / "cache",
        "run-dir": run_dir,
        "vocab-size": 300,
        "valid-fraction": 0.2,
        "seq-len": 8,
        "batch-size": 2,
        "steps": 6,
        "lr": 0.01,
        "adapter-rank": 0.0156,
        "adapter-start": 0.5,
        "eval-every": 2,
        **fields,
    }
    return [f"--{name}={value}" for name, value in fields.items()]


def test_gpt2_trains_and_leaves_a_full_record(text, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(options(text, run_dir)) == 0
    out = capsys.readouterr().out
    assert "adapters of rank" in out
    assert "held-out loss" in out
    assert not re.search(r"\b0 tokens/s", out)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["tokens"] == 6 * 2 * 8
    assert summary["adapter_step"] == 3
    # The function is uniform over 300 tokens at first, up to the spread of the initialisation.
    assert abs(summary["held_out_first"]["eval_loss"] - np.log(300)) < 0.2
    assert summary["held_out_last"]["eval_loss"] < summary["held_out_first"]["eval_loss"]
    assert summary["density"] == 0.5
    assert summary["environment"]["versions"]["jax"] == jax.__version__
    assert summary["peak_memory_bytes"]["host"] > 2**20
    assert summary["programs"] >= 4  # the state's birth, evaluation, and the step with and without
    assert summary["compiling_seconds"] > 0
    assert 0 < summary["first_step_seconds"] < summary["seconds"]
    assert (run_dir / "checkpoints" / "6").is_dir()
    assert (run_dir / "tokenizer.json").is_file()
    assert (run_dir / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert all("nsp_loss" not in x for x in lines)
    speeds = [x.get("tokens_per_second") for x in lines if "loss" in x]
    assert speeds[0] is None  # the first step compiles
    assert all(speed > 0 for speed in speeds[1:])


def test_divergence_stops_and_names_the_last_good_checkpoint(text, tmp_path, capsys, monkeypatch):
    real, calls = job.make_train_step, []

    def poisoned(*args, **kwargs):
        step = real(*args, **kwargs)

        def call(state, batch, key):
            calls.append(0)
            state, found = step(state, batch, key)
            if len(calls) == 4:
                state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            return state, found

        return call

    monkeypatch.setattr(job, "make_train_step", poisoned)
    run_dir = tmp_path / "run"
    args = options(text, run_dir, **{"checkpoint-every": 2, "eval-every": 0, "adapter-rank": 0})
    assert main(args) == 1
    error = capsys.readouterr().err
    assert "not finite after step 4" in error
    assert str(run_dir / "checkpoints" / "2") in error
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["2"]


def test_time_limit_saves_and_stops(text, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(options(text, run_dir, **{"max-minutes": 1e-6, "adapter-rank": 0})) == 75
    assert "The same command goes on" in capsys.readouterr().out
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("glob", ["missing-*.txt", "a.txt.nothing"])
def test_missing_text_is_reported_without_a_trace(text, tmp_path, capsys, glob):
    assert main(options(text, tmp_path / "run", data=f"text:{text / glob}")) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_dry_run_of_the_largest_model_takes_no_memory():
    script = (
        "import sys; from train.pretrain import main;"
        "code = main(['--model=gpt2-xl', '--recipe=paper', '--dry-run']);"
        "print(open('/proc/self/status').read(), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # 1,557,611,200 parameters as published, and 7 padded rows of 1600.
    assert "1,557,622,400 in the dense model" in done.stdout
    assert "join 191 linears after step 396,000, for the last 4,000 of 400,000 steps" in done.stdout
    assert "209,715,200,000" in done.stdout
    peak = next(x for x in done.stderr.splitlines() if x.startswith("VmHWM"))
    assert int(peak.split()[1]) < 2**20  # KiB: 1 GiB; the state alone would take 12.9


def test_planned_bytes_are_those_of_a_real_state():
    config = make_config("bert-tiny", adapter_rank=0)
    plan = make_plan(config)
    state = init_state(make_setup(config))
    stored = sum(x.nbytes for x in jax.tree.leaves((state.params, state.masks, state.opt_state)))
    assert plan.checkpoint_bytes == stored
    assert plan.parameters[0] == sum(x.size for x in jax.tree.leaves(state.params))
    assert plan.density == 0.5
