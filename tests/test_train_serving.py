"""From a run's checkpoint to text: what is loaded, kept, written and refused."""

import dataclasses
import errno
import functools
import json
import logging
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jobs import save_run

from slope_jax.generate import generate, inference_variables
from train import evaluate, integrity, serving
from train.config import from_json, to_json
from train.generate import main
from train.recipes import make_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_text):
    folder = tmp_path_factory.mktemp("gpt2")
    texts = [(small_text / "a.txt").read_text()]
    save_run(folder, texts, "gpt2-nano", 3)
    return folder, *save_run(folder, texts, "gpt2-nano", 7)


@pytest.fixture(scope="module")
def trained_in(tmp_path_factory, small_text):
    """The folder of a run in a given dtype."""

    @functools.cache
    def make(dtype):
        folder = tmp_path_factory.mktemp(dtype)
        save_run(folder, [(small_text / "a.txt").read_text()], "gpt2-nano", 7, dtype=dtype)
        return folder

    return make


@pytest.fixture(scope="module")
def served(run):
    return serving.load(run[0])


def test_the_latest_weights_are_loaded_in_the_compute_dtype_and_nothing_else(run, served):
    _, model, state = run
    single, expected = inference_variables(model, state.variables)
    assert served.model == single
    assert served.about["adapters"]
    jax.tree.map(np.testing.assert_array_equal, served.variables, expected)
    kernel = served.variables["params"]["layers_1"]["mlp"]["up"]
    assert {name: x.dtype.name for name, x in kernel.items()} == {
        "kernel": "bfloat16",
        "adapter_l": "bfloat16",
        "adapter_r": "bfloat16",
        "bias": "float32",
    }
    assert kernel["kernel"].shape == (64, 512)  # half of 128 inputs
    pruned = 4 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 512) - 3 * 128 * 128  # not the first qkv
    masks = sum(x.nbytes for x in jax.tree.leaves(served.variables["masks"]))
    assert masks == pruned // 8
    assert served.nbytes == masks + sum(x.nbytes for x in jax.tree.leaves(expected["params"]))


def test_an_earlier_checkpoint_has_no_adapters_yet(run):
    for path, step in ((run[0], 3), (run[0] / "checkpoints" / "3", None)):
        found = serving.load(path, step=step)
        assert found.about["step"] == 3
        assert not found.model.config.adapter_rank
    with pytest.raises(ValueError, match="3 is one step: leave out step=7, or give "):
        serving.load(run[0] / "checkpoints" / "3", step=7)


def test_what_is_saved_is_loaded_bit_for_bit(served, tmp_path):
    folder = serving.save(served, tmp_path / "a" / "model")
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "served.json",
        "tokenizer.json",
        "variables",
    ]
    again = serving.load(folder)
    assert again.model == served.model
    assert again.about == served.about
    assert again.vocabulary.fingerprint == served.vocabulary.fingerprint
    jax.tree.map(np.testing.assert_array_equal, again.variables, served.variables)
    with pytest.raises(ValueError, match=r"holds one model, .* leave out step=7"):
        serving.load(folder, step=7)
    with pytest.raises(ValueError, match="exists already"):
        serving.save(served, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ("auto", None, "bfloat16"),
        ("auto", "float32", "float32"),
        ("float32", None, "float32"),
    ],
)
def test_weights_are_saved_in_16_bits_unless_float32_is_asked_for(
    trained_in, tmp_path, capsys, trained, asked, expected
):
    run = trained_in(trained)
    options = [f"--checkpoint={run}", f"--save={tmp_path / 'saved'}"]
    assert main([*options, *([f"--save-dtype={asked}"] if asked else [])]) == 0
    assert f"saved, weights in {expected}" in capsys.readouterr().err
    with ocp.StandardCheckpointer() as checkpointer:
        written = checkpointer.restore(tmp_path / "saved" / "variables")
    layer = written["params"]["layers_1"]["mlp"]["up"]
    kinds = {name: array.dtype.name for name, array in layer.items()}
    assert kinds.pop("bias") == "float32"
    assert set(kinds.values()) == {expected}
    assert written["params"]["embeddings"]["token"]["embedding"].dtype == expected
    # A CPU computes in float32, with what the folder holds.
    served, again = serving.load(run), serving.load(tmp_path / "saved")
    assert again.model == served.model
    rounded = jax.tree.map(
        lambda whole, kept: whole.astype(kept.dtype).astype(whole.dtype),
        served.variables,
        written,
    )
    jax.tree.map(np.testing.assert_array_equal, again.variables, rounded)


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_a_run_is_served_in_the_dtype_that_is_asked_for(trained_in, tmp_path, capsys, trained):
    run = trained_in(trained)
    for asked in ("bfloat16", "float16", "float32"):
        served = serving.load(run, dtype=asked)
        assert served.model.config.dtype == asked
        assert served.about["config"]["dtype"] == asked
        full = serving.load_trained(run)
        config = dataclasses.replace(full.model.config, dtype=jnp.dtype(asked))
        _, expected = inference_variables(type(full.model)(config), full.variables)
        jax.tree.map(np.testing.assert_array_equal, served.variables, expected)
        kernel = served.variables["params"]["layers_1"]["mlp"]["up"]["kernel"]
        assert kernel.dtype == asked
        # What is saved of it is loaded in either.
        folder = serving.save(served, tmp_path / asked, dtype="float32")
        again = serving.load(folder, dtype="float32")
        assert again.model.config.dtype == jnp.float32
        np.testing.assert_array_equal(
            again.variables["params"]["layers_1"]["mlp"]["up"]["kernel"],
            kernel.astype(jnp.float32),
        )
    for asked in ("bfloat16", "float16"):
        folder = tmp_path / f"saved in {asked}"
        assert main([f"--checkpoint={run}", f"--dtype={asked}", f"--save={folder}"]) == 0
        assert f"weights in {asked}" in capsys.readouterr().err
        again, served = serving.load(folder), serving.load(run, dtype=asked)
        assert (again.model, again.about) == (served.model, served.about)
        jax.tree.map(np.testing.assert_array_equal, again.variables, served.variables)
    with pytest.raises(ValueError, match="one of auto, bfloat16, float16, float32, or None for"):
        serving.load(run, dtype="float64")


