"""The few-token kernel's copies: a ring of stages in shared memory, filled by `cp.async`."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx, warps


def fetch(geometry: warps.Geometry, arrays, ring_ref, tile, step, stage, limit) -> None:
    """Starts and commits the copies of one stage: inputs 64 `step` .. of all warps.

    Args:
      arrays: values, metadata, x, the norm's parameters, and an adapter's first matrix, in global memory.
      tile: of outputs; limit: the CTA's last input, in units of 8. Beyond the limit and beyond
        the arrays, zeros arrive.
    """
    g = geometry

    @plgpu.inline_mgpu(arg_types=(warps.REF,) * (1 + len(arrays)) + (warps.SPLAT,) * 4)
    def body(ctx, values, metadata, x, *others):
        *norm, ring, tile, step, stage, limit = others
        left = norm.pop() if g.rank else None
        tile, step, stage, limit = (s.registers.item() for s in (tile, step, stage, limit))
        lane = warps.Lane(g)
        base = ptx.sum_of(ptx.shared_address(ring), ops.mul(stage, g.stage_bytes))
        step = ptx.sum_of(step, lane.along)
        output = ptx.sum_of(
            ops.mul(tile, warps.OUTPUTS * g.across), ops.mul(lane.across, warps.OUTPUTS)
        )
        target = ptx.sum_of(base, ops.mul(lane.warp, warps.WARP_BYTES))
        _fetch_metadata(g, metadata, lane, step, output, ops.add(target, warps.VALUE_BYTES), limit)
        _fetch_values(g, values, lane, step, output, target, ops.mul(limit, 4))
        tokens, bound = warps.token_base(g, lane, base), ops.mul(limit, 8)
        _fetch_tokens(g, x, lane, step, tokens, bound)
        for number, parameter in enumerate(norm):
            to = ops.add(tokens, warps.STEP * (2 * g.width + 4 * number))
            _fetch_parameter(g, parameter, lane, step, to, bound)
        if left is not None:
            _fetch_left(g, left, lane, step, ops.add(tokens, g.left_offset), bound)
        ptx.asm("cp.async.commit_group;")

    body(*arrays, ring_ref, tile, step, stage, limit)


def _fetch_values(g, values, lane, step, output, target, bound) -> None:
    """By whole lines of 128 bytes: 8 lanes a row, the rows of 4 readers c at a time."""
    c, chunk = llvm.lshr(lane.lane, ops.const(3)), llvm.and_(lane.lane, ops.const(7))
    row = ptx.sum_of(ops.mul(step, 32), ops.mul(c, 2))
    column = ptx.sum_of(output, ops.mul(chunk, 8))
    source = ptx.global_address(values, row, 2 * g.f, ops.mul(column, 2))
    left = ptx.select(ops.less(column, g.f), ptx.minus(bound, row), ops.const(0))
    target = ptx.sum_of(target, warps.spread(c, chunk))
    for piece, further in enumerate((0, 1, 8, 9, 16, 17, 24, 25)):
        _copy(target, 512 * piece, source, 2 * g.f * further, 16, left, further)


def _fetch_metadata(g, metadata, lane, step, output, target, bound) -> None:
    """By 16 bytes, or by 8 where the array's rows are no multiple of 16."""
    count = 16 if g.f % 16 == 0 else 8
    lanes = warps.OUTPUTS // count  # of a row
    for first in range(0, 8 * lanes, 32):
        place = ops.add(lane.lane, first)
        row = ptx.sum_of(ops.mul(step, 8), llvm.udiv(place, ops.const(lanes)))
        column = ptx.sum_of(output, ops.mul(llvm.urem(place, ops.const(lanes)), count))
        left = ptx.select(ops.less(column, g.f), ptx.minus(bound, row), ops.const(0))
        byte = ops.mul(place, count)
        chunk = llvm.and_(llvm.lshr(byte, ops.const(4)), ops.const(7))
        to = ptx.sum_of(
            target,
            warps.spread(llvm.lshr(byte, ops.const(7)), chunk),
            llvm.and_(byte, ops.const(15)),
        )
        _copy(to, 0, ptx.global_address(metadata, row, g.f, column), 0, count, left, 0)


