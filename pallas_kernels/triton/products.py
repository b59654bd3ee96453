"""The product of the dispatcher on the Triton kernel; what follows the sum is left to XLA.

XLA fuses the sum over the splits, the bias, the activation and the cast into one kernel.
"""

import jax
import jax.numpy as jnp

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
    rows = x.reshape(-1, x.shape[-1])
    tokens, (k, f) = rows.shape[0], w.shape
    if tokens == 0:
        return finish(jnp.zeros((*x.shape[:-1], f), jnp.float32), epilogue, out_dtype)
    tile = matmul.choose_tile(tokens)
    splits = matmul.choose_splits(tile, tokens, k, f, matmul.processors())
    parts = matmul.nm_matmul(
        rows,
        w.values,
        w.metadata,
        tile=tile,
        splits=splits,
        out_dtype=out_dtype if splits == 1 and epilogue.is_empty else jnp.float32,
        capability=capability,
    )
    z = parts[0] if splits == 1 else parts.sum(0)
    return finish(z.reshape(*x.shape[:-1], f), epilogue, out_dtype)
