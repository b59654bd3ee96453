"""prepare: tokenizer, split, cache, damage, full disks, restarts."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from train.data import build, make_dataset, prepare, store
from train.data.segment import sentences
from train.data.tokenizer import load_tokenizer, train_tokenizer

WORDS = np.array((Path(json.__file__).read_text() + Path(logging.__file__).read_text()).split())


def english(count, seed=0):
    """Documents made of the words of two manuals, a few sentences each."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        lines = (rng.choice(WORDS, rng.integers(6, 20)) for _ in range(rng.integers(2, 9)))
        documents.append(" ".join("The " + " ".join(line) + "." for line in lines))
    return documents


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n".join(english(400)))
    return f"text:{path}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


OPTIONS = {"objective": "mlm", "vocab_size": 600, "valid_fraction": 0.1}


def test_tokenizer_training_is_deterministic_and_lossless():
    texts = english(200)
    first, second = (train_tokenizer(iter(texts), "clm", 700).to_json() for _ in range(2))
    assert first == second
    vocabulary = train_tokenizer(iter(texts), "mlm", 700)
    assert vocabulary.size == 700
    sample = texts[0] + " – ümlaut 漢字 🙂\n\ttab"
    assert vocabulary.decode(vocabulary.encode(sample)) == sample
    assert [vocabulary.tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [
        *range(4)
    ]


def test_sentences_encode_as_the_whole_text_does():
    texts = english(50)
    vocabulary = train_tokenizer(iter(texts), "clm", 700)
    for text in [*texts, "\n\n".join(texts), " a.  B\n c. \n\n\n D!x (E) "]:
        pieces = [vocabulary.encode(piece) for piece in sentences(text)]
        assert [*itertools.chain(*pieces)] == vocabulary.encode(text)


def test_text_that_spells_a_special_token_stays_text(text, cache):
    vocabulary = train_tokenizer(english(50), "mlm", 400)
    ids = vocabulary.encode("the [MASK] and [PAD] tokens")
    assert not set(ids) & set(vocabulary.specials.all)
    assert vocabulary.decode(ids) == "the [MASK] and [PAD] tokens"


def test_saved_tokenizer_is_the_trained_one(tmp_path):
    trained = train_tokenizer(english(50), "mlm", 400)
    trained.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json", "mlm")
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.specials == trained.specials
    assert load_tokenizer(tmp_path, "mlm").fingerprint == trained.fingerprint


def test_bert_vocabulary_is_uncased_word_piece(tmp_path):
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "mod", "##ules", "cafe", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    vocabulary = load_tokenizer(tmp_path / "vocab.txt", "mlm")
    ids = vocabulary.encode("The Modules Café zzz.")
    assert [entries[i] for i in ids] == ["the", "mod", "##ules", "cafe", "[UNK]", "."]
    assert vocabulary.specials.all == (0, 1, 2, 3, 4)
    assert vocabulary.size == len(entries)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "no such file; give a tokenizer.json or a vocab.txt"),
        ("bad.json", "{}", "not a tokenizer.json of the tokenizers library"),
        ("vocab.txt", "the\nof\n", r"the vocab.txt lacks \[PAD\], \[UNK\]"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na", "repeats an entry"),
        ("plain.json", "plain", "has no token for pad, which objective mlm needs: add one of"),
    ],
)
def test_bad_tokenizers_are_explained(tmp_path, name, content, message):
    if content == "plain":
        content = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer .*{name}.*{message}"):
        load_tokenizer(tmp_path / name, "mlm")


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_store_holds_the_documents(text, cache, objective, tmp_path):
    corpus = prepare(
        text, **(OPTIONS | {"objective": objective}), cache_dir=cache, run_dir=tmp_path
    )
    originals = Path(text.partition(":")[2]).read_text().split("\n\n")
    found = {"train": [], "valid": []}
    for split, tokens in (("train", corpus.train), ("valid", corpus.valid)):
        assert set(tokens.documents.tolist()) <= set(tokens.sentences.tolist())
        assert tokens.documents[-1] == tokens.sentences[-1] == tokens.num_tokens
        assert (np.diff(tokens.sentences) > 0).all()
        for start, stop in zip(tokens.documents[:-1], tokens.documents[1:], strict=True):
            ids = tokens.tokens[start:stop].tolist()
            if objective == "clm":
                assert ids.pop() == corpus.tokenizer.specials.end_of_text
            found[split].append(corpus.tokenizer.decode(ids))
    held_out = [t for t in originals if build.held_out_score(t) < 0.1]
    assert found["valid"] == held_out
    assert found["train"] == [t for t in originals if t not in held_out]
    assert corpus.stats["train"]["documents"] == len(found["train"])
    assert corpus.stats["train"]["characters"] == sum(map(len, found["train"]))
    assert (tmp_path / "tokenizer.json").read_text() == corpus.tokenizer.to_json()
    assert corpus.vocab_size == 600


