"""Attention of one new token of each sequence to the keys and values before it, in one kernel on Hopper.

A CTA takes the queries that share a head of keys and values. Its warps take 16 keys at a time, in turns,
straight from the cache to registers, and the next 16 meanwhile: `mma` multiplies keys by queries, the
weights that come of it are the other operand for the values, and what the warps have is put together at
the end (`decode_sums`), each with the largest score that it has seen. Where there are too few heads to
keep the device busy, the CTAs of a cluster share a head's keys.
"""

import itertools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import decode_sums, launch, ops, ptx, warps
from pallas_kernels.mosaic.decode_sums import (
    COLUMNS,
    KEYS,
    LOWEST,
    OTHER_KEYS,
    Geometry,
    Place,
    exp2,
    larger,
)
from pallas_kernels.mosaic.support import attention_obstacle

PROCESSORS = 132
MOST_PARTS = 8  # CTAs of a cluster
MOST_WARPS = 8  # for whose registers a processor has room


def cut_of(batch: int, heads: int, slots: int) -> tuple[int, int]:
    """CTAs that share a head's keys, more than one where there are few heads, and keys for all; and
    their warps. Where processors take several CTAs, two fit at a time: one loads while another ends.

    >>> cut_of(1, 40, 528), cut_of(1, 8, 528), cut_of(16, 8, 528), cut_of(16, 40, 528)
    ((2, 8), (4, 8), (1, 8), (1, 4))
    """
    most = min(MOST_PARTS, PROCESSORS // (batch * heads), slots // (KEYS * MOST_WARPS))
    alone = batch * heads <= PROCESSORS
    return 1 << max(0, most.bit_length() - 1), MOST_WARPS if alone else MOST_WARPS // 2


@launch.once("columns", "queries", "window", "cut")
def attend(
    query: jax.Array,
    new_key: jax.Array,
    new_value: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    *,
    columns: tuple[int, int, int] = (0, 0, 0),
    queries: int,
    window: int | None = None,
    cut: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(q @ k.T / sqrt(width)) @ v of one token a sequence, of which each sees the slots up to its own.

    Its key and value join the cache, in place where that is donated.

    Args:
      query: (B, any) in the cache's dtype, heads * queries * width of them from `columns` on; those
        that share keys side by side.
      new_key, new_value: (B, any), heads * width of them from `columns` on; all three may be one array.
      key, value: the cache (B, heads, slots, width), bfloat16 or float16; width a multiple of 8, at
        most 128.
      positions: int32 (B,), the slot of each token; those beyond the cache are taken to be its ends.
      columns: of the first query, key and value, multiples of 8.
      queries: that share a head of keys, at most 8.
      window: slots that a token sees, its own included; None: all.
      cut: CTAs that share a head's keys, 1, 2, 4 or 8, and the warps of each, 4 or 8; None: by the
        sizes.

    Returns:
      (B, heads * queries * width) in the cache's dtype, and the cache's keys and values.

    Raises:
      NotImplementedError: the kernel does not take such heads.
      ValueError: another cut.
    """
    batch, heads, slots, width = key.shape
    if why := attention_obstacle(str(key.dtype), width, queries):
        raise NotImplementedError(why)
    cut = parts, count = cut or cut_of(batch, heads, slots)
    if parts not in (1, 2, 4, 8) or count not in (4, 8):
        raise ValueError(f"cut={cut} must be 1, 2, 4 or 8 CTAs of a cluster, and 4 or 8 warps")
    g = Geometry(queries, heads, slots, width, str(key.dtype), parts, count, window)
    factor = width**-0.5 * math.log2(math.e)
    clusters = {"cluster": (parts,), "cluster_names": ("part",)}
    operands = {"query": query, "new_key": new_key, "new_value": new_value}
    operands |= {"key": key, "value": value, "positions": positions}

    def body(*refs):
        names = (*operands, "y", "shared")
        _kernel(g, factor, columns, dict(zip(names, refs, strict=True)))

    kernel = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads * queries * width), key.dtype),
        grid=(heads, batch),
        grid_names=("head", "sequence"),
        **(clusters if parts > 1 else {}),
        num_threads=g.warps // 4,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((g.shared_memory,), jnp.uint8)],
        # Safe here: the inline parts hold their own barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name="decode_attention",
    )
    y, cache = launch.in_place(kernel, operands, "key", "value")
    return (y, *cache)


def _kernel(g: Geometry, factor: float, columns: tuple[int, int, int], refs: dict) -> None:
    part = lax.axis_index("part") if g.parts > 1 else jnp.int32(0)
    place = Place(lax.axis_index("head"), part, lax.axis_index("sequence"))
    decode_sums.open_exchange(g)
    position, first, rounds = _bounds(g, refs["positions"], place.sequence)
    queries = _load_queries(g, refs["query"], columns[0], place)
    cache = refs["key"], refs["value"], refs["new_key"], refs["new_value"]
    _place_new(g, cache, columns[1:], place, position)

    def fetch(number):
        block = first + (number * g.parts + place.part) * g.warps
        return block, _load(g, cache, columns[1:], place, block, position)

    def turn(number, state):
        sums, block, words = state
        following = fetch(number + 1)
        return _attend(g, factor, sums, queries, words, block, position), *following

    sums, *_ = lax.fori_loop(0, rounds, turn, (_start(g), *fetch(jnp.int32(0))))
    decode_sums.finish(g, sums, refs["y"], refs["shared"], place)


def _bounds(g: Geometry, positions_ref, sequence):
    """The token's slot, the number of the first 16 keys that it sees, and turns of all warps."""
    splat = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT), return_type=splat)
    def load(ctx, positions, sequence):
        row = sequence.registers.item()
        source = ptx.global_address(positions, row, 4, ops.const(0))
        value = ptx.asm("ld.global.b32 $0, [$1];", source, results="r")
        # What is beyond the cache must not be written to.
        value = ptx.asm("max.s32 $0, $1, 0;", value, results="r", pure=True)
        value = ptx.asm(f"min.s32 $0, $1, {g.slots - 1};", value, results="r", pure=True)
        return fa.FragmentedArray.splat(value, (), is_signed=True)

    position = load(positions_ref, sequence)
    first = jnp.int32(0)
    if g.window is not None:
        first = lax.div(jnp.maximum(position - (g.window - 1), 0), jnp.int32(KEYS))
    count = lax.div(position, jnp.int32(KEYS)) + 1 - first
    in_turn = g.warps * g.parts
    return position, first, lax.div(count + (in_turn - 1), jnp.int32(in_turn))


