"""What joins the kernel of many tokens: 64 outputs of it in a stage of the ring, for one warpgroup of the two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import needs_gpu, needs_jax
from test_epilogue import ACTIVATIONS, formula, integers
from test_joining import chain

from pallas_kernels import compress, decompress, nm_matmul
from pallas_kernels.mosaic import support


def joined(shape, dtype, tile, **options):
    """A product with a bias, ranks of part of two stages, and what joins; its arguments, and its sum."""
    from pallas_kernels.mosaic import matmul

    tokens, k, f, processors = shape
    x, w = integers(0, (tokens, k), dtype), compress(integers(1, (k, f), dtype), "2:4")
    joining, bias = integers(2, (tokens, f), dtype), integers(3, (f,))
    low_rank = integers(4, (tokens, 40), dtype), integers(5, (40, f), dtype)
    run = jax.jit(
        lambda x, values, metadata, joining, bias, low_rank: matmul.nm_matmul(
            x,
            values,
            metadata,
            tile,
            bias=bias,
            low_rank=low_rank,
            joining=joining,
            processors=processors,
            **options,
        )
    )
    exact = np.float64(x) @ np.float64(decompress(w)) + np.float64(bias)
    exact = exact + np.float64(low_rank[0]) @ np.float64(low_rank[1])
    return run, (x, w.values, w.metadata, joining, bias, low_rank), exact


# Tokens, in, out, processors.
SMALL = (1000, 200, 1032, 132), (776, 1096, 520, 8), (1, 8, 8, 132), (2500, 320, 264, 4)
FEW = 200, 520, 520, 132  # tokens, where tiles of few of them fill all processors with those above
TOGETHER = (
    (70, 2056, 264, 132),
    (1, 1032, 8, 132),
)  # one tile for each cluster, and 9 pairs of stages or more


@needs_jax
@pytest.mark.parametrize("through", [None, *ACTIVATIONS])
def test_what_joins_lowers_for_cuda(through):
    from pallas_kernels.mosaic import matmul

    clusters = dataclasses.replace(matmul.Tile(down=2), splits=8), SMALL[0]
    together = matmul.Tile(blocks=1, tokens=32, slot_tokens=16, along=4), TOGETHER[0]
    tile, shape = together if through == "relu" else clusters
    options = {"through": through, "save_sums": through is not None}
    run, arguments, *_ = joined(shape, jnp.bfloat16, tile, **options)
    text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "nm_matmul" in text


@needs_jax
def test_tiles_that_cannot_join_are_named():
    from pallas_kernels.mosaic import matmul

    tile = matmul.Tile(tokens=208, slot_tokens=208, stages=3, slots=1)
    run, arguments, *_ = joined(SMALL[0], jnp.bfloat16, tile)
    with pytest.raises(ValueError, match="takes 4 stages at a time"):
        jax.eval_shape(run, *arguments)
    for options, message in (
        ({"out_dtype": jnp.float32}, "results in x's bfloat16, not float32"),
        ({"through": "relu"}, "needs joining"),
    ):
        run, arguments, *_ = joined(SMALL[0], jnp.bfloat16, matmul.Tile(), **options)
        given = (*arguments[:3], None if "through" in options else arguments[3], *arguments[4:])
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, *given)


@needs_jax
@pytest.mark.parametrize("tokens", [48, 300])
def test_what_is_saved_comes_in_order_whatever_joins_apart(tokens):
    """y, what enters the activation, moments that nobody takes, and sums of what is multiplied."""
    from pallas_kernels.epilogue import Epilogue
    from pallas_kernels.mosaic import products

    arrays = [jax.ShapeDtypeStruct((tokens, n), jnp.bfloat16) for n in (136, 200)]
    w = jax.eval_shape(lambda: compress(integers(1, (136, 200), jnp.bfloat16), "2:4"))
    saved = {"save_preactivation": True, "save_moments": True, "save_sums": True}

    def run(x, source, w):
        epilogue = Epilogue(source=source, through="relu", activation="silu", **saved)
        return products.nm_matmul(x, w, jnp.dtype("bfloat16"), None, epilogue)

    y, z, moments, sums = jax.eval_shape(run, *arrays, w)
    assert moments is None
    assert (y.shape, y.dtype, z.shape, z.dtype) == 2 * ((tokens, 200), jnp.bfloat16)
    assert (sums.shape, sums.dtype) == ((136,), jnp.float32)


def tiles():
    if support.version_obstacle() is not None:
        return []
    from pallas_kernels.mosaic import matmul_tiles

    return matmul_tiles.TILES


def shapes_for(tile):
    """Two that cut tiles everywhere; of tiles that may be shared, all at which some are."""
    if tile.along > 1:
        return TOGETHER
    if tile.splits == 1:
        return SMALL[::3]
    return [shape for shape in SMALL if tile.schedule(*shape).slots] or [FEW]


@needs_jax
@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_every_tile_is_tried_where_it_is_cut_and_shared(tile):
    shapes = shapes_for(tile)
    assert shapes
    assert tile.splits == 1 or all(tile.schedule(*shape).slots for shape in shapes)


@needs_gpu
@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_what_joins_is_exact_on_integers(tile):
    """With tiles that are shared or not, of clusters, in partial tiles; every sum is written, once."""
    for shape in shapes_for(tile):
        options = {"through": "relu", "save_sums": True}
        run, arguments, exact = joined(shape, jnp.bfloat16, tile, **options)
        joining = np.float64(arguments[3])
        y, sums = run(*arguments)
        passed = jnp.asarray(np.where(joining > 0, exact, 0), jnp.float32)
        np.testing.assert_array_equal(y, passed.astype(jnp.bfloat16))
        np.testing.assert_array_equal(np.float64(sums).sum(0), np.float64(arguments[0]).sum(0))
        again = run(*arguments)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(again, (y, sums), strict=True))
        options = {"activation": "relu", "save_preactivation": True}
        run, *_ = joined(shape, jnp.bfloat16, tile, **options)
        y, z = run(*arguments)
        np.testing.assert_array_equal(z, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
        exact = jnp.asarray(np.maximum(exact, 0) + joining, jnp.float32)
        np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_within_a_thousandth(name, dtype):
    """Of products with the identity, at -30 .. 30 and at NaN and the infinities."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan]
    source = np.concatenate([np.linspace(-30, 30, 8192 - len(special)), special])
    source = jnp.broadcast_to(jnp.asarray(source, dtype), (128, 8192))
    x, w = jnp.ones((128, 64), dtype), jnp.zeros((64, 8192), dtype).at[0].set(1)
    y = nm_matmul(x, compress(w, "2:4"), through=(name, source), implementation="mosaic")
    found, at = np.float64(y[5]), np.float64(source[5])
    with np.errstate(invalid="ignore"):
        exact = formula(name, np.clip(at, -20, 20))[1]  # flat beyond
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact) & (name != "relu"))
    there = ~np.isnan(exact)
    rounding = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(found - exact) <= 1e-3 + rounding)[there].all()


@needs_gpu
@pytest.mark.parametrize("tokens", [48, 300])
def test_gradients_of_a_chain_are_those_of_xla(tokens):
    """On integers they are exact; for few tokens the activation is differentiated apart."""
    x = integers(0, (tokens, 136), jnp.bfloat16)
    up, down = (
        compress(integers(i, size), "2:4") for i, size in ((1, (136, 200)), (2, (200, 136)))
    )
    biases, dy = (integers(3, (200,)), integers(4, (136,))), integers(5, x.shape, x.dtype)
    results = []
    for implementation in ("mosaic", "xla"):

        def call(x, up, down, biases, implementation=implementation):
            options = {"activated": True, "implementation": implementation}
            return chain(x, up, down, biases, x, "relu", **options)

        y, back = jax.vjp(jax.jit(call), x, up, down, biases)
        dx, dup, ddown, dbiases = jax.jit(back)(dy)
        results.append((y, dx, dup.values, ddown.values, *dbiases))
    for mosaic, xla in zip(*results, strict=True):
        np.testing.assert_array_equal(np.float32(mosaic), np.float32(xla))
