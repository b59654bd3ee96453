"""Training on many GPUs, on paper: what links carry, and what of it computation hides.

From the step times that one GPU was measured with, the account of `benchmarks.traffic`, and bandwidths
of data sheets; `benchmarks.multi_gpu` measures what one host can hold of it. Weak scaling: each GPU has
the micro-batch that it was measured with, however many there are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import traffic
from benchmarks.traffic import BACKWARD, FORWARD, GRADIENT, HEAD, TABLE, Item
from slope_jax import models
from slope_jax.models import TransformerConfig
from slope_jax.sharding import AXES, DATA, FSDP, check_model

DEVICE = "NVIDIA H100 80GB HBM3"  # whose step times and links are taken
HOST = 8  # GPUs in a host
# Bytes a second that a GPU can send, as data sheets say; it receives as many at the same time.
NVLINK = 450e9  # to the GPUs of its host: NVLink 4 of an H100 SXM, 900 GB/s both ways together
NETWORK = 50e9  # to other hosts: a network adapter of 400 Gbit/s for each GPU
FORWARD_SHARE = 1 / 3  # of a layer's time; the backward pass has two products for each one

INSIDE, BETWEEN = "NVLink", "network"


class Layout(NamedTuple):
    """A mesh: `fsdp` devices in a row, in hosts of eight, and `data` such rows."""

    data: int
    fsdp: int

    @property
    def gpus(self) -> int:
        return self.data * self.fsdp

    @property
    def sizes(self) -> dict[str, int]:
        return dict.fromkeys(AXES, 1) | {DATA: self.data, FSDP: self.fsdp}

    def __str__(self) -> str:
        return f"data:{self.data},fsdp:{self.fsdp}" if self.data > 1 else f"fsdp:{self.fsdp}"


LAYOUTS = (Layout(1, 8), Layout(8, 8), Layout(1, 64), Layout(128, 8), Layout(16, 64))


class Stage(NamedTuple):
    """Some computation, what must have arrived before it, and what it leaves to be sent.

    Attributes:
      compute: seconds.
      before, after: (link, seconds) of collectives, one after another.
    """

    compute: float
    before: tuple[tuple[str, float], ...] = ()
    after: tuple[tuple[str, float], ...] = ()


class Walk(NamedTuple):
    """Seconds of a step: all, its computation, and its communication if nothing hid it."""

    step: float
    compute: float
    communication: float

    @property
    def exposed(self) -> float:
        return self.step - self.compute

    @property
    def efficiency(self) -> float:
        """Of one GPU that waits for nobody."""
        return self.compute / self.step

    @property
    def unhidden(self) -> float:
        """The efficiency if nothing were hidden."""
        return self.compute / (self.compute + self.communication)


def walk(stages: Sequence[Stage]) -> Walk:
    """Goes through the stages of a step, with communication beside the computation.

    What a stage needs is sent for when the stage before it begins, one ahead and no more; what it
    leaves is sent when it is done. Each link takes one collective at a time, in this order.

    >>> layer = Stage(3.0, before=(("link", 1.0),))
    >>> walk([layer] * 4)  # the first one alone is waited for
    Walk(step=13.0, compute=12.0, communication=4.0)
    """
    free: dict[str, float] = {}

    def send(issued: float, collectives) -> float:
        """When the last one has arrived."""
        for link, seconds in collectives:
            issued = free[link] = max(issued, free.get(link, 0.0)) + seconds
        return issued

    end, arrived = 0.0, send(0.0, stages[0].before)
    for stage, following in zip(stages, (*stages[1:], Stage(0.0)), strict=True):
        start = max(end, arrived)
        arrived = send(start, following.before)
        end = start + stage.compute
        send(end, stage.after)
    compute = math.fsum(stage.compute for stage in stages)
    sent = math.fsum(s for stage in stages for _, s in (*stage.before, *stage.after))
    return Walk(max(end, *free.values()) if free else end, compute, sent)


def link_bytes(item: Item, layout: Layout) -> dict[str, float]:
    """Bytes that a GPU sends over each kind of link.

    A mesh that one host holds stays in it; if not, `data` is between hosts. A row of more than one host is a set of as many rings as a host has GPUs, each of which leaves
    the host by another GPU: of what a GPU sends, the part of one ring goes over the network.
    """
    if layout.gpus <= HOST:
        return {INSIDE: item.sent}
    if item.axis == DATA:
        return {BETWEEN: item.sent}
    if layout.fsdp <= HOST:
        return {INSIDE: item.sent}
    return {INSIDE: item.sent * (HOST - 1) / HOST, BETWEEN: item.sent / HOST}


def seconds(item: Item, layout: Layout, share: float = 1.0) -> tuple[str, float]:
    """The link that an exchange is slowest on, and how long it takes at a share of the bandwidths."""
    speeds = {INSIDE: NVLINK * share, BETWEEN: NETWORK * share}
    times = {link: sent / speeds[link] for link, sent in link_bytes(item, layout).items()}
    slowest = max(times, key=times.get)
    return slowest, times[slowest]


def stages(
    config: TransformerConfig,
    layout: Layout,
    step: float,
    per_layer: float,
    share: float = 1.0,
) -> list[Stage]:
    """The stages of a step: forward through the layers, the head, and backward.

    Args:
      config: the model, dense or sparse.
      layout: the mesh.
      step, per_layer: measured seconds of the whole step and of each layer in it.
      share: of the bandwidths.
    """
    found: dict[tuple, list[tuple[str, float]]] = {}
    for item in traffic.items(config, layout.sizes):
        found.setdefault((item.place, item.phase), []).append(seconds(item, layout, share))
    sent = {key: tuple(times) for key, times in found.items()}
    layers = range(config.num_layers)
    backward = sent.get((HEAD, BACKWARD), ())
    return [
        Stage(0.0, sent.get((TABLE, FORWARD), ())),
        *(Stage(FORWARD_SHARE * per_layer, sent.get((i, FORWARD), ())) for i in layers),
        Stage(
            step - config.num_layers * per_layer,
            (*sent.get((HEAD, FORWARD), ()), *backward),
            sent.get((HEAD, GRADIENT), ()),
        ),
        *(
            Stage(
                (1 - FORWARD_SHARE) * per_layer,
                sent.get((i, BACKWARD), ()),
                sent.get((i, GRADIENT), ()),
            )
            for i in reversed(layers)
        ),
        Stage(0.0, (), sent.get((TABLE, GRADIENT), ())),
    ]


def side(row: Mapping[str, Any], layout: Layout, what: str, share: float = 1.0) -> Walk:
    """The walk of a measured model, `what` "dense" or "sparse", on a mesh.

    Args:
      row: a result of `benchmarks.train_step`, or one like it of a model cut to "depth" layers.
    """
    step, per_layer = row[f"{what}_ms"] / 1e3, row[f"{what}_ms_per_layer"] / 1e3
    return walk(stages(model(row, what), layout, step, per_layer, share))


def links(row: Mapping[str, Any], layout: Layout, what: str) -> dict[str, float]:
    """Bytes that a GPU sends in a step over each kind of link."""
    sums = dict.fromkeys((INSIDE, BETWEEN), 0.0)
    for item in traffic.items(model(row, what), layout.sizes):
        for link, sent in link_bytes(item, layout).items():
            sums[link] += sent
    return sums


def model(row: Mapping[str, Any], what: str) -> TransformerConfig:
    """The configuration of a measured model."""
    sparsity = "dense" if what == "dense" else row["sparsity"]
    rank = 0 if what == "dense" else row["rank"]
    cut = {"num_layers": row["depth"]} if "depth" in row else {}
    return models.variant_config(row["model"], sparsity=sparsity, adapter_rank=rank, **cut)


def refused(row: Mapping[str, Any], layout: Layout) -> str:
    """Why a mesh cannot cut the sparse model; empty if it can."""
    try:
        check_model(model(row, "sparse"), layout.sizes)
    except ValueError as error:
        return str(error)
    return ""
