"""The product of the dispatcher on the Triton kernel; what follows the sum is left to XLA.

XLA fuses the sum over the splits, the bias, the activation and the cast into one kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import batching
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.epilogue import Epilogue, finish
from pallas_kernels.triton import matmul


def nm_matmul(
    x: jax.Array,
    w: CompressedMatrix,
    out_dtype,
    precision,
    epilogue: Epilogue,
    *,
    capability: int | None = None,
):
    """(..., in) @ (in, out). `precision` does not matter to 16-bit operands."""
    x, epilogue = epilogue.normalised(x)
    dtype = out_dtype if epilogue.is_empty else jnp.float32
    run = functools.partial(_product, out_dtype=dtype, capability=capability)
    z = batching.by_rows(run, lambda x, w: (True, jax.tree.map(lambda _: False, w)))(x, w)
    return finish(z, epilogue.multiplied(x), out_dtype, x=x)


def _product(x: jax.Array, w: CompressedMatrix, out_dtype, capability: int | None) -> jax.Array:
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    if tokens == 0:
        return jnp.zeros((*x.shape[:-1], f), out_dtype)
    device = matmul.Processors.here()
    tile = matmul.choose_tile(tokens, k, f, device)
    splits = matmul.choose_splits(tile, tokens, k, f, device)
    parts = matmul.nm_matmul(
        x.reshape(tokens, k),
        w.values,
        w.metadata,
        tile=tile,
        splits=splits,
        out_dtype=out_dtype if splits == 1 else jnp.float32,
        capability=capability,
    )
    y = parts[0] if splits == 1 else parts.sum(0).astype(out_dtype)
    return y.reshape(*x.shape[:-1], f)