def test_float16_generates_what_its_logits_say_closer_to_float32_than_bfloat16(run):
    """Whole sequences give the logits, so that the cache is not held to itself."""
    ids = jnp.asarray([serving.load(run[0]).vocabulary.encode("Sparse kernel")])

    def logits(dtype, ids):
        served = serving.load(run[0], dtype=dtype)
        return np.asarray(jax.jit(served.model.apply)(served.variables, ids), np.float32)

    served = serving.load(run[0], dtype="float16")
    made = generate(served.model, served.variables, ids, max_new_tokens=12).tokens
    whole = jnp.concatenate([ids, made], axis=1)
    exact, half, brain = (logits(dtype, whole) for dtype in ("float32", "float16", "bfloat16"))
    size = served.model.config.vocab_size
    errors = [np.abs(found - exact)[..., :size].max() for found in (half, brain)]
    assert 0 < 2 * errors[0] < errors[1]
    behind = exact[0, ids.shape[1] - 1 : -1, :size]
    chosen = np.take_along_axis(behind, np.asarray(made).T, axis=1)[:, 0]
    assert (behind.max(axis=1) - chosen <= 2 * errors[0]).all()


def continued(served, text, count):
    ids = jnp.asarray([served.vocabulary.encode(text)])
    tokens = generate(served.model, served.variables, ids, max_new_tokens=count).tokens
    return served.vocabulary.decode(np.asarray(tokens[0]).tolist())


def test_the_command_writes_what_is_generated(run, served, capsys):
    options = [f"--checkpoint={run[0]}", "--max-new-tokens=12"]
    expected = {text: continued(served, text, 12) for text in ("Sparse kernel", "Mask")}
    assert main([*options, "--prompt=Sparse kernel"]) == 0
    out, err = capsys.readouterr()
    assert out == f"Sparse kernel{expected['Sparse kernel']}\n"
    assert "first token after" in err
    config = served.model.config
    kept = 2 * config.num_layers * 256 * config.hidden_size * config.dtype.itemsize
    assert f"{kept / 1024:.1f} KiB of keys and values, for 1 x 256 tokens" in err
    assert "sparse linears by xla: dense product on the decompressed weight" in err
    assert "attention by xla: " in err
    assert "warning" not in err
    stop = expected["Mask"][3:6]
    assert main([*options, "--prompt=Sparse kernel", "--prompt=Mask", f"--stop={stop}"]) == 0
    first, second, _ = capsys.readouterr().out.split("\n\n")
    assert first == f"Sparse kernel{expected['Sparse kernel'].split(stop)[0]}"
    assert second == f"Mask{expected['Mask'].split(stop)[0]}"


