"""Hopper kernels: their private order on any machine, lowering where JAX can, results on a GPU."""

import dataclasses
import functools

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import needs_gpu, needs_jax

from pallas_kernels import (
    Pattern,
    Query,
    choose,
    compress,
    decompress,
    kept_mask,
    narrow_matmul,
    nm_matmul,
    nm_sddmm,
)
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.mosaic import support

obstacle = support.device_obstacle()


# tokens, in, out: whole tiles, partial tiles in every direction, one row, many tiles per CTA
SHAPES = [
    (1152, 768, 768),
    (1000, 776, 1000),
    (8, 64, 64),
    (1, 8, 8),
    (5, 136, 72),
    (100, 1600, 4800),
    (8200, 1024, 1032),
]


@needs_jax
@pytest.mark.parametrize(
    "size", [(768, 768), (2304, 768), (1024, 1024), (3072, 1024), (5120, 1280)]
)
def test_small_products_are_cut_for_most_of_the_processors(size):
    """Processors that idle leave their power to others, whose clock has an end all the same."""
    from pallas_kernels.mosaic import matmul

    tile = matmul.choose(2048, *size)
    plan = tile.schedule(2048, *size, 132)
    assert plan.waves or plan.left * plan.sharers * tile.cluster >= 90


@needs_jax
@pytest.mark.parametrize("tokens", [1024, 1536, 2048, 3000])
def test_a_tile_measured_with_other_tokens_leaves_no_wave_nearly_empty(tokens, monkeypatch):
    """256 x 192 of 768 x 2304: 54, 72, 99 and 144 tiles for 132 processors."""
    from pallas_kernels import tuning
    from pallas_kernels.mosaic import matmul, products

    measured = tuning.Entry("", "", 2048, (768, 2304), dataclasses.asdict(matmul.Tile()), 1, 2)
    monkeypatch.setattr(products, "_measured", lambda *_: measured)
    tile = products.configuration("nm_matmul", tokens, 768, 2304, jnp.bfloat16)
    assert (tile == matmul.Tile()) == (tokens == 2048)
    plan = tile.schedule(tokens, 768, 2304, 132)
    assert plan.waves == 0 or plan.left >= plan.processors / 2


# Microseconds on an H100, by (outputs, tokens) of a tile, and by how many CTAs of a cluster shared it.
MEASURED = {
    (128, 768, 2304): {(128, 32): 4.1, (128, 64): 4.4, (128, 96): 5.6, (128, 128): 5.2},
    (128, 1600, 1600): {(128, 32): 6.1, (128, 32, 2): 5.9, (128, 64): 7.0, (128, 64, 3): 5.9},
    (128, 2304, 768): {(128, 32): 7.0, (128, 32, 3): 5.3, (128, 32, 4): 5.5},
    (128, 4096, 1024): {(128, 32): 7.7, (128, 32, 3): 6.8, (128, 64): 10.8, (128, 64, 3): 7.7},
    (256, 4096, 1024): {(128, 32): 8.9, (128, 32, 2): 9.1, (128, 64, 2): 9.3, (128, 64, 3): 8.6},
    (512, 3072, 768): {(128, 32): 9.0, (128, 64): 10.0, (128, 64, 2): 8.4},
    (1024, 1024, 1024): {(128, 64): 5.0, (128, 96): 5.8, (128, 128): 6.4, (128, 192): 7.9},
    (1024, 1280, 1280): {(128, 64): 8.8, (128, 96): 6.7, (128, 128): 7.3, (128, 192): 9.3},
    (1024, 768, 2304): {(128, 96): 8.1, (128, 160): 6.8, (128, 192): 7.5, (128, 256): 7.9},
    (1024, 3072, 768): {(128, 64): 10.2, (128, 96): 11.5, (128, 128): 12.8, (128, 160): 14.7},
    (1024, 4096, 4096): {(128, 256): 30.2, (256, 128): 31.9, (256, 160): 36.7, (256, 192): 41.8},
    (2048, 2560, 2560): {(256, 160): 25.0, (256, 192): 28.5},
    (2048, 5120, 5120): {(256, 160): 103.1, (128, 256): 109.8, (256, 192): 113.8},
    (2048, 20480, 5120): {(128, 256): 412.9, (256, 160): 435.8, (256, 192): 455.6},
}


