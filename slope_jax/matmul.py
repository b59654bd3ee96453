"""The sparse linear map and its double-pruned gradient, as one `jax.custom_vjp`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import CompressedMatrix, decompress, nm_matmul, nm_sddmm, nm_transpose
from pallas_kernels.epilogue import ACTIVATIONS, first_product

DOUBLE_PRUNED, EXACT = "double-pruned", "exact"
BACKWARDS = (DOUBLE_PRUNED, EXACT)


class Working(NamedTuple):
    """What is multiplied in the place of a weight, made once for many products.

    Attributes:
      values: the weight's values in x's dtype; None casts them in each forward pass.
      transpose: `nm_transpose` of the weight, in x's dtype; None makes it in each backward pass.
    """

    values: jax.Array | None = None
    transpose: CompressedMatrix | None = None


def slope_matmul(
    x: jax.Array,
    w: CompressedMatrix,
    *,
    working: Working | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
    backward: str = DOUBLE_PRUNED,
) -> jax.Array:
    """activation(x @ w + (x @ l) @ r + bias), with SLoPe's double-pruned backward pass.

        z  = x @ w_r + (x @ l) @ r + bias,  y = activation(z)
        dz = dy * activation'(z)
        dx = dz @ w_rc.T + (dz @ r.T) @ l.T     w_rc: w_r pruned again, n:m along the output axis
        dw = (x.T @ dz) * mask_r                only the survivors' values

    (SLoPe, section 2.1, algorithm 1; adapters, section 2.2.) dx is therefore not the derivative
    of y. Bias, activation and adapter join the sparse product's own kernel where one runs.

    Args:
      x: (..., in), float32, bfloat16 or float16; the products run in its dtype and accumulate in
        float32.
      w: (in, out), compressed along the input axis, in any of these dtypes; in and out are
        multiples of m. The double pruning selects before w is cast to x's dtype.
      working: copies of w, which is then neither read nor kept for the backward pass; it gets the
        same gradient, in its own dtype, and the copies get none. They must be those of w.
      bias: (out,). adapter: l (in, rank), r (rank, out). In any of these dtypes as well.
      activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
      precision: of the products, as in `jax.lax.dot_general`.
      implementation: of the products; None for the best. See `pallas_kernels.choose`.
      backward: "double-pruned", or "exact": dx = dz @ w_r.T + ..., the derivative, by a dense
        product. For comparisons: it is what the second pruning approximates.

    Returns:
      (..., out) in x's dtype. Gradients are in the dtypes of their operands; that of w comes
      straight from float32 accumulators.

    Raises:
      ValueError: shapes or dtypes do not fit, or the activation or `backward` is unknown.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import compress
    >>> w = compress(jnp.arange(16.0).reshape(4, 4), "2:4")
    >>> slope_matmul(jnp.ones((1, 4)), w, bias=jnp.ones(4)).tolist()
    [[21.0, 23.0, 25.0, 27.0]]
    """
    working = Working() if working is None else working
    check_operands(x, w, working, adapter, backward)
    options = Options(precision, implementation, w.dtype, backward)
    return _slope_matmul(x, w, working, bias, adapter, activation, options)


class Options(NamedTuple):
    precision: jax.lax.PrecisionLike
    implementation: str | None
    dtype: jnp.dtype  # of the weight, hence of its gradient
    backward: str


class Saved(NamedTuple):
    """What a pass keeps beside y for the backward pass: what enters the activation, and x @ l."""

    preactivation: bool = False
    first_product: bool = False


NOTHING = Saved()


def saved_with(activation: str | None) -> Saved:
    """What the backward pass needs: where relu is flat, its y says."""
    return Saved(preactivation=activation not in (None, "relu"), first_product=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _slope_matmul(x, w, working, bias, adapter, activation, options):
    return product(x, w, working, bias, adapter, activation, options)[0]


def product(x, w, working, bias, adapter, activation, options, saved=NOTHING):
    """y, and z and x @ l where they are saved."""
    precision, implementation = options.precision, options.implementation
    low_rank, t = None, None
    if adapter is not None:
        adapter = left, right = tuple(a.astype(x.dtype) for a in adapter)
        if saved.first_product:
            t = first_product(x, left, precision)
            low_rank, adapter = (t, right), None
    y = nm_matmul(
        x,
        w.with_values(w.values.astype(x.dtype) if working.values is None else working.values),
        bias=bias,
        activation=activation,
        low_rank=low_rank,
        adapter=adapter,
        save_preactivation=saved.preactivation,
        precision=precision,
        implementation=implementation,
    )
    y, z = y if saved.preactivation else (y, None)
    return y, z, t


def _forward(x, w, working, bias, adapter, activation, options):
    saved = saved_with(activation)
    y, z, t = product(x, w, working, bias, adapter, activation, options, saved)
    if None not in working:  # the backward pass then reads w's positions alone
        w = w.with_values(working.values)
    residuals = (x, w, working.transpose, bias, adapter, y if activation == "relu" else z, t)
    return y, residuals


def backward(activation, options, residuals, dy):
    """Gradients of x, w, its copies (none), bias and adapter."""
    precision, implementation, dtype, kind = options
    x, w, transpose, bias, adapter, z, t = residuals
    dz, dbias, dadapter, low_rank = outer_gradients(
        activation, precision, (x, bias, adapter, z, t), dy
    )
    if kind == EXACT:
        dx = _exact_dx(dz, w, low_rank, precision)
    else:
        if transpose is None:
            transpose = nm_transpose(w, dtype=x.dtype, implementation=implementation)
        dx = nm_matmul(
            dz, transpose, low_rank=low_rank, precision=precision, implementation=implementation
        )
    dw = nm_sddmm(x, dz, w, out_dtype=dtype, precision=precision, implementation=implementation)
    no_gradient = np.zeros(w.metadata.shape, jax.dtypes.float0)
    dw = CompressedMatrix(dw, no_gradient, w.pattern, w.axis, w.shape)
    return dx, dw, None, dbias, dadapter


def outer_gradients(activation, precision, residuals, dy):
    """What comes before the products with the weight.

    Returns the gradient of the product in x's dtype, those of bias and adapter, and the factors of
    the low-rank term of dx.
    """
    x, bias, adapter, z, t = residuals
    dz = dy.astype(jnp.float32)
    if activation is not None:
        dz = jax.vjp(ACTIVATIONS[activation], z.astype(jnp.float32))[1](dz)[0]
    tokens = tuple(range(dz.ndim - 1))
    dbias = None if bias is None else dz.sum(tokens).astype(bias.dtype)
    dz = dz.astype(x.dtype)
    dadapter, low_rank = None, None
    if adapter is not None:
        dadapter, low_rank = _adapter_backward(x, t, dz, adapter, precision)
    return dz, dbias, dadapter, low_rank


def _exact_dx(dz, w, low_rank, precision):
    w = decompress(w.with_values(w.values.astype(dz.dtype)))
    dx = jnp.matmul(dz, w.T, precision=precision)
    return dx if low_rank is None else dx + jnp.matmul(*low_rank, precision=precision)


def _adapter_backward(x, t, dz, adapter, precision):
    """Gradients of l and r, and the low-rank term of dx."""
    left, right = (a.astype(x.dtype) for a in adapter)
    dt = jnp.matmul(dz, right.T, precision=precision)

    def over_tokens(a, b, like):
        tokens = tuple(range(a.ndim - 1))
        product = jax.lax.dot_general(
            a,
            b,
            ((tokens, tokens), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return product.astype(like.dtype)

    return (over_tokens(x, dt, adapter[0]), over_tokens(t, dz, adapter[1])), (dt, left.T)


# Where a layer is rematerialised, its first pass then runs `product` without the preactivation.
_slope_matmul.defvjp(_forward, backward, optimize_remat=True)


def check_operands(x, w, working: Working, adapter, backward: str) -> None:
    """Raises a ValueError unless the arguments of `slope_matmul` fit; w may be dense."""
    if isinstance(w, CompressedMatrix):
        w.pattern.check_divides(w.shape[1], f"output axis of shape {w.shape}")
    _check_adapter(adapter, w.shape)
    _check_working(working, x, w)
    check_backward(backward)


def check_backward(backward: str) -> None:
    """Raises a ValueError unless `backward` is one of `BACKWARDS`."""
    if backward not in BACKWARDS:
        raise ValueError(f"backward={backward!r}; choose one of {', '.join(BACKWARDS)}")


def _check_adapter(adapter, shape: tuple[int, int]) -> None:
    if adapter is None:
        return
    left, right = adapter
    if left.ndim != 2 or right.shape != (left.shape[1], shape[1]) or left.shape[0] != shape[0]:
        raise ValueError(
            f"adapter has shapes {left.shape} and {right.shape}; for a weight {shape} they must be"
            f" ({shape[0]}, rank) and (rank, {shape[1]})"
        )


def _check_working(working: Working, x: jax.Array, w: CompressedMatrix) -> None:
    values, transpose = working
    shape = getattr(w, "values", w).shape
    if values is not None and (values.shape, values.dtype) != (shape, x.dtype):
        raise ValueError(
            f"working.values are {values.dtype}{list(values.shape)}; for this x and w they must be"
            f" {x.dtype}{list(shape)}, as slope_jax.working_copies makes them"
        )
    if transpose is None:
        return
    found = (transpose.shape, transpose.pattern, transpose.axis, transpose.dtype)
    if found != (w.shape[::-1], w.pattern, 0, x.dtype):
        raise ValueError(
            f"working.transpose is {transpose.dtype}, {transpose.pattern}, {transpose.shape}; for"
            f" this x and w it must be nm_transpose(w, dtype={x.dtype}), of shape {w.shape[::-1]}"
        )
