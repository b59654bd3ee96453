"""What a training step on a mesh must move, worked out from the sizes of a model's matrices.

The account of `slope_jax.sharded` on paper, independent of what XLA makes of it: kernels are gathered
over `fsdp` where they are used, sparse ones compressed; gradients are scattered back in float32, and
added up over `data`. Norms, biases and positions, which are small, are left out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pallas_kernels import Pattern
from slope_jax.models import TransformerConfig
from slope_jax.sharding import COLUMN, DATA, FSDP, TENSOR, cut_of

GRADIENT_BYTES = 4  # float32, as parameters are
FORWARD, BACKWARD, GRADIENT = "forward", "backward", "gradient"
# Bytes that each of k devices sends, of the whole array, by rings.
_SHARES = {
    "all-gather": lambda k: (k - 1) / k,
    "reduce-scatter": lambda k: (k - 1) / k,
    "all-reduce": lambda k: 2 * (k - 1) / k,
    "all-to-all": lambda k: (k - 1) / k,
}


class Item(NamedTuple):
    """Something that devices exchange: of which layer (None: outside of them), when, and how.

    `sent` are the bytes that each device sends.
    """

    layer: int | None
    phase: str
    kind: str
    axis: str
    sent: float


def items(
    config: TransformerConfig,
    sizes: Mapping[str, int],
    *,
    tokens: int = 0,
    itemsize: int = 2,
    merged: bool = True,
) -> list[Item]:
    """All that one device sends in a step without accumulation or rematerialised products.

    Args:
      config: the model, dense or sparse.
      sizes: devices by axis of the mesh, all three.
      tokens: of a micro-batch on one device; only where `tensor` cuts products.
      itemsize: bytes of the compute dtype.
      merged: whether layers that are not scanned keep what they gathered forward for the backward
        pass, as XLA does. Layers that are scanned gather it again.
    """
    result = []

    def add(layer, phase, kind, axis, nbytes):
        if sizes[axis] > 1 and nbytes:
            sent = nbytes * _SHARES[kind](sizes[axis])
            result.append(Item(layer, phase, kind, axis, sent))

    def weight(layer, phase, nbytes, cut):
        """Gathers a matrix of so many bytes on all devices together."""
        here = nbytes / (sizes[TENSOR] if cut.parallel else 1)
        if cut.exchanged:
            add(layer, phase, "all-to-all", TENSOR, here / sizes[FSDP])
        add(layer, phase, "all-gather", FSDP, here)

    def gradient(layer, nbytes, cut):
        here = nbytes / (sizes[TENSOR] if cut.parallel else 1)
        add(layer, GRADIENT, "reduce-scatter", FSDP, here)
        if cut.exchanged:
            add(layer, GRADIENT, "all-to-all", TENSOR, here / sizes[FSDP])
        add(layer, GRADIENT, "all-reduce", DATA, here / sizes[FSDP])

    def activations(layer, phase, width):
        add(layer, phase, "all-reduce", TENSOR, tokens * width * itemsize)

    kept = {s.start for s in config.segments if merged and s.stop - s.start == 1} | {None}
    for linear in config.linears:
        where = linear.path.split("/")
        layer = int(where[1]) if where[0] == "layers" else None
        cut = COLUMN if linear.tied else cut_of(where)
        entries = linear.in_features * linear.out_features
        text = config.patterns[linear.path]
        if text == "dense":
            values, metadata = entries, 0
        else:
            pattern = Pattern.parse(text)
            values = entries * pattern.n // pattern.m
            metadata = values * pattern.bits / 8
        again = layer not in kept
        weight(layer, FORWARD, values * itemsize, cut)
        weight(layer, FORWARD, metadata, cut)
        if text != "dense":  # the transpose; and positions, for the gradient
            weight(layer, BACKWARD, values * itemsize, cut)
            weight(layer, BACKWARD, metadata * (2 if again else 1), cut)
        elif again:
            weight(layer, BACKWARD, values * itemsize, cut)
        gradient(layer, values * GRADIENT_BYTES, cut)
        if config.rank and text != "dense":
            adapters = config.rank * (linear.in_features + linear.out_features)
            for phase in (FORWARD, BACKWARD) if again else (FORWARD,):
                add(layer, phase, "all-gather", FSDP, adapters * itemsize)
            # In the compute dtype, unlike those of kernels.
            add(layer, GRADIENT, "reduce-scatter", FSDP, adapters * itemsize)
            add(layer, GRADIENT, "all-reduce", DATA, adapters * itemsize / sizes[FSDP])
        if cut.parallel == "outputs":
            activations(layer, BACKWARD, linear.in_features)
        if cut.parallel == "inputs":
            activations(layer, FORWARD, linear.out_features)
    cut = cut_of(("embeddings", "token"))
    entries = config.padded_vocab_size * config.hidden_size
    weight(None, FORWARD, entries * itemsize, cut)
    activations(None, FORWARD, config.hidden_size)
    gradient(None, entries * GRADIENT_BYTES, cut)
    return result


def total(found: Iterable[Item]) -> float:
    """Bytes that a device sends in a step."""
    return math.fsum(item.sent for item in found)
