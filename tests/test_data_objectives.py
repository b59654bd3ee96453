"""Batches: masking, pairs, causal blocks, determinism, sharding, resuming, evaluation."""

import json
import pickle

import numpy as np
import pytest

from train.data import TokenStore, batches_from, make_dataset
from train.data import store as stores
from train.data.objectives import chunk_documents, random_bits

PAD, UNK, CLS, SEP, MASK, END = range(6)
VOCAB = 50_000
RESERVED = 35_000  # From here on ids are special too; the documents do not reach them.


def write_store(directory, objective, documents):
    """A store from documents given as lists of sentences given as lists of tokens."""
    directory.mkdir(parents=True)
    entries = {}
    for split in ("train", "valid"):
        writer = stores.SplitWriter(directory, split, "<u2")
        for sentences in documents:
            writer.add(np.concatenate(sentences), np.cumsum([len(s) for s in sentences]))
        writer.close()
        files = {name: stores.checksum(directory / f"{split}.{name}") for name in stores.FILES}
        entries[split] = {"stats": {}, "files": files}
    specials = {"all": [PAD, UNK, CLS, SEP, MASK, END, *range(RESERVED, VOCAB)]}
    specials |= {"pad": PAD, "cls": CLS, "sep": SEP, "mask": MASK, "end_of_text": END}
    meta = {"objective": objective, "vocab_size": VOCAB, "specials": specials, "dtype": "<u2"}
    (directory / "meta.json").write_text(json.dumps(meta | {"splits": entries}))
    return TokenStore(directory, "train")


@pytest.fixture(scope="module")
def documents():
    """Ninety documents whose tokens are all different: a token tells its place in the store."""
    rng = np.random.default_rng(0)
    tokens, documents = iter(range(6, RESERVED)), []
    for _ in range(90):
        lengths = rng.integers(4, 40, size=rng.integers(1, 30))
        documents.append([np.array([next(tokens) for _ in range(n)]) for n in lengths])
    return documents


@pytest.fixture(scope="module")
def mlm_store(documents, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("mlm") / "store", "mlm", documents)


@pytest.fixture(scope="module")
def clm_store(documents, tmp_path_factory):
    closed = [[*sentences[:-1], np.append(sentences[-1], END)] for sentences in documents]
    return write_store(tmp_path_factory.mktemp("clm") / "store", "clm", closed)


def mlm_batches(store, count=40, **options):
    options = {"seq_len": 64, "batch_size": 32, "max_predictions": 9, "seed": 7} | options
    dataset = make_dataset(store, objective="mlm", **options)
    return [dataset[i] for i in range(count)]


def unmasked(batch):
    """Input ids with the predicted tokens put back."""
    ids = batch["input_ids"].copy()
    rows, columns = np.nonzero(batch["mlm_weights"])
    ids[rows, batch["mlm_positions"][rows, columns]] = batch["mlm_labels"][rows, columns]
    return ids


def test_mlm_batch_shapes_and_dtypes(mlm_store):
    (batch,) = mlm_batches(mlm_store, 1)
    found = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert found == {
        "input_ids": ((32, 64), "int32"),
        "token_type_ids": ((32, 64), "int32"),
        "lengths": ((32,), "int32"),
        "mlm_positions": ((32, 9), "int32"),
        "mlm_labels": ((32, 9), "int32"),
        "mlm_weights": ((32, 9), "float32"),
        "nsp_labels": ((32,), "int32"),
    }


def test_pairs_have_the_bert_layout_and_come_from_the_documents(mlm_store):
    store = mlm_store
    place = {token: index for index, token in enumerate(store.tokens.tolist())}
    document_of = np.repeat(np.arange(store.num_documents), np.diff(store.documents))
    for batch in mlm_batches(store):
        for ids, types, length, label in zip(
            unmasked(batch),
            batch["token_type_ids"],
            batch["lengths"],
            batch["nsp_labels"],
            strict=True,
        ):
            assert ids[0] == CLS
            assert ids[length - 1] == SEP
            assert (ids[length:] == PAD).all()
            first, second = np.flatnonzero(ids == SEP)
            assert types.tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * (
                64 - length
            )
            a = [place[t] for t in ids[1:first].tolist()]
            b = [place[t] for t in ids[first + 1 : second].tolist()]
            assert len(a) >= 1
            assert len(b) >= 1
            assert a == list(range(a[0], a[-1] + 1))
            assert b == list(range(b[0], b[-1] + 1))
            same = document_of[a[0]] == document_of[b[0]]
            assert same == (label == 0)
            if label == 0:
                assert b[0] == a[-1] + 1


def test_half_of_the_pairs_are_random(mlm_store):
    labels = np.concatenate([b["nsp_labels"] for b in mlm_batches(mlm_store, 120)])
    # Five standard deviations of a fair coin.
    assert abs(labels.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(labels))


