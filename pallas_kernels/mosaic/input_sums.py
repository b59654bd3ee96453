"""The sums over the tokens of what a product multiplies, on the side: gradients of biases.

A step's inputs lie in shared memory for all CTAs that make outputs of the same tokens. One of them, another
one for every step, adds up their tokens while the tensor cores multiply: each warp has 8 of the 64 inputs.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.wgmma import SWIZZLED

SPLAT = plgpu.Layout.WG_SPLAT
LANES = 32
EACH = STEP // (4 * CONSUMERS)  # inputs of a warp, 16 bytes of a row


def store(x_ref, sums_ref, row, step) -> None:
    """Row `row` of the sums (tiles of tokens, in) gets the 64 inputs of `step`, from x (tokens, 64)."""
    tokens, inputs = x_ref.shape[0], sums_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), plgpu.RefType(), SPLAT, SPLAT))
    def body(ctx, x, sums, row, step):
        row, step = row.registers.item(), step.registers.item()
        lane = llvm.and_(mutils.thread_idx(), ops.const(LANES - 1))
        warp = llvm.and_(llvm.lshr(mutils.thread_idx(), ops.const(5)), ops.const(4 * CONSUMERS - 1))
        # Rows of 128 bytes, whose 16-byte pieces are exchanged by the row's number.
        piece = llvm.xor(warp, llvm.and_(lane, ops.const(7)))
        source = ptx.sum_of(ptx.shared_address(x), ops.mul(lane, 128), ops.mul(piece, 16))
        total = None
        for first in range(0, tokens, LANES):
            words = ptx.asm(
                f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{128 * first}];", source, results="rrrr"
            )
            if first + LANES > tokens:  # the others have read what comes behind x
                known = ops.less(lane, tokens - first)
                words = [ptx.select(known, word, ops.const(0)) for word in words]
            values = ptx.floats_of(words, ptx.dtype_of(x))
            total = values if total is None else ptx.add_floats(total, values)
        value = _of_all_lanes(lane, total)
        feature = ptx.sum_of(
            ops.mul(step, STEP), ops.mul(warp, EACH), llvm.lshr(lane, ops.const(2))
        )
        first = ops.flag(llvm.ICmpPredicate.eq, llvm.and_(lane, ops.const(3)), ops.const(0))
        inside = llvm.and_(first, ops.less(feature, inputs))
        target = ptx.global_address(sums, row, 4 * inputs, ops.mul(feature, 4))
        ptx.store_float(target, value, inside)
        mutils.warpgroup_barrier()  # for one thread then releases the stage for all

    body(x_ref, sums_ref, row, step)


def _of_all_lanes(lane, values: list):
    """The sum over lanes of the value that has a lane's number / 4: each exchange halves them."""
    for distance in (16, 8, 4):
        half = len(values) // 2
        upper = llvm.icmp(llvm.ICmpPredicate.ne, llvm.and_(lane, ops.const(distance)), ops.const(0))
        kept, given = [], []
        for low, high in zip(values[:half], values[half:], strict=True):
            kept.append(llvm.select(upper, high, low))
            given.append(llvm.select(upper, low, high))
        values = [
            llvm.fadd(mine, ptx.of_lane(theirs, distance))
            for mine, theirs in zip(kept, given, strict=True)
        ]
    return ptx.over_lanes(*values, (1, 2))