@pytest.fixture
def streamed(served, monkeypatch):
    """Runs the command on a model whose stream gives these pieces of one row."""

    def run(pieces, *options):
        rows = [np.array([piece], np.int32) for piece in pieces]
        monkeypatch.setattr("train.serving.load", lambda path, **options: served)
        monkeypatch.setattr("slope_jax.generate.stream", lambda *args, **kwargs: iter(rows))
        return main(["--checkpoint=run", *options])

    return run


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["END"], "one two "),
        (["END", "wo END"], "one t"),
        (["ENDS", "Dx"], "one two END three"),  # begun, and never finished
        (["three!"], "one two END three"),  # held back to the last
    ],
)
def test_no_beginning_of_a_stop_is_written(served, streamed, capsys, stops, expected):
    pieces = [served.vocabulary.encode(part) for part in ("one t", "wo E", "N", "D three")]
    assert streamed(pieces, "--prompt=> ", *(f"--stop={stop}" for stop in stops)) == 0
    assert capsys.readouterr().out == f"> {expected}\n"


def test_half_a_character_is_written_when_nothing_follows(served, streamed, capsys):
    first, *rest = served.vocabulary.encode("é")
    assert streamed([[first], rest], "--prompt=a") == 0
    assert capsys.readouterr().out == "aé\n"
    assert streamed([[first]], "--prompt=a") == 0
    assert capsys.readouterr().out == "a\ufffd\n"


def test_positions_that_were_never_trained_are_warned_of(served, streamed, capsys):
    assert served.longest == 16 < served.model.config.max_positions
    count = len(served.vocabulary.encode("Mask"))
    for new, warned in ((16 - count, False), (17 - count, True)):
        assert streamed([[5]], "--prompt=Mask", f"--max-new-tokens={new}") == 0
        out, err = capsys.readouterr()
        assert out.startswith("Mask")
        assert ("warning" in err) == warned
    assert f"of {count} tokens and {17 - count} new ones are 17; " in err
    assert "sequences of at most 16" in err


