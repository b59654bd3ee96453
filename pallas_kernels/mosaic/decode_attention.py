"""Attention of one new token of each sequence to the keys and values before it, in one kernel on Hopper.

A CTA takes the queries that share a head of keys and values. Its warps take 32 keys at a time, in turns,
straight from the cache to registers: `mma` multiplies keys by queries, the weights that come of it are
the other operand for the values, and what the warps have is put together at the end, each with the
largest score that it has seen. Where there are too few heads to keep the device busy, several CTAs share
a head's keys, and XLA adds up their parts.
"""

import dataclasses
import itertools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import launch, ops, ptx, warps
from pallas_kernels.mosaic.support import MOST_QUERIES, attention_obstacle

WARPS = 8
KEYS = 32  # that a warp takes at a time
COLUMNS = 64  # of the values that one pass of products makes
LOWEST = -1e30  # below all scores, and finite, so that differences are none of infinities
PROCESSORS, SHARE = 132, 512  # keys that are worth a CTA


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the arrays, and in how many parts a head's keys are cut."""

    queries: int
    heads: int
    slots: int
    width: int
    dtype: str
    parts: int
    window: int | None

    across = 1  # for `warps.Lane`

    @property
    def units(self) -> int:
        """Results of a warp, in fours a lane: 16 outputs of 8 queries."""
        return -(-self.width // COLUMNS) * 4

    @property
    def state(self) -> int:
        """Registers: results, the largest score and the sum of weights of two queries."""
        return 4 * self.units + 4

    @property
    def words(self) -> int:
        """Registers of `KEYS` keys and values, or of one query row."""
        return 2 * 8 * self.blocks + 2 * 16 * (self.units // 4)

    @property
    def blocks(self) -> int:
        """Of 32 entries of a head."""
        return -(-self.width // 32)

    @property
    def statistics_offset(self) -> int:
        return WARPS * self.units * 512

    @property
    def shared_memory(self) -> int:
        return self.statistics_offset + WARPS * MOST_QUERIES * 8


def parts_of(batch: int, heads: int, slots: int) -> int:
    """CTAs that share a head's keys: more than one where long caches meet few heads.

    >>> parts_of(1, 40, 528), parts_of(1, 8, 4096), parts_of(16, 8, 4096)
    (1, 8, 1)
    """
    return max(1, min(slots // SHARE, PROCESSORS // (batch * heads)))


@launch.once("queries", "window", "scale", "parts")
def attend(
    rows: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    *,
    queries: int,
    window: int | None = None,
    scale: float | None = None,
    parts: int | None = None,
) -> jax.Array:
    """softmax(q @ k.T * scale) @ v of one token a sequence, of which each sees the slots up to its own.

    Args:
      rows: (B, columns) in the keys' dtype, of which the first heads * queries * width are the
        queries; those that share keys side by side.
      key, value: (B, heads, slots, width), bfloat16 or float16; width a multiple of 8, at most 128.
      positions: int32 (B,), the slot of each token, < slots.
      queries: that share a head of keys, at most 8.
      window: slots that a token sees, its own included; None: all.
      scale: None is 1 / sqrt(width).
      parts: CTAs that share a head's keys; None: by the sizes.

    Returns:
      (B, heads * queries * width) in the keys' dtype.

    Raises:
      NotImplementedError: the kernel does not take such heads.
    """
    batch, heads, slots, width = key.shape
    if why := attention_obstacle(str(key.dtype), width, queries):
        raise NotImplementedError(why)
    parts = parts or parts_of(batch, heads, slots)
    g = Geometry(queries, heads, slots, width, str(key.dtype), parts, window)
    factor = (width**-0.5 if scale is None else scale) * math.log2(math.e)
    columns = heads * queries * width
    out = [jax.ShapeDtypeStruct((batch, columns), key.dtype)]
    if parts > 1:
        out = [
            jax.ShapeDtypeStruct((parts, batch, columns), jnp.float32),
            jax.ShapeDtypeStruct((parts, batch, heads * queries, 2), jnp.float32),
        ]

    def body(*refs):
        names = ("rows", "key", "value", "positions", *("y", "statistics")[: len(out)], "shared")
        _kernel(g, factor, dict(zip(names, refs, strict=True)))

    kernel = launch.kernel(
        body,
        out_type=out,
        grid=(heads, parts, batch),
        grid_names=("head", "part", "sequence"),
        num_threads=WARPS // 4,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((g.shared_memory,), jnp.uint8)],
        # Safe here: the inline parts hold their own barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name="decode_attention",
    )
    y, *statistics = kernel(rows, key, value, positions)
    return y if parts == 1 else _together(y, *statistics).astype(key.dtype)


def _together(parts: jax.Array, statistics: jax.Array) -> jax.Array:
    """Of unnormalised parts (parts, B, columns), and of their largest scores and sums of weights."""
    largest, total = statistics[..., 0], statistics[..., 1]
    factor = jnp.exp2(largest - largest.max(0, keepdims=True))
    weights = factor / (factor * total).sum(0, keepdims=True)
    by_head = parts.reshape(*weights.shape, -1) * weights[..., None]
    return by_head.sum(0).reshape(parts.shape[1:])


def _kernel(g: Geometry, factor: float, refs: dict) -> None:
    place = tuple(lax.axis_index(name) for name in ("head", "part", "sequence"))
    position, first, rounds = _bounds(g, refs["positions"], place[2])
    queries = _load_queries(g, refs["rows"], place)
    state = _start(g)

    def turn(number, state):
        block = first + (number * g.parts + place[1]) * WARPS
        words = _load(g, refs["key"], refs["value"], place, block, position)
        return _attend(g, factor, state, queries, words, block, position)

    state = lax.fori_loop(0, rounds, turn, state)
    _finish(g, state, refs, place)


def _bounds(g: Geometry, positions_ref, sequence):
    """The token's slot, the number of the first `KEYS` keys that it sees, and turns of all warps."""
    splat = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT), return_type=splat)
    def load(ctx, positions, sequence):
        row = sequence.registers.item()
        source = ptx.global_address(positions, row, 4, ops.const(0))
        value = ptx.asm("ld.global.b32 $0, [$1];", source, results="r")
        return fa.FragmentedArray.splat(value, (), is_signed=True)

    position = load(positions_ref, sequence)
    first = jnp.int32(0)
    if g.window is not None:
        first = lax.div(jnp.maximum(position - (g.window - 1), 0), jnp.int32(KEYS))
    count = lax.div(position, jnp.int32(KEYS)) + 1 - first
    in_turn = WARPS * g.parts
    return position, first, lax.div(count + (in_turn - 1), jnp.int32(in_turn))


def _load_queries(g: Geometry, rows_ref, place):
    """Operand B of every 32 entries: lane 4 g + c has 8 c .. 8 c + 7 of query g."""
    result = warps.array_type(4 * g.blocks, jnp.int32)

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT, warps.SPLAT), return_type=result)
    def body(ctx, rows, head, sequence):
        lane = warps.Lane(g)
        head, sequence = head.registers.item(), sequence.registers.item()
        columns = ir.MemRefType(rows.type).shape[1]
        query = ptx.sum_of(ops.mul(head, g.queries), lane.g)
        words = []
        for first in range(0, 32 * g.blocks, 32):
            entry = ops.add(ops.mul(lane.c, 8), first)
            inside = llvm.and_(ops.less(lane.g, g.queries), ops.less(entry, g.width))
            column = ptx.sum_of(ops.mul(query, 2 * g.width), ops.mul(entry, 2))
            words += ptx.load(ptx.global_address(rows, sequence, 2 * columns, column), inside, 4)
        return warps.array_of(words)

    return body(rows_ref, place[0], place[2])


def _start(g: Geometry):
    """Nothing seen yet."""

    @plgpu.inline_mgpu(return_type=warps.array_type(g.state))
    def body(ctx):
        zeros = [ptx.number(0.0)] * (4 * g.units)
        return warps.array_of(zeros + [ptx.number(LOWEST)] * 2 + [ptx.number(0.0)] * 2)

    return body()


def _load(g: Geometry, key_ref, value_ref, place, block, position):
    """A warp's keys and values; zeros behind the token's own slot.

    Keys: of each 16, rows g and g + 8, for each 32 entries 8 c .. 8 c + 7. Values: of each 16 and each
    64 columns, rows 2 c, 2 c + 1, and 8 further, columns 8 g .. 8 g + 7.
    """
    result = warps.array_type(g.words, jnp.int32)

    @plgpu.inline_mgpu(arg_types=(*(warps.REF,) * 2, *(warps.SPLAT,) * 4), return_type=result)
    def body(ctx, keys, values, head, sequence, block, position):
        lane = warps.Lane(g)
        head, sequence, block, position = (
            s.registers.item() for s in (head, sequence, block, position)
        )
        slot = ops.mul(ptx.sum_of(block, lane.warp), KEYS)
        row = ops.mul(ptx.sum_of(ops.mul(sequence, g.heads), head), g.slots)

        def piece(ref, further: int, of_lane, entry):
            mine = ptx.sum_of(slot, of_lane, ops.const(further))
            seen = ops.flag(llvm.ICmpPredicate.sle, mine, position)
            inside = llvm.and_(seen, ops.less(entry, g.width))
            source = ptx.global_address(ref, ptx.sum_of(row, mine), 2 * g.width, ops.mul(entry, 2))
            return ptx.load(source, inside, 4)

        words = []
        for half, first in itertools.product((0, 16), range(0, 32 * g.blocks, 32)):
            entry = ops.add(ops.mul(lane.c, 8), first)
            words += [w for further in (0, 8) for w in piece(keys, half + further, lane.g, entry)]
        for half, first in itertools.product((0, 16), range(0, g.width, COLUMNS)):
            entry = ops.add(ops.mul(lane.g, 8), first)
            for further in (0, 1, 8, 9):
                words += piece(values, half + further, ops.mul(lane.c, 2), entry)
        return warps.array_of(words)

    return body(key_ref, value_ref, place[0], place[2], block, position)


def _attend(g: Geometry, factor: float, state, queries, words, block, position):
    """The state with these keys and values."""
    layouts = (array.layout for array in (warps.array_type(g.state), *_word_types(g)))

    @plgpu.inline_mgpu(
        arg_types=(*layouts, warps.SPLAT, warps.SPLAT), return_type=warps.array_type(g.state)
    )
    def body(ctx, state, queries, words, block, position):
        lane = warps.Lane(g)
        block, position = (s.registers.item() for s in (block, position))
        state, queries = warps.values_of(state), warps.values_of(queries)
        words = iter(warps.values_of(words))
        sums, largest, total = state[:-4], state[-4:-2], state[-2:]
        scores = [_scores(g, queries, words) for _ in range(2)]
        slot = ops.mul(ptx.sum_of(block, lane.warp), KEYS)
        scores = _masked(g, factor, scores, ptx.sum_of(slot, lane.g), position)
        new = [_maximum(largest[q], *(s[q::2] for s in scores)) for q in range(2)]
        fading = [_exp2(llvm.fsub(largest[q], new[q])) for q in range(2)]
        weights = [[_exp2(llvm.fsub(s, new[j % 2])) for j, s in enumerate(half)] for half in scores]
        total = [
            llvm.fadd(llvm.fmul(total[q], fading[q]), _sum([w for h in weights for w in h[q::2]]))
            for q in range(2)
        ]
        sums = [llvm.fmul(value, fading[j % 2]) for j, value in enumerate(sums)]
        for half in weights:
            sums = _add_values(g, sums, half, words)
        return warps.array_of([*sums, *new, *total])

    return body(state, queries, words, block, position)


def _word_types(g: Geometry) -> tuple:
    return warps.array_type(4 * g.blocks, jnp.int32), warps.array_type(g.words, jnp.int32)


def _scores(g: Geometry, queries: list, words) -> list:
    """Products of 16 keys and 8 queries: keys g and g + 8 by queries 2 c and 2 c + 1."""
    scores = [ptx.number(0.0)] * 4
    for number in range(g.blocks):
        low, high = (list(itertools.islice(words, 4)) for _ in range(2))
        b = queries[4 * number : 4 * number + 4]
        for i in (0, 2):
            a = [low[i], high[i], low[i + 1], high[i + 1]]
            scores = _mma(g, scores, a, b[i : i + 2])
    return scores


def _masked(g: Geometry, factor: float, scores: list[list], slot, position) -> list[list]:
    """Scaled, and below all others where the token does not look."""
    hidden, result = ptx.number(-math.inf), []
    for half, products in zip((0, 16), scores, strict=True):
        kept = []
        for j, product in enumerate(products):
            mine = ops.add(slot, half + 8 * (j // 2))
            seen = ops.flag(llvm.ICmpPredicate.sle, mine, position)
            if g.window is not None:
                near = ops.flag(llvm.ICmpPredicate.sgt, ops.add(mine, g.window), position)
                seen = llvm.and_(seen, near)
            kept.append(ptx.select(seen, llvm.fmul(product, ptx.number(factor)), hidden))
        result.append(kept)
    return result


def _maximum(first, *more: list):
    """Over lanes 4 g + c as well, which have other keys."""
    value = first
    for other in itertools.chain(*more):
        value = _larger(value, other)
    for distance in (4, 8, 16):
        value = _larger(value, _of_lane(value, distance))
    return value


def _add_values(g: Geometry, sums: list, weights: list, words) -> list:
    """sums + 16 values by their weights."""
    low, high = (ptx.pack(weights[j], weights[j + 1], g.dtype) for j in (0, 2))
    b = [
        ptx.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", word, results="r")
        for word in (low, high)
    ]
    sums = list(sums)
    for first in range(0, 4 * g.units, 16):
        pieces = [list(itertools.islice(words, 4)) for _ in range(4)]
        for i, a in enumerate(warps.operands(pieces)):
            at = slice(first + 4 * i, first + 4 * i + 4)
            sums[at] = _mma(g, sums[at], a, b)
    return sums


def _finish(g: Geometry, state, refs: dict, place) -> None:
    """Puts together what the warps have, and writes it."""
    outputs = [refs[name] for name in ("y", "statistics") if name in refs]

    @plgpu.inline_mgpu(
        arg_types=(
            warps.array_type(g.state).layout,
            *(warps.REF,) * (1 + len(outputs)),
            *(warps.SPLAT,) * 3,
        )
    )
    def body(ctx, state, shared, *others):
        *outputs, head, part, sequence = others
        lane, shared = warps.Lane(g), ptx.shared_address(shared)
        head, part, sequence = (s.registers.item() for s in (head, part, sequence))
        state = warps.values_of(state)
        sums, largest = state[:-4], state[-4:-2]
        total = [_over_keys(value) for value in state[-2:]]
        _share_statistics(g, lane, shared, largest, total)
        largest, total, own = _of_all_warps(g, lane, shared, largest)
        _share_sums(g, lane, shared, [llvm.fmul(v, own[j % 2]) for j, v in enumerate(sums)])
        query = ops.mul(lane.c, 2)
        row = ptx.sum_of(ops.mul(part, refs["positions"].shape[0]), sequence)
        for first in range(0, g.units, WARPS):
            unit = ops.add(lane.warp, first)
            known = ops.less(unit, g.units)
            values = _sum_of_warps(g, lane, shared, ptx.select(known, unit, ops.const(0)))
            column = ptx.sum_of(
                ops.mul(llvm.udiv(unit, ops.const(4)), COLUMNS),
                ops.mul(lane.g, 8),
                ops.mul(llvm.urem(unit, ops.const(4)), 2),
            )
            inside = llvm.and_(known, ops.less(column, g.width))
            for q in range(2):
                mine = ops.add(query, q)
                here = llvm.and_(inside, ops.less(mine, g.queries))
                head_of = ptx.sum_of(ops.mul(head, g.queries), mine)
                at = ptx.sum_of(ops.mul(head_of, g.width), column)
                _store_two(g, outputs[0], row, at, values[q::2], total[q], here)
        if g.parts > 1:
            _store_statistics(g, lane, outputs[1], row, head, largest, total)

    body(state, refs["shared"], *outputs, *place)


def _share_statistics(g, lane, shared, largest: list, total: list) -> None:
    """Of queries 2 c and 2 c + 1, by the lanes that have g = 0."""
    target = ptx.sum_of(shared, ops.mul(lane.warp, 8 * MOST_QUERIES), ops.mul(lane.c, 16))
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
    ptx.asm("bar.sync 0;")


def _of_all_warps(g, lane, shared, own: list) -> tuple[list, list, list]:
    """Of two queries: the largest score, the sum of weights, and the factor of this warp's sums."""
    source = ptx.sum_of(shared, ops.mul(lane.c, 16))
    found = [
        ptx.asm(
            f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{g.statistics_offset + 64 * warp}];",
            source,
            results="ffff",
        )
        for warp in range(WARPS)
    ]
    largest, total = [], []
    for q in range(2):
        most = found[0][2 * q]
        for statistics in found[1:]:
            most = _larger(most, statistics[2 * q])
        terms = [llvm.fmul(s[2 * q + 1], _exp2(llvm.fsub(s[2 * q], most))) for s in found]
        largest.append(most)
        total.append(_sum(terms))
    return largest, total, [_exp2(llvm.fsub(own[q], largest[q])) for q in range(2)]


def _share_sums(g, lane, shared, sums: list) -> None:
    target = ptx.sum_of(shared, ops.mul(lane.warp, 512 * g.units), ops.mul(lane.lane, 16))
    for unit in range(g.units):
        ptx.asm(
            f"st.shared.v4.f32 [$0+{512 * unit}], {{$1,$2,$3,$4}};",
            target,
            *sums[4 * unit : 4 * unit + 4],
        )
    ptx.asm("bar.sync 0;")


def _sum_of_warps(g, lane, shared, unit) -> list:
    source = ptx.sum_of(shared, ops.mul(unit, 512), ops.mul(lane.lane, 16))
    total = None
    for warp in range(WARPS):
        values = ptx.asm(
            f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{512 * g.units * warp}];",
            source,
            results="ffff",
        )
        total = values if total is None else ptx.add_floats(total, values)
    return total


def _store_two(g, out, row, column, values: list, total, inside) -> None:
    """Two neighbours: normalised in the array's dtype, or in parts as they are."""
    columns = g.heads * g.queries * g.width
    if g.parts > 1:
        target = ptx.global_address(out, row, 4 * columns, ops.mul(column, 4))
        store, operands = "st.global.v2.f32 [$0], {$1,$2}", values
    else:
        target = ptx.global_address(out, row, 2 * columns, ops.mul(column, 2))
        values = [llvm.fdiv(value, total) for value in values]
        store, operands = "st.global.b32 [$0], $1", [ptx.pack(*values, g.dtype)]
    ptx.asm(
        f"{{ .reg .pred p; setp.ne.b32 p, ${1 + len(operands)}, 0; @p {store}; }}",
        target,
        *operands,
        inside,
    )


def _store_statistics(g, lane, out, row, head, largest: list, total: list) -> None:
    for q in range(2):
        query = ops.add(ops.mul(lane.c, 2), q)
        head_of = ptx.sum_of(ops.mul(head, g.queries), query)
        first = llvm.and_(ops.less(lane.g, 1), ops.less(lane.warp, 1))
        ptx.asm(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.f32 [$0], {$1,$2}; }",
            ptx.global_address(out, row, 8 * g.heads * g.queries, ops.mul(head_of, 8)),
            largest[q],
            total[q],
            llvm.and_(first, ops.less(query, g.queries)),
        )


def _mma(g: Geometry, sums: list, a: list, b: list) -> list:
    kind = ops.PTX_TYPE[g.dtype]
    return ptx.asm(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$0,$1,$2,$3};",
        *a,
        *b,
        results="ffff",
        tied=sums,
        pure=True,
    )


def _over_keys(value):
    for distance in (4, 8, 16):
        value = llvm.fadd(value, _of_lane(value, distance))
    return value


def _of_lane(value, distance: int):
    return ptx.asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;", value, results="f")


def _larger(x, y):
    return ptx.asm("max.f32 $0, $1, $2;", x, y, results="f", pure=True)


def _exp2(x):
    return ptx.asm("ex2.approx.ftz.f32 $0, $1;", x, results="f", pure=True)


def _sum(values: list):
    total = values[0]
    for value in values[1:]:
        total = llvm.fadd(total, value)
    return total
