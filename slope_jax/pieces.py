"""What one device does with its piece of a weight, compressed or dense. No collectives."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import CompressedMatrix, Query, choose, nm_transpose
from pallas_kernels.epilogue import ACTIVATIONS, sums_of
from slope_jax import matmul
from slope_jax.matmul import Options, Saved, Terms, Working


def product(x, w, bias, adapter, activation, options: Options, saved: Saved):
    """y, and the pre-activation and x @ l where they are saved; w has x's dtype."""
    if isinstance(w, CompressedMatrix):
        terms = Terms(bias, adapter)
        return matmul.product(x, w, Working(), terms, activation, options, saved)
    z, t = jnp.matmul(x, w, precision=options.precision), None
    if adapter is not None:
        t = jnp.matmul(x, adapter[0], precision=options.precision)
        z = z + jnp.matmul(t, adapter[1], precision=options.precision)
    if bias is not None:
        z = z + bias.astype(z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
    y = z if activation is None else ACTIVATIONS[activation](z)
    return y, z if saved.preactivation else None, t if saved.first_product else None


def gradients(activation, options: Options, residuals, dy):
    """dx, dw, dbias, dadapter; of a compressed w the residuals have its transpose as well."""
    x, w, transpose, bias, adapter, z, t = residuals
    if isinstance(w, CompressedMatrix):
        residuals = (x, w, transpose, Terms(bias, adapter), z, t)
        dx, dw, _, terms = matmul.backward(activation, options, residuals, dy)
        return dx, dw.values, terms.bias, terms.adapter
    precision = options.precision
    dz, dadapter = matmul.gradient_of_product(activation, x, z, dy), None
    dbias = None if bias is None else sums_of(dz).astype(bias.dtype)
    dx = jnp.matmul(dz, w.T, precision=precision)
    if adapter is not None:
        dt = matmul.gradient_of_first(dz, adapter, options)
        dx = dx + jnp.matmul(dt, adapter[0].astype(dz.dtype).T, precision=precision)
        dadapter = matmul.gradients_of_adapter(x, t, dz, dt, adapter, options)
    tokens = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(
        x, dz, ((tokens, tokens), ((), ())), precision, preferred_element_type=jnp.float32
    )
    return dx, dw.astype(options.dtype), dbias, dadapter


def transposes(w: CompressedMatrix, dtype, implementation: str | None) -> CompressedMatrix:
    """`nm_transpose` of a matrix or a stack of them."""
    asked = matmul.for_transposes(implementation)
    transpose = functools.partial(nm_transpose, dtype=dtype, implementation=asked)
    query = Query("nm_transpose", w.shape, w.pattern, str(w.dtype))
    if choose(query, asked).implementation == "xla":
        for _ in w.values.shape[:-2]:  # one layer after another, for each is dense for a moment
            transpose = functools.partial(jax.lax.map, transpose)
    return transpose(w)