def test_a_bert_fills_masks(tmp_path, small_text, capsys):
    texts = [(small_text / "a.txt").read_text()]
    save_run(tmp_path, texts, "bert-tiny", 3)
    options = [f"--checkpoint={tmp_path}", "--top-k=2"]
    assert main([*options, "--prompt=Sparse [MASK] mask [MASK]."]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Sparse [MASK] mask [MASK]."
    assert [line.count("%") for line in out[1:]] == [2, 2]
    assert main([*options, "--prompt=Sparse kernel"]) == 2
    assert "has no [MASK]" in capsys.readouterr().err


def test_bad_input_is_named(run, tmp_path, capsys):
    for options, message in [
        ([f"--checkpoint={tmp_path}", "--prompt=a"], "holds no checkpoints"),
        ([f"--checkpoint={tmp_path}", "--prompt=a"], "a folder with served.json or of Hugging Face"),
        ([f"--checkpoint={run[0]}", "--step=5", "--prompt=a"], "no checkpoint of step 5; there are 3, 7"),
        ([f"--checkpoint={run[0]}"], "give --prompt=TEXT or --save"),
        (["--checkpoint=run", "--prompt=a", "--save-dtype=float32"], "that --save=FOLDER names"),
        ([f"--checkpoint={run[0]}", "--prompt=a", "--max-new-tokens=9999"], "max_positions"),
    ]:  # fmt: skip
        assert main(options) == 2
        assert message in capsys.readouterr().err


def test_damaged_and_unwritable_files_end_the_command(run, served, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    largest = max((folder / "checkpoints/7").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert main([f"--checkpoint={folder}", "--prompt=a"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder}/checkpoints/7 is damaged: ")
    assert "Give another step; there are: 3" in err
    assert evaluate.main([f"--checkpoint={folder}", "--data=text:none"]) == 1
    assert "is damaged" in capsys.readouterr().err
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("train.serving.load", lambda path, **options: served)
    monkeypatch.setattr("train.serving.write_atomically", mock.Mock(side_effect=full))
    assert main(["--checkpoint=run", f"--save={tmp_path / 'saved'}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: there is no room to write")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "floaty", "float64", ""])
def test_weights_are_saved_as_floats_of_16_or_32_bits_alone(served, tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}'.* float32, bfloat16, float16"):
        serving.save(served, tmp_path / "saved", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_folders_of_ours_are_none_of_hugging_face(run, served, tmp_path):
    saved = serving.save(served, tmp_path / "saved")
    for path, kind in (
        (run[0], "a run"),
        (run[0] / "checkpoints" / "7", "a checkpoint of a run"),
        (saved, "a saved model with served.json"),
    ):
        with pytest.raises(
            ValueError, match=rf"{path} is {kind}, .*; give it to train.serving.load"
        ):
            serving.from_hf(path)


def test_weights_saved_in_float16_are_loaded_again(served, tmp_path):
    again = serving.load(serving.save(served, tmp_path / "saved", dtype=jnp.float16))
    kernel, expected = (
        x.variables["params"]["layers_1"]["mlp"]["up"]["kernel"] for x in (again, served)
    )
    np.testing.assert_array_equal(
        kernel, expected.astype(jnp.float16).astype(expected.dtype), strict=True
    )


def test_a_step_is_an_integer(run):
    for step in ("7", 7.0, True):
        with pytest.raises(ValueError, match=f"step={step!r} must be an integer"):
            serving.load(run[0], step=step)
    assert serving.load(run[0], step=np.int64(3)).about["step"] == 3


def test_a_path_inside_of_a_run_is_recognised(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run[0] / "checkpoints" / "3")
    assert serving.load(".").about["step"] == 3
    with pytest.raises(ValueError, match=f"holds the steps of a run: give the run, {run[0]}"):
        serving.load("..")
    with pytest.raises(ValueError, match=r"there/none is not a folder; give the --run-dir"):
        serving.load(tmp_path / "there" / "none")


def test_a_checkpoint_without_a_manifest_is_used_and_said(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "checkpoints" / "7" / integrity.MANIFEST).unlink()
    assert main([f"--checkpoint={folder}", "--prompt=a", "--max-new-tokens=1"]) == 0
    said = f"warning: checkpoint {folder}/checkpoints/7 has no manifest.json, as those of earlier"
    assert capsys.readouterr().err.count(said) == 1
    assert serving.load_trained(folder, step=3).about["step"] == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("state", "run", "tokenizer"), "it has no state and no run and no tokenizer. "),
        (("run",), "it has no run. "),
        (("state",), "it has no state. "),
    ],
)
def test_an_incomplete_checkpoint_is_named(run, tmp_path, capsys, missing, message):
    folder = shutil.copytree(run[0], tmp_path / "run")
    step = folder / "checkpoints" / "7"
    (step / integrity.MANIFEST).unlink()
    for name in missing:
        shutil.rmtree(step / name)
    assert main([f"--checkpoint={folder}", "--prompt=a"]) == 1
    error = capsys.readouterr().err
    assert error == f"error: {step} is incomplete: {message}Give another step; there are: 3\n"


@pytest.mark.parametrize("item", ["state", "run"])
def test_a_damaged_checkpoint_without_a_manifest_is_said_in_a_line(run, tmp_path, capsys, item):
    folder = shutil.copytree(run[0], tmp_path / "run")
    step = folder / "checkpoints" / "7"
    (step / integrity.MANIFEST).unlink()
    for file in (step / item).rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    assert main([f"--checkpoint={folder}", "--prompt=a"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {step} cannot be read (")
    assert error.endswith("Give another step; there are: 3")


def test_a_saved_model_has_a_manifest(served, tmp_path):
    folder = serving.save(served, tmp_path / "saved")
    (folder / integrity.MANIFEST).unlink()
    with pytest.raises(integrity.DamagedError, match=r"manifest.json is missing. Copy it again"):
        serving.load(folder)


def changed(**config):
    def change(folder):
        about = json.loads((folder / "served.json").read_text())
        (folder / "served.json").write_text(
            json.dumps(about | {"config": about["config"] | config})
        )

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "variables"), "variables does not fit served.json ("),
        (changed(model="gpt2-small"), "variables does not fit served.json ("),
        (lambda folder: (folder / "served.json").write_text('{"con'), "served.json does not describe"),
        (lambda folder: (folder / "served.json").write_text("[]"), "served.json does not describe"),
        (lambda folder: (folder / "served.json").write_text("{}"), "served.json does not describe"),
    ],
)  # fmt: skip
def test_what_a_saved_model_lacks_is_named(served, tmp_path, damage, message):
    """Also where somebody wrote a manifest of it."""
    folder = serving.save(served, tmp_path / "saved")
    damage(folder)
    with pytest.raises(integrity.DamagedError, match="is damaged: "):
        serving.load(folder)
    integrity.write_manifest(folder)
    with pytest.raises(integrity.DamagedError) as caught:
        serving.load(folder)
    assert message in str(caught.value)
    assert str(caught.value).endswith("Copy it again, or save it again from the run")
    assert len(str(caught.value)) < 500 + len(str(folder))


def test_loading_a_run_changes_nothing_and_says_nothing(run, caplog, capfd):
    def files():
        return {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}

    before = files()
    with caplog.at_level(logging.WARNING):
        serving.load(run[0])
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert files() == before


def test_configurations_survive_json_and_unknown_fields_are_named():
    config = make_config("gpt2-nano", seq_len=(8, 16), lr=(1e-3, 2e-3))
    assert from_json(to_json(config)) == config
    fewer = {name: value for name, value in to_json(config).items() if name != "moments"}
    assert from_json(fewer) == dataclasses.replace(config, moments="float32")
    with pytest.raises(ValueError, match="fresh, which this version does not know"):
        from_json(to_json(config) | {"fresh": 1})