def _load_queries(g: Geometry, query_ref, first_column: int, place: Place):
    """Operand B of every 32 entries: lane 4 g + c has 8 c .. 8 c + 7 of query g."""
    result = warps.array_type(4 * g.blocks, jnp.int32)

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT, warps.SPLAT), return_type=result)
    def body(ctx, rows, head, sequence):
        lane = warps.Lane(g)
        head, sequence = head.registers.item(), sequence.registers.item()
        query = ptx.sum_of(ops.mul(head, g.queries), lane.g)
        words = []
        for first in range(0, 32 * g.blocks, 32):
            entry = ops.add(ops.mul(lane.c, 8), first)
            inside = llvm.and_(ops.less(lane.g, g.queries), ops.less(entry, g.width))
            column = ops.add(ptx.sum_of(ops.mul(query, g.width), entry), first_column)
            words += ptx.load(_of_row(rows, sequence, column), inside, 4)
        return warps.array_of(words)

    return body(query_ref, place.head, place.sequence)


def _of_row(ref, row, column):
    """Address of a 16-bit entry."""
    width = ir.MemRefType(ref.type).shape[-1]
    return ptx.global_address(ref, row, 2 * width, ops.mul(column, 2))


def _place_new(g: Geometry, cache, columns: tuple[int, int], place: Place, position) -> None:
    """Puts the token's own key and value where later tokens look for them; nobody reads them there now."""

    @plgpu.inline_mgpu(arg_types=(*(warps.REF,) * 4, *(warps.SPLAT,) * 4))
    def body(ctx, *arguments):
        *cache, head, part, sequence, position = arguments
        lane = warps.Lane(g)
        head, part, sequence, position = (
            s.registers.item() for s in (head, part, sequence, position)
        )
        row = ops.mul(ptx.sum_of(ops.mul(sequence, g.heads), head), g.slots)
        entry = ops.mul(lane.lane, 8)
        first = llvm.and_(ops.less(part, 1), ops.less(entry, g.width))
        for number, (ref, new, column) in enumerate(
            zip(cache[:2], cache[2:], columns, strict=True)
        ):
            here = ops.flag(llvm.ICmpPredicate.eq, lane.warp, ops.const(number))
            inside = llvm.and_(first, here)
            at = ops.add(ptx.sum_of(ops.mul(head, g.width), entry), column)
            words = ptx.load(_of_row(new, sequence, at), inside, 4)
            ptx.store16(_of_row(ref, ptx.sum_of(row, position), entry), words, inside)

    body(*cache, *place, position)


