"""Projections of one matrix: apart on their way out, and their gradients on the way back."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered, needs_gpu, needs_jax

from pallas_kernels import Sections, compress, decompress, nm_matmul, nm_sddmm
from pallas_kernels.mosaic import support
from slope_jax import SparseDense, sharding, slope_matmul
from slope_jax.normed import Stream
from slope_jax.sharded import sharded_matmul

# tokens, in, sections: ragged tiles, sections within a tile, a last one that is not of a whole tile
SHAPES = [
    (300, 128, (64, 192, 128)),
    (520, 320, (128, 64, 64)),
    (1000, 776, (512, 128, 128)),
    (2048, 768, (768, 768, 768)),
]


def integers(seed, shape, dtype=jnp.bfloat16):
    values = np.random.default_rng(seed).integers(-2, 3, shape)
    return jnp.asarray(values.astype(dtype))


def sparse(seed, shape, dtype=jnp.bfloat16):
    return jax.jit(compress, static_argnums=1)(integers(seed, shape, dtype), "2:4")


def float32(x):
    return np.asarray(x, np.float32)


def rounded(x, dtype=jnp.bfloat16):
    return float32(jnp.asarray(x, jnp.float32).astype(dtype))


def split(x, sections):
    return np.split(x, np.cumsum(sections)[:-1], axis=-1)


def same(found, expected):
    assert isinstance(found, tuple)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(float32(a), b)


def check_forward(shape, implementation, dtype=jnp.bfloat16):
    tokens, k, sections = shape
    x, w = integers(0, (2, tokens // 2, k), dtype), sparse(1, (k, sum(sections)), dtype)
    bias = integers(2, (sum(sections),), jnp.float32)
    run = jax.jit(functools.partial(nm_matmul, sections=sections, implementation=implementation))
    exact = float32(x) @ float32(jax.jit(decompress)(w)) + float32(bias)
    same(run(x, w, bias=bias), split(rounded(exact, dtype), sections))


def check_backward(shape, implementation, dtype=jnp.bfloat16):
    tokens, k, sections = shape
    x, w = integers(0, (tokens, k), dtype), sparse(1, (sum(sections), k), dtype)
    dy = Sections(tuple(integers(2 + i, (tokens, n), dtype) for i, n in enumerate(sections)))
    run = functools.partial(nm_matmul, implementation=implementation)
    dx, sums = jax.jit(functools.partial(run, save_sums=True))(dy, w)
    whole = np.concatenate([float32(part) for part in dy.parts], -1)
    np.testing.assert_array_equal(
        float32(dx), rounded(whole @ float32(jax.jit(decompress)(w)), dtype)
    )
    np.testing.assert_array_equal(sums, whole.sum(0))
    kept = sparse(9, (k, sum(sections)), dtype)
    run = jax.jit(functools.partial(nm_sddmm, out_dtype=jnp.float32, implementation=implementation))
    dw = run(x, dy, kept)
    ones = jax.jit(decompress)(kept.with_values(jnp.ones_like(kept.values)))
    expected = (float32(x).T @ whole) * float32(ones)
    np.testing.assert_array_equal(float32(jax.jit(decompress)(kept.with_values(dw))), expected)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_sections_of_a_product(shape):
    check_forward(shape, "xla")
    check_backward(shape, "xla")


def test_gradients_are_those_of_a_product_that_is_split_later():
    sections, (x, w) = (
        (8, 16, 8),
        (integers(0, (6, 16), jnp.float32), sparse(1, (16, 32), jnp.float32)),
    )
    bias = integers(2, (32,), jnp.float32)
    weights = [integers(3 + i, (6, n), jnp.float32) for i, n in enumerate(sections)]

    def loss(apart, backward, x, values, bias, adapter):
        given = {"bias": bias, "adapter": adapter, "backward": backward}
        given |= {"sections": sections} if apart else {}
        y = slope_matmul(x, w.with_values(values), **given)
        parts = y if apart else jnp.split(y, (8, 24), axis=-1)
        return sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))

    adapter = integers(7, (16, 2), jnp.float32), integers(8, (2, 32), jnp.float32)
    for backward in ("double-pruned", "exact"):
        for given, names in ((adapter, (0, 1, 2, 3)), (None, (0, 1, 2))):
            a, b = (
                jax.grad(functools.partial(loss, apart, backward), names)(x, w.values, bias, given)
                for apart in (True, False)
            )
            jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("sparsity", ["2:4", None])
def test_a_layer_returns_its_sections(sparsity):
    layer = SparseDense(24, sparsity=sparsity, sections=(8, 16))
    x = jax.random.normal(jax.random.key(0), (3, 8))
    variables = layer.init(jax.random.key(1), x)
    whole = layer.apply(variables, x)
    same(layer.apply(variables, x, apart=True), split(float32(whole), (8, 16)))


def test_bad_input_is_named():
    x, w = jnp.ones((2, 8)), sparse(0, (8, 16), jnp.float32)
    with pytest.raises(
        ValueError, match=r"sections=\(8, 4\) must be positive integers that add up to the 16"
    ):
        nm_matmul(x, w, sections=(8, 4))
    with pytest.raises(ValueError, match=r"sections=\(16, 0\) must be positive"):
        nm_matmul(x, w, sections=(16, 0))
    with pytest.raises(ValueError, match="sections and what is saved of y"):
        nm_matmul(x, w, sections=(8, 8), activation="relu", save_preactivation=True)
    for other in (jnp.ones((4, 4)), jnp.ones((2, 4), jnp.bfloat16)):
        parts = Sections((x[:, :4], other))
        with pytest.raises(ValueError, match=r"x has the sections float32\[2, 4\], .*same leading"):
            nm_matmul(parts, w)
        with pytest.raises(
            ValueError, match=r"dy has the sections float32\[2, 4\], .*same leading"
        ):
            nm_sddmm(x, parts, w)
    with pytest.raises(ValueError, match="x has the sections none"):
        nm_matmul(Sections(()), w)
    with pytest.raises(ValueError, match="sections and activation='relu' are both given"):
        slope_matmul(x, w, sections=(8, 8), activation="relu")
    with pytest.raises(ValueError, match="sections and a residual are both given"):
        slope_matmul(x, w, sections=(8, 8), residual=jnp.ones((2, 16)))
    for options, arguments in [
        ({}, (x,)),
        ({"sections": (8, 8), "activation": "relu"}, (x,)),
        ({"sections": (8, 8)}, (x, jnp.ones((2, 16)))),
        ({"sections": (8, 8)}, (x, Stream(jnp.ones((2, 16))))),
    ]:
        layer = SparseDense(16, **options)
        with pytest.raises(ValueError, match="apart=True needs sections"):
            layer.init(jax.random.key(0), *arguments, apart=True)


@needs_jax
@pytest.mark.parametrize("on_mesh", [False, True])
def test_the_kernels_write_and_read_them_apart(monkeypatch, on_mesh):
    """No slice and no concatenation is left in a training step of a layer."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    sections = (768, 128, 128)
    x = jax.ShapeDtypeStruct((2, 1024, 768), jnp.bfloat16)
    w = jax.eval_shape(
        lambda w: compress(w, "2:4"), jax.ShapeDtypeStruct((768, sum(sections)), jnp.bfloat16)
    )

    def loss(x, w, sections):
        if on_mesh:
            product = functools.partial(sharded_matmul, cut=sharding.FUSED, apart=True)
        else:
            product = slope_matmul
        y = product(x, w, sections=sections, implementation="mosaic")
        return sum((part.astype(jnp.float32) ** 2).sum() for part in y)

    def operations(sections):
        text = lowered(
            jax.grad(functools.partial(loss, sections=sections), (0, 1), allow_int=True), x, w
        )
        return [text.count(f"stablehlo.{name}") for name in ("slice", "concatenate")]

    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=auto, devices=jax.devices()[:1])
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        assert operations(sections) == [0, 0]
        assert operations((760, 136, 128)) == [3, 2]  # not multiples of 64


