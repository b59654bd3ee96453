"""Specs, text files in every form, TFDS, and what is said about bad ones."""

import gzip
import json
import lzma
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from train.data.sources import TextSource, split_spec, text_units

DOCUMENTS = ["The first document\nhas two lines.", "The second – with ümlauts.", "A third one"]


def write(path, data: bytes):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(data)
    return path


def read(pattern):
    return [text for unit in TextSource(str(pattern)).units(None, 1) for text in unit.documents()]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_documents_of_text_and_of_records(tmp_path, suffix):
    text = "\n\n\n  \n".join(DOCUMENTS).encode()
    write(tmp_path / f"a.txt{suffix}", b"\n\n" + text + b"\n")
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(DOCUMENTS)]
    write(tmp_path / f"b.jsonl{suffix}", ("\n".join([*lines, ""])).encode())
    assert read(tmp_path / f"a.txt{suffix}") == DOCUMENTS
    assert read(tmp_path / f"b.jsonl{suffix}") == DOCUMENTS
    assert read(tmp_path / f"*{suffix or 'l'}")[-3:] == DOCUMENTS


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo", "three"]


def test_invalid_utf8_becomes_the_replacement_character(tmp_path):
    write(tmp_path / "a.txt", b"caf\xe9 au lait\n\nplain")
    write(tmp_path / "b.jsonl", b'{"text": "caf\xe9"}\n{"text": "\\ud800 alone"}\n')
    assert read(tmp_path / "a.txt") == ["caf\ufffd au lait", "plain"]
    assert read(tmp_path / "b.jsonl") == ["caf\ufffd", "\ufffd alone"]


lines = st.lists(st.sampled_from([b"", b" ", b"one", b"two words", b"x" * 30]), max_size=30)


@hypothesis.given(lines, st.integers(1, 40), st.sampled_from([b"\n", b"\r\n"]))
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
def test_ranges_of_a_text_lose_and_share_nothing(tmp_path, parts, size, end):
    path = tmp_path / "a.txt"
    path.write_bytes(end.join(parts))
    (whole,) = text_units(str(path), range_bytes=1 << 20) or [None]
    expected = [*whole.documents()] if whole else []
    units = text_units(str(path), range_bytes=size)
    assert [text for unit in units for text in unit.documents()] == expected
    assert sum(unit.size for unit in units) == path.stat().st_size


@hypothesis.given(st.lists(st.text(max_size=20), max_size=12), st.integers(1, 60))
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
def test_ranges_of_records_lose_and_share_nothing(tmp_path, texts, size):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    units = text_units(str(path), range_bytes=size)
    assert [text for unit in units for text in unit.documents()] == texts


