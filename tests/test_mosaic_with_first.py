"""The way to the kernel that makes both products of an adapter, and all that may join them there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standins
from compiled import compress
from hopper import lowered, needs_gpu, needs_jax
from test_mosaic_first_tiles import expected, float32, integers, left_of, shape_of, small_tile

from pallas_kernels import NarrowQuery, choose_narrow, nm_matmul, tuning
from pallas_kernels.mosaic import support
from slope_jax import SparseDense, explain, slope_matmul

TOKENS, K, F, RANK = 2048, 1600, 1536, 16
FASTER, SLOWER = (80.0, 100.0), (100.0, 80.0)


@pytest.fixture
def measure(monkeypatch):
    """Makes it a measured fact that one kernel takes so long, and two so long; for all shapes."""
    from pallas_kernels.mosaic import products

    def measure(sparse_us, dense_us):
        def measured(op, tokens, k, f, dtype):
            config = dataclasses.asdict(small_tile())
            entry = tuning.Entry(op, "16-bit", tokens, (k, f), config, sparse_us, dense_us)
            return entry if op == "with_first" else None

        monkeypatch.setattr(products, "_measured", measured)

    return measure


@needs_jax
def test_products_and_gradients_take_it_where_it_was_faster(monkeypatch, measure):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)

    def layer(x, w, adapter):
        return slope_matmul(x, w, adapter=adapter, implementation="mosaic")

    def program(rank, *, gradients=False):
        w = jax.eval_shape(lambda w: compress(w, "2:4"), shape_of(K, F))
        arguments = shape_of(TOKENS, K), w, (shape_of(K, rank), shape_of(rank, F))

        def loss(*arguments):  # anew, since JAX keeps what it has traced of a function
            return layer(*arguments).astype(jnp.float32).sum()

        return lowered(jax.grad(loss, argnums=(0, 2)) if gradients else loss, *arguments)

    measure(*FASTER)
    for rank in (16, 20):  # padded to 24
        assert "narrow_product" not in program(rank)
        text = program(rank, gradients=True)
        assert "narrow_product" not in text
        assert text.count("call @nm_matmul") == 2
        # Gradients of l and r, over the tokens, are all that XLA multiplies.
        assert text.count("stablehlo.dot_general") == 2
    assert "narrow_product" in program(72)  # in twice as many tiles as were timed
    measure(*SLOWER)
    assert program(16).count("call @narrow_product") == 1
    assert program(16, gradients=True).count("call @narrow_product") == 2


@needs_jax
def test_times_hold_for_tokens_near_those_they_were_taken_with_and_for_many(monkeypatch):
    from pallas_kernels.mosaic import matmul, products

    config = dataclasses.asdict(matmul.Tile(down=2, snake=8))  # of any order

    def takes(tokens, measured, microseconds=FASTER, rank=80, dtype="bfloat16"):
        entry = tuning.Entry("with_first", "16-bit", measured, (5120, 15360), config, *microseconds)
        monkeypatch.setattr(products, "_measured", lambda *_: entry)
        return products.tile_with_first(tokens, 5120, 15360, rank, dtype) is not None

    for tokens, taken in ((2176, True), (2177, False), (1920, True), (1919, False), (4096, False)):
        assert takes(tokens, 2048) == taken
    for tokens, taken in ((16383, False), (16384, True), (65536, True), (4096, False)):
        assert takes(tokens, 8192) == taken
    assert not takes(2048, 2048, SLOWER)
    assert not takes(2048, 2048, (100.0, 100.5))  # the same, as far as can be told
    assert takes(2048, 2048, (100.0, 101.0))
    assert not takes(2048, 2048, rank=136)
    assert not takes(2048, 2048, rank=0)
    assert not takes(2048, 2048, dtype="float64")


@needs_jax
def test_times_hold_for_no_wave_of_tiles_more(monkeypatch):
    from pallas_kernels.mosaic import matmul_tiles, products

    tile = dataclasses.replace(matmul_tiles.THIRD, slices=2)
    plan = tile.schedule(512, 5120, 5120, 132, first_rank=80)
    assert (plan.tiles, plan.processors) == (132, 132)
    entry = tuning.Entry(
        "with_first", "16-bit", 512, (5120, 5120), dataclasses.asdict(tile), *FASTER
    )
    monkeypatch.setattr(products, "_measured", lambda *_: entry)
    monkeypatch.setattr(products, "processors", lambda: 132)
    for tokens, taken in ((480, tile), (528, tile), (529, None), (544, None)):
        assert products.tile_with_first(tokens, 5120, 5120, 80, "bfloat16") == taken


@needs_jax
def test_it_is_told_what_makes_the_first_product(monkeypatch, measure):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    layer = SparseDense(F, adapter_rank=RANK, dtype=jnp.bfloat16, implementation="mosaic")
    x = shape_of(TOKENS, K)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    measure(*FASTER)
    assert explain(layer, variables, x).rows[0].reason == (
        "asked for; x @ l mosaic: by the kernel of the product that it joins"
    )
    alone = choose_narrow(NarrowQuery((K, RANK), "bfloat16", TOKENS))
    assert alone == ("mosaic", "measured to be the faster one")
    other = choose_narrow(NarrowQuery((K, RANK), "float64", TOKENS, outputs=F))
    assert other == ("xla", "x @ l has a kernel for bfloat16 or float16, not float64")
    with pytest.raises(ValueError, match="outputs is -5; it must be a positive integer, or None"):
        NarrowQuery((K, RANK), "bfloat16", TOKENS, outputs=-5)
    measure(*SLOWER)
    reason = explain(layer, variables, x).rows[0].reason
    assert reason == "asked for; x @ l mosaic: measured to be the faster one"


def terms(tokens, dtype):
    residual, source = integers(5, (tokens, F), 4, dtype), integers(6, (tokens, F), 4, dtype)
    yield {}
    yield {"bias": integers(4, (F,), 4, jnp.float32), "activation": "relu"}
    yield {"activation": "relu", "save_preactivation": True}
    yield {"residual": residual, "save_sums": True}
    yield {"through": ("relu", source), "save_sums": True}
    yield {"sections": (512, 1024), "save_sums": True}
    yield {"sections": (520, 1016)}  # which the kernel cannot write apart
    yield {"residual": residual, "out_dtype": jnp.float32}


def compare(found, wanted, t, dtype):
    rounded, sums = wanted
    *found, found_t = jax.tree.leaves(found)
    np.testing.assert_array_equal(float32(found_t), t)
    for array, exact in zip(found, [*rounded, *sums], strict=True):
        kind = jnp.float32 if any(exact is each for each in sums) else dtype
        np.testing.assert_array_equal(
            float32(array), float32(jnp.asarray(exact, jnp.float32).astype(kind))
        )


@needs_jax
@pytest.mark.parametrize("transposed", [False, True])
def test_the_way_to_the_kernel_and_back(monkeypatch, measure, transposed):
    """With plain JAX in the kernels' place: padded ranks, batches, and all that may join."""
    ran, tokens = standins.install(monkeypatch), 130
    measure(*FASTER)
    w = compress(integers(3, (K, F), 2), "2:4")
    x, right = integers(0, (tokens, K), 2), integers(2, (20, F), 1)
    left = left_of(K, 20)
    t = float32(x) @ float32(left)
    adapter = {"adapter": (left.T if transposed else left, right), "left_transposed": transposed}
    call = functools.partial(nm_matmul, w=w, save_first=True, implementation="mosaic", **adapter)
    for joined in terms(tokens, x.dtype):
        dtype = joined.get("out_dtype", x.dtype)
        compare(call(x, **joined), expected(x, w, t, right, **joined), t, dtype)
    y, found = jax.vmap(lambda x: call(x))(x.reshape(2, 65, K))
    compare((y.reshape(tokens, F), found.reshape(tokens, 20)), expected(x, w, t, right), t, x.dtype)
    assert set(ran) == {"many"}
    y, found = call(x[:0])
    assert (y.shape, found.shape) == ((0, F), (0, 20))
    for rows, moments in ((4, True), (40, True), (tokens, False)):  # None of many
        y, known, found = call(x[:rows], save_moments=True)
        assert (known is not None) == moments
        compare((y, found), expected(x[:rows], w, t[:rows], right), t[:rows], x.dtype)
        alone = call(x[:rows], save_moments=True, save_first=False)
        jax.tree.map(np.testing.assert_array_equal, alone, (y, known))
        np.testing.assert_array_equal(call(x[:rows], save_first=False), y)
    assert "few" in ran


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_that_joins_is_exact(measure, transposed, dtype):
    measure(*FASTER)
    tokens = 1000
    w = compress(integers(3, (K, F), 1, dtype), "2:4")
    x, right, left = integers(0, (tokens, K), 1, dtype), integers(2, (20, F), 1, dtype), None
    left = left_of(K, 20, dtype)
    t = float32(x) @ float32(left)
    adapter = {"adapter": (left.T if transposed else left, right), "left_transposed": transposed}
    for joined in terms(tokens, dtype):

        def call(x, w, adapter=adapter, joined=joined):
            return nm_matmul(x, w, save_first=True, implementation="mosaic", **adapter, **joined)

        assert "narrow_product" not in lowered(call, x, w)
        found = jax.jit(call)(x, w)
        compare(found, expected(x, w, t, right, **joined), t, joined.get("out_dtype", dtype))


