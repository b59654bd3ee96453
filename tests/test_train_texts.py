"""Texts continued in Python, held to ids that are generated one prompt at a time."""

import itertools
import pathlib

import jax
import numpy as np
import pytest
import tokenizers

from slope_jax import decoding, models
from slope_jax.generate import generate
from train import serving
from train.data.tokenizer import train_tokenizer, vocabulary_from_json
from train.evaluate import perplexity
from train.serving import Served
from train.texts import complete, continuations, continued_text, fitting_tokens

PROMPTS = ["Some words", "", "begin with"]
SIZES = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "mlp_size": 64, "max_positions": 128}


@pytest.fixture(scope="module")
def served():
    vocabulary = train_tokenizer(["some words to begin with"], "clm", 300)
    model = models.build("gpt2-nano", vocab_size=300, **SIZES)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    about = {"config": {"model": "gpt2-nano", "seq_len": [128]}, "step": 1, "adapters": False}
    return Served(model, variables, vocabulary, about)


def alone(served, prompt, **options):
    """The ids that follow a prompt, by itself and unpadded, up to an end of text."""
    vocabulary = served.vocabulary
    end = vocabulary.specials.end_of_text
    ids = vocabulary.encode(prompt) or [end]
    made = generate(
        served.model, served.variables, np.array([ids]), end_token=end, max_new_tokens=20, **options
    )
    return ids, np.asarray(made.tokens)[0, : int(made.lengths[0])].tolist()


def behind(served, prompt, tokens):
    """What the tokens add to the text of the prompt."""
    vocabulary = served.vocabulary
    end = vocabulary.specials.end_of_text
    whole, first = ([t for t in row if t != end] for row in ([*prompt, *tokens], prompt))
    return vocabulary.decode(whole).removeprefix(vocabulary.decode(first))


def test_prompts_are_continued_together_as_each_by_itself(served):
    found = complete(served, PROMPTS, max_new_tokens=20)
    assert found == [behind(served, *alone(served, prompt)) for prompt in PROMPTS]
    assert complete(served, PROMPTS[0], max_new_tokens=20) == found[:1]
    assert len(set(found)) == 3


def test_a_seed_samples_the_same_again(served):
    options = {"temperature": 1.5, "top_k": 50, "seed": 7}
    (found,) = complete(served, "Some", max_new_tokens=20, **options)
    key = jax.random.key(options.pop("seed"))
    assert found == behind(served, *alone(served, "Some", key=key, **options))
    assert complete(served, "Some", max_new_tokens=20, temperature=1.5, seed=8) != [found]


def test_the_first_prompt_alone_waits_for_programs(served):
    """Others of up to 64 tokens, with any number of new ones, find them."""
    expected = behind(served, *alone(served, "words " * 11))
    complete(served, "Some words", max_new_tokens=5)
    programs = (decoding.start, decoding.advance)
    before = [program._cache_size() for program in programs]
    for words, count in ((1, 16), (5, 64), (11, 9), (11, 20)):
        (found,) = complete(served, "words " * words, max_new_tokens=count)
    assert found == expected
    assert [program._cache_size() for program in programs] == before


def test_as_many_tokens_as_fit_are_made_where_none_are_asked_for(served):
    ids = served.vocabulary.encode("a" * 100)
    for prompt, count in (("a", 64), ("a" * 100, 128 - len(ids))):
        (last,) = list(continuations(served, prompt))[-1]
        assert last.tokens == count or last.ended
    assert count < 64


