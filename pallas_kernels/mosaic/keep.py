"""Accumulators on their way out: to global memory, keeping only what 2:4 metadata keeps."""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops
from pallas_kernels.mosaic.wgmma import ACC


def store_kept(acc, metadata_ref, out_ref, row, column) -> None:
    """Stores the entries of acc that 2:4 metadata keeps, at their compressed places.

    Args:
      acc: (rows, columns), transposed: rows lie along `out`, columns along `in`.
      metadata_ref: uint8 (in / 8, out), the logical metadata, in global memory.
      out_ref: float32 (in / 2, out), in global memory.
      row, column: where acc lies; `in` and `out` are multiples of 8.
    """
    groups8, out = metadata_ref.shape
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), plgpu.RefType(), splat, splat))
    def body(ctx, acc, metadata, target, row, column):
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
        for block in range(acc.shape[0] // 64):
            block_row = ops.add(row.registers.item(), 64 * block)
            block_registers = registers[block].reshape(-1, 4)
            _store_block(
                block_registers, metadata, target, block_row, column.registers.item(), groups8, out
            )

    body(acc, metadata_ref, out_ref, row, column)


def _store_block(registers, metadata, target, row, column, groups8, out) -> None:
    """64 rows. A thread holds two columns of a group of 4 in two rows, 8 apart; its neighbour the
    other two. They exchange, so that the even thread has the whole group of the first row and the
    odd one that of the second. A warp then stores two runs of 16 floats.
    """
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    thread = llvm.and_(mutils.thread_idx(), ops.const(127))
    warp, lane = llvm.lshr(thread, ops.const(5)), llvm.and_(thread, ops.const(31))
    odd, second = (
        llvm.and_(lane, ops.const(1)),
        llvm.and_(llvm.lshr(lane, ops.const(1)), ops.const(1)),
    )
    is_odd = llvm.icmp(llvm.ICmpPredicate.ne, odd, ops.const(0))
    row = ops.add_reg(
        ops.add_reg(row, ops.mul(warp, 16)),
        ops.add_reg(ops.mul(odd, 8), llvm.lshr(lane, ops.const(2))),
    )
    row_inside = ops.less(row, out)
    first_octet = llvm.lshr(column, ops.const(3))
    row_bytes = llvm.zext(i64, row)
    metadata_row = ops.add_reg(llvm.ptrtoint(i64, mutils.memref_ptr(metadata)), row_bytes)
    target_row = ops.add_reg(
        llvm.ptrtoint(i64, mutils.memref_ptr(target)),
        llvm.shl(row_bytes, ops.const64(2), overflow_flags=ops.NO_WRAP),
    )
    shift = ops.mul(second, 4)
    for n in range(len(registers)):
        octet = ops.add(first_octet, n)
        inside = llvm.and_(row_inside, ops.less(octet, groups8))
        source = ops.add_reg(metadata_row, ops.wide_mul(octet, out))
        loaded = llvm.inline_asm(
            i32,
            [source, inside],
            "{ .reg .pred p; .reg .b16 v; setp.ne.b32 p, $2, 0; mov.b16 v, 0; "
            "@p ld.global.nc.u8 v, [$1]; cvt.u32.u16 $0, v; }",
            "=r,l,r",
            asm_dialect=0,
        )
        nibble = llvm.lshr(loaded, shift)
        own = [llvm.extractelement(register, ops.const(0)) for register in registers[n]]
        theirs = [ops.from_neighbour(llvm.select(is_odd, own[e], own[2 + e])) for e in (0, 1)]
        group = [llvm.select(is_odd, theirs[e], own[e]) for e in (0, 1)]
        group += [llvm.select(is_odd, own[2 + e], theirs[e]) for e in (0, 1)]
        first_value = ops.add_reg(ops.mul(octet, 4), ops.mul(second, 2))
        address = ops.add_reg(target_row, ops.wide_mul(first_value, 4 * out))
        values = [_pick(group, nibble, low_bit) for low_bit in (0, 2)]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, ops.add(address, 4 * out), *values, inside],
            "{ .reg .pred p; setp.ne.b32 p, $4, 0; "
            "@p st.global.f32 [$0], $2; @p st.global.f32 [$1], $3; }",
            "l,l,f,f,r",
            asm_dialect=0,
            has_side_effects=True,
        )


def _pick(group, nibble, low_bit: int):
    """The entry of the four that the two bits from `low_bit` on name."""
    bits = [
        llvm.icmp(llvm.ICmpPredicate.ne, llvm.and_(nibble, ops.const(1 << b)), ops.const(0))
        for b in (low_bit, low_bit + 1)
    ]
    low, high = (llvm.select(bits[0], group[i + 1], group[i]) for i in (0, 2))
    return llvm.select(bits[1], high, low)
