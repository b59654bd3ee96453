"""Files with anything in them: an error that says what is wrong, never another one, never a hang."""

import contextlib
import gzip
import json
import lzma

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from slope_jax.models import hf_files
from train import integrity, metrics
from train.config import Config, from_json, to_json
from train.data.sources import TextSource
from train.data.tokenizer import load_tokenizer, train_tokenizer

few = hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """The bytes cut off, with some flipped, or with others in between."""
    data = bytearray(good[: draw(st.integers(0, len(good)))] if draw(st.booleans()) else good)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    texts = ["the quick brown fox jumps over the lazy dog"] * 3
    return train_tokenizer(texts, "clm", 300).to_json().encode()


@hypothesis.given(st.data())
@few
def test_tokenizers(tmp_path, tokenizer, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data.draw(damaged(tokenizer)))
    with contextlib.suppress(ValueError):
        load_tokenizer(path, "clm").encode("a fox")


@hypothesis.given(st.data())
@few
def test_vocabularies(tmp_path, data):
    path = tmp_path / "vocab.txt"
    good = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "##es"]).encode()
    path.write_bytes(data.draw(damaged(good)))
    with contextlib.suppress(ValueError):
        load_tokenizer(path, "mlm").encode("a fox")


@hypothesis.given(st.data())
@few
def test_safetensors(tmp_path, data):
    import safetensors.numpy

    good = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2))})
    (tmp_path / "model.safetensors").write_bytes(data.draw(damaged(good)))
    with contextlib.suppress(ValueError):
        for tensor in hf_files.open_tensors(tmp_path).values():
            tensor.read()


@hypothesis.given(json_values)
@few
def test_indices_of_safetensors(tmp_path, value):
    path = tmp_path / "model.safetensors.index.json"
    for content in (value, {"weight_map": value}, {"weight_map": {"a": value}}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index"):
            hf_files.open_tensors(tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_texts(tmp_path, kind, pack):
    good = b"one\n\ntwo\n" if kind == ".txt" else b'{"text": "one"}\n{"text": "two"}\n'
    suffix = {bytes: "", gzip.compress: ".gz", lzma.compress: ".xz"}[pack]
    path = tmp_path / f"a{kind}{suffix}"

    @hypothesis.given(damaged(pack(good)))
    @few
    def check(content):
        path.write_bytes(content)
        try:
            units = TextSource(str(path)).units(None, 1)
            assert all(isinstance(text, str) for u in units for text in u.documents())
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017

    check()


def test_metrics_cut_at_any_byte(tmp_path):
    path = tmp_path / metrics.METRICS_FILE
    whole = [{"step": i, "loss": i / 3} for i in range(1, 5)]
    data = "".join(json.dumps(line) + "\n" for line in whole).encode()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        metrics.truncate(path, 9)
        kept = metrics.read(path)
        # A line counts from its last brace on, be there an end of line or not.
        assert (
            kept
            == whole[
                : data[: end + 1].count(b"}\n")
                if data[:end].endswith(b"}")
                else data[:end].count(b"\n")
            ]
        )
        assert path.read_bytes() == b"".join(json.dumps(x).encode() + b"\n" for x in kept)


@hypothesis.given(st.lists(json_values), st.binary(max_size=30))
@few
def test_metrics_of_anything(tmp_path, values, rest):
    path = tmp_path / metrics.METRICS_FILE
    path.write_bytes("\n".join(json.dumps(v) for v in values).encode() + b"\n" + rest)
    metrics.truncate(path, 5)
    assert all(isinstance(line["step"], int) for line in metrics.read(path))


@hypothesis.given(json_values)
@few
def test_manifests(tmp_path, value):
    (tmp_path / "file").write_text("content")
    for content in (value, {"files": value}, {"files": {"file": value}}):
        (tmp_path / integrity.MANIFEST).write_text(json.dumps(content))
        empty = content in ({"files": {}}, {"files": {}} | {})
        assert integrity.problems(tmp_path) or empty


def test_manifests_look_at_nothing_outside_of_their_folder(tmp_path):
    for name in ("../secret", "/etc/passwd", "a/../../secret"):
        entry = {"files": {name: {"bytes": 1, "sha256": ""}}}
        (tmp_path / integrity.MANIFEST).write_text(json.dumps(entry))
        (found,) = integrity.problems(tmp_path)
        assert "outside of the folder" in found


@hypothesis.given(st.sampled_from(sorted(to_json(Config()))), json_values)
@hypothesis.settings(max_examples=150)
def test_configurations_of_checkpoints(name, value):
    with contextlib.suppress(ValueError):
        config = from_json(to_json(Config()) | {name: value})
        assert from_json(to_json(config)) == config or value != value
