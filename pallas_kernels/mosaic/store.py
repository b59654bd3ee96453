"""The epilogue: bias and activation on accumulators, and their way out, transposed."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops
from pallas_kernels.mosaic.activations import FAST, PRECISE
from pallas_kernels.mosaic.wgmma import ACC, SWIZZLED

BIAS = ACC.reduce(1)


def load_bias(bias_ref, first, rows: int):
    """rows float32 entries from `first` on, as `store_transposed` takes them."""
    return plgpu.load(bias_ref.at[pl.ds(first, rows)], layout=BIAS, optimized=False)


def store_transposed(acc, bias, out_ref, block: int, first: int, dtype: str, activation) -> None:
    """out_ref (tokens, 64) = activation(acc + bias)[64 * block :][:64, first:][:, :tokens].T.

    By stmatrix: four times fewer instructions than storing the transposed layout.
    """
    tokens = out_ref.shape[0]

    def store(rows, out):
        i32 = ir.IntegerType.get_signless(32)
        address = ops.add_reg(llvm.ptrtoint(i32, mutils.memref_ptr(out)), _lane_offset())
        for q in range(tokens // 16):
            b = first // 8 + 2 * q
            pairs = [ops.pack(*rows(b + n, h), dtype) for n in (0, 1) for h in (0, 1)]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [ops.add(address, 2048 * q), *pairs],
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};",
                "r,r,r,r,r",
                asm_dialect=0,
                has_side_effects=True,
            )

    _with_epilogue(acc, bias, out_ref, plgpu.RefType(SWIZZLED), block, FAST.get(activation), store)


def store_float32(acc, bias, out_ref, block: int, row, column, activation) -> None:
    """As `store_transposed`, float32 and straight to the whole (tokens, out) array in memory.

    A warp stores runs of 8 features, whole sectors. row and column: where the block lies.
    """
    tokens, features = out_ref.shape

    def store(rows, out, row, column):
        i64 = ir.IntegerType.get_signless(64)
        thread = llvm.and_(mutils.thread_idx(), ops.const(127))
        lane = llvm.and_(thread, ops.const(31))
        warp = llvm.lshr(thread, ops.const(5))
        feature = ops.add_reg(
            row.registers.item(), ops.add_reg(ops.mul(warp, 16), llvm.lshr(lane, ops.const(2)))
        )
        token = ops.add_reg(column.registers.item(), ops.mul(llvm.and_(lane, ops.const(3)), 2))
        place = ops.add_reg(ops.wide_mul(token, 4 * features), ops.wide_mul(feature, 4))
        address = ops.add_reg(llvm.ptrtoint(i64, mutils.memref_ptr(out)), place)
        for h in (0, 1):
            feature_inside = ops.less(feature, features - 8 * h)
            for b in range(acc.shape[1] // 8):
                for e, value in enumerate(rows(b, h)):
                    inside = llvm.and_(feature_inside, ops.less(token, tokens - 8 * b - e))
                    there = ops.add(address, 4 * (features * (8 * b + e) + 8 * h))
                    llvm.inline_asm(
                        ir.Type.parse("!llvm.void"),
                        [there, value, inside],
                        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }",
                        "l,f,r",
                        asm_dialect=0,
                        has_side_effects=True,
                    )

    splat = plgpu.Layout.WG_SPLAT
    _with_epilogue(
        acc,
        bias,
        out_ref,
        plgpu.RefType(),
        block,
        PRECISE.get(activation),
        store,
        layouts=(splat, splat),
        scalars=(row, column),
    )


def _with_epilogue(acc, bias, out_ref, out_type, block, function, store, layouts=(), scalars=()):
    """Calls `store` in a thread's terms: rows(b, h) is the pair of neighbouring tokens, finished,
    of columns 8 * b on and of the thread's row (h = 0) or the one 8 below (h = 1)."""
    extra = () if bias is None else (bias,)

    @plgpu.inline_mgpu(arg_types=(ACC, *(BIAS for _ in extra), out_type, *layouts))
    def body(ctx, acc, *args):
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers[block].reshape(-1, 2, 2)
        added = args[0].registers.reshape(-1, 2)[block] if extra else None

        def rows(b, h):
            pair = [llvm.extractelement(v, ops.const(0)) for v in registers[b, h]]
            if added is not None:
                pair = [ops.add_float(z, ops.scalar(added[h])) for z in pair]
            return pair if function is None else [function(z) for z in pair]

        store(rows, *args[len(extra) :])

    body(acc, *extra, out_ref, *scalars)


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
