"""The benchmark of prefill and decode: what is run, what is made of given times, and the report."""

import argparse
import doctest
import functools
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import inference, report_inference, serving_profile, serving_rows, serving_steps
from benchmarks.serving_rows import Timing
from benchmarks.serving_steps import DECODE, ITERATIONS, PREFILL, Cut, Work
from benchmarks.step_profile import Event, Instruction, tally
from pallas_kernels.samples import CACHE_BYTES
from slope_jax.generate import generate
from slope_jax.models import gpt2, init_cache

TINY = Cut("gpt2-nano", 3, dtype="float32")
TRIAL = ["--models=gpt2-nano", "--batches=1", "--prompts=1x8", "--context=8", "--ranks=0"]
TRIAL += ["--depths=1,2", "--seconds=0", "--rounds=2", "--preheat=0", "--dtype=float32"]


def test_examples_of_the_docstrings():
    for module in (serving_steps, serving_profile):
        assert doctest.testmod(module).failed == 0


@pytest.fixture(scope="module")
def variables():
    return serving_steps.random_variables(TINY)


def test_decoding_is_that_of_generate(variables):
    """A prompt passed over by the model, then the timed loop: the tokens that `generate` gives, and
    the cache of the whole sequence."""
    work, model = Work(DECODE, 2, 8), TINY.ready[0]
    run = serving_steps.lower(TINY, work).compile().start(variables)
    prompts = jax.random.randint(jax.random.key(3), (2, 8), 0, 50257)
    steps = ITERATIONS[DECODE]
    tokens = generate(model, variables, prompts, max_new_tokens=steps + 1).tokens
    whole = {**variables, "cache": run.cache}
    _, filled = model.apply(whole, prompts, mutable=["cache"])
    run.cache, run.ids = filled["cache"], tokens[:, :1]
    run.loops(1)
    run.check()
    np.testing.assert_array_equal(run.ids[:, 0], tokens[:, steps])
    sequence = jnp.concatenate([prompts, tokens[:, :steps]], axis=1)
    whole = {**variables, "cache": init_cache(model.config, 2, work.slots(model.config))}
    _, filled = model.apply(whole, sequence, mutable=["cache"])
    for got, expected in zip(*map(jax.tree.leaves, (run.cache, filled["cache"])), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_fewer_layers_are_among_more(variables):
    few = serving_steps.first_layers(variables, 2)
    shapes = Cut("gpt2-nano", 2, dtype="float32").ready[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), few) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    assert TINY.nbytes == sum(x.nbytes for x in jax.tree.leaves(variables))


def test_weights_of_the_least_depth_are_more_than_the_cache():
    for model in ("opt-13b", "gpt2-small"):
        first, second = serving_steps.depths(model)
        assert first < second
        assert Cut(model, first).layer_bytes > CACHE_BYTES
    layer = (
        12 * 5120**2 * (2 * 0.5 + 1 / 8) + 4 * (9 + 4) * 5120
    )  # values, positions; biases, norms
    more = Cut("opt-13b", 3).layer_bytes - Cut("opt-13b", 2).layer_bytes
    assert more == layer


def options(**other) -> argparse.Namespace:
    given = {"models": ["opt-13b", "gpt2-small"], "prompts": inference.PROMPTS, "context": 512}
    return argparse.Namespace(**given, batches=(1, 16, 4), ranks=[0.0, 0.0156, 0.0625], **other)


def test_what_matters_most_comes_first_and_nothing_twice():
    stages = inference.stages(options())
    first = stages[0]
    assert (first.model, first.ranks) == ("opt-13b", (0.0, 0.0156))
    assert first.works == (
        Work(PREFILL, 1, 2048),
        Work(PREFILL, 8, 512),
        Work(DECODE, 1, 512),
        Work(DECODE, 16, 512),
    )
    points = [(s.model, w, r) for s in stages for w in s.works for r in s.ranks]
    assert len(points) == len(set(points)) == 2 * 7 * 3
    assert {w.prompt for m, w, _ in points if m == "gpt2-small"} == {512, 1024}


def test_whole_models_follow_from_two_depths():
    work = Work(DECODE, 16, 512)
    dense = [Cut("opt-13b", depth, "dense") for depth in (2, 4)]
    sparse = [Cut("opt-13b", depth, rank=0.0156) for depth in (2, 4)]
    ms = dict(zip((*dense, *sparse), (0.6, 1.0, 0.45, 0.65), strict=True))
    timings = {(cut, work): Timing((t, 0.9 * t, 2 * t)) for cut, t in ms.items()}
    row = serving_rows.result(work, dense, sparse, timings)
    assert (row["dense_ms"], row["sparse_ms"]) == (8.2, 4.25)
    assert row["speedup"] == round(8.2 / 4.25, 3)
    assert (row["speedup_per_layer"], row["rank"]) == (2.0, 80)
    assert row["dense_tokens_per_s"] == round(16 / 8.2e-3, 1)
    assert row["weights_exceed_cache"]
    given = (10_000, 30_000), (6_000, 16_000)
    weights = serving_rows.weight_row(dense, sparse, *given)
    assert (weights["dense_bytes"], weights["sparse_bytes"]) == (390_000, 196_000)
    assert (weights["ratio"], weights["source"]) == (round(196 / 390, 4), "device")
    silent = serving_rows.weight_row(dense, sparse, None, None)
    assert (silent["ratio"], silent["source"]) == (silent["shape_ratio"], "shapes")
    assert silent["dense_bytes"] == pytest.approx(2 * 12.853e9, rel=1e-3)
    json.dumps([row, weights, silent])