def test_split_does_not_depend_on_order(tmp_path, cache):
    texts = english(60, seed=4)
    held_out = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(order))
        corpus = prepare(f"text:{tmp_path}/{name}.txt", **OPTIONS, cache_dir=cache)
        ids, edges = corpus.valid.tokens, corpus.valid.documents
        held_out.append(
            {corpus.tokenizer.decode(ids[a:b].tolist()) for a, b in itertools.pairwise(edges)}
        )
    assert held_out[0] == held_out[1]
    assert held_out[0]


def test_tokenizer_never_sees_the_held_out_documents(tmp_path):
    """Other held-out documents, the same tokenizer."""
    texts = english(60)
    jsons = []
    for name, extra in (("a", []), ("b", english(300, seed=8))):
        held_out = [text for text in extra if build.held_out_score(text) < 0.1]
        (tmp_path / f"{name}.txt").write_text("\n\n".join([*held_out, *texts]))
        corpus = prepare(f"text:{tmp_path}/{name}.txt", **OPTIONS, cache_dir=tmp_path / "cache")
        jsons.append(corpus.tokenizer.to_json())
    assert len(held_out) > 10
    assert jsons[0] == jsons[1]


def test_workers_give_what_one_process_gives(tmp_path, text, monkeypatch):
    """Also across ranges, compressed files and several sources at once."""
    monkeypatch.setattr(build, "IN_PROCESS_BYTES", 0)
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in english(9, 1))
    )
    spec = f"{text},text:{tmp_path}/*.jsonl"
    one = prepare(spec, **OPTIONS, cache_dir=tmp_path / "one", workers=1)
    two = prepare(spec, **OPTIONS, cache_dir=tmp_path / "two", workers=2)
    assert one.fingerprint == two.fingerprint
    np.testing.assert_array_equal(one.train.tokens, two.train.tokens)
    assert one.train.num_documents + one.valid.num_documents == 409
    edges = two.train.documents[-3:].tolist()
    last = [two.tokenizer.decode(two.train.tokens[a:b]) for a, b in itertools.pairwise(edges)]
    assert last == [t for t in english(9, 1) if build.held_out_score(t) >= 0.1][-2:]
    assert not [p for p in (tmp_path / "two").iterdir() if p.name.startswith(".")]


def test_second_call_reads_the_cache(text, cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    first = prepare(text, **OPTIONS, cache_dir=cache)
    caplog.clear()
    monkeypatch.setattr(build, "build_store", None)
    monkeypatch.setattr("train.data.corpus.train_tokenizer", None)
    second = prepare(text, **OPTIONS, cache_dir=cache)
    assert second.fingerprint == first.fingerprint
    assert "read from the cache" in caplog.text
    assert "from the cache" in caplog.text.splitlines()[0]


def test_changed_files_make_a_new_store_but_a_run_keeps_its_own(tmp_path, caplog):
    path, run = tmp_path / "a.txt", tmp_path / "run"
    path.write_text("\n\n".join(english(50)))
    options = OPTIONS | {"cache_dir": tmp_path / "cache"}
    begun = prepare(f"text:{path}", **options, run_dir=run)
    path.write_text("\n\n".join(english(60, seed=5)))
    assert prepare(f"text:{path}", **options).fingerprint != begun.fingerprint
    kept = prepare(f"text:{path}", **options, run_dir=run)
    assert kept.fingerprint == begun.fingerprint
    assert "this run keeps the tokens" in caplog.text
    other = prepare(f"text:{path}", **(options | {"valid_fraction": 0.3}), run_dir=run)
    assert other.train.num_documents + other.valid.num_documents == 60


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "train.tokens").write_bytes((d / "train.tokens").read_bytes()[:-2]),
        lambda d: flip(d / "train.tokens"),
        lambda d: flip(d / "valid.sentences"),
        lambda d: (d / "valid.documents").unlink(),
        lambda d: (d / "meta.json").write_text("{}"),
        lambda d: (d / "meta.json").write_text('{"splits'),
        lambda d: (d / "meta.json").unlink(),
    ],
)
def test_damaged_store_is_built_again(text, tmp_path, caplog, damage):
    good = prepare(text, **OPTIONS, cache_dir=tmp_path)
    tokens = np.array(good.train.tokens)
    damage(good.directory)
    again = prepare(text, **OPTIONS, cache_dir=tmp_path)
    assert "is damaged, building it again" in caplog.text
    assert again.fingerprint == good.fingerprint
    np.testing.assert_array_equal(again.train.tokens, tokens)


