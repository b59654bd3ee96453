"""The functions that tests call most, each as one program: outside of `jax.jit` every operation of
theirs is compiled by itself, for every shape."""

import jax

import pallas_kernels
from slope_jax import masks

compress = jax.jit(pallas_kernels.compress, static_argnames=("pattern", "axis"))
decompress = jax.jit(pallas_kernels.decompress)
positions_of = jax.jit(pallas_kernels.positions_of)
kept_mask = jax.jit(pallas_kernels.kept_mask)
nm_matmul = jax.jit(pallas_kernels.nm_matmul, static_argnames=("out_dtype", "implementation"))
nm_sddmm = jax.jit(pallas_kernels.nm_sddmm, static_argnames=("out_dtype", "implementation"))
nm_transpose = jax.jit(pallas_kernels.nm_transpose, static_argnames=("dtype", "implementation"))
magnitude_mask = jax.jit(masks.magnitude_mask, static_argnames=("pattern", "axis"))
double_prune = jax.jit(masks.double_prune, static_argnames="pattern")