@needs_jax
def test_kernels_refuse_sections_that_end_within_a_stage():
    from pallas_kernels.mosaic import matmul

    x, w = jnp.ones((128, 128), jnp.bfloat16), sparse(0, (128, 128))
    run = functools.partial(matmul.nm_matmul, tile=matmul.choose(128, 128, 128))
    with pytest.raises(ValueError, match=r"sections=\(96, 32\) must be multiples of 64"):
        run(x, w.values, w.metadata, sections=(96, 32))
    with pytest.raises(
        ValueError, match=r"x has sections of \(96, 32\); they must be multiples of 64"
    ):
        run(Sections((x[:, :96], x[:, :32])), w.values, w.metadata)
    with pytest.raises(ValueError, match="no preactivation"):
        run(x, w.values, w.metadata, sections=(64, 64), out_dtype=jnp.float32)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_exact_on_integers(shape, dtype):
    check_forward(shape, "mosaic", dtype)
    check_backward(shape, "mosaic", dtype)


# Alone, in clusters of either kind, of either width, shared at the end, and along the inputs
TILES = [
    {"blocks": 2, "tokens": 160, "slot_tokens": 80},
    {"blocks": 1, "tokens": 256, "slot_tokens": 64, "down": 2, "splits": 8},
    {"blocks": 2, "tokens": 128, "slot_tokens": 64, "stages": 5, "across": 2},
    {"blocks": 1, "tokens": 64, "slot_tokens": 32, "stages": 8, "along": 3},
]


@needs_gpu
@pytest.mark.parametrize("options", TILES)
def test_tiles_of_all_kinds_write_and_read_sections(options):
    from pallas_kernels.mosaic import matmul

    tile = matmul.Tile(**options)
    tokens, k, sections = (60, 1024, (64, 128)) if tile.along > 1 else (1100, 512, (256, 64, 128))
    x, w = integers(0, (tokens, k)), sparse(1, (k, sum(sections)))
    parts = Sections(tuple(integers(2 + i, (tokens, n)) for i, n in enumerate((64, k - 192, 128))))
    exact, back = (float32(a) @ float32(jax.jit(decompress)(w)) for a in (x, parts.whole()))
    run = functools.partial(matmul.nm_matmul, tile=tile, processors=6)
    found = run(x, w.values, w.metadata, sections=sections)
    same(tuple(found), split(rounded(exact), sections))
    np.testing.assert_array_equal(float32(run(parts, w.values, w.metadata)), rounded(back))


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"blocks": 1, "columns": 160, "down": 2, "across": 2}])
def test_gradients_of_sections_are_those_of_the_whole(options):
    from pallas_kernels.mosaic import sddmm

    tile = sddmm.Tile(**options)
    x, w = integers(0, (1100, 512)), sparse(1, (512, 448))
    dy = Sections(tuple(integers(5 + i, (1100, n)) for i, n in enumerate((256, 64, 128))))
    run = functools.partial(sddmm.nm_sddmm, x, metadata=w.metadata, tile=tile)
    np.testing.assert_array_equal(run(dy=dy), run(dy=dy.whole()))