@needs_jax
@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_the_rule_takes_a_tile_that_was_measured_to_be_about_the_best(shape):
    from pallas_kernels.mosaic import matmul

    times, tile = MEASURED[shape], matmul.choose(*shape)
    name = (tile.rows, tile.tokens, tile.along)
    assert times[name if tile.along > 1 else name[:2]] <= 1.05 * min(times.values())


@needs_jax
def test_no_estimate_overrules_a_tile_where_it_was_measured():
    from pallas_kernels import tuning
    from pallas_kernels.mosaic import matmul

    tables = [tuning.load(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")]
    entries = [e for table in tables for e in table.entries if e.op == "nm_matmul"]
    assert len(entries) > 100
    for entry in entries:
        tile = matmul.Tile(**entry.config)
        assert matmul.suited(tile, entry.tokens, entry.tokens, *entry.size) == tile


def integers(seed, shape, dtype=jnp.bfloat16):
    return jax.random.randint(jax.random.key(seed), shape, -4, 5).astype(dtype)


def adversarial(shape, dtype=jnp.float32):
    """Ties, zeros of both signs, NaN and Inf among small integers."""
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40], np.float32)
    numbers = rng.integers(-4, 5, shape).astype(np.float32)
    return jnp.asarray(
        np.where(rng.random(shape) < 0.3, rng.choice(special, shape), numbers), dtype
    )


@pytest.mark.parametrize(("dtype", "stack"), [("float32", ()), ("bfloat16", (3,))])
@pytest.mark.parametrize("pattern", [str(p) for p in support.FITTING])
def test_every_fitting_pattern_is_the_same_matrix_as_two_four(pattern, dtype, stack):
    from pallas_kernels.mosaic import two_four as module

    as_two_four, values_of = jax.jit(module.as_two_four), jax.jit(module.values_of)
    dense = adversarial((*stack, 64, 24), dtype)
    few = jax.random.bernoulli(jax.random.key(1), 0.2, dense.shape)
    full = compiled.compress(dense, pattern)
    for w in (full, compiled.compress(dense, pattern, mask=few & compiled.kept_mask(full))):
        two_four = as_two_four(w)
        expected = compiled.compress(compiled.decompress(w), "2:4", mask=compiled.kept_mask(w))
        assert two_four.check().pattern == expected.pattern
        for got, exact in ((two_four, expected), (w.with_values(values_of(two_four.values, w)), w)):
            np.testing.assert_array_equal(got.metadata, exact.metadata)
            bits = [np.asarray(a.values).view(f"u{a.dtype.itemsize}") for a in (got, exact)]
            np.testing.assert_array_equal(*bits)


@pytest.mark.skipif(support.version_obstacle() is not None, reason=str(support.version_obstacle()))
@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:8"])
def test_nothing_dense_is_made_of_other_patterns(monkeypatch, pattern):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    w = compress(integers(1, (256, 72)), pattern)

    def both(x, dy, w):
        y = nm_matmul(x, w, implementation="mosaic")
        return y, nm_sddmm(x, dy, w, implementation="mosaic")

    shapes = [(80, 256), (80, 72)]
    x, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    traced = jax.jit(both).trace(x, dy, w)
    assert traced.out_info[1].shape == w.values.shape
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "nm_matmul" in text
    assert "nm_sddmm" in text
    assert "256x72x" not in text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (("nm_matmul", (64, 64), "2:4", "float32"), "bfloat16 or float16, not float32"),
        (("nm_matmul", (64, 60), "2:4", "bfloat16"), "multiples of 8"),
        (("nm_matmul", (64, 64), "4:8", "bfloat16"), "not 4:8"),
        (("nm_sddmm", (64, 64), "4:8", "bfloat16"), "not 4:8"),
        (("nm_transpose", (64, 64), "1:4", "float32"), "not 1:4"),
    ],
)
def test_obstacles_are_named(query, message):
    op, shape, pattern, dtype = query
    assert message in support.problem_obstacle(op, shape, Pattern.parse(pattern), dtype)


