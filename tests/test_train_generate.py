"""What the command that generates takes, refuses, warns of and writes."""

import io
import os
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import tokenizers
from jobs import save_run

from slope_jax import models
from train import evaluate, serving
from train.data.tokenizer import BERT_SPECIALS, train_tokenizer, vocabulary_from_json
from train.generate import main
from train.prompts import carries_space, masked_ids
from train.serving import Served

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.fixture(scope="module")
def bert(tmp_path_factory, small_text):
    folder = tmp_path_factory.mktemp("bert")
    save_run(folder, [(small_text / "a.txt").read_text()], "bert-tiny", 3)
    return serving.load(folder)


@pytest.fixture
def filled(bert, monkeypatch):
    """Runs the command on a BERT that was trained on 16 tokens."""
    monkeypatch.setattr("train.serving.load", lambda path, **options: bert)
    return lambda *options: main(["--checkpoint=run", *options])


@pytest.fixture
def written(monkeypatch):
    """Runs the command on a decoder that writes a text, token by token."""
    vocabulary = train_tokenizer(["some words to begin with"], "clm", 300)
    model = models.build(
        "gpt2-nano",
        vocab_size=300,
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        mlp_size=64,
        max_positions=128,
    )
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    about = {"config": {"model": "gpt2-nano", "seq_len": [128]}, "step": 1, "adapters": False}
    served = Served(model, variables, vocabulary, about)
    monkeypatch.setattr("train.serving.load", lambda path, **options: served)

    def run(text, *options):
        rows = [np.array([[token]], np.int32) for token in vocabulary.encode(text)]
        monkeypatch.setattr("slope_jax.generate.stream", lambda *args, **kwargs: iter(rows))
        return main(["--checkpoint=run", "--prompt=> ", *options])

    return run


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr("train.serving.load", mock.Mock(side_effect=AssertionError("loaded")))


def test_a_bert_gives_five_candidates_or_as_many_as_are_asked_for(filled, capsys):
    for options, count in (((), 5), (("--top-k=1",), 1)):
        assert filled("--prompt=Sparse [MASK] mask", *options) == 0
        assert capsys.readouterr().out.count("%") == count


@pytest.mark.parametrize(
    "option",
    [
        "--temperature=0",
        "--top-p=0.5",
        "--stop=a",
        "--max-new-tokens=3",
        "--seed=0",
        "--special-tokens",
    ],
)
def test_a_bert_refuses_what_a_decoder_alone_takes(filled, tmp_path, capsys, option):
    assert filled("--prompt=[MASK]", option, f"--save={tmp_path / 'saved'}") == 2
    assert f"takes no {option.split('=')[0]};" in capsys.readouterr().err
    assert not (tmp_path / "saved").exists()


def test_a_bert_warns_of_positions_that_were_never_trained(bert, filled, capsys):
    long = "Sparse [MASK] mask values" + " a" * 16
    for text, warned in (("Sparse [MASK]", False), (long, True)):
        assert filled(f"--prompt={text}") == 0
        assert ("warning" in (err := capsys.readouterr().err)) == warned
    assert f"a prompt of {len(masked_ids(bert.vocabulary, long))} tokens" in err
    assert "sequences of at most 16 tokens" in err


def test_a_mask_stands_for_a_word_and_the_space_that_it_carries(bert):
    vocabulary, specials = bert.vocabulary, bert.vocabulary.specials
    encode = vocabulary.encode
    assert carries_space(vocabulary.tokenizer)

    def around(*ids):
        return [specials.cls, *ids, specials.sep]

    whole, word = encode("Sparse kernel mask"), encode(" kernel")
    at = len(encode("Sparse"))
    assert whole[at : at + len(word)] == word
    masked = [*whole[:at], specials.mask, *whole[at + len(word) :]]
    assert masked_ids(vocabulary, "Sparse [MASK] mask") == around(*masked)
    assert masked_ids(vocabulary, "[MASK] [MASK]") == around(specials.mask, specials.mask)
    # What is no space of the word's own stays.
    assert masked_ids(vocabulary, "Sparse\n[MASK]") == around(*encode("Sparse\n"), specials.mask)
    assert masked_ids(vocabulary, "Sparse  [MASK]") == around(*encode("Sparse "), specials.mask)