@pytest.fixture
def few_words(monkeypatch):
    """Most of the time of so few layers is the head's; what is recorded does not depend on it."""
    few = gpt2.VARIANTS["gpt2-nano"] | {"vocab_size": 500}
    monkeypatch.setitem(gpt2.VARIANTS, "gpt2-nano", few)


@pytest.mark.usefixtures("few_words")
def test_a_run_writes_its_record_and_the_report_reads_it(monkeypatch, tmp_path, capsys):
    arguments = ["--models=gpt2-nano", "--batches=2", "--prompts=1x8", "--context=8", "--ranks=8"]
    arguments += [
        "--depths=1,2",
        "--seconds=0",
        "--rounds=2",
        "--preheat=0",
        "--dtype=float32",
        "--part=trial",
    ]
    monkeypatch.setattr("sys.argv", ["inference", *arguments, f"--results={tmp_path}"])
    inference.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.name.startswith("inference-trial-")
    assert [(r["phase"], r["batch"], r["rank"]) for r in record["results"]] == [
        (PREFILL, 1, 8),
        (DECODE, 2, 8),
    ]
    assert not record["failed"]
    assert not record["results"][0]["weights_exceed_cache"]
    assert [row["source"] for row in record["weights"]] == ["shapes"]
    for table in (report_inference.summary, report_inference.times, report_inference.weights):
        text = table(tmp_path)
        assert "gpt2-nano" in text
        assert "python -m benchmarks.inference" in text
    assert "decode 2" in report_inference.summary(tmp_path)
    assert report_inference.times(tmp_path / "none") == report_inference.MISSING
    stopped = {"device": "cpu", "results": [], "weights": []}  # before anything was measured
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "inference.json").write_text(json.dumps(stopped))
    assert report_inference.times(tmp_path / "none") == report_inference.MISSING
    left = ["a: prefill 1 x 8; rank 0", "b: decode 2; rank 8", "c: prefill 1 x 8; rank 0"]
    row = record["results"][0]
    measured = f"gpt2-nano: prefill 1 x {row['prompt']}; rank {row['share']:g}"
    left += [measured, left[0], measured + ", 3"]
    path.write_text(json.dumps(record | {"left_out": left}))
    line = (
        "Left out for want of time: a, c (prefill 1 x 8; rank 0); b (decode 2; rank 8); gpt2-nano"
        f" (prefill 1 x {row['prompt']}; rank 3)."
    )
    assert line in report_inference.summary(tmp_path).splitlines()


@pytest.mark.usefixtures("few_words")
def test_what_fails_is_named_and_the_rest_is_timed(monkeypatch, tmp_path, capsys):
    lower = serving_steps.lower

    def failing(cut, work):
        if work.phase == PREFILL and cut.dense:
            raise RuntimeError("no such kernel")
        return lower(cut, work)

    monkeypatch.setattr(serving_steps, "lower", failing)
    monkeypatch.setattr("sys.argv", ["inference", *TRIAL, f"--results={tmp_path}"])
    with pytest.raises(SystemExit, match="1"):
        inference.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert [r["phase"] for r in record["results"]] == [DECODE]
    assert {f["error"] for f in record["failed"]} == {"RuntimeError: no such kernel"}
    assert "no such kernel" in capsys.readouterr().err


def clock(monotonic):
    """For the benchmark alone, whose limit goes by it."""
    return types.SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter)


@pytest.mark.usefixtures("few_words")
def test_time_that_runs_out_inside_of_a_model_leaves_the_rest_of_it_out(
    monkeypatch, tmp_path, capsys
):
    """The first work takes all of the time; the record has it, and names the other."""
    now, timed = [0.0], inference.timed

    def slow(*args):
        now[0] += 31.0
        return timed(*args)

    monkeypatch.setattr(inference, "time", clock(lambda: now[0]))
    monkeypatch.setattr(inference, "timed", slow)
    monkeypatch.setattr("sys.argv", ["inference", *TRIAL, "--minutes=1", f"--results={tmp_path}"])
    inference.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert [r["phase"] for r in record["results"]] == [PREFILL]
    assert record["left_out"] == ["gpt2-nano: decode 1 x 8; rank 0"]
    said = capsys.readouterr().out
    assert said.startswith("gpt2-nano: prefill 1 x 8, decode 1 x 8; rank 0: begins\n")
    assert "left out for want of time:\n  gpt2-nano: decode 1 x 8; rank 0\n" in said
    assert "gpt2-nano (decode 1 x 8; rank 0)" in report_inference.summary(tmp_path)


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("late", [0, 1])
def test_without_a_measurement_an_older_record_stays(monkeypatch, tmp_path, capsys, late):
    """Where the time is over ahead of the first stage, or of its programs."""
    times = iter([0.0] * (1 + 2 * late))
    monkeypatch.setattr(inference, "time", clock(lambda: next(times, 61.0)))
    monkeypatch.setattr("sys.argv", ["inference", *TRIAL, "--minutes=1", f"--results={tmp_path}"])
    inference.main()
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert said.count("begins") == late
    assert "no record is written; give more --minutes" in said
    assert "left out for want of time:\n  gpt2-nano: prefill 1 x 8, decode 1 x 8; rank 0\n" in said