def test_lengths_do_not_tell_the_label(mlm_store):
    batches = mlm_batches(mlm_store, 300, seq_len=256)
    labels, lengths = (np.concatenate([b[k] for b in batches]) for k in ("nsp_labels", "lengths"))
    groups = [lengths[labels == label] for label in (0, 1)]
    error = np.sqrt(sum(g.var() / len(g) for g in groups))
    assert abs(groups[0].mean() - groups[1].mean()) < 4 * error


def test_masking_rates_and_limits(mlm_store):
    masked = kept = random = 0
    for batch in mlm_batches(mlm_store, 120):
        text = unmasked(batch)
        maskable = (text > END).sum(axis=1)
        count = batch["mlm_weights"].sum(axis=1)
        np.testing.assert_array_equal(count, np.clip(np.rint(0.15 * maskable), 1, 9))
        real = batch["mlm_weights"] == 1
        assert (batch["mlm_labels"][real] > END).all()
        assert (batch["mlm_labels"][~real] == 0).all()
        steps = np.diff(np.where(real, batch["mlm_positions"], 64), axis=1)
        assert ((steps > 0) | ~real[:, 1:]).all()
        shown = np.take_along_axis(batch["input_ids"], batch["mlm_positions"], axis=1)[real]
        labels = batch["mlm_labels"][real]
        masked += (shown == MASK).sum()
        kept += (shown == labels).sum()
        replaced = shown[(shown != MASK) & (shown != labels)]
        random += len(replaced)
        assert ((replaced > END) & (replaced < RESERVED)).all()
        untouched = np.ones_like(text, bool)
        rows, columns = np.nonzero(real)
        untouched[rows, batch["mlm_positions"][rows, columns]] = False
        np.testing.assert_array_equal(batch["input_ids"][untouched], text[untouched])
    total = masked + kept + random
    for share, expected in ((masked, 0.8), (kept, 0.1), (random, 0.1)):
        assert abs(share / total - expected) < 5 * np.sqrt(expected * (1 - expected) / total)


def test_masks_are_new_each_time_an_example_returns(mlm_store):
    dataset = make_dataset(mlm_store, objective="mlm", seq_len=64, batch_size=1, seed=0)
    bounds, _ = chunk_documents(mlm_store.sentences, mlm_store.documents, 61)
    examples = len(bounds) - 1
    first = [dataset[i] for i in range(examples)]
    second = [dataset[i] for i in range(examples, 2 * examples)]
    edges = mlm_store.sentences[bounds]
    chunk = lambda b: int(np.searchsorted(edges, unmasked(b)[0, 1] - 6, "right"))  # noqa: E731
    orders = [[chunk(b) for b in epoch] for epoch in (first, second)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, examples + 1))
    again = dict(zip(orders[1], second, strict=True))
    same = [
        np.array_equal(b["mlm_positions"], again[c]["mlm_positions"])
        for b, c in zip(first, orders[0], strict=True)
    ]
    assert np.mean(same) < 0.2


@pytest.mark.parametrize("budget", [4, 13, 61, 509])
def test_chunks_tile_the_documents_with_whole_sentences(mlm_store, budget):
    sentences, documents = mlm_store.sentences, mlm_store.documents
    bounds, first_chunk = chunk_documents(sentences, documents, budget)
    assert bounds[0] == 0
    assert bounds[-1] == len(sentences) - 1
    assert (np.diff(bounds) > 0).all()
    np.testing.assert_array_equal(sentences[bounds[first_chunk]], documents)
    sizes = np.diff(sentences[bounds])
    assert (sizes[np.diff(bounds) > 1] <= budget).all()
    # Greedy: the first sentence of the next chunk of the document would not have fitted.
    following = np.setdiff1d(np.arange(1, len(bounds) - 1), first_chunk)
    overfull = sentences[bounds[following] + 1] - sentences[bounds[following - 1]]
    assert (overfull > budget).all()


