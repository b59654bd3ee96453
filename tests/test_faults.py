"""Every fault of docs/robustness.md is caused, and says what the page says."""

import contextlib
import errno
import gc
import gzip
import json
import lzma
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from pallas_kernels.files import new_folder
from slope_jax import TrainState
from slope_jax.models import hf_files
from train import checkpoint, integrity, job, metrics, step, watch
from train.checkpoint import Checkpoints
from train.data import prepare, sources, store, tfds_source
from train.data.sources import TextSource
from train.data.tokenizer import load_tokenizer
from train.folder import open_folder
from train.optimizer import make_optimizer, make_schedule
from train.recipes import make_config

ROOT = pathlib.Path(__file__).parents[1]
FAULTS = {}


def fault(name):
    def register(function):
        FAULTS[name] = function
        return function

    return register


def page() -> dict[str, str]:
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    table = text.partition("<!-- faults -->")[2].partition("<!-- /faults -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    return {name: message.strip("`") for name, _, message in rows}


def test_every_fault_of_the_page_is_caused_here():
    assert page().keys() == FAULTS.keys()


# Tensorstore drops futures of writes that failed; the interpreter reports them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_fault_says_what_the_page_says(name, tmp_path, monkeypatch):
    said = FAULTS[name](tmp_path, monkeypatch)
    pattern = r"[\s\S]*".join(re.escape(part.strip(" ")) for part in page()[name].split("…"))
    pattern = pattern.replace(r"[\s\S]*\.\ ", r"[\s\S]*\.\ ").replace(r"[\s\S]*", r"[\s\S]*?\s?")
    assert re.fullmatch(r"\s?" + pattern, said.strip()), said


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    error = caught.value
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@contextlib.contextmanager
def disk_that_holds(count: int):
    """No file can grow beyond `count` bytes: the system refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state_at(count: int, size: int = 3) -> TrainState:
    noise = np.random.default_rng(count).normal(size=(2, size))
    state = TrainState.create(
        apply_fn=None,
        params={"up": {"kernel": jnp.asarray(noise, jnp.float32)}},
        masks={},
        tx=optax.adam(0.1),
    )
    return state.replace(step=jnp.int32(count))


def saved(folder, *steps, size=3):
    made = Checkpoints(folder, keep=9)
    try:
        for count in steps:
            made.save(state_at(count, size), jax.random.key(count), {"step": count}, {}, None)
        made.wait()
    finally:
        made.close()


def largest(folder: pathlib.Path) -> pathlib.Path:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != integrity.MANIFEST]
    return max(files, key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, pathlib.Path.unlink])
def test_any_damaged_file_of_a_checkpoint_is_found(tmp_path, damage):
    saved(tmp_path, 1)
    names = [
        p.relative_to(tmp_path)
        for p in tmp_path.rglob("*")
        if p.is_file() and p.name not in integrity._NOTES
    ]
    assert len(names) > 5
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "checkpoints", copy / "checkpoints")
        if (copy / name).stat().st_size:
            damage(copy / name)
            (found,) = integrity.problems(copy / "checkpoints" / "1")
            assert name.name in found
        shutil.rmtree(copy)


def test_the_whole_checkpoint_before_a_damaged_one_is_restored(tmp_path):
    saved(tmp_path, 1, 2, 3)
    flip(largest(tmp_path / "checkpoints" / "3"))
    (tmp_path / "checkpoints" / "2" / integrity.MANIFEST).write_text('{"files": ')
    said = []
    integrity.set_aside_damaged(tmp_path / "checkpoints", said.append)
    assert len(said) == 2
    made = Checkpoints(tmp_path, keep=9)
    assert made.steps() == [1]
    state, _ = made.restore(1, jax.eval_shape(lambda: state_at(1)))
    np.testing.assert_array_equal(state.params["up"]["kernel"], state_at(1).params["up"]["kernel"])
    made.close()
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    saved(tmp_path, 3)  # its place is free
    assert not integrity.problems(tmp_path / "checkpoints" / "3")


@fault("checkpoint cut off or flipped")
def _(folder, _):
    saved(folder, 1, 2)
    flip(largest(folder / "checkpoints" / "2"))
    said = []
    integrity.set_aside_damaged(folder / "checkpoints", said.append)
    return said[0]


@fault("no checkpoint whole")
def _(folder, _):
    saved(folder, 1)
    cut(largest(folder / "checkpoints" / "1"))
    said = message_of(
        integrity.DamagedError, integrity.set_aside_damaged, folder / "checkpoints", print
    )
    assert (folder / "checkpoints" / "1").is_dir()
    return said


@fault("checkpoint of an earlier version")
def _(folder, _):
    saved(folder, 1)
    (folder / "checkpoints" / "1" / integrity.MANIFEST).unlink()
    said = []
    integrity.set_aside_damaged(folder / "checkpoints", said.append)
    return said[0]


@fault("served model damaged")
def _(folder, _):
    (folder / "variables").write_bytes(bytes(1000))
    integrity.write_manifest(folder)
    flip(folder / "variables")
    return message_of(integrity.DamagedError, integrity.check, folder, "Copy it again")


@fault("served model without its manifest")
def _(folder, _):
    (folder / "variables").write_bytes(bytes(1000))
    return message_of(integrity.DamagedError, integrity.check, folder, "Copy it again")


def read_without_manifest(folder, damage):
    """What a command says that reads step 2 of a run, damaged and without a manifest."""
    saved(folder, 1, 2)
    (folder / "checkpoints" / "2" / integrity.MANIFEST).unlink()
    damage(folder / "checkpoints" / "2")
    made = Checkpoints(folder, keep=9, read_only=True)
    try:
        return message_of(
            integrity.DamagedError, made.restore, 2, jax.eval_shape(lambda: state_at(2))
        )
    finally:
        made.close()


@fault("such a checkpoint, copied in part")
def _(folder, _):
    return read_without_manifest(folder, lambda step: shutil.rmtree(step / "run"))


@fault("such a checkpoint, damaged")
def _(folder, _):
    return read_without_manifest(folder, lambda step: cut(largest(step / "state")))


@fault("disk too full for a checkpoint")
def _(folder, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    return message_of(checkpoint.OutOfSpace, saved, folder, 1)


@fault("disk fills up during a save")
def _(folder, _):
    saved(folder, 1)
    with disk_that_holds(100_000):
        said = message_of(checkpoint.OutOfSpace, saved, folder, 2, size=100_000)
    gc.collect()
    again = Checkpoints(folder, keep=9)
    assert again.steps() == [1]
    again.close()
    assert not integrity.problems(folder / "checkpoints" / "1")
    return said


@fault("disk turns read-only")
def _(folder, monkeypatch):
    made = Checkpoints(folder, keep=9)

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(made._manager, "save", fail)
    said = message_of(OSError, made.save, state_at(1), jax.random.key(0), {}, {}, None)
    made.close()
    return said


@fault("disk full for metrics")
def _(folder, _):
    writer = metrics.MetricsWriter(folder, step=0, tensorboard=False)

    def write():
        for count in range(1, 1000):
            writer.write(count, {"loss": 1.0})

    with disk_that_holds(1000):
        said = message_of(OSError, write)
        with contextlib.suppress(OSError):
            writer.close()
    again = metrics.MetricsWriter(folder, step=5, tensorboard=False)
    again.write(6, {"loss": 2.0})
    again.close()
    lines = metrics.read(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return said


@fault("disk full for the token cache")
def _(folder, _):
    text = "\n\n".join(f"The document number {i} has a few words of its own." for i in range(900))
    (folder / "a.txt").write_text(text)
    options = {"objective": "clm", "vocab_size": 300, "cache_dir": folder / "cache"}
    prepare(f"text:{folder}/a.txt", valid_fraction=0.1, **options)  # the tokenizer fits
    with disk_that_holds(10_000):
        said = message_of(OSError, prepare, f"text:{folder}/a.txt", valid_fraction=0.2, **options)
    assert len([p for p in (folder / "cache").iterdir() if p.is_dir()]) == 1
    return said


@fault("disk full for an export")
def _(folder, _):
    import safetensors.numpy

    def export():
        with new_folder(folder / "model") as staging:
            tensors = {"w": np.zeros(100_000, np.float32)}
            safetensors.numpy.save_file(tensors, staging / "model.safetensors")

    with disk_that_holds(100_000):
        said = message_of(OSError, export)
    assert not list(folder.iterdir())
    return said


def tiny_text(folder) -> str:
    text = "\n\n".join(f"The document number {i} has a few words of its own." for i in range(200))
    (folder / "a.txt").write_text(text)
    return f"text:{folder}/a.txt"


def poisoned_run(folder, monkeypatch, bad_steps, **fields) -> str:
    """What a run says whose batches give NaN at some steps."""
    real_sums, real_batches = step.loss_sums, job.batches_from

    def sums(apply_fn, variables, batch, key, **options):
        poison = batch.get("poison", jnp.zeros(1))
        batch = {k: v for k, v in batch.items() if k != "poison"}
        found = real_sums(apply_fn, variables, batch, key, **options)
        return found._replace(nll=found.nll + poison.sum())

    def batches(dataset, start):
        for count, batch in enumerate(real_batches(dataset, start), start + 1):
            value = np.nan if count in bad_steps else 0.0
            yield batch | {"poison": np.full(len(batch["input_ids"]), value, np.float32)}

    monkeypatch.setattr(step, "loss_sums", sums)
    monkeypatch.setattr(job, "batches_from", batches)
    config = make_config(
        "gpt2-nano",
        **{
            "data": tiny_text(folder),
            "cache_dir": str(folder / "cache"),
            "run_dir": str(folder / "run"),
            "vocab_size": 300,
            "valid_fraction": 0.2,
            "seq_len": 8,
            "batch_size": 2,
            "steps": 6,
            "adapter_rank": 0,
            "eval_every": 0,
            "checkpoint_every": 1,
            "tensorboard": False,
        }
        | fields,
    )
    console = Console(file=(folder / "log").open("w"), record=True, width=500)
    try:
        job.pretrain(config, console=console)
    finally:
        console.file.close()
    return console.export_text()


@fault("NaN or infinite gradient")
def _(folder, monkeypatch):
    said = poisoned_run(folder, monkeypatch, {2, 4})
    found = [line for line in said.splitlines() if line.startswith("warning")]
    assert len(found) == 2
    assert json.loads((folder / "run" / "summary.json").read_text())["bad_steps"] == 2
    lines = [x for x in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in x]
    assert [x["loss"] is None for x in lines] == [False, True, False, True, False, False]
    assert [x.get("bad_steps", 0) for x in lines] == [0, 1, 1, 2, 2, 2]
    assert lines[1]["lr"] == lines[2]["lr"]  # the schedule waits
    return found[0]


@fault("too many of these")
def _(folder, monkeypatch):
    said = message_of(
        watch.NonFiniteError, poisoned_run, folder, monkeypatch, {2, 4, 5}, max_bad_steps=2
    )
    assert said.startswith("loss is nan at step 5, after 2 skipped steps")
    return said


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_skipped_step_leaves_weights_moments_and_counters(moments, optimizer):
    config = make_config(
        "gpt2-nano", moments=moments, optimizer=optimizer, steps=9, warmup=0.5, seq_len=8
    )
    schedule = make_schedule(config.phases, config.schedule)
    params = {
        "up": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(11, 7)), jnp.float32)},
        "l": {"adapter_l": jnp.ones((7, 11)) / 9},
    }

    def apply(variables, ids, **_):
        p = variables["params"]
        return jnp.where(ids[0, 0] == 0, jnp.nan, 1) * p["up"]["kernel"][ids] @ p["l"]["adapter_l"]

    state = TrainState.create(
        apply_fn=apply,
        params=params,
        masks={},
        tx=make_optimizer(config, schedule, lambda path: False),
    )
    run, plain = (step.make_train_step(1, schedule, skip_bad=skip) for skip in (True, False))
    ids = jnp.arange(1, 9, dtype=jnp.int32).reshape(2, 4)
    good, bad = ({"input_ids": x, "labels": ids} for x in (ids, ids.at[0, 0].set(0)))
    key = jax.random.key(0)
    copied = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    once, _ = run(copied(state), good, key)
    unguarded, _ = plain(copied(state), good, key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=1e-5, atol=1e-9),
        (once.params, once.opt_state),
        (unguarded.params, unguarded.opt_state),
    )
    before = jax.device_get((once.params, once.opt_state))
    skipped, found = run(copied(once), bad, key)
    assert not np.isfinite(found["loss"])
    jax.tree.map(np.testing.assert_array_equal, (skipped.params, skipped.opt_state), before)
    assert int(skipped.step) == 2
    # Goes on as if the bad batch had not been, at the rate that was due.
    after, seen = run(copied(skipped), good, key)
    wanted, expected = run(copied(once), good, key)
    jax.tree.map(np.testing.assert_array_equal, after.params, wanted.params)
    assert seen["lr"] == expected["lr"] == found["lr"] == jnp.float32(schedule(1))


def test_skipping_moves_no_more_bytes():
    config = make_config("gpt2-nano", steps=9, seq_len=8)
    schedule = make_schedule(config.phases, config.schedule)
    state = TrainState.create(
        apply_fn=lambda v, ids, **_: v["params"]["kernel"][ids],
        params={"kernel": jnp.ones((512, 512))},
        masks={},
        tx=make_optimizer(config, schedule, lambda path: False),
    )
    ids = jnp.ones((2, 4), jnp.int32)
    moved = [
        step.make_train_step(1, schedule, skip_bad=skip)
        .lower(state, {"input_ids": ids, "labels": ids}, jax.random.key(0))
        .compile()
        .cost_analysis()["bytes accessed"]
        for skip in (True, False)
    ]
    assert moved[0] < 1.01 * moved[1]


@fault("SIGTERM and no time to save")
def _(folder, _):
    script = (
        "import signal, time; from train.signals import StopRequest\n"
        "with StopRequest(0.2):\n signal.raise_signal(signal.SIGTERM); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    return done.stderr


def read(pattern):
    return [text for unit in TextSource(str(pattern)).units(None, 1) for text in unit.documents()]


@fault("compressed text cut off")
def _(folder, _):
    data = gzip.compress(np.random.default_rng(0).bytes(10_000))
    (folder / "a.txt.gz").write_bytes(data[:5000])
    return message_of(ValueError, read, folder / "a.txt.gz")


@fault("decompression bomb")
def _(folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1 << 20)
    (folder / "a.txt.gz").write_bytes(gzip.compress(bytes(20 << 20)))
    return message_of(ValueError, read, folder / "a.txt.gz")


@fault(".xz that asks for gigabytes")
def _(folder, _):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 << 20}]
    # The dictionary that a header asks for is allocated when it is read, however short the text is.
    (folder / "a.txt.xz").write_bytes(lzma.compress(b"text", filters=filters))
    return message_of(ValueError, read, folder / "a.txt.xz")


@fault("record too long")
def _(folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1000)
    (folder / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + 2000 * "x" + '"}\n')
    said = message_of(ValueError, read, folder / "a.jsonl")
    assert "line 2" in said
    return said


@fault("record that is none")
def _(folder, _):
    (folder / "a.jsonl").write_text("[" * 100_000 + "\n")
    return message_of(ValueError, read, folder / "a.jsonl")


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 100)
    lines = [f"line {i} of a long document" for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "\n".join(lines)}))
    for name, join in (("a.txt", "\n"), ("b.jsonl", "")):
        found = read(tmp_path / name)
        assert len(found) > 5
        assert max(map(len, found)) < 200
        assert join.join(found) == "\n".join(lines)


@pytest.mark.parametrize("name", ["../../x", "x/../../y", "/etc", "a/b/c", "x:../1.0.0", "a b"])
def test_names_of_tfds_are_no_paths(name):
    with pytest.raises(ValueError, match="is not the name of a data set"):
        tfds_source._builder(None, name)


@fault("TFDS name with a path")
def _(folder, _):
    return message_of(ValueError, tfds_source._builder, None, "../../x")


@fault("tokenizer damaged")
def _(folder, _):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    return message_of(ValueError, load_tokenizer, folder / "tokenizer.json", "clm")


def without_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)


@fault("file system without locks, run")
def _(path, monkeypatch):
    without_locks(monkeypatch)
    config = make_config("gpt2-nano", run_dir=str(path / "run"))
    return message_of(ValueError, open_folder(config).__enter__)


@fault("file system without locks, cache")
def _(path, monkeypatch):
    without_locks(monkeypatch)
    return message_of(OSError, store.locked(path / "tokens").__enter__)


@fault("index that names other folders")
def _(folder, _):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return message_of(ValueError, hf_files.open_tensors, folder)


@fault("weights as pickle (.bin)")
def _(folder, _):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return message_of(ValueError, hf_files.open_tensors, folder)


def test_the_record_of_a_run_leads_to_no_other_folder(tmp_path):
    text = tiny_text(tmp_path)
    options = {"objective": "clm", "vocab_size": 300, "valid_fraction": 0.2}
    options |= {"cache_dir": tmp_path / "cache", "run_dir": tmp_path / "run"}
    corpus = prepare(text, **options)
    record = tmp_path / "run" / "corpus.json"
    shutil.copytree(corpus.directory, tmp_path / "elsewhere")
    entry = json.loads(record.read_text())
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "", None, 3):
        record.write_text(json.dumps(entry | {"store": name}))
        assert prepare(text, **options).directory == corpus.directory