def test_words_without_spaces_are_masked_as_they_are():
    words = {word: i for i, word in enumerate((*BERT_SPECIALS, "the", "kernel", " "))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    for splits, ids in (
        (tokenizers.pre_tokenizers.BertPreTokenizer(), [5, 4, 6]),
        (tokenizers.pre_tokenizers.Split(" ", "isolated"), [5, 7, 4, 7, 6]),
    ):
        made.pre_tokenizer = splits
        vocabulary = vocabulary_from_json(made.to_str(), "mlm")
        assert masked_ids(vocabulary, "the [MASK] kernel") == [2, *ids, 3]


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--prompt=\udcff\udcfe abc", "argument --prompt: not UTF-8, '\\udcff' at character 0"),
        ("--stop=ab\udcff", "argument --stop: not UTF-8, '\\udcff' at character 2"),
        ("--stop=", "argument --stop: an empty text"),
    ],
)
def test_unreadable_text_is_refused_by_the_name_of_its_option(capsys, option, message):
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint=run", option])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed=99999999999999999999", "--seed=99999999999999999999 must lie in [0, 2**31)"),
        ("--seed=-1", "--seed=-1 must lie in [0, 2**31)"),
        ("--top-k=0", "--top-k=0 must be 1 or more"),
        ("--max-new-tokens=0", "--max-new-tokens=0 must be 1 or more"),
        ("--temperature=-1", "error: --temperature=-1.0 must not be negative or infinite"),
        ("--temperature=nan", "error: --temperature=nan must not be"),
        ("--temperature=1e-40", "error: --temperature=1e-40 divides"),
        ("--temperature=0 --top-k=3", "error: --top-k and --top-p choose what is sampled"),
        ("--temperature=0 --top-p=1", "what is sampled; set a --temperature above 0"),
        ("--top-p=0", "error: --top-p=0.0 must be a probability in (0, 1]"),
        ("--top-p=1.5", "error: --top-p=1.5 must be a probability in (0, 1]"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_model_is_loaded(capsys, option, message):
    temperature = [] if option.startswith("--temperature") else ["--temperature=1"]
    assert main(["--checkpoint=run", "--prompt=a", *temperature, *option.split()]) == 2
    assert message in capsys.readouterr().err


def test_more_candidates_than_tokens_are_refused_by_the_name_of_the_option(filled, bert, capsys):
    most = bert.model.config.vocab_size
    assert filled("--prompt=[MASK]", f"--top-k={most + 1}") == 2
    assert f"error: --top-k={most + 1} must be an integer between 1 and {most} tokens" in (
        capsys.readouterr().err
    )


def test_more_tokens_to_sample_from_than_there_are_too(written, capsys):
    for options, message in (
        (
            ["--top-k=301", "--temperature=1"],
            "error: --top-k=301 must be an integer between 1 and 300",
        ),
        (["--top-k=3"], "what is sampled; set a --temperature above 0"),
    ):
        assert written("text", *options) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(flush):
    """As `head` does: while text is written, or when what is left is at the end."""
    program = (
        "import sys; from train.command import exit_code\n"
        f"sys.exit(exit_code(lambda _: print('text' * 9, flush={flush}), None, less_memory=''))"
    )
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as unread:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=unread, stderr=subprocess.PIPE
        )
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_an_error():
    program = (
        "import os, sys; from train.command import exit_code\n"
        "def run(_): read, write = os.pipe(); os.close(read); os.write(write, b'x')\n"
        "code = exit_code(run, None, less_memory=''); print('after'); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (ended.returncode, ended.stdout) == (1, b"after\n")
    assert ended.stderr == b"error: Broken pipe\n"


def test_a_command_may_have_no_output():
    program = "import sys; from train.command import exit_code\nsys.stdout = None\n"
    program += "sys.exit(exit_code(lambda _: print('text'), None, less_memory=''))"
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("command", [main, evaluate.main])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nA\nB"
            ),
            "error: Out of memory allocating 9 bytes; give ",
        ),
        (MemoryError("Unable to allocate 9 GiB"), "error: Unable to allocate 9 GiB; give "),
        (MemoryError(), "error: out of memory; give "),
    ],
)
def test_too_little_memory_ends_in_one_line(monkeypatch, capsys, command, error, said):
    monkeypatch.setattr("train.serving.load", mock.Mock(side_effect=error))
    what = "--prompt=a" if command is main else "--data=docs"
    assert command(["--checkpoint=run", what]) == 1
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert ("--batch" in err) == (command is not main)
    assert err.count("\n") == 1


def test_other_errors_of_the_runtime_are_bugs(monkeypatch):
    error = jax.errors.JaxRuntimeError("INTERNAL: what")
    monkeypatch.setattr("train.serving.load", mock.Mock(side_effect=error))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: what"):
        main(["--checkpoint=run", "--prompt=a"])


def test_as_many_tokens_as_fit_are_made_where_none_are_asked_for(written, capsys):
    asked = []

    def stream(model, variables, ids, *, max_new_tokens, **options):
        asked.append((ids.shape[1], max_new_tokens))
        return iter([np.array([[7]], np.int32)])

    for prompt, said in (("a", False), ("a" * 100, True)):
        written("a")  # the model
        with mock.patch("slope_jax.generate.stream", stream):
            assert main(["--checkpoint=run", f"--prompt={prompt}"]) == 0
        width, count = asked.pop()
        assert count == min(64, 128 - width)
        assert ("new tokens, not 64: no more fit behind" in capsys.readouterr().err) == said
    assert count < 64


@pytest.mark.parametrize("stop", [COMPOSED, DECOMPOSED])
def test_a_stop_is_found_however_its_accents_are_written(written, capsys, stop):
    assert written(f"un {COMPOSED} noir", f"--stop={stop}") == 0
    assert capsys.readouterr().out == "> un \n"


def test_what_the_output_cannot_encode_is_escaped(written, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    assert written(f"un {COMPOSED} noir") == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"> un caf\\xe9 noir\n"


def test_a_folder_to_save_to_is_new_before_anything_is_loaded(nothing_loaded, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path, "exists already"), (tmp_path / "file" / "a", "is no folder")):
        assert main(["--checkpoint=run", f"--save={path}"]) == 2
        assert f"--save={path}" in (err := capsys.readouterr().err)
        assert message in err
