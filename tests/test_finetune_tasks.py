"""Tasks: metrics against formulas, reading, tokenisation, spans against loops."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.special import log_softmax

from slope_jax import TrainState
from train.data.tokenizer import train_tokenizer
from train.tasks import metrics
from train.tasks.examples import Example, read_splits, read_squad, read_tsv
from train.tasks.features import MOST_QUESTION, Features, make_features
from train.tasks.head import LONGEST_ANSWER, inputs, losses, predictions
from train.tasks.registry import TASKS, find_task
from train.tasks.scoring import best_answers, score
from train.tasks.step import PADDING, batches, make_train_step

EPS32 = float(jnp.finfo(jnp.float32).eps)


def test_metrics_of_classes_are_those_of_the_table():
    # Class 1: 3 right, 1 missed, 2 wrong, 4 rejected.
    found = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    true = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert metrics.accuracy(found, true) == 0.7
    assert metrics.f1(found, true) == 2 * 3 / (2 * 3 + 2 + 1)
    assert metrics.matthews(found, true) == pytest.approx((3 * 4 - 2 * 1) / np.sqrt(5 * 4 * 6 * 5))
    assert metrics.matthews(true, true) == 1.0
    assert metrics.matthews([1 - x for x in true], true) == -1.0


def test_metrics_of_nothing_told_apart_are_zero():
    true = [1, 0, 1, 1]
    assert metrics.matthews([1] * 4, true) == 0.0
    assert metrics.matthews([0] * 4, [0] * 4) == 0.0
    assert metrics.f1([0] * 4, true) == 0.0
    assert metrics.f1([0] * 4, [0] * 4) == 0.0
    assert metrics.pearson([0.1] * 3, true[:3]) == 0.0  # the mean of these isn't 0.1
    assert metrics.spearman([2.0] * 4, true) == 0.0


def test_correlations_are_those_of_scipy_ties_included():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.integers(0, 5, 50)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    x = rng.integers(0, 7, 50)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert metrics.spearman([1, 2, 3, 4], [1, 10, 100, 1e6]) == pytest.approx(1.0, rel=1e-15)
    assert metrics.spearman([1, 2, 3, 4], [9, 8, 7, -6]) == pytest.approx(-1.0, rel=1e-15)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The  Norman\tConquest.", "norman conquest"),
        ("a an the", ""),
        ("A. B. the-end's", "b theends"),  # punctuation goes first: "A." is an article then
        ("Theatre, another Anna", "theatre another anna"),
        ("$1,234.5 (US)", "12345 us"),
        ("É", "é"),
    ],
)
def test_answers_are_normalised_as_squad_does(answer, normalised):
    assert metrics.normalise(answer) == normalised


def test_answers_are_scored_against_the_one_that_fits_best():
    golds = ["the Denver Broncos", "Broncos of Denver"]
    assert metrics.exact_match("Denver Broncos!", golds) == 1.0
    assert metrics.exact_match("Broncos", golds) == 0.0
    assert metrics.answer_f1("Denver", golds) == 2 * 1 / (1 + 2)
    assert metrics.answer_f1("of Denver of", golds) == 2 * 2 / (3 + 3)
    assert metrics.answer_f1("so so", ["so so good"]) == 2 * 2 / (2 + 3)  # as often as they come
    assert metrics.answer_f1("Seattle", golds) == 0.0
    assert metrics.answer_f1("the", ["an"]) == 0.0


def test_labels_are_in_the_order_of_tensorflow_datasets():
    pytest.importorskip("tensorflow_datasets", reason="needs slope-jax[tfds]")
    from train.data.tfds_source import _builder, _tfds

    for task in TASKS.values():
        features = dict(_builder(_tfds(), task.name).info.features.items())
        assert set(task.columns) <= features.keys()
        if task.labels:
            assert tuple(features["label"].names) == task.labels
        else:
            assert task.kind == "span" or features["label"].np_dtype == np.float32
    assert find_task("rte") is find_task("glue/rte")


def test_records_of_tensorflow_datasets_become_examples(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs slope-jax[tfds]")

    class Reviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["negative", "positive"])
            features = {"sentence": tfds.features.Text(), "label": label}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, 3),
                "validation": self._generate_examples(3, 5),
            }

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"sentence": f"Nº {i}", "label": i % 2}

    Reviews(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    original = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name, **kw: original(name, data_dir=str(tmp_path), **kw)
    )
    task = dataclasses.replace(TASKS["glue/sst2"], name="reviews")
    found = {split: sorted(rows) for split, rows in read_splits(task, "").items()}
    assert found == {
        "train": [Example(("Nº 0",), 0), Example(("Nº 1",), 1), Example(("Nº 2",), 0)],
        "validation": [Example(("Nº 3",), 1), Example(("Nº 4",), 0)],
    }
    wrong = dataclasses.replace(task, held_out=("test",))
    with pytest.raises(ValueError, match=r"no split named test \(it has train, validation\)"):
        read_splits(wrong, "")


def test_files_are_read_by_their_columns(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(
        'label\tid\tsentence2\tsentence1\r\nentailment\t7\tb "\tä\r\n1\t8\t\td\r\n'.encode()
    )
    assert read_tsv(TASKS["glue/rte"], path) == [Example(("ä", 'b "'), 0), Example(("d", ""), 1)]
    path.write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\tb")  # no last newline
    assert read_tsv(TASKS["glue/mrpc"], path) == [Example(("a", "b"), 1)]
    path.write_text("sentence1\tsentence2\tscore\na\tb\t3.25\n")
    assert read_tsv(TASKS["glue/stsb"], path) == [Example(("a", "b"), 3.25)]


def test_mnli_has_two_held_out_files(tmp_path):
    for name in ("train", "dev_matched", "dev_mismatched"):
        text = f"premise\thypothesis\tlabel\n{name}\tb\tneutral\n"
        (tmp_path / f"{name}.tsv").write_text(text)
    found = read_splits(TASKS["glue/mnli"], str(tmp_path))
    assert list(found) == ["train", "validation_matched", "validation_mismatched"]
    assert found["validation_mismatched"] == [Example(("dev_mismatched", "b"), 1)]
    (tmp_path / "dev_matched.tsv").unlink()
    with pytest.raises(ValueError, match=r"lacks dev_matched\.tsv, which --task=glue/mnli needs"):
        read_splits(TASKS["glue/mnli"], str(tmp_path))


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("glue/cola", b"gj04\t1\t\tA sentence.\n", "no column 'sentence'; add a header"),
        ("glue/cola", b"sentence\tlabel\n", "holds no examples"),
        ("glue/cola", b"", "no column 'sentence'"),
        (
            "glue/cola",
            b"sentence\tlabel\na\t1\n\nb\t1\n",
            "line 3: 1 fields where the header names 2",
        ),
        ("glue/cola", b"sentence\tlabel\na\tb\t1\n", "line 2: 3 fields"),
        (
            "glue/cola",
            b"sentence\tlabel\na\t2\n",
            "line 2: unknown label '2'; glue/cola has 0 or unacceptable, 1 or acceptable",
        ),
        ("glue/cola", b"sentence\tlabel\na\t-1\n", "unknown label '-1'"),
        ("glue/cola", b"sentence\tlabel\n\xff\t1\n", "is not UTF-8 text"),
        ("glue/stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", "label 'nan' is no number"),
        ("glue/mrpc", b"Quality\ta\tb\n1\tx\ty\n", "no column 'sentence1' or '#1 String'"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, task, text, message):
    path = tmp_path / "train.tsv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"train.tsv.*{message}"):
        read_tsv(TASKS[task], path)


def squad_file(path, context, answers):
    entry = {"id": "1", "question": "Who?", "answers": answers}
    content = {"data": [{"paragraphs": [{"context": context, "qas": [entry]}]}]}
    path.write_text(json.dumps(content))
    return path


def test_answers_of_squad_are_found_where_they_stand(tmp_path):
    path = squad_file(tmp_path / "a.json", "ann, an ann", [{"answer_start": 7, "text": "ann"}])
    assert read_squad(TASKS["squad"], path) == [Example(("Who?", "ann, an ann"), 0, ((8, "ann"),))]
    for answers, message in (
        ([], "has no answer; give SQuAD v1.1"),
        ([{"answer_start": 0, "text": "bob"}], "does not hold 'bob'"),
        ([{"text": "ann"}], r"not in the format of SQuAD v1.1 \(KeyError: 'answer_start'\)"),
    ):
        squad_file(path, "ann", answers)
        with pytest.raises(ValueError, match=message):
            read_squad(TASKS["squad"], path)
    path.write_text("[")
    with pytest.raises(ValueError, match="not in the format"):
        read_squad(TASKS["squad"], path)


@pytest.fixture(scope="module")
def vocabulary():
    return train_tokenizer(["alpha beta gamma delta epsilon"] * 3, "mlm", 280)


def shortened(first, second, room):
    """One token after another off the longer text; of equal ones off the second."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


