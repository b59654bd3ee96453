"""Accumulators on their way out: to shared memory, transposed, by `stmatrix`."""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops
from pallas_kernels.mosaic.wgmma import ACC, X_TRANSFORMS


def store_transposed(acc, out_ref, block: int, first: int, dtype: str) -> None:
    """out_ref (tokens, 64) = acc[64 * block :][:64, first : first + tokens].T, by stmatrix.

    Four times fewer instructions than storing the transposed layout.
    """
    tokens = out_ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(X_TRANSFORMS)))
    def body(ctx, acc, out):
        i32 = ir.IntegerType.get_signless(32)
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers[block].reshape(-1, 4)
        address = ops.add_reg(llvm.ptrtoint(i32, mutils.memref_ptr(out)), _lane_offset())
        for q in range(tokens // 16):
            b = first // 8 + 2 * q
            pairs = [
                ops.pack(registers[b + n, h], registers[b + n, h + 1], dtype)
                for n in (0, 1)
                for h in (0, 2)
            ]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [ops.add(address, 2048 * q), *pairs],
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};",
                "r,r,r,r,r",
                asm_dialect=0,
                has_side_effects=True,
            )

    body(acc, out_ref)


def _lane_offset():
    """Byte offset of the 16-byte row that this lane addresses in a 16-token block."""
    thread = mutils.thread_idx()
    warp = llvm.lshr(llvm.and_(thread, ops.const(127)), ops.const(5))
    lane = llvm.and_(thread, ops.const(31))
    row = llvm.and_(lane, ops.const(7))
    # matrices: features 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
    feature_half = llvm.and_(llvm.lshr(lane, ops.const(3)), ops.const(1))
    token_half = llvm.lshr(lane, ops.const(4))
    chunk = llvm.or_(llvm.shl(warp, ops.const(1), overflow_flags=ops.NO_WRAP), feature_half)
    swizzled = llvm.xor(chunk, row)
    parts = [ops.mul(token_half, 1024), ops.mul(row, 128), ops.mul(swizzled, 16)]
    return ops.add_reg(ops.add_reg(parts[0], parts[1]), parts[2])
