"""The three products in plain XLA: the definition, the oracle, and what runs without a kernel.

Each multiplies densely, so it saves memory (stored weights, gradients, moments) and no time.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import compressed
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.epilogue import Epilogue, finish


def nm_matmul(x: jax.Array, w: CompressedMatrix, out_dtype, precision, epilogue: Epilogue):
    x, epilogue = epilogue.normalised(x)
    z = jnp.matmul(
        x, compressed.decompress(w), precision=precision, preferred_element_type=jnp.float32
    )
    return finish(z, epilogue.multiplied(x, precision), out_dtype, precision, x=x)


def nm_sddmm(
    x: jax.Array, dy: jax.Array, w: CompressedMatrix, out_dtype, precision, into=None
) -> jax.Array:
    tokens = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(
        x,
        dy,
        ((tokens, tokens), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    groups = compressed.split_groups(dw if into is not None else dw.astype(out_dtype), w.m, w.axis)
    positions = compressed.split_groups(compressed.positions_of(w), w.n, w.axis)
    values = compressed.join_groups(compressed.pick(groups, positions), w.axis)
    if into is not None:
        values = values + into.astype(jnp.float32)
    return values.astype(out_dtype)


def nm_transpose(w: CompressedMatrix, dtype) -> CompressedMatrix:
    dense = jnp.swapaxes(compressed.decompress(w), -1, -2)
    pruned = compressed.compress(dense, w.pattern, axis=0)
    return pruned.with_values(pruned.values.astype(dtype))
