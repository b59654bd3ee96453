"""Random operands on the device, as timings need them: different ones for each call."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.compressed import CompressedMatrix, compress, decompress

CACHE_BYTES = 50e6  # of an H100's L2
MOST_COPIES = 32
# The dense product as cuBLAS computes it: quick to compile, and what XLA chooses for most shapes.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


class Weight(NamedTuple):
    """A 2:4 matrix, and the same values in a dense one."""

    sparse: CompressedMatrix
    dense: jax.Array


def copies(nbytes: float, *, cache: float = CACHE_BYTES, most: int = 8) -> int:
    """How many operands of so many bytes to rotate through so that none is left in the cache.

    >>> copies(60e6), copies(10e6), copies(1e3)
    (2, 8, 8)
    """
    return max(2, min(most, math.ceil(2 * cache / nbytes)))


def normal(seed: int, count: int, shape: tuple[int, ...], dtype=jnp.bfloat16) -> list[jax.Array]:
    """`count` arrays of random normal numbers."""
    return [_normal(jax.random.key(seed * 1000 + i), shape, dtype) for i in range(count)]


def weights(seed: int, count: int, size: tuple[int, int], dtype=jnp.bfloat16) -> list[Weight]:
    """`count` weights of random normal numbers, the largest of each group of 4 kept."""
    return [_weight(jax.random.key(seed * 1000 + i), size, dtype) for i in range(count)]


def compile_for(function, *operands, options: dict | None = None):
    """`function` compiled for these operands; calls of it never compile again."""
    return jax.jit(function).lower(*operands).compile(compiler_options=options)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _weight(key, size, dtype):
    # Scaled so that products are of order one, whatever the width.
    dense = jax.random.normal(key, size, dtype) * jnp.asarray(size[0] ** -0.5, dtype)
    sparse = compress(dense, "2:4")
    return Weight(sparse, decompress(sparse))
