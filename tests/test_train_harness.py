"""Requests of the LM Evaluation Harness against loops, and the harness itself where it is installed."""

import doctest
import json
import math
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from test_train_evaluate import LONGEST, log_probabilities, tiny_gpt2

from slope_jax.generate import generate, stream
from train import scoring
from train.data.tokenizer import vocabulary_from_json
from train.evaluate import main, perplexity
from train.harness import Harness, evaluate_tasks
from train.scoring import batches, score
from train.serving import Served
from train.texts import continued_text


@pytest.fixture(scope="module")
def served(small_text):
    return tiny_gpt2(small_text)


def request(*args):
    return types.SimpleNamespace(args=args)


def test_continuations_are_scored_after_their_contexts(served):
    encode = served.vocabulary.encode
    cases = [("The sparse ", "kernel"), ("", "mask"), ("rank token " * 30, "dense layer")]
    found = Harness(served, batch_size=2).loglikelihood([request(*case) for case in cases])
    for (context, continuation), (nats, greedy) in zip(cases, found, strict=True):
        after = encode(" " * context.endswith(" ") + continuation)
        before = encode(context.rstrip()) or [served.vocabulary.specials.end_of_text]
        tokens = (before + after)[-(LONGEST + 1) :]
        rows = log_probabilities(served, tokens[:-1])[-len(after) :]
        assert nats == pytest.approx(sum(rows[range(len(after)), after]), rel=1e-4)
        assert greedy == (rows.argmax(-1) == after).all()


def test_a_continuation_that_ends_the_contexts_last_word_has_its_tokens(served):
    """Where the context's tokens go on otherwise, they are the continuation's."""
    encode, end = served.vocabulary.encode, served.vocabulary.specials.end_of_text
    harness = Harness(served)
    cases = [("a rank ker", "nel"), ("a rank ker", "nel mask"), ("ker", "nel"), ("spar", "se")]
    for context, continuation in cases:
        before, whole = encode(context), encode(context + continuation)
        cut = next(
            i for i, pair in enumerate(zip(before, whole, strict=False)) if len(set(pair)) > 1
        )
        assert cut < len(before)
        after = whole[cut:]
        ((nats, _),) = harness.loglikelihood([request(context, continuation)])
        rows = log_probabilities(served, [*([] if cut else [end]), *whole[:-1]])[-len(after) :]
        assert nats == pytest.approx(sum(rows[range(len(after)), after]), rel=1e-4)


def test_errors_name_the_request(served):
    harness, long = Harness(served), "rank token " * 30
    for continuation, message in (("", "of 0 tokens"), (long, r"of \d\d+ tokens")):
        with pytest.raises(ValueError, match=rf"request 1, 'kernel' and .*{message}; .* 1 \.\. 24"):
            harness.loglikelihood([request("a", " mask"), request("kernel", continuation)])
    with pytest.raises(ValueError, match=r"request 0, 'rank token rank token rank .* rank token '"):
        harness.loglikelihood([request(long, "")])
    for options, error, message in (
        ({"max_gen_toks": 0}, ValueError, "max_gen_toks=0 must be 1 or more"),
        ({"num_beams": 3, "until": "a"}, NotImplementedError, "num_beams=3; generation here takes"),
    ):
        with (
            mock.patch("train.requests.stream", side_effect=AssertionError("generated")),
            pytest.raises(error, match=f"request 1, 'kernel': {message}"),
        ):
            harness.generate_until([request("a", {}), request("kernel", options)])


def test_what_is_generated_greedily_is_scored_as_greedy(served):
    prompt = served.vocabulary.encode("sparse mask")
    made = generate(served.model, served.variables, jnp.asarray([prompt]), max_new_tokens=5)
    tokens = np.array([*prompt, *np.asarray(made.tokens[0])], np.int32)
    assert score(served.model, served.variables, [(tokens, 5)])[0].greedy.all()
    tokens[-1] = (tokens[-1] + 1) % served.vocabulary.size
    assert score(served.model, served.variables, [(tokens, 5)])[0].greedy.tolist() == [True] * 4 + [
        False
    ]