def test_clm_blocks_are_the_stream_with_shifted_labels(clm_store):
    dataset = make_dataset(clm_store, objective="clm", seq_len=32, batch_size=4, seed=3)
    blocks = (clm_store.num_tokens - 1) // 32
    stream = clm_store.tokens.astype(np.int32)
    seen = []
    for i in range(blocks):
        batch = dataset[i]
        assert {(v.shape, v.dtype.name) for v in batch.values()} == {((4, 32), "int32")}
        for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = inputs[inputs > END]
            at = int(np.flatnonzero(stream == text[0])[0]) - int(np.argmax(inputs > END))
            np.testing.assert_array_equal(inputs, stream[at : at + 32])
            np.testing.assert_array_equal(labels, stream[at + 1 : at + 33])
            seen.append(at // 32)
    # Four epochs: every block once in each.
    for epoch in range(4):
        assert sorted(seen[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))
    assert seen[:blocks] != seen[blocks : 2 * blocks]
    assert (stream == END).sum() == clm_store.num_documents


def test_bits_belong_to_places(mlm_store):
    whole = random_bits(5, 100, 64, 77)
    np.testing.assert_array_equal(whole[20:30], random_bits(5, 120, 10, 77))
    assert not np.array_equal(whole, random_bits(6, 100, 64, 77))
    assert len(np.unique(whole)) > 0.99 * whole.size


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_batches_depend_on_seed_and_index_alone(objective, mlm_store, clm_store):
    store = mlm_store if objective == "mlm" else clm_store
    options = {"objective": objective, "seq_len": 32, "batch_size": 8}
    dataset = make_dataset(store, seed=1, **options)
    ahead = [dataset[i] for i in (900, 5, 0)]
    again = make_dataset(store, seed=1, **options)
    for index, batch in zip((900, 5, 0), ahead, strict=True):
        assert_same(batch, again[index])
    other = make_dataset(store, seed=2, **options)
    assert not np.array_equal(other[0]["input_ids"], ahead[2]["input_ids"])


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_processes_share_the_same_global_batch(objective, mlm_store, clm_store):
    store = mlm_store if objective == "mlm" else clm_store
    options = {"objective": objective, "seq_len": 32, "batch_size": 12, "seed": 1}
    whole = make_dataset(store, **options)
    parts = [make_dataset(store, process_index=p, process_count=3, **options) for p in range(3)]
    for index in (0, 41):
        joined = [part[index] for part in parts]
        assert_same(
            whole[index], {k: np.concatenate([part[k] for part in joined]) for k in joined[0]}
        )


def test_iteration_resumes_from_one_integer(mlm_store):
    dataset = make_dataset(mlm_store, objective="mlm", seq_len=32, batch_size=8, seed=1)
    uninterrupted = batches_from(dataset)
    for _ in range(7):
        next(uninterrupted)
    resumed = batches_from(dataset, 7, threads=1)
    for _ in range(3):
        assert_same(next(uninterrupted), next(resumed))


def test_evaluation_is_finite_fixed_and_without_duplicates(mlm_store, clm_store):
    options = {"seq_len": 32, "batch_size": 16, "train": False}
    first, second = (
        [*batches_from(make_dataset(mlm_store, objective="mlm", seed=seed, **options))]
        for seed in (1, 2)
    )
    bounds, _ = chunk_documents(mlm_store.sentences, mlm_store.documents, 29)
    assert len(first) == (len(bounds) - 1) // 16
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    clm = make_dataset(clm_store, objective="clm", **options)
    rows = np.concatenate([clm[i]["input_ids"] for i in range(len(clm))])
    assert len(np.unique(rows, axis=0)) == len(rows) == (clm_store.num_tokens - 1) // 32 // 16 * 16


def test_small_evaluation_set_gives_one_smaller_batch(clm_store):
    blocks = (clm_store.num_tokens - 1) // 2048
    dataset = make_dataset(clm_store, objective="clm", seq_len=2048, batch_size=512, train=False)
    assert len(dataset) == 1
    assert len(dataset[0]["input_ids"]) == blocks


def test_store_pickles_as_its_path(mlm_store):
    copy = pickle.loads(pickle.dumps(mlm_store))
    np.testing.assert_array_equal(copy.tokens, mlm_store.tokens)
    assert len(pickle.dumps(mlm_store)) < 1000


def test_text_without_ordinary_tokens_predicts_nothing(tmp_path):
    store = write_store(tmp_path / "s", "mlm", [[np.full(20, UNK)] for _ in range(5)])
    batch = make_dataset(store, objective="mlm", seq_len=16, batch_size=4)[0]
    assert batch["mlm_weights"].sum() == 0
    assert (batch["input_ids"] != MASK).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nsp"}, "'nsp' is not one of mlm, clm"),
        ({"objective": "clm"}, "prepared for 'mlm'"),
        ({"batch_size": 9, "process_count": 2}, "batch_size=9 must be a positive multiple"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must be in"),
        ({"seq_len": 7}, "seq_len=7.*at least 8"),
        ({"seq_len": 1 << 20}, "seq_len=1048576 is too long.*only [0-9]+ tokens"),
        ({"max_predictions": 0}, "max_predictions=0 must be from 1 to"),
        ({"seed": -1}, "seed=-1 must"),
    ],
)
def test_bad_arguments_are_named(mlm_store, options, message):
    options = {"objective": "mlm", "seq_len": 64, "batch_size": 8} | options
    with pytest.raises(ValueError, match=message):
        make_dataset(mlm_store, **options)


def test_pairs_need_two_documents(tmp_path):
    store = write_store(tmp_path / "s", "mlm", [[np.arange(6, 206)]])
    with pytest.raises(ValueError, match=r"train split has 1 document: .* at least two"):
        make_dataset(store, objective="mlm", seq_len=16, batch_size=2)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
