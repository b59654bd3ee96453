"""Tables of measured configurations, the tuner's choices, and the gate that configurations pass."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gate import xla_matmul, xla_sddmm

from benchmarks import shapes
from pallas_kernels import (
    candidates,
    compress,
    device_time,
    tune,
    tuning,
)
from pallas_kernels.device_time import Kernel
from pallas_kernels.mosaic import support
from pallas_kernels.tuning import Entry

DEVICE = "NVIDIA Test 1 (PCIe)"
needs_jax = pytest.mark.skipif(
    support.version_obstacle() is not None, reason=str(support.version_obstacle())
)


def entry(tokens, size=(768, 3072), sparse=1.0, dense=2.0, op="nm_matmul", **config):
    return Entry(op, "16-bit", tokens, size, config or {"blocks": 2}, sparse, dense)


def write(folder, entries, device=DEVICE, capability="9.0"):
    path = folder / f"{tuning.slug(device)}.json"
    tune.write(path, device, capability, entries)
    return path


def best(folder, tokens, op="nm_matmul", size=(768, 3072), dtype="bfloat16", device=DEVICE):
    return tuning.best(op, tokens, *size, dtype, device, folder=folder)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [(1023, None), (1024, 2048), (4095, 2048), (4096, 8192), (16384, 8192), (10**6, 8192)],
)
def test_an_entry_stands_for_half_to_twice_its_tokens(tmp_path, tokens, found):
    write(tmp_path, [entry(2048), entry(8192)])
    got = best(tmp_path, tokens)
    assert (got and got.tokens) == found


def test_few_tokens_are_for_the_kernel_that_was_the_faster_one(tmp_path):
    small, large, other = (768, 3072), (3072, 768), (1024, 1024)
    few, many = ({"op": op, "split": 2} for op in ("few_tokens", "nm_matmul"))
    entries = [entry(64, small, 2.0, **few), entry(64, small, 1.9, **many), entry(16, small, **few)]
    entries += [entry(64, large, 2.0, **few), entry(64, large, 2.0, **many)]
    entries += [entry(64, other, 2.0, **few), entry(128, other, 1.0, **many)]
    write(tmp_path, entries)

    def kernel(tokens, size, op="nm_matmul", dtype="bfloat16"):
        return tuning.kernel_of(op, tokens, *size, dtype, DEVICE, folder=tmp_path)

    assert [kernel(tokens, small) for tokens in (1, 32, 33)] == ["few_tokens"] * 3
    assert [kernel(tokens, small) for tokens in (62, 64, 65)] == ["nm_matmul"] * 3
    assert kernel(64, large) == "few_tokens"  # as fast
    assert kernel(64, other) == "few_tokens"  # the other one was timed with more tokens
    assert kernel(64, (8, 8)) == kernel(64, small, dtype="float32") == "few_tokens"
    assert kernel(64, small, op="nm_sddmm") == "nm_sddmm"
    assert kernel(0, small) == "few_tokens"


def test_the_kernel_for_few_tokens_takes_less_for_fewer(tmp_path):
    """By hand: 1 us with 16 tokens and 4 with 64 are 2 with 32 and 3 with 48."""
    few = [entry(tokens, sparse=us, op="few_tokens", split=2) for tokens, us in ((16, 1), (64, 4))]
    for many, least in ((2.5, 41), (3.0, 49), (3.9, 63), (4.0, 65)):
        write(tmp_path, [*few, entry(64, sparse=many)])
        tuning._load.cache_clear(), tuning._known.cache_clear()
        found = [
            tuning.kernel_of("nm_matmul", n, 768, 3072, "bfloat16", DEVICE, folder=tmp_path)
            for n in range(65)
        ]
        assert [n for n in range(65) if found[n] == "nm_matmul"] == list(range(least, 65))


def test_times_of_two_devices_are_not_compared(tmp_path):
    few, other = {"op": "few_tokens", "split": 2}, "NVIDIA Test 2"
    write(tmp_path, [entry(64, sparse=12.0, **few), entry(64, sparse=14.0)])
    write(tmp_path, [entry(64, sparse=20.0, **few)], device=other)

    def kernel(device):
        problem = 64, 768, 3072, "bfloat16", device, "9.0"
        return tuning.kernel_of("nm_matmul", *problem, folder=tmp_path)

    assert kernel(DEVICE) == kernel(other) == "few_tokens"


def test_entries_are_of_one_op_size_dtype_and_device(tmp_path):
    write(tmp_path, [entry(2048, tile=3), entry(16, op="few_tokens", split=4)])
    assert best(tmp_path, 2048, dtype=jnp.dtype("float16")).config == {"tile": 3}
    assert best(tmp_path, 16, op="few_tokens").config == {"split": 4}
    assert best(tmp_path, 2048, op="nm_sddmm") is None
    assert best(tmp_path, 2048, size=(3072, 768)) is None
    assert best(tmp_path, 2048, dtype="float32") is None
    assert best(tmp_path, 2048, device="another") is None
    with pytest.raises(ValueError, match="dtype is int8"):
        best(tmp_path, 2048, dtype="int8")


def test_a_table_is_read_as_it_was_written_in_any_order(tmp_path):
    entries = [entry(8192, sparse=3.25), entry(2048), entry(64, op="few_tokens")]
    path = write(tmp_path, entries)
    assert [p.name for p in tmp_path.iterdir()] == ["nvidia-test-1-pcie.json"]
    table = tuning.load(DEVICE, tmp_path)
    assert set(map(repr, table.entries)) == set(map(repr, entries))
    assert (table.device, table.capability) == (DEVICE, "9.0")
    text = path.read_text()
    write(tmp_path, entries[::-1])
    assert path.read_text() == text


def test_the_verdict_is_that_of_the_entry(tmp_path):
    write(tmp_path, [entry(2048, sparse=7.0, dense=6.0), entry(8192, sparse=40.0, dense=57.0)])

    def verdict(tokens):
        return tuning.verdict("nm_matmul", tokens, 768, 3072, "bfloat16", DEVICE, folder=tmp_path)

    assert verdict(2048) == (False, f"measured, on {DEVICE}: dense 6 us, sparse 7 us")
    assert verdict(9000).use_sparse
    assert verdict(9000).reason.startswith("measured with 8192 tokens, on")


def test_a_shape_without_an_entry_goes_by_the_nearest_in_octaves(tmp_path):
    write(
        tmp_path,
        [
            entry(8192, (768, 768), sparse=2.0, dense=1.0),
            entry(8192, (4096, 4096), sparse=1.0, dense=2.0),
        ],
    )

    def verdict(tokens, size, **more):
        return tuning.verdict(
            "nm_matmul", tokens, *size, "bfloat16", DEVICE, folder=tmp_path, **more
        )

    # sqrt(768 * 4096) = 1774: the geometric mean, not the arithmetic one, is the border
    assert not verdict(8192, (1768, 1768)).use_sparse
    assert verdict(8192, (1776, 1776)).use_sparse
    assert "nearest shape measured (8192 x 4096 x 4096)" in verdict(64, (8192, 2048)).reason


def test_what_a_device_lacks_comes_from_one_of_its_capability(tmp_path):
    first = [entry(2048, tile=3), entry(8192, tile=4), entry(16, op="few_tokens", split=4)]
    write(tmp_path, first)
    write(tmp_path, [entry(2048, tile=5)], device="Other")
    write(tmp_path, [entry(16, op="few_tokens", split=8)], device="Older", capability="8.0")

    def config(op, tokens, capability, device="Other"):
        found = tuning.best(op, tokens, 768, 3072, "bfloat16", device, capability, folder=tmp_path)
        return found and found.config

    assert config("nm_matmul", 2048, "9.0") == {"tile": 5}
    assert config("nm_matmul", 2048, "9.0", device=DEVICE) == {"tile": 3}
    assert config("nm_matmul", 8192, "9.0") == {"tile": 4}
    assert config("nm_matmul", 8192, None) == {"tile": 5}  # the largest stands for any more
    assert config("few_tokens", 16, "9.0") == {"split": 4}
    assert config("few_tokens", 16, "9.0", device="Third") == {"split": 4}
    assert config("few_tokens", 16, None) is None
    assert config("nm_sddmm", 2048, "9.0") is None


def test_a_device_without_a_table_goes_by_one_of_its_capability(tmp_path):
    write(tmp_path, [entry(2048)])

    def verdict(capability):
        return tuning.verdict(
            "nm_matmul", 2048, 768, 3072, "bfloat16", "Other", capability, folder=tmp_path
        )

    assert verdict("9.0").reason.startswith(f"measured, not on Other but on {DEVICE}")
    assert verdict("8.0") is None
    assert verdict(None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "nm_add"}, "entry 1: op is 'nm_add'"),
        ({"tokens": 0}, "entry 1: tokens is 0"),
        ({"tokens": 2.5}, "entry 1: tokens is 2.5"),
        ({"sparse_us": float("nan")}, "entry 1: sparse_us is nan"),
        ({"config": {"blocks": "2"}}, "entry 1: config"),
        ({"config": {"blocks": True}}, "entry 1: config"),
        ({"more": 1}, "entry 1: it must have op"),
        ({"tokens": 2048}, "entry 1: nm_matmul 2048 x 768 x 3072 is there twice"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    path = write(tmp_path, [entry(2048), entry(8192)])
    found = json.loads(path.read_text())
    found["entries"][1].update(change)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"{path.name}, {message}"):
        tuning.load(DEVICE, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("{}", "lacks 'device'")],
)
def test_a_file_that_is_no_table_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json {message}"):
        tuning.load("a", tmp_path)


@needs_jax
@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_committed_tables_hold_configurations_that_kernels_take(path):
    table = tuning.load(path.stem, path.parent)
    for found in table.entries:
        candidates.kernel(found.op).make(**found.config)


def test_the_fastest_wins_and_the_rule_where_times_are_alike():
    problem = tune.Problem("nm_matmul", 8192, (768, 3072))
    configs = [{"a": 1}, {"a": 2}, {"a": 3}]

    def chosen(*times):
        named = {str(i): time for i, time in enumerate(times)}
        return tune.fastest(problem, configs, named | {"dense": 9.0})

    assert chosen(5.0, 4.0, 6.0) == Entry(
        "nm_matmul", "16-bit", 8192, (768, 3072), {"a": 2}, 4.0, 9.0
    )
    assert chosen(4.1, 4.0, 4.0).config == {"a": 1}
    assert chosen(4.15, 4.0, 3.99).config == {"a": 2}


def test_the_tuner_knows_the_shapes_of_the_benchmark():
    assert set(tune.default_sizes()) == {shape.size for shape in shapes.unique()}


def test_where_the_kernel_is_slower_what_runs_instead_decides(tmp_path):
    slower = entry(8192, sparse=5.0, dense=4.0)
    for xla_us, use_sparse in ((None, False), (4.5, False), (5.5, True)):
        folder = tmp_path / str(xla_us)
        folder.mkdir()
        write(folder, [dataclasses.replace(slower, xla_us=xla_us)])
        found = tuning.verdict(slower.op, 8192, *slower.size, "bfloat16", DEVICE, folder=folder)
        assert found.use_sparse == use_sparse
        assert xla_us is None or f"dense from compressed {xla_us} us" in found.reason


@pytest.mark.parametrize("op", ["nm_matmul", "nm_sddmm"])
def test_what_runs_instead_computes_the_same(op):
    w = compress(jax.random.normal(jax.random.key(0), (16, 24)), "2:4")
    x, dy = (jax.random.normal(jax.random.key(i), (6, n)) for i, n in ((1, 16), (2, 24)))
    problem = tune.Problem(op, 6, w.shape)
    if op == "nm_sddmm":
        found, expected = tune._with_xla(problem, x, dy, w.metadata), xla_sddmm(x, dy, w)
    else:
        found, expected = tune._with_xla(problem, x, w.values, w.metadata), xla_matmul(x, w)
    np.testing.assert_array_equal(found, expected)


@needs_jax
def test_problems_come_with_the_most_telling_tokens_first():
    found = tune.ordered(["nm_matmul", "few_tokens"], None, [(8, 8), (16, 16)])
    assert [p.tokens for p in found][:4] == [8192, 8192, 16, 16]
    assert {p.tokens for p in found} == {*candidates.FEW_TOKENS, *candidates.MANY_TOKENS}
    assert [p.tokens for p in tune.ordered(["nm_sddmm"], [512], [(8, 8)])] == [512]
    assert [p.op for p in tune.ordered(["with_first", "nm_matmul"], [512, 8192], [(8, 8)])] == [
        *2 * ["nm_matmul"],
        *2 * ["with_first"],
    ]


@needs_jax
@pytest.mark.parametrize("op", list(candidates.KERNELS))
def test_configurations_are_integers_and_their_cases_lower(op):
    kernel = candidates.kernel(op)
    tokens = kernel.tokens[1]
    configs = kernel.configs(tokens, 4096, 6144)
    assert configs
    for config in configs[:6]:
        assert all(type(value) is int for value in config.values())
        for n, k, f, options in kernel.cases(config, tokens):
            x = jax.ShapeDtypeStruct((n, k), jnp.bfloat16)
            second = {"nm_sddmm": (n, f)}.get(op, (k // 2, f))
            operands = (
                x,
                jax.ShapeDtypeStruct(second, jnp.bfloat16),
                jax.ShapeDtypeStruct((k // 8, f), jnp.uint8),
            )
            if op == "with_first":
                operands += tuple(
                    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((k, 56), (56, f))
                )
            traced = jax.jit(lambda *a, c=config, o=options: kernel.run(c, *a, **o)).trace(
                *operands
            )
            first, *others = jax.tree.leaves(traced.out_info)
            assert first.shape == ((k // 2, f) if op == "nm_sddmm" else (n, f))
            assert [each.shape for each in others] == ([(n, 56)] if op == "with_first" else [])
    traced.lower(lowering_platforms=("cuda",))


@needs_jax
def test_both_ways_to_cut_a_first_product_come_with_the_tile_of_the_product_alone_first(
    monkeypatch,
):
    from pallas_kernels.mosaic import matmul, products

    alone = matmul.Tile(blocks=1, tokens=64, slot_tokens=32, stages=8)
    monkeypatch.setattr(products, "configuration", lambda *_: dataclasses.replace(alone, splits=8))
    configs = candidates.kernel("with_first").configs(8192, 5120, 5120)
    found = [matmul.Tile(**config) for config in configs]
    assert {tile.size for tile in found[:2]} == {alone}
    assert {tile.slices for tile in found[:2]} == {1, 2}
    assert len(set(found)) == len(found)
    assert candidates.kernel("with_first").configs(64, 5120, 5120)  # few have a kernel of their own


@needs_jax
def test_a_first_product_is_timed_beside_the_way_apart_alone(monkeypatch):
    """Whatever the tokens; XLA's own dense product, of few, is none of a first product's."""
    timed = []

    def measure(calls, **_):
        timed.append(sorted(calls))
        return {name: device_time.Time(10.0 + len(name), ()) for name in calls}

    monkeypatch.setattr(tune, "_operands", lambda problem: ([((1,), (1,))] * 2, None))
    monkeypatch.setattr(tune.samples, "compile_for", lambda *_, **__: print)
    monkeypatch.setattr(tune.device_time, "measure", measure)
    monkeypatch.setattr(tune.device_time, "cool", measure)
    problem = tune.Problem("with_first", 16, (64, 64))
    found = tune.Tuner(2, 1)._time(problem, [{}, {}])
    assert timed == 2 * [["0", "1", "dense"]]
    assert found == {"dense": 15.0, "0": 11.0, "1": math.inf}
    entry = tune.fastest(problem, [{"a": 1}, {"a": 2}], found)
    assert (entry.config, entry.sparse_us, entry.dense_us) == ({"a": 1}, 11.0, 15.0)


def kernels(count, start=1000.0, name="k", duration=50.0):
    return [Kernel(name, start + 100 * i, duration) for i in range(count)]


def test_time_is_that_of_the_calls_that_count():
    warm = kernels(4, start=1000.0, duration=90.0)
    counted = kernels(6, start=2000.0, duration=30.0)
    before = kernels(3, start=0.0, name="other")
    found = device_time.mean_time(counted[::-1] + before + warm, 900.0, 3000.0, 5, lead=2)
    assert found == device_time.Time(2 * 30.0 / 1e3, ("k",))  # two kernels for each of 3 calls


@pytest.mark.parametrize("count", [0, 7])
def test_a_profile_that_lost_kernels_is_not_trusted(count):
    with pytest.raises(RuntimeError, match=f"{count} kernels for 5 calls"):
        device_time.mean_time(kernels(count), 0.0, 1e9, 5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shapes=768", "give IN x OUT"),
        ("--shapes=768x30", "multiples of 8"),
        ("--ops=nm_add", "op is 'nm_add'"),
        ("--tokens=0", "give numbers"),
    ],
)
def test_wrong_options_of_the_tuner_are_named(option, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", option])
    with pytest.raises(SystemExit):
        tune.main()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(support.device_obstacle() is None, reason="the kernels run here")
def test_the_tuner_says_why_it_cannot_run_here(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="nothing to tune here: "):
        tune.main()
