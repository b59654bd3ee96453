"""An adapter's first product for many tokens: its kernel, and the way to it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered, needs_gpu, needs_jax

from pallas_kernels import NarrowQuery, choose_narrow, compress, narrow_matmul, nm_matmul
from pallas_kernels.mosaic import support
from slope_jax import slope_matmul

SHARES = (1, 2, 3, 4)
# tokens, in, rank: parts of tiles, of stages and of blocks; the widest
SHAPES = [
    (65, 8, 8),
    (128, 512, 16),
    (2048, 5120, 80),
    (1000, 776, 24),
    (300, 2048, 104),
    (129, 4104, 128),
    (16384, 768, 16),
]


def integers(seed, shape, dtype=jnp.bfloat16, most=4):
    values = np.random.default_rng(seed).integers(-most, most + 1, shape)
    return jnp.asarray(values.astype(dtype))


def exact(x, left):
    """Products of small integers are exact in float32 in any order; rounded once."""
    return np.asarray(
        (np.asarray(x, np.float32) @ np.asarray(left, np.float32)).astype(x.dtype), np.float32
    )


def of_kernel(x, left, share=None, *, transposed=False):
    from pallas_kernels.mosaic import narrow

    rank = left.shape[0 if transposed else 1]
    cut = narrow.choose(*x.shape, rank)
    if share is not None:
        deep = (narrow.frame.SHARED_MEMORY - narrow.HEAD) // narrow.stage_bytes(rank)
        cut = narrow.Cut(share, min(deep, 4))
    return narrow.narrow_product(x, left, cut, transposed=transposed)


def float32(x):
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_of_any_leading_axes(transposed):
    x, left = integers(0, (2, 3, 16), jnp.float32), integers(1, (16, 5), jnp.float32)
    found = narrow_matmul(x, left.T if transposed else left, transposed=transposed)
    np.testing.assert_array_equal(found, float32(x) @ float32(left))


def test_bad_input_of_the_product_is_named():
    x = jnp.ones((2, 16))
    with pytest.raises(ValueError, match="must be a matrix"):
        narrow_matmul(x, jnp.ones(16))
    with pytest.raises(
        ValueError, match=r"x has shape \(2, 16\); its last axis must be left's in, 8"
    ):
        narrow_matmul(x, jnp.ones((8, 2)))
    with pytest.raises(ValueError, match="left's in, 2"):
        narrow_matmul(x, jnp.ones((16, 2)), transposed=True)
    with pytest.raises(ValueError, match="x is float32 and left is bfloat16"):
        narrow_matmul(x, jnp.ones((16, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        narrow_matmul(x, jnp.ones((16, 2)), implementation="cuda")


def test_what_the_kernel_does_not_take_is_named(monkeypatch):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    for (shape, dtype, tokens), reason in [
        (((768, 16), "float32", 2048), "not float32"),
        (((772, 16), "bfloat16", 2048), "not 772"),
        (((1600, 136), "bfloat16", 2048), "ranks from 1 to 128, not 136"),
        (((768, 16), "bfloat16", 2048), "768 inputs is no slower in XLA"),
        (((1600, 16), "bfloat16", 1024), "1024 tokens is no slower in XLA"),
    ]:
        choice = choose_narrow(NarrowQuery(shape, dtype, tokens), "mosaic")
        assert choice.implementation == "xla"
        assert reason in choice.reason
    query = NarrowQuery((5120, 80), "bfloat16", 2048)
    assert choose_narrow(query).implementation == "mosaic"
    assert choose_narrow(query, "xla") == ("xla", "asked for")
    assert choose_narrow(query, "triton") == ("xla", "x @ l has no Triton kernel")


@needs_jax
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("share", "rank"), [(1, 8), (2, 80), (3, 64), (4, 128)])
def test_it_lowers_for_cuda_without_a_gpu(share, rank, transposed, strict_dtypes):
    shapes = (200, 776), ((rank, 776) if transposed else (776, rank))
    x, left = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    run = functools.partial(of_kernel, share=share, transposed=transposed)
    assert "narrow_product" in lowered(run, x, left)


@needs_jax
def test_every_choice_fits_the_machine():
    from pallas_kernels.mosaic import narrow

    for tokens, k, rank in itertools.product(
        (1, 65, 128, 2048, 2049, 4096, 5121, 65536),
        (8, 136, 768, 4096, 36864),
        (8, 16, 72, 80, 128),
    ):
        cut = narrow.choose(tokens, k, rank)
        cut.check(k, rank)
        sums = cut.share * cut.units(rank) * narrow.UNIT_BYTES  # which the ring has room for
        assert cut.share == 1 or sums <= cut.stages * narrow.stage_bytes(rank)
        most = {1: math.inf, 2: 66, 3: 40, 4: 30}  # clusters that run at once
        tiles = -(-tokens // 128)
        fitting = [n for n in SHARES if tiles <= most[n] and n <= -(-k // 64)]
        assert cut.share == max(fitting)  # as many CTAs as there is room for


@needs_jax
def test_bad_cuts_are_named():
    from pallas_kernels.mosaic import narrow

    with pytest.raises(ValueError, match="64 inputs leave some CTAs without any"):
        narrow.Cut(2, 4).check(64, 8)
    for options, rank, message in [
        ({"share": 5}, 8, "share must be 1 to 4"),
        ({"share": 3, "stages": 2}, 128, "sums of 73728 bytes need more stages"),
        ({"stages": 1}, 8, "at least 2"),
        ({}, 136, "up to 128"),
        ({}, 12, "multiples of 8"),
        ({"stages": 16}, 80, "needs 524416 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            narrow.Cut(**options).check(4096, rank)


@needs_jax
def test_products_and_gradients_of_many_tokens_take_it(monkeypatch):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)

    def layer(x, w, adapter):
        return slope_matmul(x, w, adapter=adapter, implementation="mosaic")

    def loss(x, w, adapter):
        return layer(x, w, adapter).astype(jnp.float32).sum()

    def shapes(rank):
        x, left, right = (
            jax.ShapeDtypeStruct(s, jnp.bfloat16)
            for s in ((2048, 1600), (1600, rank), (rank, 1600))
        )
        return x, jax.eval_shape(lambda w: compress(w, "2:4"), shape_of(1600, 1600)), (left, right)

    def shape_of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    for rank in (16, 20):  # padded to 24
        assert lowered(layer, *shapes(rank)).count("call @narrow_product") == 1
        gradients = lowered(jax.grad(loss, argnums=(0, 2)), *shapes(rank))
        assert gradients.count("call @narrow_product") == 2  # x @ l and dz @ r.T
    assert "narrow_product" not in lowered(layer, *shapes(136))


@needs_jax
def test_it_lowers_under_vmap_scan_and_shard_map(monkeypatch):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    x, left = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2048, 1600), (1600, 16)))
    stack = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in (x, left)]

    def scanned(*stack):
        return jax.lax.scan(lambda _, each: (None, narrow_matmul(*each)), None, stack)[1]

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    specs = (spec("data"), spec())
    mapped = jax.shard_map(narrow_matmul, mesh=mesh, in_specs=specs, out_specs=spec("data"))
    for function, arguments in [
        (jax.vmap(narrow_matmul), stack),
        (jax.vmap(narrow_matmul, in_axes=(0, None)), (stack[0], left)),
        (scanned, stack),
        (mapped, (x, left)),
    ]:
        assert "narrow_product" in lowered(function, *arguments)
    more_rows = jax.vmap(narrow_matmul, in_axes=(0, None))
    assert "stablehlo.while" not in lowered(more_rows, stack[0], left)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_integers_are_exact(shape, transposed, dtype):
    tokens, k, rank = shape
    x, left = integers(0, (tokens, k), dtype, 1), integers(1, (k, rank), dtype, 1)
    found = of_kernel(x, left.T if transposed else left, transposed=transposed)
    np.testing.assert_array_equal(float32(found), exact(x, left))


@needs_gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_every_share_is_exact_on_ragged_sizes(share, transposed):
    for tokens, k, rank in [(1, 8 * 64, 8), (130, 1032, 72), (300, 3080, 128), (5, 2000, 104)]:
        x, left = integers(0, (tokens, k), most=1), integers(1, (k, rank), most=1)
        found = of_kernel(x, left.T if transposed else left, share, transposed=transposed)
        np.testing.assert_array_equal(float32(found), exact(x, left), err_msg=str((k, rank)))


@needs_gpu
def test_not_a_number_stays_in_its_row():
    x, left = integers(0, (200, 1000), most=1), integers(1, (1000, 24), most=1)
    found = float32(of_kernel(x.at[7, 999].set(jnp.nan), left))
    assert np.isnan(found[7]).all()
    np.testing.assert_array_equal(np.delete(found, 7, 0), np.delete(exact(x, left), 7, 0))


@needs_gpu
@pytest.mark.parametrize("shape", [(2048, 5120, 80), (512, 20480, 128)])
def test_repeats_are_equal_and_the_error_within_twice_that_of_xla(shape):
    tokens, k, rank = shape
    keys = jax.random.split(jax.random.key(0), 2)
    x, left = (
        jax.random.normal(key, s, jnp.bfloat16)
        for key, s in zip(keys, ((tokens, k), (k, rank)), strict=True)
    )
    found = of_kernel(x, left)
    for _ in range(5):
        np.testing.assert_array_equal(found, of_kernel(x, left))
    product = np.asarray(x, np.float64) @ np.asarray(left, np.float64)
    plain = np.asarray(jnp.matmul(x, left), np.float64)
    allowed = 2 * np.abs(plain - product).max()
    assert np.abs(np.asarray(found, np.float64) - product).max() <= allowed


@needs_gpu
def test_the_product_with_an_adapter_runs_it():
    x, left, right = (
        integers(seed, shape, most=1)
        for seed, shape in ((0, (2, 800, 1600)), (2, (1600, 20)), (3, (20, 264)))
    )
    dense = integers(1, (1600, 264), most=1)
    w = jax.jit(compress, static_argnums=1)(dense, "2:4")
    run = jax.jit(functools.partial(nm_matmul, implementation="mosaic"))
    assert "narrow_product" in run.lower(x, w, adapter=(left, right)).as_text()
    t = exact(x.reshape(-1, 1600), left)
    from pallas_kernels import decompress

    kept = float32(jax.jit(decompress)(w))
    expected = float32(x).reshape(-1, 1600) @ kept + t @ float32(right)
    expected = float32(jnp.asarray(expected, jnp.bfloat16)).reshape(2, 800, 264)
    np.testing.assert_array_equal(float32(run(x, w, adapter=(left, right))), expected)