def test_a_stop_ends_a_text_and_what_is_settled_stays(served):
    (whole,) = complete(served, "Some", max_new_tokens=20)
    stop = whole[len(whole) // 2 :][:2]
    assert stop
    grown = [row for (row,) in continuations(served, "Some", max_new_tokens=20, stops=[stop])]
    assert grown[-1].text == whole[: whole.index(stop)]
    assert grown[-1].ended
    assert [row.tokens for row in grown] == sorted({row.tokens for row in grown})
    for row, later in itertools.pairwise(grown):
        assert later.text.startswith(row.text[: row.settled])


@pytest.fixture
def of_bytes(served):
    """With bytes that stand for themselves where a character has no token, as LLaMA 2 has them."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
    ]
    vocab = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return served._replace(vocabulary=vocabulary_from_json(made.to_str(), "clm"))


@pytest.mark.parametrize("chunk", [1, 2, 3, 20])
@pytest.mark.parametrize(
    "text",
    [
        "\n\U0001f600 a",
        "a\n\n\U0001f600",
        "\nb",
        "a \u65e5\u672c b\n",
        "a\n",
        b"\n\xf0 a",
        b"a\n\xf0",
    ],
)
@pytest.mark.parametrize("stops", [(), ("\n",), (" b", "\U0001f600")])
@pytest.mark.parametrize("prompt", ["b", "b\u65e5"])
def test_bytes_are_settled_by_what_follows_them(of_bytes, monkeypatch, chunk, text, stops, prompt):
    if isinstance(text, str):
        tokens, expected = of_bytes.vocabulary.encode(text), text
    else:
        token = of_bytes.vocabulary.tokenizer.token_to_id
        names = (
            chr(byte).replace(" ", "\u2581") if byte in b" a" else f"<0x{byte:02X}>"
            for byte in text
        )
        tokens = [token(name) for name in names]
        expected = text.replace(b"\n\xf0", "\ufffd\ufffd".encode()).decode()
        if "\n" in stops:  # it was there when the token came
            expected = text.split(b"\xf0")[0].decode()
    pieces = [np.array([tokens[i : i + chunk]]) for i in range(0, len(tokens), chunk)]
    monkeypatch.setattr("slope_jax.generate.stream", lambda *args, **options: iter(pieces))
    grown = [row for (row,) in continuations(of_bytes, prompt, stops=stops)]
    cut = min([expected.index(stop) for stop in stops if stop in expected], default=len(expected))
    assert grown[-1].text == expected[:cut]
    assert grown[-1].ended == any(stop in expected for stop in stops)
    for row, later in itertools.pairwise(grown):
        assert later.text.startswith(row.text[: row.settled])


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ("\u65e5", b"\xff", "\ufffd"),
        ("b\u65e5", b"\n\xff", "\ufffd\ufffd"),
        ("\u65e5", b"\n\xe6", "\ufffd\ufffd"),
        ("\u65e5", "\u672c".encode(), "\u672c"),
        ("\u65e5", b"", ""),
        ("\u65e5b", b"\xff", "\ufffd"),
        ("\u65e5\u672c".encode()[:-1], "\u672c".encode()[-1:], "\u672c"),
        ("\u672c".encode()[:-1], b"\xff\xff", "\ufffd\ufffd"),
    ],
)
@pytest.mark.parametrize("more", ["", "b"])
def test_a_prompt_that_ends_in_bytes_is_not_continued_with_itself(
    of_bytes, prompt, tokens, expected, more
):
    """Bytes in a row are decoded together, those of the prompt with those behind it."""
    token = of_bytes.vocabulary.tokenizer.token_to_id
    encode = of_bytes.vocabulary.encode
    ids = encode(prompt) if isinstance(prompt, str) else [token(f"<0x{b:02X}>") for b in prompt]
    made = [*(token(f"<0x{byte:02X}>") for byte in tokens), *encode(more)]
    assert continued_text(of_bytes, ids, made, []) == (expected + more, False)


def test_a_stop_may_be_one_text_or_none(served):
    (whole,) = complete(served, "Some", max_new_tokens=20)
    stop = whole[len(whole) // 2 :][:2]
    kept = [whole[: whole.index(stop)]]
    assert complete(served, "Some", max_new_tokens=20, stops=stop) == kept
    assert complete(served, "Some", max_new_tokens=20, stops=iter([stop])) == kept
    assert complete(served, "Some", max_new_tokens=20, stops=None) == [whole]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        (3, {}, "prompts=3 must be a text or several"),
        (["a", 3], {}, r"prompts=\['a', 3\] must be a text or several"),
        (["a", "a\ud800b"], {}, r"prompts, number 1: not UTF-8, '\\ud800' at character 1; give"),
        ("a", {"stops": "\udcff"}, "stops, number 0: not UTF-8"),
        ("a", {"stops": [3]}, r"stops=\[3\] must be a text or several"),
        ("a", {"stops": ""}, "no empty text to stop at"),
        ("a", {"seed": None, "temperature": 1.0}, r"seed=None must be an integer in \[0, 2"),
        ("a", {"seed": 2**31}, "seed=2147483648 must be"),
        ("a", {"temperature": 1e-46}, "temperature=1e-46"),
        ("a", {"stops": [""]}, "no empty text to stop at"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("a", {"temperature": -1.0}, "temperature=-1.0"),
        ("a" * 300, {}, "300 tokens leaves no room for another: the model has 128 positions"),
    ],
)
def test_bad_input_is_named_at_the_call(served, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        continuations(served, prompts, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda served: complete(served, "a"),
        lambda served: continuations(served, ["a"]),
        lambda served: fitting_tokens(served, 3),
        lambda served: continued_text(served, [1], [2], ()),
        lambda served: perplexity(served, np.arange(4)),
        lambda served: serving.save(served, "never"),
    ],
)
def test_the_path_of_a_run_is_no_model(served, call):
    for path in ("runs/gpt", pathlib.Path("runs/gpt")):
        with pytest.raises(
            TypeError, match=r"^'runs/gpt' is .* train.serving.load\('runs/gpt'\) gives"
        ):
            call(path)
    with pytest.raises(
        TypeError, match=r"^a GPT2 is no served model; pass .*load\(RUN or FOLDER\)"
    ):
        call(served.model)
