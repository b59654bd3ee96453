"""Attention of a decode step: its sizes, and how warps and CTAs put together what each has.

Every warp has weighted sums of values for up to 8 queries, relative to the largest score that it has
seen, and the sum of its weights. A CTA's warps share theirs through shared memory; CTAs of a cluster
send each other the units that they are to complete.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx, warps
from pallas_kernels.mosaic.support import MOST_QUERIES

KEYS = 16  # that a warp takes at a time
COLUMNS = 64  # of the values that one pass of products makes
UNIT = 512  # bytes: 16 outputs of 8 queries, a float32 four a lane
STATISTICS = 8 * MOST_QUERIES  # bytes: the largest score and the sum of weights of each query
OTHER_KEYS = (4, 8, 16)  # between lanes 4 g + c of one c, whose keys are others
LOWEST = -1e30  # below all scores, and finite, so that differences are none of infinities


class Place(NamedTuple):
    """What a CTA works on."""

    head: Any
    part: Any
    sequence: Any


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the arrays, in how many parts a head's keys are cut, and the warps of a CTA."""

    queries: int
    heads: int
    slots: int
    width: int
    dtype: str
    parts: int
    warps: int
    window: int | None

    across = 1  # for `warps.Lane`

    @property
    def units(self) -> int:
        """Sums of a warp."""
        return -(-self.width // COLUMNS) * 4

    @property
    def owned(self) -> int:
        """Units that a CTA of a cluster completes."""
        return -(-self.units // self.parts)

    @property
    def state(self) -> int:
        """Registers: sums, the largest score and the sum of weights of two queries."""
        return 4 * self.units + 4

    @property
    def blocks(self) -> int:
        """Of 32 entries of a head."""
        return -(-self.width // 32)

    @property
    def words(self) -> int:
        """Registers of `KEYS` keys and values."""
        return 8 * self.blocks + 4 * self.units

    @property
    def statistics_offset(self) -> int:
        return self.warps * self.units * UNIT

    @property
    def received_offset(self) -> int:
        """Of other CTAs' sums, and behind them their statistics."""
        return self.statistics_offset + self.warps * STATISTICS

    @property
    def received_statistics_offset(self) -> int:
        return self.received_offset + self.parts * self.owned * UNIT

    @property
    def shared_memory(self) -> int:
        received = self.received_statistics_offset + self.parts * STATISTICS
        return received if self.parts > 1 else self.received_offset


def open_exchange(g: Geometry) -> None:
    """Tells the cluster that this CTA has begun, so that it can be sent to."""
    if g.parts == 1:
        return

    @plgpu.inline_mgpu()
    def body(ctx):
        ptx.asm("barrier.cluster.arrive.relaxed.aligned;")

    body()


def finish(g: Geometry, state, y_ref, shared_ref, place: Place) -> None:
    """Puts together what the warps have, and writes it."""

    @plgpu.inline_mgpu(
        arg_types=(warps.array_type(g.state).layout, *(warps.REF,) * 2, *(warps.SPLAT,) * 3)
    )
    def body(ctx, state, shared, y, head, part, sequence):
        lane, shared = warps.Lane(g), ptx.shared_address(shared)
        head, part, sequence = (s.registers.item() for s in (head, part, sequence))
        state = warps.values_of(state)
        sums, largest = state[:-4], state[-4:-2]
        total = [ptx.over_lanes(value, OTHER_KEYS) for value in state[-2:]]
        _store_statistics(g, lane, shared, largest, total)
        ptx.asm("bar.sync 0;")
        statistics = _load_statistics(lane, shared, g.statistics_offset, g.warps)
        most, total = _joined(statistics)
        factors = [exp2(llvm.fsub(largest[q], most[q])) for q in range(2)]
        _store_sums(g, lane, shared, [llvm.fmul(v, factors[j % 2]) for j, v in enumerate(sums)])
        ptx.asm("bar.sync 0;")
        units = _units_of_warps(g, lane, shared)
        if g.parts > 1:
            _send(g, lane, shared, part, units, (most, total))
            units, total = _received(g, lane, shared, part)
        for unit, known, values in units:
            _complete(g, lane, y, (head, sequence), unit, known, values, total)

    body(state, shared_ref, y_ref, *place)


# Units: (number, whether there is one, 4 values a lane: two outputs of queries 2 c and 2 c + 1).


def _units_of_warps(g, lane, shared):
    for first in range(0, g.units, g.warps):
        unit = ops.add(lane.warp, first)
        known = ops.less(unit, g.units)
        at = ops.mul(ptx.select(known, unit, ops.const(0)), UNIT)
        yield unit, known, _sum(lane, ptx.sum_of(shared, at), g.units * UNIT, [None] * g.warps)


def _send(g, lane, shared, part, units, statistics) -> None:
    """A unit to the CTA that completes it, the statistics to all."""
    ptx.asm("barrier.cluster.wait.acquire.aligned;")
    for unit, known, values in units:
        owner, number = llvm.urem(unit, ops.const(g.parts)), llvm.udiv(unit, ops.const(g.parts))
        place = ops.mul(ptx.sum_of(ops.mul(part, g.owned), number), UNIT)
        target = ptx.sum_of(shared, place, ops.mul(lane.lane, 16))
        _store_far(ops.add(target, g.received_offset), owner, values, known)
    (most, total), first = statistics, llvm.and_(ops.less(lane.g, 1), ops.less(lane.warp, 1))
    target = ptx.sum_of(shared, ops.mul(part, STATISTICS), ops.mul(lane.c, 16))
    target = ops.add(target, g.received_statistics_offset)
    for owner in range(g.parts):
        _store_far(target, ops.const(owner), [most[0], total[0], most[1], total[1]], first)
    ptx.asm("barrier.cluster.arrive.release.aligned;")
    ptx.asm("barrier.cluster.wait.acquire.aligned;")


def _received(g, lane, shared, part):
    """The units that this CTA completes, and all weights."""
    statistics = _load_statistics(lane, shared, g.received_statistics_offset, g.parts)
    most, total = _joined(statistics)
    factors = [[exp2(llvm.fsub(s[2 * q], most[q])) for q in range(2)] for s in statistics]
    units = []
    for first in range(0, g.owned, g.warps):
        number = ops.add(lane.warp, first)
        unit = ptx.sum_of(ops.mul(number, g.parts), part)
        known = llvm.and_(ops.less(unit, g.units), ops.less(number, g.owned))
        at = ops.mul(ptx.select(known, number, ops.const(0)), UNIT)
        source = ops.add(ptx.sum_of(shared, at), g.received_offset)
        units.append((unit, known, _sum(lane, source, g.owned * UNIT, factors)))
    return units, total


def _sum(lane, source, apart: int, factors: list) -> list:
    """Of four values a lane, `apart` bytes from one to the next, by factors of two queries or None."""
    source, total = ptx.sum_of(source, ops.mul(lane.lane, 16)), None
    for number, factor in enumerate(factors):
        values = ptx.asm(
            f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{apart * number}];", source, results="ffff"
        )
        if factor is not None:
            values = [llvm.fmul(value, factor[j % 2]) for j, value in enumerate(values)]
        total = values if total is None else ptx.add_floats(total, values)
    return total


def _store_statistics(g, lane, shared, largest: list, total: list) -> None:
    """Of queries 2 c and 2 c + 1, by the lanes that have g = 0."""
    target = ptx.sum_of(shared, ops.mul(lane.warp, STATISTICS), ops.mul(lane.c, 16))
    ptx.asm(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0;"
        f" @p st.shared.v4.f32 [$0+{g.statistics_offset}], {{$1,$2,$3,$4}}; }}",
        target,
        largest[0],
        total[0],
        largest[1],
        total[1],
        ops.less(lane.g, 1),
    )


def _load_statistics(lane, shared, offset: int, count: int) -> list[list]:
    """(score, weights, score, weights) of queries 2 c and 2 c + 1, of each that has some."""
    source = ptx.sum_of(shared, ops.mul(lane.c, 16))
    return [
        ptx.asm(
            f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{offset + STATISTICS * number}];",
            source,
            results="ffff",
        )
        for number in range(count)
    ]


def _joined(statistics: list[list]) -> tuple[list, list]:
    """The largest scores, and the sums of all weights relative to them."""
    largest, total = [], []
    for q in range(2):
        most = statistics[0][2 * q]
        for other in statistics[1:]:
            most = larger(most, other[2 * q])
        terms = [llvm.fmul(s[2 * q + 1], exp2(llvm.fsub(s[2 * q], most))) for s in statistics]
        weights = terms[0]
        for term in terms[1:]:
            weights = llvm.fadd(weights, term)
        largest.append(most)
        total.append(weights)
    return largest, total


def _store_sums(g, lane, shared, sums: list) -> None:
    target = ptx.sum_of(shared, ops.mul(lane.warp, UNIT * g.units), ops.mul(lane.lane, 16))
    for unit in range(g.units):
        four = sums[4 * unit : 4 * unit + 4]
        ptx.asm(f"st.shared.v4.f32 [$0+{UNIT * unit}], {{$1,$2,$3,$4}};", target, *four)


def _store_far(target, owner, values: list, known) -> None:
    """Into the shared memory of a CTA of the cluster."""
    far = ptx.asm("mapa.shared::cluster.u32 $0, $1, $2;", target, owner, results="r", pure=True)
    ptx.asm(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.shared::cluster.v4.f32 [$0], {$1,$2,$3,$4}; }",
        far,
        *values,
        known,
    )


def _complete(g, lane, y, place, unit, known, values: list, total: list) -> None:
    head, sequence = place
    column = ptx.sum_of(
        ops.mul(llvm.udiv(unit, ops.const(4)), COLUMNS),
        ops.mul(lane.g, 8),
        ops.mul(llvm.urem(unit, ops.const(4)), 2),
    )
    inside = llvm.and_(known, ops.less(column, g.width))
    for q in range(2):
        query = ops.add(ops.mul(lane.c, 2), q)
        row = ptx.sum_of(ops.mul(head, g.queries), query)
        at = ops.mul(ptx.sum_of(ops.mul(row, g.width), column), 2)
        two = [llvm.fdiv(value, total[q]) for value in values[q::2]]
        ptx.asm(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }",
            ptx.global_address(y, sequence, 2 * g.heads * g.queries * g.width, at),
            ptx.pack(*two, g.dtype),
            llvm.and_(inside, ops.less(query, g.queries)),
        )


def larger(x, y):
    return ptx.asm("max.f32 $0, $1, $2;", x, y, results="f", pure=True)


def exp2(x):
    return ptx.asm("ex2.approx.ftz.f32 $0, $1;", x, results="f", pure=True)
