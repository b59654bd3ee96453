"""Random operands on the device, as timings need them: different ones for each call."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compressed import CompressedMatrix, compress, decompress

CACHE_BYTES = 50e6  # of an H100's L2
MOST_COPIES = 32
BASE_SIZE = 16_777_213  # a prime, so that rows of no width repeat
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


def adapter_rank(width: int, share: float = 0.0156) -> int:
    """1.56 % (or another share) of the width, rounded up to a multiple of 8.

    >>> adapter_rank(768), adapter_rank(4096)
    (16, 64)
    """
    return 8 * math.ceil(share * width / 8)


def normal(seed: int, count: int, shape: tuple[int, ...], dtype=jnp.bfloat16) -> list[jax.Array]:
    """`count` arrays of random normal numbers, cut from one block that repeats.

    To make new ones for every shape would take longer to compile than most products.
    """
    base = _base(jnp.dtype(dtype))
    return [_cut(base, _offset(seed, i), shape) for i in range(count)]


def weights(seed: int, count: int, size: tuple[int, int], dtype=jnp.bfloat16) -> list[Weight]:
    """`count` weights of random normal numbers, the largest of each group of 4 kept."""
    base = _base(jnp.dtype(dtype))
    return [_weight(base, _offset(seed, i), size) for i in range(count)]


def compile_for(function, *operands, options: dict | None = None):
    """`function` compiled for these operands; calls of it never compile again."""
    return jax.jit(function).lower(*operands).compile(compiler_options=options)


@functools.cache
def _base(dtype) -> jax.Array:
    make = jax.jit(lambda key: jax.random.normal(key, (BASE_SIZE,), dtype))
    return jax.block_until_ready(make(jax.random.key(0)))


def _offset(seed: int, number: int) -> jax.Array:
    return jnp.int32((1_000_003 * (31 * seed + number)) % BASE_SIZE)


@functools.partial(jax.jit, static_argnums=2)
def _cut(base, offset, shape):
    count = math.prod(shape)
    repeats = 1 + -(-count // BASE_SIZE)
    return lax.dynamic_slice_in_dim(jnp.tile(base, repeats), offset, count).reshape(shape)


@functools.partial(jax.jit, static_argnums=2)
def _weight(base, offset, size):
    # Scaled so that products are of order one, whatever the width.
    dense = _cut(base, offset, size) * jnp.asarray(size[0] ** -0.5, base.dtype)
    sparse = compress(dense, "2:4")
    return Weight(sparse, decompress(sparse))
