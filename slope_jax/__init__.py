"""SLoPe in JAX: double-pruned N:M sparse pretraining with lazy low-rank adapters."""

from pallas_kernels import CompressedMatrix, Pattern, compress, decompress
from slope_jax import masks
from slope_jax.account import Memory
from slope_jax.adapters import adapter_labels, add_adapters, lazy_adapters
from slope_jax.dense import WORKING, SparseDense
from slope_jax.explain import Explanation, explain
from slope_jax.matmul import Working, slope_matmul
from slope_jax.memory import memory
from slope_jax.rates import pruned_rate, scale_pruned
from slope_jax.state import TrainState
from slope_jax.working import find_layers, working_copies

__all__ = [
    "WORKING",
    "CompressedMatrix",
    "Explanation",
    "Memory",
    "Pattern",
    "SparseDense",
    "TrainState",
    "Working",
    "adapter_labels",
    "add_adapters",
    "compress",
    "decompress",
    "explain",
    "find_layers",
    "lazy_adapters",
    "masks",
    "memory",
    "pruned_rate",
    "scale_pruned",
    "slope_matmul",
    "working_copies",
]
