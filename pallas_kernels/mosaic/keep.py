"""From an accumulator to compressed values: selection by 2:4 metadata, and the ways out.

A consumer warpgroup works in a free stage of the ring: the two consumers' 16-bit values on their
way to TMA lie at its start, then their metadata. Compressed values ("kept") are one flat array in
an order of their own: thread t of the warpgroup holds four at a time, the two survivors of a group
of 4 inputs and those of the group 8 inputs further on.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, parts, ptx
from pallas_kernels.mosaic.frame import CONSUMERS
from pallas_kernels.mosaic.wgmma import ACC, SWIZZLED

SPLAT = plgpu.Layout.WG_SPLAT
AT_ONCE = 8  # octets whose metadata is read before the first is used


def fetch_metadata(metadata_ref, stage_ref, row, column, *, rows: int, columns: int) -> None:
    """Starts copying the metadata of (rows, columns) at (row, column) to shared memory.

    Args:
      metadata_ref: uint8 (in / 8, out), in global memory, out a multiple of 8.
      stage_ref: the free stage; each consumer has its part.
      row, column: first output and first input; rows and columns of one warpgroup.
    """
    groups8, out = metadata_ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(SWIZZLED), SPLAT, SPLAT))
    def body(ctx, metadata, stage, row, column):
        i64 = ir.IntegerType.get_signless(64)
        row, column = row.registers.item(), column.registers.item()
        thread = llvm.and_(mutils.thread_idx(), ops.const(127))
        target = _metadata_address(stage, rows, columns)
        base = llvm.ptrtoint(i64, mutils.memref_ptr(metadata))
        pieces = rows // 8  # of 8 outputs, per octet
        first_octet = llvm.lshr(column, ops.const(3))
        for first in range(0, pieces * columns // 8, 128):
            index = ops.add(thread, first)
            octet = ops.add_reg(first_octet, llvm.udiv(index, ops.const(pieces)))
            piece_row = ops.add_reg(row, ops.mul(llvm.urem(index, ops.const(pieces)), 8))
            inside = llvm.and_(ops.less(octet, groups8), ops.less(piece_row, out))
            offset = ops.add_reg(ops.wide_mul(octet, out), llvm.zext(i64, piece_row))
            is_inside = llvm.icmp(llvm.ICmpPredicate.ne, inside, ops.const(0))
            offset = llvm.select(is_inside, offset, ops.const64(0))
            mine = ops.less(index, pieces * columns // 8)
            ops.asm(
                "{ .reg .pred p; setp.ne.b32 p, $3, 0; "
                "@p cp.async.ca.shared.global [$0], [$1], 8, $2; }",
                "r,l,r,r",
                ops.add_reg(target, ops.mul(index, 8)),
                ops.add_reg(base, offset),
                ops.mul(inside, 8),
                mine,
            )

    body(metadata_ref, stage_ref, row, column)


def await_metadata() -> None:
    """Waits for the whole warpgroup's copies."""

    @plgpu.inline_mgpu()
    def body(ctx):
        ops.asm("cp.async.wait_all;", "~{memory}")
        mutils.warpgroup_barrier()

    body()


