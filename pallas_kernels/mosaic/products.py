"""The dispatcher's way in: logical arrays of any rank to kernels and back."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import compressed
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.mosaic import matmul, sddmm, transpose
from pallas_kernels.pattern import Pattern

TWO_FOUR = Pattern(2, 4)

nm_transpose = transpose.nm_transpose


def nm_matmul(x: jax.Array, w: CompressedMatrix, out_dtype, precision) -> jax.Array:
    del precision  # products of 16-bit numbers are exact in float32
    if out_dtype != x.dtype:
        raise NotImplementedError(
            f"the kernel writes {x.dtype}, the dtype of x; out_dtype {out_dtype} needs 'xla'"
        )
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    if tokens == 0:
        return jnp.zeros((*x.shape[:-1], f), x.dtype)
    tile = matmul.choose_tile(tokens, k, f)
    w = as_two_four(w)
    y = matmul.nm_matmul(x.reshape(tokens, k), w.values, w.metadata, tile)
    return y.reshape(*x.shape[:-1], f)


def nm_sddmm(x: jax.Array, dy: jax.Array, w: CompressedMatrix, out_dtype, precision) -> jax.Array:
    del precision
    if w.axis != 0:
        raise NotImplementedError("the kernel keeps along the input axis; axis 1 needs 'xla'")
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    if tokens == 0:
        return jnp.zeros(w.values.shape, out_dtype)
    tile, splits = sddmm.choose(tokens, k, f)
    flat_x, flat_dy = x.reshape(tokens, k), dy.reshape(tokens, f)
    dw = sddmm.nm_sddmm(flat_x, flat_dy, w.metadata, tile, splits)
    return dw.astype(out_dtype)


def as_two_four(w: CompressedMatrix) -> CompressedMatrix:
    """The same matrix as 2:4, with stored zeros where the pattern keeps fewer."""
    if w.pattern == TWO_FOUR:
        return w
    mask = compressed.kept_mask(w)
    return compressed.compress(compressed.decompress(w), TWO_FOUR, mask=mask)
