"""The benchmark of text from trained models: what is counted, and the report."""

import argparse
import json

import jax
import pytest

from benchmarks import generation, report_inference
from slope_jax import models
from slope_jax.generate import stream
from train import serving


def served(sparsity: str) -> serving.Served:
    model = models.build("gpt2-nano", vocab_size=64, sparsity=sparsity)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    return serving.Served(
        model, variables, None, {"vocab_size": 64, "adapters": sparsity == "2:4", "step": 3}
    )


@pytest.fixture(scope="module")
def both():
    return {"slope": served("2:4"), "dense": served("dense")}


def test_numbers_are_those_of_the_clock(both, monkeypatch):
    """A clock on which one look takes a second for sparse and two for dense, none in between."""
    calls = []
    times = {"slope": 0.25, "dense": 0.5}

    def once(each, prompts, new_tokens):
        name = next(name for name, other in both.items() if other is each)
        calls.append((name, prompts.shape, new_tokens))
        slow = 100 if len(calls) <= 2 else 1  # compiling
        return generation.Timing(slow * times[name], slow * 8 * times[name])

    monkeypatch.setattr(generation, "once", once)
    row = generation.measure(both, batch=3, length=5, new_tokens=9, rounds=2)
    order = ("slope", "dense", "slope", "dense", "dense", "slope")
    assert calls == [(name, (3, 5), 9) for name in order]
    assert row == {
        "batch": 3,
        "prompt": 5,
        "new_tokens": 9,
        "rounds": 2,
        "dense_first_ms": 500,
        "dense_tokens_per_s": 3 * 8 / 4,
        "dense_compiling_s": 450,
        "sparse_first_ms": 250,
        "sparse_tokens_per_s": 3 * 8 / 2,
        "sparse_compiling_s": 225,
        "first_speedup": 2,
        "speedup": 2,
    }


def test_every_chunk_is_looked_at(both, monkeypatch):
    looks = []
    monkeypatch.setattr(generation.time, "perf_counter", lambda: looks.append(1) or len(looks))
    prompts = jax.random.randint(jax.random.key(0), (2, 4), 0, 64)
    timing = generation.once(both["slope"], prompts, 2 * generation.CHUNK + 2)
    assert timing == (1, 1)
    whole = _pieces(both["slope"], prompts)
    assert sum(piece.shape[1] for piece in whole) == 2 * generation.CHUNK + 2

    monkeypatch.setattr(generation, "stream", lambda *a, **k: iter(whole[:-1]))
    with pytest.raises(RuntimeError, match=f"{2 * generation.CHUNK + 1} tokens were made"):
        generation.once(both["slope"], prompts, 2 * generation.CHUNK + 2)


def _pieces(each, prompts):
    count = 2 * generation.CHUNK + 2
    return list(
        stream(each.model, each.variables, prompts, max_new_tokens=count, chunk=generation.CHUNK)
    )


def test_what_is_served_is_told(both):
    told = generation.about(both)
    assert told["dense"]["paths"] == {}
    assert not told["dense"]["adapters"]
    assert sum(told["slope"]["paths"].values()) > 0
    assert told["slope"]["steps"] == 3
    assert told["slope"]["bytes"] < told["dense"]["bytes"]


def test_shapes_of_prompts():
    assert generation._shapes("1x32,8x128") == ((1, 32), (8, 128))
    for wrong in ("", "8", "0x4", "1x2x3", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="BATCHxTOKENS"):
            generation._shapes(wrong)


def test_report(tmp_path):
    assert "benchmarks.generation" in report_inference.generation(tmp_path)
    row = dict.fromkeys(("dense_compiling_s", "sparse_compiling_s"), 1.0)
    row |= {"batch": 8, "prompt": 128, "dense_first_ms": 30.0, "sparse_first_ms": 20.0}
    row |= {"dense_tokens_per_s": 1000.0, "sparse_tokens_per_s": 1500.0}
    row |= {"first_speedup": 1.5, "speedup": 1.5}
    side = {"bytes": 2e6, "adapters": False, "steps": 7}
    record = {
        "benchmark": "generation-gpt2-nano",
        "device": "a device",
        "versions": {"jax": "1", "python": "3"},
        "date": "2026-01-01",
        "commit": "c" * 40,
        "command": "python -m benchmarks.generation",
        "results": [row],
        "models": {"slope": side | {"adapters": True}, "dense": side | {"bytes": 3e6}},
    }
    (tmp_path / "generation-gpt2-nano-a-device.json").write_text(json.dumps(record))
    page = report_inference.generation(tmp_path)
    assert "gpt2-nano after 7 steps (slope 2.0 MB with adapters, dense 3.0 MB)" in page
    assert "| 8 x 128 | 30.0 | 20.0 | 1.50 | 1,000 | 1,500 | 1.50 | 1.0 | 1.0 |" in page
