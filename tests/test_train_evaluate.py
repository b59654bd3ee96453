"""Perplexity in windows against loops in NumPy, and what the command says of wrong input."""

import functools
import json
import math
import sys
import types
from unittest import mock

import jax
import numpy as np
import pytest

from slope_jax import models
from train.data.tokenizer import train_tokenizer
from train.evaluate import main, perplexity
from train.harness import Harness, evaluate_tasks
from train.scoring import strided_windows
from train.serving import Served

LONGEST = 24  # tokens of the run's sequences; there are more positions, never trained


def tiny_gpt2(small_text):
    text = (small_text / "a.txt").read_text()
    vocabulary = train_tokenizer([text], "clm", 300)
    model = models.build(
        "gpt2-nano",
        vocab_size=vocabulary.size,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        mlp_size=64,
        max_positions=LONGEST + 8,
    )
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    # Far from birth, where all logits are alike.
    variables = variables | {"params": jax.tree.map(lambda x: 5 * x, variables["params"])}
    about = {"config": {"model": "gpt2-nano", "seq_len": [LONGEST], "valid_fraction": 0.2}}
    return Served(model, variables, vocabulary, about | {"step": 1, "adapters": False})


@pytest.fixture(scope="module")
def served(small_text):
    return tiny_gpt2(small_text)


@functools.cache
def applied(model):
    return jax.jit(model.apply)


def log_probabilities(served, tokens):
    """(T, V) in float64: row i is of the token after the first i + 1."""
    ids = np.zeros((1, LONGEST), np.int32)  # one shape; padding is behind what is read
    ids[0, : len(tokens)] = tokens
    logits = applied(served.model)(served.variables, ids)[0, : len(tokens)]
    logits = np.asarray(logits, np.float64)[:, : served.vocabulary.size]
    high = logits.max(-1, keepdims=True)
    return logits - high - np.log(np.exp(logits - high).sum(-1, keepdims=True))


def test_the_window_of_a_long_model_is_bounded_unless_it_is_asked_for(served, monkeypatch):
    tokens = np.arange(100) % 300
    assert perplexity(served, tokens)["window"] == LONGEST
    monkeypatch.setattr("train.evaluate.MOST_WINDOW", 10)
    assert perplexity(served, tokens)["window"] == 10
    assert perplexity(served, tokens, window=12)["window"] == 12


def test_windows_score_every_token_once_with_the_context_promised():
    for count in range(2, 40):
        for window, stride in ((8, 8), (8, 3), (8, 1), (5, 2)):
            found = strided_windows(count, window, stride)
            scored = [i for w in found for i in range(w.scored, w.stop)]
            assert scored == list(range(count - 1))
            assert all(w.stop - w.start <= window for w in found)
            assert all(w.scored - w.start >= window - stride for w in found[1:])
    for wrong in ((1, 8, 4), (9, 8, 0), (9, 8, 9)):
        with pytest.raises(ValueError, match=r"two or more|between 1 and"):
            strided_windows(*wrong)


@pytest.mark.parametrize(("window", "stride"), [(LONGEST, 12), (10, 10)])
def test_perplexity_is_that_of_a_loop(served, window, stride):
    tokens = np.random.default_rng(0).integers(0, served.vocabulary.size, 61).astype(np.int32)
    total, right = 0.0, 0
    for target in range(1, len(tokens)):
        # The first window that reaches this far; windows begin at multiples of the stride.
        number = max(0, math.ceil((target - window) / stride))
        found = log_probabilities(served, tokens[number * stride : target])[-1]
        total -= found[tokens[target]]
        right += found.argmax() == tokens[target]
    result = perplexity(served, tokens, window=window, stride=stride, batch_size=4)
    assert result["tokens"] == 60
    assert result["nats_per_token"] == pytest.approx(total / 60, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / 60), rel=1e-4)
    assert result["accuracy"] == right / 60
    with pytest.raises(ValueError, match="max_positions=32"):
        perplexity(served, tokens, window=33)