def _fetch_tokens(g, x, lane, step, target, bound) -> None:
    """Rows of 128 bytes, swizzled; the warps side by side share the work."""
    pieces, threads = 8 * g.width, 32 * g.across
    for first in range(0, pieces, threads):
        piece = ops.add(ptx.sum_of(ops.mul(lane.across, 32), lane.lane), first)
        token, chunk = llvm.lshr(piece, ops.const(3)), llvm.and_(piece, ops.const(7))
        swizzled = llvm.xor(chunk, llvm.and_(token, ops.const(7)))
        column = ptx.sum_of(ops.mul(step, warps.STEP), ops.mul(chunk, 8))
        to = ptx.sum_of(target, ops.mul(token, 128), ops.mul(swizzled, 16))
        left = ptx.select(ops.less(token, g.tokens), ptx.minus(bound, column), ops.const(0))
        here = ops.less(piece, pieces) if first + threads > pieces else None
        _copy(
            to, 0, ptx.global_address(x, token, 2 * g.k, ops.mul(column, 2)), 0, 16, left, 0, here
        )


def _fetch_left(g, left, lane, step, target, bound) -> None:
    """Rows of 64 inputs, read as they lie; 8 columns of all of them lie together then."""
    blocks, threads = g.rank // 8, 32 * g.across
    pieces = warps.STEP * blocks
    for first in range(0, pieces, threads):
        piece = ops.add(ptx.sum_of(ops.mul(lane.across, 32), lane.lane), first)
        inside = llvm.udiv(piece, ops.const(blocks))
        block = llvm.urem(piece, ops.const(blocks))
        row = ptx.sum_of(ops.mul(step, warps.STEP), inside)
        to = ptx.sum_of(target, ops.mul(block, 16 * warps.STEP), ops.mul(inside, 16))
        here = ops.less(piece, pieces) if first + threads > pieces else None
        source = ptx.global_address(left, row, 2 * g.rank, ops.mul(block, 16))
        _copy(to, 0, source, 0, 16, ptx.minus(bound, row), 0, here)


def _fetch_parameter(g, parameter, lane, step, target, bound) -> None:
    """64 float32, by half of a warp."""
    column = ptx.sum_of(ops.mul(step, warps.STEP), ops.mul(lane.lane, 4))
    source = ptx.global_address(parameter, ops.const(0), 0, ops.mul(column, 4))
    here = ops.less(ptx.sum_of(lane.lane, ops.mul(lane.across, 32)), warps.STEP // 4)
    to = ptx.sum_of(target, ops.mul(lane.lane, 16))
    _copy(to, 0, source, 0, 16, ptx.minus(bound, column), 0, here)


def start(geometry: warps.Geometry, fetch) -> None:
    """fetch(number, stage) of all stages but one.

    In a loop that stays one: unrolled, it would be mixed up with what is ready for it, and wait.
    """

    @plgpu.inline_mgpu(
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))
    )
    def count(ctx):  # hidden from LLVM
        value = ptx.asm(f"mov.b32 $0, {geometry.stages - 1};", results="r")
        return fa.FragmentedArray.splat(value, (), is_signed=True)

    @plgpu.inline_mgpu()
    def keep_rolled(ctx):  # by ptxas
        ptx.asm('.pragma "nounroll";')

    @pl.loop(0, count())
    def _start(number):
        keep_rolled()
        fetch(number, number)


def wait(geometry: warps.Geometry, in_flight: int) -> None:
    """Waits for all but `in_flight` stages, of all warps that share them."""
    g = geometry

    @plgpu.inline_mgpu()
    def body(ctx):
        ptx.asm(f"cp.async.wait_group {in_flight};")
        if g.across == 1:  # nothing but what the warp copied itself
            ptx.asm("bar.warp.sync 0xffffffff;")
        elif g.along == 1:
            ptx.asm("bar.sync 0;")
        else:
            ptx.asm(f"bar.sync $0, {32 * g.across};", ops.add(warps.Lane(g).along, 1))

    body()


def _copy(target, target_at, source, source_at, count, left, needed, here=None) -> None:
    """Starts a copy of `count` bytes if left > needed, else of as many zeros."""
    kind = "cg" if count == 16 else "ca"
    test, when = ("setp.ne.b32 q, $3, 0;", "@q ") if here is not None else ("", "")
    ptx.asm(
        f"{{ .reg .pred p, q; .reg .b32 size; {test}"
        f" setp.gt.s32 p, $2, {needed}; selp.b32 size, {count}, 0, p;"
        f" {when}cp.async.{kind}.shared.global.L2::128B"
        f" [$0+{target_at}], [$1+{source_at}], {count}, size; }}",
        target,
        source,
        left,
        *(() if here is None else (here,)),
    )
