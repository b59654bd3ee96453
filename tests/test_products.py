"""The three products: exact on integers, within the rounding of their dtype on random data."""

import dataclasses

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Pattern,
    Query,
    Sections,
    choose,
    compress,
    decompress,
    nm_matmul,
    nm_sddmm,
    nm_transpose,
)
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.epilogue import Norm
from slope_jax import slope_matmul

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8", "4:4"]
SHAPES = [(16, 8), (32, 40), (48, 24)]


def integers(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).integers(-8, 9, shape).astype(dtype))


def weight(seed, shape, pattern, dtype=jnp.float32, axis=0):
    return compiled.compress(integers(seed, shape, dtype), pattern, axis=axis)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_matmul_is_exact_on_integers(implementation, shape, pattern, lead):
    w = weight(0, shape, pattern)
    x = integers(1, (*lead, shape[0]))
    y = compiled.nm_matmul(x, w, implementation=implementation)
    np.testing.assert_array_equal(y, np.asarray(x) @ np.asarray(compiled.decompress(w)))


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sddmm_is_exact_on_integers(implementation, pattern, axis):
    shape = (32, 48)
    w = weight(0, shape, pattern, axis=axis)
    x, dy = integers(1, (2, 3, 32)), integers(2, (2, 3, 48))
    dw = compiled.nm_sddmm(x, dy, w, implementation=implementation)
    dense = np.einsum("abi,abo->io", x, dy) * np.asarray(compiled.kept_mask(w))
    np.testing.assert_array_equal(compiled.decompress(w.with_values(dw)), dense)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, jnp.float32) for shape in SHAPES),
        ((48, 24), jnp.bfloat16),
        ((48, 24), jnp.float16),
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_transpose_prunes_again_along_the_other_axis(pattern, shape, dtype):
    """Ties abound among small integers, so the oracle must break them the same way: lower first."""
    w = weight(0, shape, pattern, dtype)
    n, m = w.n, w.m
    dense = np.asarray(compiled.decompress(w).astype(jnp.float32))
    expected = np.zeros_like(dense)
    for row, start in np.ndindex(shape[0], shape[1] // m):
        group = dense[row, start * m : (start + 1) * m]
        keep = sorted(range(m), key=lambda i: (-abs(group[i]), i))[:n]
        for i in keep:
            expected[row, start * m + i] = group[i]
    w_t = compiled.nm_transpose(w)
    assert (w_t.shape, w_t.axis, w_t.dtype) == (shape[::-1], 0, dtype)
    np.testing.assert_array_equal(compiled.decompress(w_t).astype(jnp.float32), expected.T)


def test_transpose_selects_before_it_casts():
    w = compiled.compress(
        jnp.array([[1.0, 1.001, 1.002, 1.003]] * 4) * jnp.array([[1.0]] * 4), "4:4"
    )
    w = compiled.compress(compiled.decompress(w), "2:4")
    dense = compiled.decompress(compiled.nm_transpose(w, dtype=jnp.bfloat16))
    kept = np.asarray(dense.T != 0)
    np.testing.assert_array_equal(kept[:2], [[False, False, True, True]] * 2)
    assert dense.dtype == jnp.bfloat16


def test_transpose_keeps_nan_and_treats_negative_zero_as_zero():
    w = compiled.compress(jnp.array([[1.0, jnp.nan, -0.0, 3.0], [0.0, -0.0, 0.0, 0.0]] * 2), "2:4")
    row = compiled.decompress(compiled.nm_transpose(w))[:, 0]
    assert np.isnan(row[1])
    assert row[3] == 3.0
    assert row[0] == row[2] == 0.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_error_is_within_twice_that_of_the_dense_product(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (96, 256)).astype(dtype)
    dy = jax.random.normal(keys[1], (96, 128)).astype(dtype)
    w = compiled.compress(jax.random.normal(keys[2], (256, 128)).astype(dtype), "2:4")
    exact = np.asarray(x, np.float64) @ np.asarray(compiled.decompress(w), np.float64)
    dense = np.abs(np.asarray(x @ compiled.decompress(w), np.float64) - exact).max()
    sparse = compiled.nm_matmul(x, w, implementation="xla")
    assert np.abs(np.asarray(sparse, np.float64) - exact).max() <= 2 * dense
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    dense = np.abs(np.asarray(x.T @ dy, np.float64) - exact).max()
    dw = compiled.nm_sddmm(x, dy, w, implementation="xla")
    mask = np.asarray(compiled.kept_mask(w))
    error = np.asarray(compiled.decompress(w.with_values(dw)), np.float64) - exact * mask
    assert np.abs(error).max() <= 2 * dense


def test_accumulates_in_float32():
    """4096 ones: a bfloat16 accumulator would stop at 256."""
    w = compiled.compress(jnp.ones((8192, 4), jnp.bfloat16), "2:4")
    y = compiled.nm_matmul(jnp.ones((1, 8192), jnp.bfloat16), w, out_dtype=jnp.float32)
    assert y.tolist() == [[4096.0] * 4]
    x, dy = jnp.ones((4096, 8), jnp.bfloat16), jnp.ones((4096, 4), jnp.bfloat16)
    w = compiled.compress(jnp.ones((8, 4), jnp.bfloat16), "2:4")
    assert compiled.nm_sddmm(x, dy, w, out_dtype=jnp.float32).tolist() == [[4096.0] * 4] * 4


def test_works_under_vmap_and_jit():
    w = weight(0, (16, 8), "2:4")
    x = integers(1, (3, 5, 16))
    y = jax.jit(jax.vmap(nm_matmul, in_axes=(0, None)))(x, w)
    np.testing.assert_array_equal(y, compiled.nm_matmul(x, w))


W = compress(jnp.ones((8, 4)), "2:4")
X, DY = jnp.ones((3, 8)), jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm_matmul(X[:, :4], W), r"\(3, 4\).*in, 8"),
        (lambda: nm_matmul(X.astype(jnp.bfloat16), W), "x is bfloat16 and w.values is float32"),
        (lambda: nm_matmul(X.astype(jnp.int32), W), "int32"),
        (lambda: nm_matmul(X, compress(jnp.ones((8, 4)), "2:4", axis=1)), "nm_transpose"),
        (lambda: nm_matmul(X, compress(jnp.ones((2, 8, 4)), "2:4")), "vmap"),
        (lambda: nm_matmul(X, W, implementation="cuda"), "'cuda'.*'xla'"),
        (lambda: nm_sddmm(X, DY[:2], W), "same tokens"),
        (lambda: nm_sddmm(X, X, W), "out, 4"),
        (lambda: nm_sddmm(X, DY, W, into=W.values[:1]), r"\[1, 4\].*\[4, 4\]"),
        (
            lambda: nm_sddmm(X, DY, W, into=W.values.astype(jnp.float16), out_dtype=jnp.bfloat16),
            "float16.*out_dtype, bfloat16",
        ),
        (lambda: nm_transpose(compress(jnp.ones((8, 4)), "2:4", axis=1)), "axis 1"),
        (lambda: nm_transpose(compress(jnp.ones((8, 6)), "2:4")), "output axis.*6 entries"),
        (lambda: Query("nm_mul", (8, 4), Pattern(2, 4), "float32"), "nm_mul"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_choose_says_what_runs_and_why():
    choice = choose(Query("nm_matmul", (8, 4), Pattern(2, 4), "float32", tokens=3))
    assert choice.implementation in IMPLEMENTATIONS
    assert choice.reason
    assert choose(Query("nm_matmul", (8, 4), Pattern(2, 4), "float32"), "xla").reason == "asked for"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("into_dtype", "out_dtype"),
    [(jnp.float32, None), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.bfloat16)],
)
def test_sddmm_adds_into_a_buffer_in_float32(into_dtype, out_dtype, axis):
    w = weight(0, (32, 48), "2:4", jnp.bfloat16, axis=axis)
    # 17, so that the product alone would be rounded in bfloat16.
    x, dy = 17 * integers(1, (7, 32), jnp.bfloat16), integers(2, (7, 48), jnp.bfloat16)
    into = 256 * integers(3, w.values.shape, into_dtype)
    dense = (
        np.asarray(x, np.float32).T @ np.asarray(dy, np.float32) * np.asarray(compiled.kept_mask(w))
    )
    buffer = compiled.decompress(w.with_values(into.astype(jnp.float32)))
    exact = jnp.asarray(dense + np.asarray(buffer)).astype(out_dtype or into_dtype)
    found = compiled.nm_sddmm(x, dy, w, into=into, out_dtype=out_dtype)
    assert found.dtype == exact.dtype
    np.testing.assert_array_equal(
        np.asarray(compiled.decompress(w.with_values(found)), np.float32),
        np.asarray(exact, np.float32),
    )