def select(acc, stage_ref) -> jax.Array:
    """The entries of acc that the metadata in `stage_ref` keeps, flat.

    A thread holds two columns of a group of 4 in two rows, 8 apart; its neighbour the other two.
    They exchange, so that the even thread has the group of the first row, the odd one of the
    second.
    """
    rows, columns = acc.shape
    kept = kept_type(rows * columns // 2)

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(SWIZZLED)), return_type=kept)
    def body(ctx, acc, stage):
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
        lane = _Lane()
        source = ops.add_reg(_metadata_address(stage, rows, columns), lane.row)
        values = []
        for block in range(rows // 64):
            block_registers = registers[block].reshape(-1, 4)
            for first in range(0, columns // 8, AT_ONCE):
                octets = range(first, min(first + AT_ONCE, columns // 8))
                loaded = [_load_byte(ops.add(source, rows * n + 64 * block)) for n in octets]
                for n, byte in zip(octets, loaded, strict=True):
                    nibble = llvm.lshr(byte, lane.shift)
                    own = [ops.scalar(register) for register in block_registers[n]]
                    values += _survivors(own, nibble, lane)
        return from_values(values)

    return body(acc, stage_ref)


def add_into(kept, into_ref, row, column, *, rows: int):
    """kept plus what lies at its place in into_ref (in / 2, out)."""
    dtype = str(into_ref.dtype)

    @plgpu.inline_mgpu(
        arg_types=(kept_layout(kept.size), plgpu.RefType(), SPLAT, SPLAT),
        return_type=kept_type(kept.size),
    )
    def body(ctx, kept, into, row, column):
        values = values_of(kept)
        places = list(_places(into, row, column, rows, len(values), BYTES[dtype]))
        added = []
        for first in range(0, len(places), AT_ONCE):
            loaded = [
                _load_value(ops.add(address, e * BYTES[dtype] * into_ref.shape[1]), inside, dtype)
                for address, inside in places[first : first + AT_ONCE]
                for e in (0, 1)
            ]
            batch = values[2 * first : 2 * first + len(loaded)]
            added += [llvm.fadd(v, old) for v, old in zip(batch, loaded, strict=True)]
        return from_values(added)

    return body(kept, into_ref, row, column)


def store(kept, out_ref, row, column, *, rows: int) -> None:
    """Stores to float32 out_ref (in / 2, out), where in and out are multiples of 8."""

    @plgpu.inline_mgpu(arg_types=(kept_layout(kept.size), plgpu.RefType(), SPLAT, SPLAT))
    def body(ctx, kept, out, row, column):
        values = values_of(kept)
        places = _places(out, row, column, rows, len(values), 4)
        for i, (address, inside) in enumerate(places):
            ops.asm(
                "{ .reg .pred p; setp.ne.b32 p, $4, 0; "
                "@p st.global.f32 [$0], $2; @p st.global.f32 [$1], $3; }",
                "l,l,f,f,r",
                address,
                ops.add(address, 4 * out_ref.shape[1]),
                values[2 * i],
                values[2 * i + 1],
                inside,
            )

    body(kept, out_ref, row, column)


def store_staged(kept, stage_ref, dtype: str, *, rows: int) -> None:
    """Stores 16-bit values to the stage, by stmatrix: swizzled blocks (columns / 2, 64 outputs).

    A register of a warp is an 8 x 8 matrix to stmatrix: each pair of its rows comes from one
    quarter of the lanes, and thus has its own inputs and its own 8 of the warp's 16 outputs.
    """

    @plgpu.inline_mgpu(arg_types=(kept_layout(kept.size), plgpu.RefType(SWIZZLED)))
    def body(ctx, kept, stage):
        i32 = ir.IntegerType.get_signless(32)
        values = values_of(kept)
        words = [ops.pack(*values[i : i + 2], dtype) for i in range(0, len(values), 2)]
        blocks = rows // 64
        octets = len(words) // blocks
        thread = mutils.thread_idx()
        lane, warp = _bits(thread, 0, 5), _bits(thread, 5, 2)
        # the row that this lane addresses: `line` of matrix `matrix`
        line, matrix = _bits(lane, 0, 3), _bits(lane, 3, 2)
        value = ops.add_reg(
            ops.mul(matrix, 4),
            ops.add_reg(ops.mul(_bits(line, 2, 1), 2), _bits(line, 0, 1)),
        )
        chunk = ops.add_reg(ops.mul(warp, 2), _bits(line, 1, 1))
        swizzled = llvm.xor(chunk, llvm.and_(value, ops.const(7)))
        base = llvm.ptrtoint(i32, mutils.memref_ptr(stage))
        base = ops.add_reg(base, ops.mul(llvm.lshr(thread, ops.const(7)), blocks * octets * 512))
        base = ops.add_reg(base, ops.add_reg(ops.mul(value, 128), ops.mul(swizzled, 16)))
        for first in range(0, len(words), 4):
            ops.asm(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};",
                "r,r,r,r,r",
                ops.add(base, 512 * first),
                *words[first : first + 4],
            )

    body(kept, stage_ref)


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Lane:
    """What a thread has after `select`: in each octet one group of 4 of one row."""

    def __init__(self):
        thread = mutils.thread_idx()
        odd = _bits(thread, 0, 1)
        self.second = _bits(thread, 1, 1)  # group of the octet
        self.shift = ops.mul(self.second, 4)
        self.is_odd = llvm.icmp(llvm.ICmpPredicate.ne, odd, ops.const(0))
        # An odd thread's group starts with the columns 2 and 3.
        self.first_column = ops.mul(odd, 2)
        self.row = ops.add_reg(
            ops.add_reg(ops.mul(_bits(thread, 5, 2), 16), ops.mul(odd, 8)), _bits(thread, 2, 3)
        )


def _survivors(own, nibble, lane):
    """The two entries of this thread's group that the nibble's low four bits name."""
    sent = [llvm.select(lane.is_odd, own[e], own[2 + e]) for e in (0, 1)]
    mine = [llvm.select(lane.is_odd, own[2 + e], own[e]) for e in (0, 1)]
    theirs = [ptx.of_lane(value, 1) for value in sent]
    first_columns = llvm.or_(
        lane.first_column, llvm.shl(lane.first_column, ops.const(2), overflow_flags=ops.NO_WRAP)
    )
    nibble = llvm.xor(nibble, first_columns)
    return [_pick([*mine, *theirs], nibble, low_bit) for low_bit in (0, 2)]


def _pick(group, nibble, low_bit: int):
    """The entry of the four that the two bits from `low_bit` on name."""
    bits = [
        llvm.icmp(llvm.ICmpPredicate.ne, llvm.and_(nibble, ops.const(1 << b)), ops.const(0))
        for b in (low_bit, low_bit + 1)
    ]
    low, high = (llvm.select(bits[0], group[i + 1], group[i]) for i in (0, 2))
    return llvm.select(bits[1], high, low)


def _places(ref, row, column, rows: int, values: int, size: int):
    """The address of the first of each two values of this thread in ref (in / 2, out), and
    whether it lies inside; the second lies one row of ref further."""
    i64 = ir.IntegerType.get_signless(64)
    half, out = ir.MemRefType(ref.type).shape
    blocks = rows // 64
    octets = values // 2 // blocks
    lane = _Lane()
    first_octet = llvm.lshr(column.registers.item(), ops.const(3))
    first_value = ops.add_reg(ops.mul(first_octet, 4), ops.mul(lane.second, 2))
    row = ops.add_reg(row.registers.item(), lane.row)
    offset = ops.add_reg(ops.wide_mul(first_value, out), llvm.zext(i64, row))
    base = llvm.ptrtoint(i64, mutils.memref_ptr(ref))
    shift = ops.const64(size.bit_length() - 1)
    base = ops.add_reg(base, llvm.shl(offset, shift, overflow_flags=ops.NO_WRAP))
    for block in range(blocks):
        row_inside = ops.less(ops.add(row, 64 * block), out)
        for n in range(octets):
            inside = llvm.and_(row_inside, ops.less(ops.add(first_octet, n), half // 4))
            yield ops.add(base, (4 * n * out + 64 * block) * size), inside


def _load_value(address, inside, dtype: str):
    load = {
        "float32": "ld.global.f32 $0, [$1];",
        "bfloat16": "ld.global.b16 h, [$1]; @p mov.b32 $0, {z, h};",
        "float16": "ld.global.b16 h, [$1]; @p cvt.f32.f16 $0, h;",
    }[dtype]
    return ops.asm(
        "{ .reg .pred p; .reg .b16 h, z; mov.b16 z, 0; mov.b32 $0, 0; setp.ne.b32 p, $2, 0; "
        f"@p {load} }}",
        "=&f,l,r",
        address,
        inside,
        result=ir.F32Type.get(),
    )


def _load_byte(address):
    return ops.asm(
        "ld.shared.u8 $0, [$1];", "=r,r", address, result=ir.IntegerType.get_signless(32)
    )


def _metadata_address(stage, rows: int, columns: int):
    """Of this warpgroup's (columns / 8, rows) bytes."""
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mutils.memref_ptr(stage))
    base = ops.add(base, CONSUMERS * rows * columns)
    consumer = llvm.lshr(mutils.thread_idx(), ops.const(7))
    return ops.add_reg(base, ops.mul(consumer, rows * columns // 8))


def _bits(x, first: int, count: int):
    return llvm.and_(llvm.lshr(x, ops.const(first)), ops.const((1 << count) - 1))


def kept_layout(count: int):
    return plgpu.Layout.WG_STRIDED((count,), 4)


def kept_type(count: int):
    return plgpu.ShapeDtypeStruct((count,), jnp.float32, layout=kept_layout(count))


def registers(kept) -> parts.Registers:
    return parts.Registers(kept_layout(kept.size), kept_type(kept.size), values_of, from_values)


def values_of(kept):
    return [
        llvm.extractelement(register, ops.const(e)) for register in kept.registers for e in range(4)
    ]


def from_values(values):
    vector = ir.VectorType.get((4,), ir.F32Type.get())
    registers = np.empty(len(values) // 4, dtype=object)
    for i in range(len(registers)):
        register = llvm.mlir_undef(vector)
        for e in range(4):
            register = llvm.insertelement(register, values[4 * i + e], ops.const(e))
        registers[i] = register
    layout = fa.WGStridedFragLayout((128 * len(values),), 4)
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