def test_the_command_says_what_is_missing_or_wrong(
    served, monkeypatch, tmp_path, capsys, small_text
):
    monkeypatch.setattr("train.serving.load", lambda path, **options: served)
    options = ["--checkpoint=run", f"--cache-dir={tmp_path / 'cache'}"]
    data = f"--data=text:{small_text}/*.txt"
    output = tmp_path / "numbers.json"
    assert main([*options, data, "--max-tokens=200", f"--output={output}"]) == 0
    written = json.loads(output.read_text())
    found = written.pop("results")
    assert written == {
        "model": "gpt2-nano",
        "step": 1,
        "dtype": "float32",
        "data": data.removeprefix("--data="),
        "held_out": False,
        "max_tokens": 200,
    }
    assert f"perplexity {found['perplexity']:,.3f}" in capsys.readouterr().out
    assert found["tokens"] >= 199
    assert (found["window"], found["stride"]) == (LONGEST, LONGEST // 2)
    assert main([*options, data, "--held-out"]) == 0
    held = capsys.readouterr().out
    assert main([*options, data]) == 0
    everything = capsys.readouterr().out
    assert "of 60 documents" in everything
    assert "of 60 documents" not in held
    for window, stride, message in (
        (33, 4, "window=33 must lie between 1 and max_positions=32"),
        (8, 9, "stride=9 must lie between 1 and the window of 8"),
    ):
        assert main([*options, "--data=text:none", f"--window={window}", f"--stride={stride}"]) == 2
        assert message in capsys.readouterr().err


def test_no_document_was_held_out_where_there_was_no_run(served, monkeypatch, capsys, tmp_path):
    about = served.about | {"imported": {"source": "folders/gpt2"}}
    monkeypatch.setattr("train.serving.load", lambda *_, **__: served._replace(about=about))
    assert main(["--checkpoint=gpt2", f"--data=text:{tmp_path}/never.txt", "--held-out"]) == 2
    said = capsys.readouterr().err
    assert (
        "error: gpt2-nano of folders/gpt2 comes from no run of ours, and nothing was held out; leave out"
        in said
    )
    monkeypatch.setattr("train.serving.load", mock.Mock(side_effect=AssertionError))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert main([f"--checkpoint={folder}", "--data=text:none", "--held-out"]) == 2
    assert f"error: {folder} comes from no run of ours" in capsys.readouterr().err


def test_windows_longer_than_what_was_trained_are_warned_of(served, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("train.serving.load", lambda path, **options: served)
    text = tmp_path / "text.txt"
    text.write_text("Sparse kernel mask. " * 20)
    options = ["--checkpoint=run", f"--data=text:{text}", f"--cache-dir={tmp_path / 'cache'}"]
    for more, warned in (([], False), ([f"--window={LONGEST}"], False), (["--window=25"], True)):
        assert main([*options, *more]) == 0
        assert ("warning" in (err := capsys.readouterr().err)) == warned
    assert (
        f"a window of 25 tokens is long; the model was trained on sequences of at most {LONGEST}"
        in err
    )


def test_names_of_tasks_may_have_spaces_around_them(served, monkeypatch, tmp_path):
    evaluated = mock.Mock(return_value={})
    monkeypatch.setattr("train.serving.load", lambda path, **options: served)
    monkeypatch.setattr("train.harness.evaluate_tasks", evaluated)
    monkeypatch.setattr("train.harness.check_tasks", lambda names: None)
    assert main(["--checkpoint=run", "--tasks= a, b", "--shots=0"]) == 0
    assert evaluated.call_args.args[1] == ["a", "b"]
    output = tmp_path / "numbers.json"
    options = ["--limit=3", "--no-bos-token", "--seed=7", f"--output={output}"]
    assert main(["--checkpoint=run", "--tasks=a, b", *options]) == 0
    assert json.loads(output.read_text()) == {
        "model": "gpt2-nano",
        "step": 1,
        "dtype": "float32",
        "tasks": ["a", "b"],
        "shots": None,
        "limit": 3,
        "add_bos_token": False,
        "seed": 7,
        "results": {},
    }


def test_the_harness_gets_the_whole_path_of_a_tasks_file(served, monkeypatch, tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    evaluated = mock.Mock(return_value={"results": {}})
    manager = types.SimpleNamespace(all_tasks=["hellaswag"])
    monkeypatch.setattr("train.harness._task_manager", lambda: manager)
    harness = types.SimpleNamespace(simple_evaluate=evaluated)
    monkeypatch.setattr("train.harness._lm_eval", lambda name: harness)
    monkeypatch.setattr("train.harness.harness_model", lambda *args, **options: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("task: own")
    evaluate_tasks(served, iter(["hellaswag", "~/own.yaml", {"task": "x"}]))
    given = evaluated.call_args.kwargs["tasks"]
    assert given == ["hellaswag", str(tmp_path / "own.yaml"), {"task": "x"}]


@pytest.mark.parametrize("real", [True, False])
def test_unknown_tasks_are_named_before_the_model_is_loaded(monkeypatch, tmp_path, capsys, real):
    if real:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra eval)")
    else:
        manager = types.SimpleNamespace(all_tasks=["hellaswag"])
        monkeypatch.setattr("train.harness._task_manager", lambda: manager)
        monkeypatch.setattr("train.harness._lm_eval", lambda name: None)
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    loaded = mock.Mock(side_effect=ValueError("loaded"))
    monkeypatch.setattr("train.serving.load", loaded)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"task": "good"}) + "a: !function b.c\n")
    (tmp_path / "bad.yaml").write_text("task: [")
    for names, message in (
        ("hellaswag,nosuchtask", "error: 'nosuchtask' is neither a task of the LM Evaluation"),
        (f"{tmp_path}/none.yaml", "none.yaml' is neither a task"),
        (str(tmp_path), "' is neither a task"),
        (f"{tmp_path}/bad.yaml", "bad.yaml is no YAML, so no task"),
    ):
        assert main(["--checkpoint=run", f"--tasks={names}"]) == 2
        assert message in capsys.readouterr().err
    loaded.assert_not_called()
    assert main(["--checkpoint=run", f"--tasks=hellaswag,{tmp_path}/good.yaml"]) == 2
    assert "error: loaded" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("train.serving.load", mock.Mock(side_effect=ValueError("loaded")))
    (tmp_path / "file").write_text("")

    def said(path):
        assert main(["--checkpoint=run", "--data=docs", f"--output={path}"]) == 2
        return capsys.readouterr().err

    assert "is a folder; name a file in it" in said(tmp_path)
    assert f"{tmp_path / 'file'} is no folder" in said(tmp_path / "file" / "a" / "b.json")
    for fine in ("file", "new/folder/b.json"):  # a file is replaced
        assert "error: loaded" in said(tmp_path / fine)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"{tmp_path} is not writable" in said(tmp_path / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_wrong_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("train.serving.load", mock.Mock(side_effect=AssertionError("loaded")))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for options, message in (
        ([], "either --data"),
        (["--data=docs", "--tasks=hellaswag"], "either --data"),
        (["--tasks=hellaswag"], "slope-jax[eval]"),
        (["--data=docs", "--window=0"], "--window=0 must be 1 or more"),
        (["--data=docs", "--stride=0"], "--stride=0 must be 1 or more"),
        (["--data=docs", "--batch=0"], "--batch=0 must be 1 or more"),
        (["--data=docs", "--max-tokens=-1"], "--max-tokens=-1 must be 1 or more"),
        (["--tasks=hellaswag", "--shots=-1"], "--shots=-1 must be 0 or more"),
        (["--tasks="], "--tasks='' has an empty name"),
        (["--tasks=a,,b"], "--tasks='a,,b' has an empty name"),
        (["--data=docs", "--shots=0"], "--data takes no --shots, which --tasks does"),
        (["--data=docs", "--limit=3"], "--data takes no --limit, which --tasks does"),
        (["--tasks=a", "--window=8"], "--tasks takes no --window, which --data does"),
        (["--tasks=a", "--stride=8"], "--tasks takes no --stride, which --data does"),
        (["--tasks=a", "--held-out"], "--tasks takes no --held-out, which --data does"),
        (["--tasks=a", "--max-tokens=8"], "--tasks takes no --max-tokens, which --data does"),
        (["--data=docs", "--seed=3"], "--data takes no --seed, which --tasks does"),
        (["--tasks=a", "--seed=-1"], "--seed=-1 must lie in [0, 2**31)"),
        (["--tasks=a", "--cache-dir=x"], "--tasks takes no --cache-dir, which --data does"),
    ):
        assert main(["--checkpoint=run", *options]) == 2
        assert message in capsys.readouterr().err


def test_batches_and_windows_of_nothing_are_refused(served):
    tokens = np.zeros(9, np.int32)
    for options in ({"window": 0}, {"stride": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="=0 must"):
            perplexity(served, tokens, **options)


def test_a_bert_is_refused(served):
    bert = models.build("bert-tiny")
    with pytest.raises(ValueError, match="gives no next token"):
        Harness(served._replace(model=bert))
