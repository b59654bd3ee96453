"""Adapters of several linears of theirs (queries, keys, values; gate, up) as those of one of ours.

Where all have one lora_A, it is ours, and each has its columns of adapter_r. Else every adapter has
columns of adapter_l and rows of adapter_r to itself, and the rank is the sum of theirs:

    adapter_l = [A_q | A_v]        adapter_r = [B_q  0   0 ]
                                               [ 0   0  B_v]
"""

import itertools
import zlib

import jax
import numpy as np

from slope_jax.dense import inverse_rank_normal
from slope_jax.models import hf_names
from slope_jax.models.config import TransformerConfig
from slope_jax.models.hf_adapter import MERGE, Adapter, pair, widths_of
from slope_jax.models.hf_families import Source
from slope_jax.policy import DENSE


def rank_of(adapter: Adapter, config: TransformerConfig, family: str) -> int:
    """The rank that a model with these adapters has, the widest of its linears'.

    Args:
      adapter: that `check_adapter` has passed.
      config: of the model; its adapter_rank does not matter.

    Raises:
      ValueError: a pruned linear cannot use so many columns.
    """
    kernels = (s for s in hf_names.sources(config, family) if s.path[-1] == "kernel")
    rank = max(adapter.rank, *(adapter.rank * _count(adapter, source) for source in kernels))
    pruned = [linear for linear in config.linears if config.patterns[linear.path] != DENSE]
    most = min(min(linear.in_features, linear.out_features) for linear in pruned)
    if rank > most:
        raise ValueError(
            f"{adapter.path} has adapters of rank {adapter.rank}, {rank} columns for all that are one"
            f" linear of ours, and the smallest one can use {most}: {MERGE}"
        )
    return rank


def adapter_of(
    adapter: Adapter, source: Source, config: TransformerConfig, inputs: int, outputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """adapter_l (inputs, rank) and adapter_r (rank, outputs) of a kernel, float32.

    What is left of the model's rank, all of it where there is no adapter, is newborn, the same every
    time: it adds nothing, but unlike zeros on both sides it gets gradients.
    """
    right = np.zeros((config.rank, outputs), np.float32)
    count = _count(adapter, source)
    if count * adapter.rank < config.rank:
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32("/".join(source.path).encode()))
        born = inverse_rank_normal(key, (inputs, config.rank), scale=config.adapter_scale)
        left = np.array(born)
    else:
        left = np.empty((inputs, config.rank), np.float32)
    widths = widths_of(config, source, outputs)
    ends = itertools.accumulate(widths)
    start = 0
    for name, width, end in zip(source.names, widths, ends, strict=True):
        a, b = (adapter.tensors.get(tensor) for tensor in pair(name))
        if a is None:
            continue
        rows = slice(start, start + adapter.rank)
        left[:, rows] = a.read().T
        right[rows, end - width : end] = b.read().T
        start += adapter.rank if count > 1 else 0
    return left, right * np.float32(adapter.scale)


def _count(adapter: Adapter, source: Source) -> int:
    """How many adapters of a linear of ours differ in their lora_A: none, 1 if all are equal, or all."""
    firsts = (adapter.tensors.get(pair(name)[0]) for name in source.names)
    found = [tensor.read() for tensor in firsts if tensor is not None]
    equal = all(np.array_equal(found[0], other) for other in found[1:])
    return min(len(found), 1) if equal else len(found)