def rolled(served, text, ahead=()):
    """Nats of a text: each window but the first has all the context that fits, scoring new ones."""
    tokens = [served.vocabulary.specials.end_of_text, *ahead, *served.vocabulary.encode(text)]
    total, done = 0.0, 1
    while done < len(tokens):
        stop = min(done + LONGEST, len(tokens))
        inputs = tokens[max(0, stop - 1 - LONGEST) : stop - 1]
        rows = log_probabilities(served, inputs)[done - stop :]
        total -= sum(rows[range(stop - done), tokens[done:stop]])
        done = stop
    return total


def test_a_whole_text_is_scored_in_windows_that_are_full(served):
    text = "Dense kernel mask values layer. " * 4
    assert len(served.vocabulary.encode(text)) > LONGEST + 2
    whole, empty = Harness(served).loglikelihood_rolling([request(text), request("")])
    assert whole == pytest.approx(-rolled(served, text), rel=1e-5)
    assert empty == 0.0


@pytest.fixture
def begun(served):
    """With an end of text ahead of every text, as an OPT has it."""
    end = served.vocabulary.specials.end_of_text
    imported = {"end_of_text": end, "beginning": [end], "bos": end}
    return served._replace(about=served.about | {"imported": imported})


@pytest.mark.parametrize("add", [True, False])
def test_what_the_tokenizer_puts_ahead_of_texts_is_ahead_of_contexts(begun, add, monkeypatch):
    encode, end = begun.vocabulary.encode, begun.vocabulary.specials.end_of_text
    ahead, harness = [end] * add, Harness(begun, add_bos_token=add)
    cases = [
        (("The sparse", " kernel"), [*ahead, *encode("The sparse")]),
        (("", " kernel"), [end]),
        (("<|endoftext|>The sparse", " kernel"), [end, *encode("The sparse")]),
        (("", "<|endoftext|> kernel"), [end]),
    ]
    after = encode(" kernel")
    for (nats, _), (_, before) in zip(
        harness.loglikelihood([request(*case) for case, _ in cases]), cases, strict=True
    ):
        rows = log_probabilities(begun, [*before, *after[:-1]])[-len(after) :]
        assert nats == pytest.approx(sum(rows[range(len(after)), after]), rel=1e-4)

    for text in ("Dense kernel mask values layer. " * 4, ""):
        (whole,) = harness.loglikelihood_rolling([request(text)])
        assert whole == pytest.approx(-rolled(begun, text, ahead), rel=1e-5)

    stream = mock.Mock(side_effect=lambda *args, **options: iter([np.array([after])]))
    monkeypatch.setattr("train.requests.stream", stream)
    for context, before in (("The sparse", [*ahead, *encode("The sparse")]), ("", [end])):
        assert harness.generate_until([request(context, {"max_gen_toks": 8})]) == [" kernel"]
        count = stream.call_args.kwargs["lengths"][0]
        assert np.asarray(stream.call_args.args[2])[0, :count].tolist() == before


def test_without_a_token_ahead_of_texts_the_one_that_begins_them_by_name_is_an_empty_context(
    served,
):
    about = served.about | {"imported": {"beginning": [], "bos": 9}}
    ((nats, _),) = Harness(served._replace(about=about)).loglikelihood([request("", "mask")])
    after = served.vocabulary.encode("mask")
    rows = log_probabilities(served, [9, *after[:-1]])
    assert nats == pytest.approx(sum(rows[range(len(after)), after]), rel=1e-4)


