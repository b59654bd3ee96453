"""Finetuning from a run's checkpoint: what is learned, what stays, what is refused."""

import hashlib
import json
import shlex
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from slope_jax import models
from slope_jax.dense import MASKS
from train import integrity
from train.checkpoint import Checkpoints
from train.config import to_json
from train.data.tokenizer import train_tokenizer
from train.finetune import main, parse
from train.recipes import make_config
from train.state import init_state, join_adapters, make_setup
from train.tasks import TASKS, FinetuneConfig, finetune, load_finetuned, results
from train.tasks.examples import read_splits
from train.tasks.features import make_features
from train.tasks.job import dry_run
from train.tasks.scoring import score
from train.tasks.setup import init_state as init_task_state
from train.tasks.setup import load_run
from train.tasks.setup import make_setup as make_task_setup
from train.tasks.step import make_predict_step, on_device, predict

WORDS = ["sparse", "kernel", "mask", "values", "dense", "layer", "adapter", "rank", "token"]
NAMES = ["anna", "bob", "carla", "dora", "emil"]


def save_run(folder, scale=1.0, **fields):
    """A run's checkpoint without the run: its first weights, after 7 of 10 steps in name."""
    options = {"seq_len": (32,), "steps": (10,), "vocab_size": 340}
    options |= {} if "method" in fields else {"adapter_rank": 0.0156, "adapter_start": 0.5}
    config = make_config("bert-tiny", **options | fields)
    text = " ".join([*WORDS, *NAMES, "the winner is good bad"])
    vocabulary = train_tokenizer([text] * 3, config.objective, 340)
    setup = make_setup(config, vocab_size=vocabulary.size)
    state = init_state(setup)
    if config.adapter_step is not None:
        state, _ = join_adapters(setup, state)
    params = jax.tree.map(lambda x: scale * x, state.params)
    state = state.replace(step=jnp.int32(7), params=params)
    checkpoints = Checkpoints(folder, keep=1)
    tokenizer = json.loads(vocabulary.to_json())
    checkpoints.save(state, setup.key, {"config": to_json(config)}, tokenizer, None)
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("slope"))


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("dense"), method="dense", seq_len=(112,))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CoLA of good and bad sentences; SQuAD whose answer is the only name in the context."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "CoLA").mkdir()
    (folder / "SQuAD").mkdir()
    for split, count in (("train", 192), ("dev", 37)):
        lines, entries = ["sentence\tlabel"], []
        for i in range(count):
            words = list(rng.choice(WORDS, 6))
            words[rng.integers(6)] = "good" if i % 2 else "bad"
            lines.append(f"{' '.join(words)}\t{i % 2}")
            words = list(rng.choice(WORDS, 12))
            name, place = rng.choice(NAMES), rng.integers(12)
            words[place] = str(name)
            start = len(" ".join([*words[:place], ""]))
            answers = [{"answer_start": start, "text": str(name)}]
            question = {"id": str(i), "question": "The winner", "answers": answers}
            entries.append({"context": " ".join(words), "qas": [question]})
        (folder / "CoLA" / f"{split}.tsv").write_bytes("\r\n".join([*lines, ""]).encode())
        content = {"data": [{"title": "x", "paragraphs": entries}]}
        (folder / "SQuAD" / f"{split}-v1.1.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def learned(run, data, tmp_path_factory):
    config = FinetuneConfig(
        task="cola",
        checkpoint=str(run),
        data=str(data),
        out=str(tmp_path_factory.mktemp("out") / "results"),
        epochs=3,
        lr=3e-3,
        batch_size=20,  # the last batch of an epoch is not full
        save_model=True,
    )
    return config, finetune(config)


def evaluated(model, config):
    """The metrics of a finetuned model, from its weights."""
    task = config.chosen
    examples = read_splits(task, config.data)["validation"]
    features = make_features(task, examples, model.vocabulary, 32)
    step = make_predict_step(task.kind, model.model.apply)
    return score(task, examples, features, predict(step, model.variables, on_device(features), 8))


def test_a_task_is_learned_and_recorded(learned):
    config, record = learned
    assert record == json.loads((config.folder() / "finetune.json").read_text())
    assert record["task"] == "glue/cola"
    assert record["run"] | {"seed": 0} == record["run"]
    assert {k: record["run"][k] for k in ("method", "sparsity", "step")} == {
        "method": "slope",
        "sparsity": "2:4",
        "step": 7,
    }
    seed = record["seeds"]["0"]
    assert [e["epoch"] for e in seed["evals"]] == [1, 2, 3]
    assert seed["last"] == {"epoch": 3, "matthews": 1.0, "accuracy": 1.0}
    assert seed["best"]["accuracy"] == 1.0
    assert record["mean"]["last"]["accuracy"] == {"mean": 1.0, "std": None}
    lines = (config.folder() / "seed-0" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.1 < losses[0]
    assert len(losses) == 3  # ten steps each, and thirty in all
    assert "sparse products of 7 linears" in (config.folder() / "plan.txt").read_text()


def test_zeros_stay_where_they_were_and_survivors_learn(run, learned):
    config, _ = learned
    before, after = load_run(config), load_finetuned(config.folder() / "seed-0" / "model")
    masks = {k: v for k, v in before.variables[MASKS].items() if k not in ("mlm", "nsp")}
    jax.tree.map(np.testing.assert_array_equal, after.variables[MASKS], {"bert": masks})
    assert set(after.variables["params"]["bert"]) == set(before.variables["params"]) - {
        "mlm",
        "nsp",
    }
    layer = "layers_1"
    old = before.variables["params"][layer]["mlp"]["up"]
    new = after.variables["params"]["bert"][layer]["mlp"]["up"]
    assert new["kernel"].shape == (64, 512)  # half of 128 inputs
    for name in ("kernel", "adapter_l", "adapter_r"):  # adapters are trained on
        assert old[name].shape == new[name].shape
        assert not np.array_equal(old[name], new[name])
    assert "adapter_l" in old


@pytest.mark.parametrize(("scale", "factor"), [(None, 2), (1.0, 1), (3.0, 3)])
def test_pruned_kernels_move_at_their_own_rate(run, scale, factor):
    """By the update of equal gradients, which Adam makes equal but for the rate."""
    config = FinetuneConfig("cola", str(run), pruned_lr_scale=scale, weight_decay=0.0, clip=0.0)
    trained = load_run(config)
    setup = make_task_setup(config, trained, 64)
    params = init_task_state(setup, trained, jax.random.key(0)).params
    grads, count = jax.tree.map(jnp.ones_like, params), setup.tx.init(params)
    updates = None
    for _ in range(2):  # the first step of the warm-up has no rate
        updates, count = setup.tx.update(grads, count, params)
    moved = traverse_util.flatten_dict(updates)
    stored = {("bert", *path) for path in traverse_util.flatten_dict(trained.variables[MASKS])}
    unit = float(np.asarray(moved["head", "bias"]).flat[0])
    assert unit != 0
    pruned = stored & moved.keys()
    assert len(pruned) >= 4
    for path, update in moved.items():
        expected = unit * (factor if path in pruned else 1)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


def test_results_of_before_pruned_kernels_had_a_rate_are_of_another_job(learned, tmp_path):
    config, _ = learned
    folder = shutil.copytree(config.folder(), tmp_path / "out")
    record = json.loads((folder / "finetune.json").read_text())
    del record["config"]["pruned_lr_scale"]
    (folder / "finetune.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"config pruned_lr_scale: 1\.0 there, None here"):
        finetune(FinetuneConfig(**{**vars(config), "out": str(folder)}))


def test_a_saved_model_gives_the_recorded_metrics(learned):
    config, record = learned
    found = evaluated(load_finetuned(config.folder() / "seed-0" / "model"), config)
    assert found == {k: record["seeds"]["0"]["last"][k] for k in ("matthews", "accuracy")}
    with pytest.raises(ValueError, match=r"has no finetuned\.json"):
        load_finetuned(config.folder())


def test_seeds_go_on_and_other_jobs_are_refused(learned, capsys):
    config, record = learned
    again = finetune(config)
    assert again["seeds"] == record["seeds"]
    assert "is complete" in capsys.readouterr().out
    for fields, message in (
        ({"lr": 1e-3}, "config lr: 0.003 there, 0.001"),
        ({"limit": 9}, "data"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(FinetuneConfig(**{**vars(config), **fields}))
    more = finetune(FinetuneConfig(**{**vars(config), "seeds": (0, 3), "save_model": False}))
    assert more["seeds"]["0"] == record["seeds"]["0"]
    files = [config.folder() / f"seed-{seed}" / "metrics.jsonl" for seed in (0, 3)]
    ours, theirs = (file.read_text().splitlines() for file in files)
    assert len(ours) == len(theirs)
    assert ours[0] != theirs[0]
    assert more["mean"]["last"]["matthews"]["std"] is not None


def test_scores_of_other_weights_in_the_same_place_are_not_taken_over(run, data, tmp_path):
    config = FinetuneConfig(
        "cola", str(tmp_path / "run"), data=str(data), out=str(tmp_path / "out")
    )
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "7"
    examples, path = read_splits(config.chosen, config.data), tmp_path / "out" / "finetune.json"
    trained, plan = load_run(config), types.SimpleNamespace(parameters=1)

    def opened(saved=None):
        if saved is not None:
            path.write_text(json.dumps(saved))
        return results.open_record(config, trained, plan, examples, config.folder())

    first = opened()
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    assert first["run"]["weights"] == digest
    assert opened(first) == first
    older = first | {"run": {k: v for k, v in first["run"].items() if k not in ("lr", "weights")}}
    assert opened(older) == older
    with pytest.raises(ValueError, match=r"run lr: \[1\.0\] there, \[0\.0003\] here"):
        opened(first | {"run": first["run"] | {"lr": [1.0]}})
    (checkpoint / "weights").write_text("others")
    integrity.write_manifest(checkpoint)
    with pytest.raises(
        ValueError, match=f"another job:\n  run weights: {digest} there, [0-9a-f]+ h"
    ):
        opened(first)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"run weights: {digest} there, None here"):
        opened(first)


def test_means_are_over_the_seeds(tmp_path):
    rows = [{"epoch": 1, "f1": 0.25}, {"epoch": 2, "f1": 0.75}, {"epoch": 3, "f1": 0.5}]
    first, second = (results.of_seed(TASKS["glue/mrpc"], rows[:n]) for n in (3, 2))
    assert first["last"] == rows[2]
    assert first["best"] == rows[1]
    record = {"seeds": {"0": first, "1": second}}
    results.write(record, tmp_path)
    assert json.loads((tmp_path / "finetune.json").read_text()) == record
    assert record["mean"] == {
        "last": {"f1": {"mean": 0.625, "std": pytest.approx(0.125 * np.sqrt(2))}},
        "best": {"f1": {"mean": 0.75, "std": 0.0}},
    }


def test_a_dense_run_learns_spans(dense_run, data, tmp_path):
    config = FinetuneConfig(
        task="squad",
        checkpoint=str(dense_run),
        data=str(data),
        out=str(tmp_path),
        epochs=3,
        lr=2e-3,
        batch_size=16,
    )
    record = finetune(config)
    assert record["run"]["sparsity"] == "dense"
    assert record["run"]["adapter_rank"] == 0
    assert record["seeds"]["0"]["last"] == {"epoch": 3, "f1": 1.0, "exact_match": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst2"}, "has neither SST-2/train.tsv nor train.tsv"),
        ({"data": "no/such/folder"}, "--data=no/such/folder is no folder"),
        ({"checkpoint": "{data}"}, "holds no checkpoints"),
        ({"step": "6"}, "has no checkpoint of step 6; there are 7"),
        ({"seq-len": "1000"}, "seq_len=1000 is longer than the model's 512 positions"),
        ({"seq-len": "4"}, "seq_len=4 is too short for glue/cola; give 8 or more"),
        ({"out": "{data}/CoLA/train.tsv"}, "cannot be written"),
    ],
)
def test_bad_input_is_named(run, data, options, message, capsys):
    options = {"task": "cola", "checkpoint": str(run), "data": str(data)} | options
    args = []
    for name, value in options.items():
        args += [f"--{name}", *value.format(data=data).split(" ")]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "sst3"}, "unknown task 'sst3'; choose one of: glue/cola, glue/sst2"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"epochs": 1.5}, r"epochs must be a positive integer, got 1\.5"),
        ({"lr": -1.0}, r"lr must be above 0 \(and below 10\), got -1"),
        ({"pruned_lr_scale": 0.0}, "pruned_lr_scale must be above 0, or None for M / N; got 0"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1"),
        ({"clip": -1.0}, "clip must not be negative"),
        ({"dtype": "float64"}, "unknown dtype 'float64'; choose one of: auto"),
        ({"stride": 8}, "stride is of tasks with long contexts"),
        ({"seeds": (1, 1)}, "seeds must be different"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**{"task": "cola", "checkpoint": "run"} | fields)


def test_a_decoder_is_refused(run, data, monkeypatch, capsys):
    trained = load_run(FinetuneConfig(task="cola", checkpoint=str(run)))
    decoder = trained._replace(model=models.build("gpt2-nano"))
    monkeypatch.setattr("train.tasks.setup.load_trained", lambda path, step: decoder)
    assert main(["--task=cola", f"--checkpoint={run}", f"--data={data}"]) == 2
    assert "holds a GPT2; finetuning takes a BERT" in capsys.readouterr().err


def test_a_dry_run_says_what_would_happen(run, data, capsys):
    args = ["--task=cola", f"--checkpoint={run}", "--dry-run", "--seeds", "1", "2"]
    assert main([*args, f"--data={data}"]) == 0
    out = capsys.readouterr().out
    for part in (
        "method slope, sparsity 2:4, adapters of rank 2",
        "192 training examples, 37 of validation",
        "at most 32 tokens",
        "5 epochs; adamw, peak lr 5e-05",
        "learning rate of pruned kernels: 2 times that of others (2:4)",
        "metrics matthews, accuracy; seeds 1, 2",
        "bert/layers_1/mlp/up",
    ):
        assert part in out
    assert main(args) == 0
    assert "data from TensorFlow Datasets" in capsys.readouterr().out
    assert not (run / "finetune").exists()


def test_a_loss_that_is_not_finite_stops_the_job(learned, tmp_path):
    config, _ = learned
    save_run(tmp_path / "run", scale=float("nan"))
    fields = {"checkpoint": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    with pytest.raises(ArithmeticError, match=r"the loss is nan by step 10 of seed 0.*lower --lr"):
        finetune(FinetuneConfig(**{**vars(config), **fields}))
    assert not (tmp_path / "out" / "finetune.json").exists()


def test_a_last_update_that_is_not_finite_stops_the_job(run, data, tmp_path, monkeypatch):
    """No loss tells of it."""
    calls = []

    def step(state, *_):
        calls.append(state)
        bias = state.params["head"]["bias"]
        head = state.params["head"] | {"bias": bias.at[0].set(jnp.nan if len(calls) == 3 else 0)}
        return state.replace(params=state.params | {"head": head}), jnp.float32(0.5)

    monkeypatch.setattr("train.tasks.job.make_train_step", lambda kind: step)
    fields = {"data": str(data), "out": str(tmp_path), "limit": 12, "batch_size": 4, "epochs": 1}
    message = r"the state is not finite after step 3 of seed 7: finetuning stopped.*lower --lr"
    with pytest.raises(ArithmeticError, match=message):
        finetune(FinetuneConfig("cola", str(run), **fields, seeds=(7,)))
    assert len(calls) == 3
    assert not (tmp_path / "finetune.json").exists()


@pytest.mark.parametrize("job", [finetune, dry_run])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere is not a folder; give the --run-dir of a run"),
        ({"seq_len": 1000}, "longer than the model's 512 positions"),
    ],
)
def test_what_needs_no_data_is_refused_before_any_is_read(run, monkeypatch, job, fields, message):
    read = []
    monkeypatch.setattr("train.tasks.job.read_splits", lambda *_: read.append("data") or {})
    given = {"task": "cola", "checkpoint": str(run), "data": "" if job is finetune else "folder"}
    with pytest.raises(ValueError, match=message):
        job(FinetuneConfig(**given | fields))
    assert read == []


def test_the_command_in_the_record_asks_for_the_same_again():
    pytest.importorskip("tyro", reason="tyro is not installed")
    config = FinetuneConfig("rte", "a run", data="a b", seeds=(3, 1), lr=1e-4, save_model=True)
    assert parse(shlex.split(config.command())[3:]) == config