def test_damaged_tokenizer_cache_is_trained_again(text, tmp_path, caplog):
    good = prepare(text, **OPTIONS, cache_dir=tmp_path)
    (path,) = tmp_path.glob("tokenizer-*.json")
    path.write_text(path.read_text()[:1000])
    assert prepare(text, **OPTIONS, cache_dir=tmp_path).fingerprint == good.fingerprint
    assert "training again" in caplog.text


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_full_disk_is_explained_and_leaves_nothing(text, tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.SplitWriter, "append_part", full)
    with pytest.raises(OSError, match=r"no space left on .*data cache .*--cache-dir") as caught:
        prepare(text, **OPTIONS, cache_dir=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    left = [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert [name.partition("-")[0] for name in left] == ["tokenizer"]


def test_unwritable_cache_is_explained(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache .*/file/cache cannot be written .*--cache-dir"):
        prepare(text, **OPTIONS, cache_dir=tmp_path / "file" / "cache")


KILLED = """
import sys, time
from train.data import build, prepare, store
if __name__ == "__main__":
    build.IN_PROCESS_BYTES = 0
    store.SplitWriter.append_part = lambda *args: time.sleep(600)
    prepare(sys.argv[1], objective="clm", vocab_size=600, cache_dir=sys.argv[2], workers=2)
"""


def test_killed_build_leaves_no_store_and_no_workers(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(english(100, i)))
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    cache, spec = tmp_path / "cache", f"text:{tmp_path}/*.txt"
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, script, spec, cache], env=environment)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".tokens-*/part-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cache.glob(".tokens-*"))
    assert not [p for p in cache.glob("tokens-*") if p.is_dir()]
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlived the process they worked for"
        time.sleep(0.05)
    corpus = prepare(spec, objective="clm", vocab_size=600, cache_dir=cache)
    assert corpus.train.num_documents > 500
    assert not list(cache.glob(".tokens-*"))


def children(pid):
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc to see the workers")
    return [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and f"\nPPid:\t{pid}\n" in (p / "status").read_text()
    ]


def test_processes_that_start_together_build_once(text, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        logs = pool.starmap(_prepare_logged, [(text, tmp_path)] * 2)
    assert sorted("built in" in log for log in logs) == [False, True]


def _prepare_logged(text, cache):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("train.data").addHandler(handler)
    logging.getLogger("train.data").setLevel(logging.INFO)
    prepare(text, **OPTIONS, cache_dir=cache)
    return "\n".join(records)


def test_huge_document_is_bounded_work(tmp_path):
    """One document of 1.5 MB without a blank line, next to small ones."""
    line = " ".join(english(3)) + "\n"
    (tmp_path / "a.txt").write_text(
        line * (1_500_000 // len(line)) + "\n\n".join(["", *english(80)])
    )
    corpus = prepare(f"text:{tmp_path}/a.txt", **(OPTIONS | {"cache_dir": tmp_path / "cache"}))
    assert corpus.stats["train"]["characters"] > 1_400_000 or (
        corpus.stats["valid"]["characters"] > 1_400_000
    )


def test_tiny_vocabulary_is_refused(text, cache):
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small: .* more than 261"):
        prepare(text, **(OPTIONS | {"vocab_size": 200}), cache_dir=cache)


@pytest.mark.parametrize(
    ("content", "fraction", "message"),
    [
        (" \n \n", 0.1, "the data holds no documents"),
        ("one two three four five six", 0.1, "holds out 0 of 1 documents; .* give more documents"),
        ("\n\n".join(english(40)), 1e-9, "holds out 0 of 40 .*--valid-fraction=0.* would do"),
        ("\n\n".join(english(40)), 0.9999, "leaves 0 of 40 documents for training"),
        ("x", 0.0, r"valid_fraction=0.0 must lie between 0 and 1"),
    ],
)
def test_empty_splits_are_explained(tmp_path, content, fraction, message):
    (tmp_path / "a.txt").write_text(content)
    options = OPTIONS | {"valid_fraction": fraction, "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prepare(f"text:{tmp_path}/a.txt", **options)
    left = [
        p for p in tmp_path.glob("cache/*") if p.name.startswith((".", "tokens")) and p.is_dir()
    ]
    assert not left


def test_suggested_fraction_works(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(english(40)))
    options = OPTIONS | {"cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match="would do") as caught:
        prepare(f"text:{tmp_path}/a.txt", **(options | {"valid_fraction": 1e-9}))
    fraction = float(str(caught.value).partition("--valid-fraction=")[2].split()[0])
    corpus = prepare(f"text:{tmp_path}/a.txt", **(options | {"valid_fraction": fraction}))
    assert corpus.valid.num_documents == 2


def test_bad_tokenizer_is_reported_before_the_source_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"tokenizer .*none.json: no such file"):
        prepare(f"text:{tmp_path}/a.txt", objective="mlm", tokenizer=tmp_path / "none.json")


def test_prepared_corpus_feeds_both_objectives(text, cache):
    for objective in ("mlm", "clm"):
        corpus = prepare(text, **(OPTIONS | {"objective": objective}), cache_dir=cache)
        batch = make_dataset(corpus.train, objective=objective, seq_len=32, batch_size=4)[0]
        assert batch["input_ids"].max() < corpus.vocab_size