def test_text_is_generated_up_to_a_stop(served):
    adapter, options = Harness(served), {"max_gen_toks": 8, "do_sample": False}
    ids = served.vocabulary.encode("sparse mask")
    made = generate(served.model, served.variables, jnp.asarray([ids]), max_new_tokens=8)
    whole = served.vocabulary.decode(np.asarray(made.tokens[0]).tolist())
    stop = whole[len(whole) // 2 :][:2]
    requests = [request("sparse mask", options), request("sparse mask", options | {"until": stop})]
    assert adapter.generate_until(requests) == [whole, whole[: whole.index(stop)]]
    aliased = {"max_new_tokens": 8, "num_beams": 1, "temperature": 0.0}
    assert adapter.generate_until([request("sparse mask", aliased)]) == [whole]
    unsampled = options | {"temperature": 1.0}
    assert adapter.generate_until([request("sparse mask", unsampled)]) == [whole]


@pytest.mark.parametrize("sampled", [False, True])
def test_requests_are_generated_together_as_each_by_itself(served, monkeypatch, sampled):
    """Those of equal options but for stops; the last ones of a kind are fewer than a batch."""
    how = {"do_sample": True, "temperature": 2.0, "top_k": 50} if sampled else {}
    texts = ["sparse mask", "a", "rank token " * 30, "", "dense", "kernel of", "values"]
    lone = Harness(served, batch_size=1, seed=3)
    asked = [
        request(text, {"max_gen_toks": 3 + 6 * (n == 2)} | how) for n, text in enumerate(texts)
    ]
    stop = lone.generate_until([request(texts[1], {"max_gen_toks": 3} | how)])[0][1:2]
    asked[4] = request(texts[4], {"max_gen_toks": 3, "until": [stop]} | how)
    asked[5] = request(texts[5], {"max_gen_toks": 3, "temperature": 0.5})
    expected = lone.generate_until(asked)
    rows = []
    real = stream

    def watched(model, variables, ids, **options):
        rows.append((len(ids), options["max_new_tokens"]))
        return real(model, variables, ids, **options)

    monkeypatch.setattr("train.requests.stream", watched)
    assert Harness(served, batch_size=4, seed=3).generate_until(asked) == expected
    assert rows == [(4, 3), (4, 3), (1, 9), (1, 3)]
    assert len(set(expected)) > 4
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        Harness(served, batch_size=0).generate_until(asked)


def test_a_request_that_ended_waits_for_no_other(served, monkeypatch):
    encode, seen = served.vocabulary.encode, []
    first, second = encode("one stop two"), encode("one two three")
    length = min(len(first), len(second))

    def stream(model, variables, ids, **options):
        for piece in (first[:length], second[:length]), (second[:length], encode(" end") * length):
            seen.append(len(ids))
            yield np.array([row[:length] for row in piece], np.int32)
        raise AssertionError("generated on behind all stops")

    monkeypatch.setattr("train.requests.stream", stream)
    asked = [request("a", {"until": "stop"}), request("b", {"until": "end"})]
    found = Harness(served).generate_until(asked)
    assert found[0] == "one "
    assert found[1] == served.vocabulary.decode(second[:length]) + " "
    assert seen == [2, 2]


def test_groups_are_filled_up_by_little():
    assert doctest.testmod(scoring).failed == 0
    for count in (*range(1, 40), 1001):
        for most in (1, 3, 8, 12, 100, 10**6):
            rows, groups = batches(range(count), most)
            assert [i for group in groups for i in group] == list(range(count))
            assert len(groups) == -(-count // most)
            assert max(map(len, groups)) <= rows <= most
            assert rows - max(map(len, groups)) <= 7
            assert rows in {1, 2, 4, most} or rows % 8 == 0


def test_a_batch_of_more_than_there_is_costs_no_memory(served):
    tokens = np.arange(100) % 300
    expected = perplexity(served, tokens, batch_size=8)
    assert perplexity(served, tokens, batch_size=10**9) == expected


def test_tasks_sample_as_they_say(served):
    ids = jnp.asarray([served.vocabulary.encode("sparse mask")])
    for options, how in (
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 2, "top_k": 0}, {"temperature": 2}),
        (
            {"do_sample": True, "temperature": 2.0, "top_k": 999, "top_p": 0.9},
            {"temperature": 2.0, "top_k": served.vocabulary.size, "top_p": 0.9},
        ),
        ({"temperature": 2.0, "top_k": 7}, {"temperature": 2.0, "top_k": 7}),
    ):
        expected = []
        for number in range(2):
            key = jax.random.fold_in(jax.random.key(5), number)
            made = generate(served.model, served.variables, ids, max_new_tokens=8, key=key, **how)
            tokens = np.asarray(made.tokens[0]).tolist()
            expected.append(continued_text(served, [], tokens, [])[0])
        asked = [request("sparse mask", {"max_gen_toks": 8, **options})] * 2
        assert Harness(served, seed=5).generate_until(asked) == expected
        assert expected[0] != expected[1]
    for options, message in (
        ({"temperature": 1e39}, r"request 1, 'kernel': temperature=1e\+39"),
        ({"do_sample": True, "top_p": 0}, "request 1, 'kernel': top_p=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Harness(served).generate_until([request("a", {}), request("kernel", options)])
    with pytest.raises(ValueError, match="seed=None must be"):
        Harness(served, seed=None)


def chosen(served, prompt, choices):
    """The number of the likeliest choice, by the sum of its tokens and by that over its letters."""
    encode = served.vocabulary.encode
    before, sums = encode(prompt), []
    for choice in choices:
        after = encode(f"{prompt} {choice}")[len(before) :]
        rows = log_probabilities(served, (before + after)[-(LONGEST + 1) : -1])[-len(after) :]
        sums.append(sum(rows[range(len(after)), after]))
    shares = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
    return int(np.argmax(sums)), int(np.argmax(shares))


def greedily(served, prompt, count):
    tokens = served.vocabulary.encode(prompt)
    for _ in range(count):
        tokens.append(int(log_probabilities(served, tokens)[-1].argmax()))
    return served.vocabulary.decode(tokens)[len(prompt) :]


@pytest.mark.filterwarnings("ignore")  # the harness and what it imports are not ours
@pytest.mark.parametrize("command", [False, True])
def test_the_harness_itself_gives_what_loops_give(served, tmp_path, monkeypatch, command):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra eval)")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    words = ["sparse", "kernel", "mask", "values", "dense", "layer", "adapter", "rank", "a token"]

    def sentence(count):
        return " ".join(rng.choice(words, count))

    docs = []
    for number in range(12):
        prompt = sentence(1 + number)
        written = greedily(served, prompt, 6) if number < 4 else "nothing"
        docs.append(
            {
                "prompt": prompt,
                "choices": [sentence(k) for k in (1, 2, 3)],
                "label": int(rng.integers(3)),
                "text": sentence(3 * number + 1),
                "written": written.split("a")[0],
            }
        )
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = [
        {
            "task": "local_choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        {
            "task": "local_text",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "word_perplexity", "higher_is_better": False},
                {"metric": "bits_per_byte", "higher_is_better": False},
            ],
        },
        {
            "task": "local_written",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{written}}",
            "generation_kwargs": {"until": ["a"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    ]
    tasks = [task | shared for task in tasks]
    if command:
        names = []
        for task in tasks:
            names.append(tmp_path / f"{task['task']}.yaml")
            names[-1].write_text(json.dumps(task))  # JSON is YAML
        monkeypatch.setattr("train.serving.load", lambda path, **options: served)
        options = [f"--tasks={','.join(map(str, names))}", f"--output={tmp_path / 'numbers.json'}"]
        assert main(["--checkpoint=run", *options]) == 0
        found = json.loads((tmp_path / "numbers.json").read_text())["results"]
    else:
        found = evaluate_tasks(served, tasks, batch_size=3)

    by_sum, by_share = zip(
        *(chosen(served, doc["prompt"], doc["choices"]) for doc in docs), strict=True
    )
    labels = [doc["label"] for doc in docs]
    assert len(set(by_sum)) > 1
    assert by_sum != by_share
    assert found["local_choice"]["acc,none"] == pytest.approx(np.mean(np.equal(by_sum, labels)))
    assert found["local_choice"]["acc_norm,none"] == pytest.approx(
        np.mean(np.equal(by_share, labels))
    )
    nats = sum(rolled(served, doc["text"]) for doc in docs)
    count = sum(len(doc["text"].split()) for doc in docs)
    letters = sum(len(doc["text"]) for doc in docs)
    text = found["local_text"]
    assert text["word_perplexity,none"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert text["bits_per_byte,none"] == pytest.approx(nats / letters / math.log(2), rel=1e-5)
    assert found["local_written"]["exact_match,none"] == pytest.approx(4 / 12)


def test_a_long_context_keeps_what_fits_beside_the_new_tokens(served, monkeypatch):
    seen = []

    def stream(model, variables, ids, *, lengths, max_new_tokens, **options):
        seen.append((np.asarray(ids)[0, : lengths[0]].tolist(), max_new_tokens))
        yield np.array([served.vocabulary.encode("one stop two")], np.int32)
        raise AssertionError("generated on behind a stop")

    monkeypatch.setattr("train.requests.stream", stream)
    text = "rank token " * 30
    tokens = served.vocabulary.encode(text)
    for wanted, count in ((5, 5), (23, 23), (24, 12), (10_000, 12)):
        options = {"until": ["stop", "two"], "max_gen_toks": wanted}
        assert Harness(served).generate_until([request(text, options)]) == ["one "]
        assert seen.pop() == (tokens[-(LONGEST - count) :], count)
    short = served._replace(about={"config": {"seq_len": [1]}})
    with pytest.raises(ValueError, match=r"max_gen_toks=7 leaves no room .* sequences of 1 tokens"):
        Harness(short).generate_until([request(text, {"max_gen_toks": 7})])


def test_a_tasks_stop_is_found_however_its_accents_are_written(served, monkeypatch):
    tokens = np.array([served.vocabulary.encode("un caf\u00e9 noir")], np.int32)
    monkeypatch.setattr("train.requests.stream", lambda *args, **options: iter([tokens]))
    asked = request("sparse", {"until": "cafe\u0301"})
    assert Harness(served).generate_until([asked]) == ["un "]


def word_piece():
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "kernel",
        "##s",
        "is",
        "rank",
        ",",
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(dict(zip(words, range(11), strict=True)))
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    return made


def metaspace():
    words = ["</s>", "<unk>", "▁the", "▁kernel", "s", "▁is", "▁rank", ","]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -1.0) for word in words], 1))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return made


@pytest.mark.parametrize("tokenizer", [word_piece(), metaspace()])
def test_a_continuation_keeps_the_space_ahead_of_it(tokenizer):
    vocabulary = vocabulary_from_json(tokenizer.to_str(), "clm")
    served = Served(None, {}, vocabulary, {})
    prompt, end = vocabulary.encode("the kernel"), vocabulary.specials.end_of_text
    whole = vocabulary.encode("the kernel is the rank, the rank")
    assert whole[: len(prompt)] == prompt
    new = whole[len(prompt) :]
    assert continued_text(served, prompt, new, []) == (" is the rank, the rank", False)
    assert continued_text(served, prompt, new, ["", "the", ","]) == (" is ", True)
    assert continued_text(served, prompt, [*new[:1], end, 5], []) == (" is", True)
    assert continued_text(served, [end], new, []) == ("is the rank, the rank", False)
    plural = vocabulary.encode("the kernels is")[len(prompt) :]
    assert continued_text(served, prompt, plural, []) == ("s is", False)