def test_fingerprint_follows_the_files(tmp_path):
    path = write(tmp_path / "a.txt", b"one")
    before = TextSource(str(path)).fingerprint
    assert TextSource(str(path)).fingerprint == before
    write(path, b"two words")
    assert TextSource(str(path)).fingerprint != before


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("docs", [("docs", "")]),
        ("docs:40", [("docs", "40")]),
        ("text:a/**/*.txt", [("text", "a/**/*.txt")]),
        ("docs,text:a+b,c/*.txt", [("docs", ""), ("text", "a+b,c/*.txt")]),
        (
            "tfds:wikipedia/20230601.en:1.0.0#text + docs",
            [("tfds", "wikipedia/20230601.en:1.0.0#text"), ("docs", "")],
        ),
    ],
)
def test_specs(spec, parts):
    assert split_spec(spec) == parts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikipedia", "'wikipedia' .* is unknown.*docs.*tfds:NAME.*text:GLOB"),
        ("docs,book:x", "'book:x' in 'docs,book:x' is unknown"),
        ("", "'' in '' is unknown"),
        ("text", "'text' needs an argument: text:GLOB"),
        ("docs:many", "megabytes to read must be a positive integer"),
    ],
)
def test_bad_specs_list_the_choices(spec, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        split_spec(spec)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\*.txt matches no file"):
        TextSource(str(tmp_path / "nothing*.txt"))
    write(tmp_path / "empty.txt", b"")
    with pytest.raises(ValueError, match=r"empty.txt, which is empty: remove it"):
        TextSource(str(tmp_path / "*.txt"))
    write(tmp_path / "table.csv", b"a,b")
    with pytest.raises(ValueError, match=r"table.csv, which is neither .txt nor .jsonl"):
        TextSource(str(tmp_path / "*.csv"))
    write(tmp_path / "cut.txt.gz", b"text " * 10_000)
    data = (tmp_path / "cut.txt.gz").read_bytes()
    (tmp_path / "cut.txt.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut.txt.gz is not a whole .gz file"):
        read(tmp_path / "cut.txt.gz")
    (tmp_path / "no.txt.xz").write_bytes(b"not compressed")
    with pytest.raises(ValueError, match=r"no.txt.xz is not a whole .xz file"):
        read(tmp_path / "no.txt.xz")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 3}', r"has no string under the key \"text\" \('body', 'id'\)"),
        ('{"text": 5}', r"has no string under the key \"text\""),
        ("[1, 2]", r"has no string under the key \"text\" \(list\)"),
        ('{"text": "x"', "is not JSON"),
    ],
)
@pytest.mark.parametrize("range_bytes", [30, 1 << 20])
def test_bad_records_are_named_by_line(tmp_path, line, message, range_bytes):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good one"}\n' * 6 + line + "\n")
    with pytest.raises(ValueError, match=rf"a.jsonl, line 7: the record {message}"):
        [text for unit in text_units(str(path), range_bytes) for text in unit.documents()]


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets", reason="needs slope-jax[tfds]")


@pytest.fixture
def stories(tfds, tmp_path, monkeypatch):
    """A data set of twelve stories prepared on the spot, where TFDS looks for them."""

    class Stories(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"title": tfds.features.Text(), "text": tfds.features.Text()}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(12):
                yield i, {"title": f"Story {i}", "text": f"Once upon a time there were {i} – cats."}

    Stories(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    original = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name, **kw: original(name, data_dir=str(tmp_path), **kw)
    )
    return "stories"


def test_tfds_documents_without_tensorflow(stories):
    from train.data.tfds_source import TfdsSource

    source = TfdsSource(stories)
    documents = [text for unit in source.units(None, 1) for text in unit.documents()]
    assert sorted(documents) == sorted(
        f"Once upon a time there were {i} – cats." for i in range(12)
    )
    assert source.fingerprint == TfdsSource(stories).fingerprint
    titles = [t for u in TfdsSource(f"{stories}#title").units(None, 1) for t in u.documents()]
    assert sorted(titles) == sorted(f"Story {i}" for i in range(12))
    assert "tensorflow" not in sys.modules
    with pytest.raises(
        ValueError, match=r"no feature 'body'; it has title \(Text\), text \(Text\)"
    ):
        TfdsSource(f"{stories}#body")


def test_tfds_text_feature_is_found_or_asked_for(tfds):
    from train.data.tfds_source import TfdsSource, text_feature

    text, label = tfds.features.Text, tfds.features.ClassLabel
    dict_ = tfds.features.FeaturesDict
    assert text_feature("x", dict_({"body": text(), "y": label(num_classes=2)})) == "body"
    assert text_feature("x", dict_({"title": text(), "text": text()})) == "text"
    with pytest.raises(ValueError, match=r"several text features \(a, b\): name one as tfds:x#FEA"):
        text_feature("x", dict_({"a": text(), "b": text()}))
    with pytest.raises(ValueError, match=r"no text feature.*It has y \(ClassLabel\)"):
        text_feature("x", dict_({"y": label(num_classes=2)}))
    with pytest.raises(ValueError, match="tfds:no_such_set is not a data set that TFDS knows"):
        TfdsSource("no_such_set")
    with pytest.raises(ValueError, match=r"tfds:glue/mrpc has several .*sentence1 \(Text\)"):
        TfdsSource("glue/mrpc")
