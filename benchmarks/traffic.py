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
HEAD, TABLE = "head", "table"
# Bytes that each of k devices sends, of the whole array, by rings.
_SHARES = {
    "all-gather": lambda k: (k - 1) / k,
    "reduce-scatter": lambda k: (k - 1) / k,
    "all-reduce": lambda k: 2 * (k - 1) / k,
    "all-to-all": lambda k: (k - 1) / k,
}


class Item(NamedTuple):
    """Something that devices exchange: what for, when, and how.

    `place` is the number of a layer, `HEAD` for linears outside of the layers, or `TABLE` for the
    token table; `sent` are the bytes that each device sends.
    """

    place: int | str
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
    remat: bool = False,
) -> list[Item]:
    """All that one device sends in a step without accumulation.

    Args:
      config: the model, dense or sparse.
      sizes: devices by axis of the mesh, all three.
      tokens: of a micro-batch on one device; only where `tensor` cuts products.
      itemsize: bytes of the compute dtype.
      remat: whether layers keep their inputs alone, and compute all else twice. Not with `tensor`.

    As XLA's CPU backend has it, what a layer needs twice in a pass is gathered once: kernels for dx
    and to compute again, positions for all that needs them. Layers that are not scanned keep what was
    gathered forward for the backward pass, rematerialised or not.

    Raises:
      ValueError: `remat` with `tensor`, of which there is no account.
    """
    if remat and sizes[TENSOR] > 1:
        raise ValueError("there is no account of rematerialised layers that tensor cuts")
    result = []

    def add(place, phase, kind, axis, nbytes):
        if sizes[axis] > 1 and nbytes:
            sent = nbytes * _SHARES[kind](sizes[axis])
            result.append(Item(place, phase, kind, axis, sent))

    def weight(place, phase, nbytes, cut):
        """Gathers a matrix of so many bytes on all devices together."""
        here = nbytes / (sizes[TENSOR] if cut.parallel else 1)
        if cut.exchanged:
            add(place, phase, "all-to-all", TENSOR, here / sizes[FSDP])
        add(place, phase, "all-gather", FSDP, here)

    def gradient(place, nbytes, cut):
        here = nbytes / (sizes[TENSOR] if cut.parallel else 1)
        add(place, GRADIENT, "reduce-scatter", FSDP, here)
        if cut.exchanged:
            add(place, GRADIENT, "all-to-all", TENSOR, here / sizes[FSDP])
        add(place, GRADIENT, "all-reduce", DATA, here / sizes[FSDP])

    def activations(place, phase, width):
        add(place, phase, "all-reduce", TENSOR, tokens * width * itemsize)

    kept = {s.start for s in config.segments if s.stop - s.start == 1} | {HEAD}
    for linear in config.linears:
        where = linear.path.split("/")
        place = int(where[1]) if where[0] == "layers" else HEAD
        cut = COLUMN if linear.tied else cut_of(where)
        entries = linear.in_features * linear.out_features
        text = config.patterns[linear.path]
        if text == "dense":
            values, metadata = entries, 0
        else:
            pattern = Pattern.parse(text)
            values = entries * pattern.n // pattern.m
            metadata = values * pattern.bits / 8
        again = place not in kept
        weight(place, FORWARD, values * itemsize, cut)
        weight(place, FORWARD, metadata, cut)
        if again:
            weight(place, BACKWARD, values * itemsize, cut)
            weight(place, BACKWARD, metadata, cut)
        gradient(place, values * GRADIENT_BYTES, cut)
        if config.rank and text != "dense":
            adapters = config.rank * (linear.in_features + linear.out_features)
            for phase in (FORWARD, BACKWARD) if again else (FORWARD,):
                add(place, phase, "all-gather", FSDP, adapters * itemsize)
            add(place, GRADIENT, "reduce-scatter", FSDP, adapters * GRADIENT_BYTES)
            add(place, GRADIENT, "all-reduce", DATA, adapters * GRADIENT_BYTES / sizes[FSDP])
        if cut.parallel == "outputs":
            activations(place, BACKWARD, linear.in_features)
        if cut.parallel == "inputs":
            activations(place, FORWARD, linear.out_features)
    cut = cut_of(("embeddings", "token"))
    entries = config.padded_vocab_size * config.hidden_size
    weight(TABLE, FORWARD, entries * itemsize, cut)
    activations(TABLE, FORWARD, config.hidden_size)
    gradient(TABLE, entries * GRADIENT_BYTES, cut)
    return result


def total(found: Iterable[Item]) -> float:
    """Bytes that a device sends in a step."""
    return math.fsum(item.sent for item in found)