def _start(g: Geometry):
    """Nothing seen yet."""

    @plgpu.inline_mgpu(return_type=warps.array_type(g.state))
    def body(ctx):
        zeros = [ptx.number(0.0)] * (4 * g.units)
        return warps.array_of(zeros + [ptx.number(LOWEST)] * 2 + [ptx.number(0.0)] * 2)

    return body()


def _load(g: Geometry, cache, columns: tuple[int, int], place: Place, block, position):
    """A warp's 16 keys and values; zeros behind the token's own slot, which has what is new.

    Keys: rows g and g + 8, for each 32 entries 8 c .. 8 c + 7. Values: for each 64 columns, rows 2 c,
    2 c + 1, and 8 further, columns 8 g .. 8 g + 7.
    """
    result = warps.array_type(g.words, jnp.int32)

    @plgpu.inline_mgpu(arg_types=(*(warps.REF,) * 4, *(warps.SPLAT,) * 4), return_type=result)
    def body(ctx, keys, values, new_keys, new_values, head, sequence, block, position):
        lane = warps.Lane(g)
        head, sequence, block, position = (
            s.registers.item() for s in (head, sequence, block, position)
        )
        slot = ops.mul(ptx.sum_of(block, lane.warp), KEYS)
        row = ops.mul(ptx.sum_of(ops.mul(sequence, g.heads), head), g.slots)

        def source(ref, new, column: int, of_lane, further: int):
            """Of one key or value: its address, and whether the token sees it."""
            mine = ptx.sum_of(slot, of_lane, ops.const(further))
            fresh = ops.flag(llvm.ICmpPredicate.eq, mine, position)
            column = ops.add(ops.mul(head, g.width), column)
            old = _of_row(ref, ptx.sum_of(row, mine), ops.const(0))
            address = ptx.select(fresh, _of_row(new, sequence, column), old)
            return address, ops.flag(llvm.ICmpPredicate.sle, mine, position)

        def piece(row, entry):
            address, seen = row
            inside = llvm.and_(seen, ops.less(entry, g.width))
            return ptx.load(_further(address, ops.mul(entry, 2)), inside, 4)

        words = []
        rows = [source(keys, new_keys, columns[0], lane.g, further) for further in (0, 8)]
        for first in range(0, 32 * g.blocks, 32):
            entry = ops.add(ops.mul(lane.c, 8), first)
            words += [word for row in rows for word in piece(row, entry)]
        pair = ops.mul(lane.c, 2)
        rows = [source(values, new_values, columns[1], pair, n) for n in (0, 1, 8, 9)]
        for first in range(0, g.width, COLUMNS):
            entry = ops.add(ops.mul(lane.g, 8), first)
            words += [word for row in rows for word in piece(row, entry)]
        return warps.array_of(words)

    return body(*cache, place.head, place.sequence, block, position)


def _further(address, offset):
    return ops.add_reg(address, llvm.zext(address.type, offset))


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
        slot = ptx.sum_of(ops.mul(ptx.sum_of(block, lane.warp), KEYS), lane.g)
        scores = _masked(g, factor, _scores(g, queries, words), slot, position)
        new = [_maximum(largest[q], scores[q::2]) for q in range(2)]
        fading = [exp2(llvm.fsub(largest[q], new[q])) for q in range(2)]
        weights = [exp2(llvm.fsub(score, new[j % 2])) for j, score in enumerate(scores)]
        total = [
            llvm.fadd(llvm.fmul(total[q], fading[q]), llvm.fadd(*weights[q::2])) for q in range(2)
        ]
        sums = [llvm.fmul(value, fading[j % 2]) for j, value in enumerate(sums)]
        sums = _add_values(g, sums, weights, words)
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
            scores = warps.instruction(g.dtype, scores, a, b[i : i + 2])
    return scores


def _masked(g: Geometry, factor: float, scores: list, slot, position) -> list:
    """Scaled, and below all others where the token does not look."""
    result = []
    for j, score in enumerate(scores):
        mine = ops.add(slot, 8 * (j // 2))
        seen = ops.flag(llvm.ICmpPredicate.sle, mine, position)
        if g.window is not None:
            near = ops.flag(llvm.ICmpPredicate.sgt, ops.add(mine, g.window), position)
            seen = llvm.and_(seen, near)
        scaled = llvm.fmul(score, ptx.number(factor))
        result.append(ptx.select(seen, scaled, ptx.number(-math.inf)))
    return result


def _maximum(value, others: list):
    """Over lanes 4 g + c as well, which have other keys."""
    for other in others:
        value = larger(value, other)
    for distance in OTHER_KEYS:
        value = larger(value, ptx.of_lane(value, distance))
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
            sums[at] = warps.instruction(g.dtype, sums[at], a, b)
    return sums