@needs_gpu
def test_gradients_of_a_layer_are_those_of_the_way_apart(measure):
    """On integers, all exact; the kernels that ran are seen in the programs."""
    tokens, k, f, rank = 1536, 512, 768, 16
    w = compress(integers(3, (k, f), 1), "2:4")
    x, dy = integers(0, (tokens, k), 1), integers(7, (tokens, f), 1)
    keep = (jnp.arange(f) % 23 == 5).astype(jnp.bfloat16)  # so that dy @ r.T is exact
    adapter = (left_of(k, rank), integers(2, (rank, f), 1) * keep[None])

    def both():
        def call(x, w, adapter):
            return slope_matmul(x, w, adapter=adapter, implementation="mosaic")

        def pullback(x, w, adapter, dy):
            y, back = jax.vjp(call, x, w, adapter)
            dx, dw, dadapter = back(dy)
            return y, dx, dw.values, dadapter

        text = lowered(pullback, x, w, adapter, dy)
        return jax.jit(pullback)(x, w, adapter, dy), text

    measure(*FASTER)
    found, text = both()
    assert text.count("stablehlo.dot_general") == 2
    measure(*SLOWER)
    wanted, text = both()
    assert text.count("stablehlo.dot_general") + text.count("call @narrow_product") == 4
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