@pytest.mark.skipif(obstacle is None, reason="the kernels run here")
def test_asking_for_kernels_on_the_wrong_machine_says_why():
    query = Query("nm_matmul", (64, 64), Pattern(2, 4), "bfloat16", tokens=8)
    with pytest.raises(NotImplementedError, match="Hopper"):
        choose(query, "mosaic")
    assert "Hopper" in choose(query).reason


@needs_jax
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1000, 776, 1000), (1, 8, 8)])
def test_kernels_lower_for_cuda_without_a_gpu(shape, dtype):
    from pallas_kernels.mosaic import products

    tokens, k, f = shape
    x, dy = jax.ShapeDtypeStruct((tokens, k), dtype), jax.ShapeDtypeStruct((tokens, f), dtype)
    w = jax.eval_shape(lambda w: compress(w, "2:4"), jax.ShapeDtypeStruct((k, f), dtype))

    def both(x, dy, w):
        return (
            products.nm_matmul(x, w, x.dtype, None, Epilogue()),
            products.nm_sddmm(x, dy, w, jnp.float32, None),
            products.nm_sddmm(x, dy, w, jnp.float32, None, w.values.astype(jnp.float32)),
        )

    text = jax.jit(both).trace(x, dy, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "nm_matmul" in text
    assert "nm_sddmm" in text


@needs_jax
def test_every_tile_lowers_and_bad_ones_are_named():
    from pallas_kernels.mosaic import matmul, matmul_tiles

    x = jax.ShapeDtypeStruct((200, 576), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((288, 192), jnp.bfloat16)
    metadata = jax.ShapeDtypeStruct((72, 192), jnp.uint8)
    together = list(matmul_tiles.TOGETHER)[-1]
    for tile in (*matmul_tiles.SIZES, together, matmul.Tile(down=2, splits=8)):
        lowered = jax.jit(matmul.nm_matmul, static_argnums=3).trace(x, values, metadata, tile)
        lowered.lower(lowering_platforms=("cuda",))
    for options, message in [
        ({"tokens": 100}, "multiple of 8"),
        ({"slot_tokens": 80}, "divides tokens"),
        ({"slots": 3}, "divide the 4 times"),
        ({"slots": 0}, "at least one slot"),
        ({"along": 0}, "1 to 8 CTAs"),
        ({"slices": 0}, "at least one slice"),
        ({"down": 3, "across": 3}, "1 to 8 CTAs"),
        ({"along": 2, "splits": 8, "stages": 2}, "shares nothing else"),
        ({"stages": 6}, "bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            matmul.Tile(**options)


@needs_jax
def test_a_tile_that_a_cluster_shares_needs_few_tiles_of_many_stages():
    from pallas_kernels.mosaic import matmul

    tile = matmul.Tile(blocks=1, tokens=32, slot_tokens=16, along=4)

    def product(tokens, k):
        x = jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16)
        w = jax.eval_shape(lambda: compress(jnp.zeros((k, 768), jnp.bfloat16), "2:4"))
        return jax.eval_shape(
            functools.partial(matmul.nm_matmul, tile=tile), x, w.values, w.metadata
        )

    assert product(160, 512).shape == (160, 768)  # 30 tiles, of 4 pairs of stages
    for tokens, k, message in ((161, 512, "there are 36 of 4"), (160, 384, "there are 30 of 3")):
        with pytest.raises(ValueError, match=f"at most 30 tiles, of 4 pairs.*{message}"):
            product(tokens, k)
        assert matmul.suited(tile, 160, tokens, k, 768).along != 4


@needs_jax
def test_the_tile_for_few_tokens_is_tried_with_few_alone():
    from pallas_kernels.mosaic import matmul_tiles

    for tokens, tried in ((33, True), (64, True), (65, False), (2048, False)):
        found = matmul_tiles.candidates(tokens, 5120, 20480)
        assert any((tile.rows, tile.tokens) == (256, 64) for tile in found) == tried
    assert matmul_tiles.choose(64, 5120, 20480) == matmul_tiles.HALF  # as it was measured
    for tokens, tried in ((65, True), (512, True), (528, True), (529, False), (2048, False)):
        found = matmul_tiles.candidates(tokens, 5120, 5120)
        assert {tile.down for tile in found if tile.tokens == 176} == ({1, 2} if tried else set())
    assert matmul_tiles.choose(512, 5120, 5120).tokens == 176


@needs_jax
def test_every_tile_is_shared_in_a_test():
    from pallas_kernels.mosaic import matmul_tiles

    for size in matmul_tiles.SIZES:
        tiles = [dataclasses.replace(size, splits=splits) for splits in (0, 8)]
        plans = [tile.schedule(1372, 1416, 1096, count) for tile in tiles for count in (132, 6)]
        assert any(plan.slots for plan in plans), size


@needs_gpu
@pytest.mark.parametrize("processors", [132, 6])  # tiles shared by many CTAs, many tiles per CTA
@pytest.mark.parametrize("splits", [0, 1, 8])
def test_every_tile_is_exact_on_integers_and_equal_on_repeats(splits, processors):
    from pallas_kernels.mosaic import matmul, matmul_tiles

    x, t, r = integers(0, (1372, 1416)), integers(1, (1372, 40)), integers(2, (40, 1096))
    w, bias = compress(integers(3, (1416, 1096)), "2:4"), integers(4, (1096,), jnp.float32)
    exact = np.asarray(x, np.float32) @ np.asarray(decompress(w), np.float32)
    exact += np.asarray(t, np.float32) @ np.asarray(r, np.float32) + np.asarray(bias)
    saves = processors == 132  # a tile leaves in twice as many pieces then
    for size in matmul_tiles.SIZES:
        tile = dataclasses.replace(size, splits=splits)
        run = jax.jit(
            functools.partial(
                matmul.nm_matmul,
                tile=tile,
                processors=processors,
                activation="relu",
                save_preactivation=saves,
            )
        )
        for _ in range(3):
            y, *z = jax.tree.leaves(run(x, w.values, w.metadata, bias=bias, low_rank=(t, r)))
            np.testing.assert_array_equal(y, np.maximum(exact, 0).astype(jnp.bfloat16), str(tile))
            for array in z:
                np.testing.assert_array_equal(array, exact.astype(jnp.bfloat16), str(tile))
            assert len(z) == saves


@needs_gpu
@pytest.mark.parametrize("along", [1, 2])
def test_tiles_are_shared_in_every_layer_of_a_scan(along):
    """Of weights in a stack, whose slices XLA may make part of a kernel's operation: flags begin at zero."""
    from pallas_kernels.mosaic import matmul

    sharing = {"splits": 8} if along == 1 else {"along": along}
    tile = matmul.Tile(blocks=1, tokens=64, slot_tokens=32, stages=8, **sharing)
    assert along > 1 or tile.schedule(200, 776, 520, 132).slots
    x = integers(0, (200, 776))
    ws = [compress(integers(seed, (776, 520)), "2:4") for seed in range(1, 7)]
    stacks = (jnp.stack([getattr(w, name) for w in ws]) for name in ("values", "metadata"))

    @jax.jit
    def run(*stacks):
        def step(_, layer):
            return None, (matmul.nm_matmul(x, *layer, tile), matmul.nm_matmul(2 * x, *layer, tile))

        return jax.lax.scan(step, None, stacks)[1]

    exact = [np.asarray(x, np.float32) @ np.asarray(decompress(w), np.float32) for w in ws]
    once, twice = run(*stacks)
    np.testing.assert_array_equal(once, np.asarray(jnp.asarray(exact).astype(jnp.bfloat16)))
    np.testing.assert_array_equal(twice, np.asarray(2 * jnp.asarray(exact)).astype(jnp.bfloat16))


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_is_within_twice_the_error_of_the_dense_product(shape, dtype):
    tokens, k, f = shape
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (tokens, k)).astype(dtype)
    w = compress(jax.random.normal(keys[1], (k, f)).astype(dtype), "2:4")
    exact = np.asarray(x, np.float64) @ np.asarray(decompress(w), np.float64)
    dense = np.abs(np.asarray(x @ decompress(w), np.float64) - exact).max()
    y = nm_matmul(x, w, implementation="mosaic")
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * dense
    for _ in range(5):
        np.testing.assert_array_equal(y, nm_matmul(x, w, implementation="mosaic"))


@needs_gpu
@pytest.mark.parametrize("tokens", [3, 40])  # twice: the kernel for few, and that for many
@pytest.mark.parametrize("pattern", [str(p) for p in support.FITTING])
def test_matmul_is_exact_on_integers_of_any_fitting_pattern(pattern, tokens):
    x, w = integers(0, (2, tokens, 64)), compress(integers(1, (64, 48)), pattern)
    y = nm_matmul(x, w, implementation="mosaic")
    exact = np.asarray(x, np.float32) @ np.asarray(decompress(w), np.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float32), exact.astype(jnp.bfloat16))


@needs_gpu
def test_nan_and_inf_reach_the_outputs_that_they_belong_to():
    x = integers(0, (300, 64)).at[7, 3].set(jnp.nan).at[200, 5].set(jnp.inf)
    w = compress(integers(1, (64, 300 // 4 * 4 + 4)), "2:4")
    y = np.asarray(nm_matmul(x, w, implementation="mosaic"), np.float32)
    clean = np.delete(np.arange(300), [7, 200])
    assert np.isfinite(y[clean]).all()
    uses_three = np.asarray(kept_mask(w))[3]
    np.testing.assert_array_equal(np.isnan(y[7])[uses_three], True)


@needs_gpu
def test_the_whole_gradient_is_that_of_xla():
    from slope_jax import slope_matmul

    w = compress(integers(0, (256, 384), jnp.float32), "2:4")
    x, dy = integers(1, (4, 250, 256)), integers(2, (4, 250, 384))
    results = []
    for implementation in ("mosaic", "xla"):

        def product(x, w, implementation=implementation):
            return slope_matmul(x, w, implementation=implementation)

        y, back = jax.vjp(product, x, w)
        dx, dw = jax.jit(back)(dy)
        results.append((y, dx, dw.values))
    for mosaic, xla in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(mosaic, np.float32), np.asarray(xla, np.float32))


@needs_gpu
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, w: nm_matmul(x, w), "nm_matmul_mosaic"),
        (lambda x, w: nm_matmul(x[:8], w), "nm_matmul_few"),
        (lambda x, w: nm_sddmm(x, x[:, :256], w), "nm_sddmm"),
        (lambda x, w: narrow_matmul(x, x[:1536, :16]), "narrow_product"),
        (lambda x, w: nm_matmul(x[:8], w, adapter=(x[:1536, :64], x[:64, :256])), "first_product"),
    ],
)
def test_the_kernels_names_are_in_the_profile(call, name):
    from pallas_kernels.device_time import device_microseconds

    x, w = integers(0, (1536, 1536)), compress(integers(1, (1536, 256)), "2:4")
    run = jax.jit(call)
    _, names = device_microseconds(lambda: run(x, w), 2)
    assert any(name in found for found in names), names