def test_without_a_gpu_models_are_to_be_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["inference", f"--results={tmp_path}"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit, match="2"):
        inference.main()
    assert (
        "there is no GPU here, and on a CPU the models take hours: name" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_with_a_gpu_all_models_are_run(monkeypatch):
    monkeypatch.setattr("sys.argv", ["inference"])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert inference._arguments().models == list(inference.MODELS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=bert-base", "no decoder"),
        ("--prompts=8", "as in 1x2048"),
        ("--ranks=-1", "fractions of the width"),
        ("--depths=4,2", "the smaller first"),
    ],
)
def test_bad_options_are_explained(argument, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["inference", argument])
    with pytest.raises(SystemExit):
        inference.main()
    assert message in capsys.readouterr().err


def test_a_higher_rank_that_seems_faster_is_told():
    row = {"model": "m", "phase": "prefill", "batch": 8, "prompt": 512}
    times = {0: 118.0, 80: 100.0, 320: 120.0}
    rows = [row | {"rank": rank, "sparse_ms": ms} for rank, ms in times.items()]
    rows.append(row | {"prompt": 64, "rank": 80, "sparse_ms": 1.0})  # other work
    (told,) = report_inference._noise(rows)
    assert told.startswith("m, prefill 8 x 512: rank 80 cannot be faster than rank 0; ")
    assert "off by 18% or more" in told


def test_kernels_of_a_step_are_summed_by_what_they_are_for(tmp_path):
    layer = "jit(_loop)/while/body/OPT/layers_0/"
    program = {
        "custom.1": Instruction((16, 15360), layer + "attention/qkv/nm_matmul"),
        "gemm.2": Instruction((16, 80), layer + "mlp/up/dot_general"),
        "gemm.3": Instruction((16, 64), layer + "mlp/up/dot_general"),
        "fusion.4": Instruction((16, 40, 1, 512), layer + "attention/dot_general"),
        "fusion_5": Instruction((16, 5120), layer + "checkpoint/mlp_norm/convert_element_type"),
        "scatter.6": Instruction((16, 40, 528, 128), layer + "attention/scatter"),
        "gemm.7": Instruction((16, 50272), "jit(_loop)/while/body/OPT/token.attend/dot_general"),
        "copy.8": Instruction((16,), "jit(_loop)/while"),
    }
    names = ("nm_matmul_mosaic_gpu_kernel", "nvjet_sm90", "nvjet_sm90", "input_reduce_fusion")
    names += ("fusion_5", "input_scatter_fusion", "nvjet_sm90", "copy_8")
    traced = [
        Event(name, "" if name == "fusion_5" else instruction, 0.0, 1e6 * 2**i)
        for i, (name, instruction) in enumerate(zip(names, program, strict=True))
    ]

    def sums_of(events, rank, count):
        classify = functools.partial(serving_profile.classify, rank=rank)
        return tally(events, program, classify, serving_profile.CATEGORIES, count)

    sums = sums_of(traced + traced, 80, 2)
    assert sums["categories"] == {
        "linears": 1.0 + 4.0,
        "first products of adapters": 2.0,
        "attention": 8.0 + 32.0,
        "elementwise": 16.0,
        "copies": 128.0,
        "vocabulary": 64.0,
    }
    assert sums["busy_ms"] == 255.0
    assert sums["launches"]["attention"] == 2
    dense = sums_of(traced[2:], 0, 1)
    cuts = Cut("gpt2-nano", 2, sparsity="dense"), Cut("gpt2-nano", 2, rank=80)
    work = Work(DECODE, 16, 512)
    row = serving_profile.result(work, *cuts, dense | {"step_ms": 9}, sums | {"step_ms": 9})
    assert row["products_speedup"] == round(4 / 7, 4)
    assert row["dense_gb_per_s"] == round(cuts[0].layer_bytes / 4.0 / 1e6, 4)
    assert "linears" in serving_profile.table(row)
    record = {"device": "A GPU", "results": [row], "failed": [], "command": "python -m x"}
    record |= {"versions": {"jax": "1", "python": "3"}, "date": "2026-11-26", "commit": "c" * 40}
    (tmp_path / "serving-profile-a-gpu.json").write_text(json.dumps(record))
    (line,) = (x for x in report_inference.profile(tmp_path).splitlines() if "gpt2-nano" in x)
    assert "| 4,000 → 5,000 | 0 → 2,000 | 40,000 → 40,000 |" in line
