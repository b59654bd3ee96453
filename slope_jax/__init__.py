"""SLoPe in JAX: double-pruned N:M sparse pretraining with lazy low-rank adapters."""

from pallas_kernels import CompressedMatrix, Pattern, compress, decompress
from slope_jax import masks
from slope_jax.adapters import adapter_labels, add_adapters, lazy_adapters
from slope_jax.dense import SparseDense
from slope_jax.explain import Explanation, explain
from slope_jax.matmul import slope_matmul
from slope_jax.state import TrainState

__all__ = [
    "CompressedMatrix",
    "Explanation",
    "Pattern",
    "SparseDense",
    "TrainState",
    "adapter_labels",
    "add_adapters",
    "compress",
    "decompress",
    "explain",
    "lazy_adapters",
    "masks",
    "slope_matmul",
]
