"""The formulas y, dx, dw. dx is not the derivative of y, so there is no gradient check."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CompressedMatrix
from slope_jax import pieces, slope_matmul

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8"]


def integers(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).integers(-8, 9, shape).astype(dtype))


@jax.jit
def gradients(x, w, dy):
    y, back = jax.vjp(slope_matmul, x, w)
    dx, dw = back(dy)
    return y, dx, dw.values


@pytest.mark.parametrize(
    ("pattern", "lead"),
    [*((pattern, (2, 3)) for pattern in PATTERNS), *(("2:4", x) for x in [(6,), (2, 1, 3), ()])],
)
def test_y_dx_dw_are_those_of_the_method(pattern, lead):
    w = compiled.compress(integers(0, (32, 48)), pattern)
    x, dy = integers(1, (*lead, 32)), integers(2, (*lead, 48))
    y, dx, dw = gradients(x, w, dy)
    w_r, mask_r = np.asarray(compiled.decompress(w)), np.asarray(compiled.kept_mask(w))
    w_rc = w_r * np.asarray(compiled.double_prune(compiled.decompress(w), pattern))
    np.testing.assert_array_equal(y, x @ w_r)
    np.testing.assert_array_equal(dx, dy @ w_rc.T)
    tokens_x, tokens_dy = np.asarray(x).reshape(-1, 32), np.asarray(dy).reshape(-1, 48)
    expected = (tokens_x.T @ tokens_dy) * mask_r
    np.testing.assert_array_equal(compiled.decompress(w.with_values(dw)), expected)


def test_dx_is_not_the_derivative_of_y():
    w = compiled.compress(integers(0, (32, 48)), "2:4")
    dy = integers(2, (6, 48))
    _, dx, _ = gradients(integers(1, (6, 32)), w, dy)
    assert (dx != dy @ compiled.decompress(w).T).any()


def test_bf16_compute_with_a_float32_master_gives_a_float32_gradient():
    w = compiled.compress(jax.random.normal(jax.random.key(0), (64, 32)), "2:4")
    x = jax.random.normal(jax.random.key(1), (512, 64)).astype(jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (512, 32)).astype(jnp.bfloat16)
    y, dx, dw = gradients(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = (
        np.asarray(x, np.float64).T @ np.asarray(dy, np.float64) * np.asarray(compiled.kept_mask(w))
    )
    error = np.abs(np.asarray(compiled.decompress(w.with_values(dw))) - exact).max()
    once_rounded = np.abs(exact.astype(jnp.bfloat16).astype(np.float64) - exact).max()
    assert error < once_rounded / 10  # never went through bfloat16


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_transformations_leave_the_gradient_alone(wrap):
    w = compiled.compress(integers(0, (16, 8)), "2:4")
    x, dy = integers(1, (5, 16)), integers(2, (5, 8))

    def loss(x, values):
        return (slope_matmul(x, w.with_values(values)) * dy).sum()

    plain, wrapped = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, w.values) for f in (loss, wrap(loss)))
    for a, b in zip(plain, wrapped, strict=True):
        np.testing.assert_array_equal(a, b)


def test_vmap_over_inputs_and_over_a_stack_of_weights():
    w = compiled.compress(integers(0, (3, 16, 8)), "2:4")
    x = integers(1, (3, 5, 16))
    y = jax.jit(jax.vmap(slope_matmul))(x, w)
    np.testing.assert_array_equal(y, jnp.einsum("lti,lio->lto", x, compiled.decompress(w)))
    one = jax.tree.map(lambda leaf: leaf[0], w)
    np.testing.assert_array_equal(
        jax.vmap(slope_matmul, in_axes=(0, None))(x, one), jnp.matmul(x, compiled.decompress(one))
    )


def test_scan_over_a_stack_of_weights():
    w = compiled.compress(integers(0, (3, 8, 8)), "2:4")
    x = integers(1, (2, 8))

    def loss(values):
        return jax.lax.scan(lambda x, w: (slope_matmul(x, w), None), x, w.with_values(values))[
            0
        ].sum()

    def unrolled(values):
        y = x
        for one, positions in zip(values, w.metadata, strict=True):
            y = slope_matmul(y, CompressedMatrix(one, positions, w.pattern, 0, w.shape))
        return y.sum()

    np.testing.assert_array_equal(
        jax.jit(jax.grad(loss))(w.values), jax.jit(jax.grad(unrolled))(w.values)
    )


def test_output_axis_must_be_a_multiple_of_m():
    w = compiled.compress(jnp.ones((8, 6)), "2:4")
    with pytest.raises(ValueError, match=r"output axis.*6 entries.*multiple of 4"):
        slope_matmul(jnp.ones((1, 8)), w)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_exact_backward_is_the_derivative_of_the_masked_dense_product(pattern, activation):
    """All in integers, so that no rounding hides which entries are multiplied."""
    w = compiled.compress(integers(0, (32, 48)), pattern)
    x, dy, bias = integers(1, (2, 3, 32)), integers(2, (2, 3, 48)), integers(3, (48,))
    adapter = integers(4, (32, 5)), integers(5, (5, 48))
    kernel, mask = compiled.decompress(w), compiled.kept_mask(w)

    def dense(x, kernel, bias, left, right):
        y = x @ jnp.where(mask, kernel, 0) + (x @ left) @ right + bias[None, None]
        return ((jnp.where(y > 0, y, 0) if activation else y) * dy).sum()

    def sparse(x, values, bias, left, right, backward):
        y = slope_matmul(
            x,
            w.with_values(values),
            bias=bias,
            adapter=(left, right),
            activation=activation,
            backward=backward,
        )
        return (y * dy).sum()

    wanted = jax.jit(jax.grad(dense, argnums=range(5)))(x, kernel, bias, *adapter)
    got = jax.jit(jax.grad(sparse, argnums=range(5)), static_argnums=5)(
        x, w.values, bias, *adapter, "exact"
    )
    np.testing.assert_array_equal(compiled.decompress(w.with_values(got[1])), wanted[1])
    for a, b in zip((got[0], *got[2:]), (wanted[0], *wanted[2:]), strict=True):
        np.testing.assert_array_equal(a, b)
    double_pruned = jax.jit(jax.grad(sparse), static_argnums=5)(
        x, w.values, bias, *adapter, "double-pruned"
    )
    assert (double_pruned != wanted[0]).any()


def test_an_unknown_backward_is_refused():
    w = compiled.compress(jnp.ones((8, 8)), "2:4")
    with pytest.raises(ValueError, match="'dense'; choose one of double-pruned, exact"):
        slope_matmul(jnp.ones((1, 8)), w, backward="dense")


def test_numbers_of_numpy_are_of_jaxs_widths():
    """Its 64 bits are 32, as for JAX's own products."""
    w = compiled.compress(jnp.arange(64.0).reshape(8, 8), "2:4")
    x, residual = np.arange(16.0).reshape(2, 8), np.ones((2, 8))
    y = slope_matmul(x, w, residual=residual)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, x @ np.float64(compiled.decompress(w)) + 1)
    with pytest.raises(TypeError, match="x is a list; it must be an array"):
        slope_matmul([[1.0] * 8], w)
    with pytest.raises(ValueError, match="x has dtype int"):
        slope_matmul(np.ones((2, 8), np.int32), w)


def test_a_name_of_no_implementation_is_refused_before_a_transpose():
    w = compiled.compress(jnp.ones((8, 8)), "2:4")
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        pieces.transposes(w, jnp.float32, "cuda")