WRONG_KINDS = {
    "bias": ([1.0], "bias is a list; it must be an array"),
    "residual": (1.0, "residual is a float; it must be an array"),
    "low_rank": (jnp.ones((3, 8)), "low_rank is .*; it must be two arrays"),
    "adapter": ((None, None), r"adapter\[0\] is a NoneType; it must be an array"),
    "norm": ((jnp.ones(16), None), "norm is a tuple; it must be a Norm"),
    "sections": (8, "sections is a int; it must be the outputs of each"),
    "through": ("relu", "through is 'relu'; it must be the name .* and what entered it"),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_what_joins_a_product_and_is_of_another_kind_is_named(name):
    w = compress(jnp.ones((16, 8)), "2:4")
    value, message = WRONG_KINDS[name]
    with pytest.raises(TypeError, match=message):
        nm_matmul(jnp.ones((3, 16)), w, **{name: value})


def test_operands_of_other_kinds_are_named():
    w = compress(jnp.ones((16, 8)), "2:4")
    x, dy = jnp.ones((3, 16)), jnp.ones((3, 8))
    for call, message in (
        (lambda: slope_matmul(x, jnp.ones((16, 8))), "w is a .*; it must be a CompressedMatrix"),
        (lambda: slope_matmul([[1.0]], w), "x is a list; it must be an array"),
        (lambda: slope_matmul(x, w, adapter=(x,)), "adapter is 1 things; it must be two arrays"),
        (lambda: nm_sddmm(x, dy, w, into=[1.0]), "into is a list; it must be an array"),
        (lambda: nm_sddmm(Sections((x,)), dy, w), "x comes in sections"),
        (lambda: compress([[1.0]], "2:4"), "w is a list; it must be an array"),
        (lambda: dataclasses.replace(w, values=None).check(), "values is a NoneType"),
        (lambda: decompress(x), "w is a .*; it must be a CompressedMatrix"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="x has dtype int32"):
        slope_matmul(jnp.ones((3, 16), jnp.int32), w)
    with pytest.raises(
        ValueError, match=r"\('8',\) must be positive integers that add up to the 8"
    ):
        nm_matmul(x, w, sections=("8",))
    with pytest.raises(TypeError, match="the norm's moments is a int; it must be an array"):
        nm_matmul(x, w, norm=Norm(jnp.ones(16), moments=1))
    with pytest.raises(ValueError, match="out_dtype is 'half a float'; it must be float32"):
        nm_matmul(x, w, out_dtype="half a float")
    with pytest.raises(ValueError, match=r"activation is \['gelu'\]"):
        nm_matmul(x, w, activation=["gelu"])
