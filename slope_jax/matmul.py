"""The sparse linear map and its double-pruned gradient, as one `jax.custom_vjp`."""

import functools

import jax
import numpy as np

from pallas_kernels import CompressedMatrix, nm_matmul, nm_sddmm, nm_transpose


def slope_matmul(
    x: jax.Array,
    w: CompressedMatrix,
    *,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """y = x @ w, with SLoPe's double-pruned backward pass (SLoPe, section 2.1, algorithm 1).

        y  = x @ w_r
        dx = dy @ w_rc.T             w_rc: w_r pruned again, n:m along the output axis
        dw = (x.T @ dy) * mask_r     only the survivors' values

    dx is therefore not the derivative of y.

    Args:
      x: (..., in), float32, bfloat16 or float16; the products run in its dtype and accumulate in
        float32.
      w: (in, out), compressed along the input axis, in any of these dtypes; in and out are
        multiples of m. The double pruning selects before w is cast to x's dtype.
      precision: of the products, as in `jax.lax.dot_general`.
      implementation: of the products; None for the best. See `pallas_kernels.choose`.

    Returns:
      (..., out) in x's dtype. The gradient of w is in w's dtype, from float32 accumulators.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import compress
    >>> w = compress(jnp.arange(16.0).reshape(4, 4), "2:4")
    >>> slope_matmul(jnp.ones((1, 4)), w).tolist()
    [[20.0, 22.0, 24.0, 26.0]]
    """
    w.pattern.check_divides(w.shape[1], f"output axis of shape {w.shape}")
    return _slope_matmul(x, w, precision, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _slope_matmul(x, w, precision, implementation):
    w = w.with_values(w.values.astype(x.dtype))
    return nm_matmul(x, w, precision=precision, implementation=implementation)


def _forward(x, w, precision, implementation):
    return _slope_matmul(x, w, precision, implementation), (x, w)


def _backward(precision, implementation, residuals, dy):
    x, w = residuals
    options = {"precision": precision, "implementation": implementation}
    w_t = nm_transpose(w, dtype=x.dtype)
    dx = nm_matmul(dy, w_t, **options)
    dw = nm_sddmm(x, dy, w, **options)
    no_gradient = np.zeros(w.metadata.shape, jax.dtypes.float0)
    return dx, CompressedMatrix(dw, no_gradient, w.pattern, w.axis, w.shape)


_slope_matmul.defvjp(_forward, _backward)