def test_sequences_hold_texts_between_special_tokens(vocabulary):
    rng, special = np.random.default_rng(0), vocabulary.specials
    texts = ["".join(rng.choice(list("abcd "), rng.integers(0, 40))) for _ in range(60)]
    examples = [Example((a, b), 1) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    found = make_features(TASKS["glue/rte"], examples, vocabulary, 24)
    assert found.input_ids.shape == (30, 24)
    for i, example in enumerate(examples):
        first, second = shortened(*map(vocabulary.encode, example.texts), 21)
        ids = [special.cls, *first, special.sep, *second, special.sep]
        assert found.input_ids[i].tolist() == ids + [0] * (24 - len(ids))
        assert found.second[i] == len(first) + 2
        assert found.lengths[i] == len(ids)
        batch = {name: x[i : i + 1] for name, x in found._asdict().items() if x is not None}
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        given = inputs(batch)["token_type_ids"][0].tolist()
        assert given == types + [0] * (24 - len(ids))
    single = make_features(TASKS["glue/cola"], [Example(("a b c",), 1)], vocabulary, 128)
    ids = [special.cls, *vocabulary.encode("a b c"), special.sep]
    assert single.input_ids.tolist() == [ids + [0] * (8 - len(ids))]  # in eights
    assert not inputs({k: v for k, v in single._asdict().items() if v is not None})[
        "token_type_ids"
    ].any()


def test_windows_cover_the_context_and_mark_the_answer(vocabulary):
    rng = np.random.default_rng(0)
    words = [str(w) for w in rng.choice(["alpha", "beta", "gamma", "ü"], 150)]
    words[70] = "omega-7"  # of many tokens
    context = " ".join(words)
    start = context.index("omega-7")
    examples = [
        Example(("alpha? " * 40, context), answers=((start, "omega-7"),)),
        Example(("Who", "epsilon"), answers=((0, "epsilon"),)),
    ]
    found = make_features(TASKS["squad"], examples, vocabulary, 100, stride=5)
    whole = vocabulary.tokenizer.encode(context, add_special_tokens=False)
    head, room = MOST_QUESTION + 2, 100 - MOST_QUESTION - 3
    count = 1 + -(-(len(whole.ids) - room) // 5)
    assert found.example.tolist() == [0] * count + [1]
    inside = 0
    for i in range(count):
        part = whole.ids[5 * i : 5 * i + room]
        assert found.input_ids[i, head : head + len(part)].tolist() == part
        assert found.lengths[i] == head + len(part) + 1
        assert found.second[i] == head
        first, last = found.labels[i]
        if first:
            inside += 1
            begin, end = found.offsets[i, first, 0], found.offsets[i, last, 1]
            assert context[begin:end].strip() == "omega-7"
        else:
            tokens = "".join(vocabulary.decode(part))
            assert last == 0
            assert "omega-7" not in tokens
    assert 1 < inside < count
    with pytest.raises(ValueError, match="seq_len=64 is too short for squad; give 96"):
        make_features(TASKS["squad"], examples, vocabulary, 64)


def spans(count=3, length=50):
    """A batch of windows and logits for it."""
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": np.zeros((count, length), np.int32),
        "second": np.array([5, 9, 7], np.int32),
        "lengths": np.array([50, 30, 44], np.int32),
        "labels": np.array([[8, 10], [0, 0], [7, 42]], np.int32),
    }
    return rng.normal(size=(count, length, 2)).astype(np.float32), batch


def test_the_best_span_is_that_of_a_loop():
    logits, batch = spans()
    logits[0, 6, 0] = logits[0, 6 + LONGEST_ANSWER, 1] = 9.0  # one too many between them
    logits[0, 5 + LONGEST_ANSWER, 1] = 8.0
    logits[1, 20, 1] = logits[1, 21, 0] = 9.0  # in the wrong order
    logits[2, 2] = logits[2, 43] = 99.0  # not in the context
    top, first, last = predictions("span", jnp.asarray(logits), batch)
    for i in range(3):
        inside = range(batch["second"][i], batch["lengths"][i] - 1)
        best = max(
            (logits[i, a, 0] + logits[i, b, 1], a, b)
            for a in inside
            for b in inside
            if a <= b < a + LONGEST_ANSWER
        )
        assert (top[i], first[i], last[i]) == best


def test_losses_are_those_of_the_formulas():
    logits, batch = spans()
    expected = []
    for i in range(3):
        places = [0, *range(batch["second"][i], batch["lengths"][i] - 1)]
        logs = log_softmax(logits[i, places].astype(np.float64), axis=0)
        expected.append(-np.mean([logs[places.index(batch["labels"][i, j]), j] for j in (0, 1)]))
    found = losses("span", jnp.asarray(logits), batch)
    np.testing.assert_allclose(found, expected, rtol=32 * EPS32)
    x, labels = logits[0, :4], np.array([1, 0, 0, 1], np.int32)
    logs = log_softmax(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(
        losses("classes", jnp.asarray(x), {"labels": labels}),
        -logs[range(4), labels],
        rtol=32 * EPS32,
    )
    assert predictions("classes", jnp.asarray(x), {}).tolist() == x.argmax(1).tolist()
    scores = losses("score", jnp.array([[1.5], [2.0]]), {"labels": np.float32([1.0, 5.0])})
    assert scores.tolist() == [0.25, 9.0]
    assert jax.grad(lambda x: losses("span", x, batch).sum())(jnp.asarray(logits))[2, 2, 0] == 0


def test_the_best_window_answers():
    offsets = np.zeros((3, 8, 2), np.int32)
    offsets[0, 4], offsets[1, 2], offsets[2, 1] = (0, 3), (3, 7), (0, 5)
    blank = np.zeros((3, 8), np.int32)
    lengths = np.full(3, 8, np.int32)
    features = Features(blank, lengths, lengths, blank, np.int32([0, 0, 1]), offsets)
    examples = [
        Example(("q", "one two"), answers=((4, "two"),)),
        Example(("q", "three"), answers=((0, "thre"),)),
    ]
    predicted = np.float32([1, 2, -5]), np.int32([4, 2, 1]), np.int32([4, 2, 1])
    assert best_answers(examples, features, *predicted) == ["two", "three"]
    assert score(TASKS["squad"], examples, features, predicted) == {"f1": 0.5, "exact_match": 0.5}


def test_batches_hold_every_number_once():
    for count, size in ((10, 4), (8, 4), (3, 4)):
        rows = list(batches(count, size, np.random.default_rng(0)))
        assert {len(row) for row in rows} == {size}
        numbers = np.concatenate(rows)
        assert sorted(numbers[numbers != PADDING]) == list(range(count))
        assert np.concatenate(list(batches(count, size)))[:count].tolist() == list(range(count))
    order = np.random.default_rng(0)
    epochs = [np.concatenate(list(batches(100, 10, order))).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1] != list(range(100)) != epochs[0]


def test_padded_rows_do_not_count_and_every_step_has_its_own_dropout():
    def apply(variables, input_ids, token_type_ids, lengths, *, deterministic, rngs):
        assert not deterministic
        noise = jax.random.normal(rngs["dropout"], ()) * variables["masks"]
        return (variables["params"]["w"] * lengths + noise)[:, None].astype(jnp.float32)

    lengths = np.array([1, 2, 3, 4], np.int32)
    data = {
        "input_ids": np.zeros((4, 4), np.int32),
        "second": lengths,
        "lengths": lengths,
        "labels": np.float32([0, 9, 5, 9]),
    }
    step = make_train_step("score")

    def state(noise):
        options = {
            "params": {"w": jnp.float32(2)},
            "masks": jnp.float32(noise),
            "tx": optax.sgd(0.5),
        }
        return TrainState.create(apply_fn=apply, **options)

    key, rows = jax.random.key(0), np.int32([0, 2, PADDING, PADDING])
    after, loss = step(state(0), data, rows, key)
    assert loss == ((2 * 1 - 0) ** 2 + (2 * 3 - 5) ** 2) / 2
    assert after.params["w"] == 2 - 0.5 * (2 * 2 * 1 + 2 * 1 * 3) / 2
    first, second = (step(state(1).replace(step=jnp.int32(i)), data, rows, key)[1] for i in (0, 1))
    assert first != second
