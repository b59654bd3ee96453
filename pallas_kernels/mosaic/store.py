"""The epilogue: bias and activation on accumulators, what joins them, and their way out, transposed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx
from pallas_kernels.mosaic.activations import FAST, PRECISE, THROUGH
from pallas_kernels.mosaic.wgmma import ACC, SWIZZLED

BIAS = ACC.reduce(1)
SPLAT = plgpu.Layout.WG_SPLAT


class Joining(NamedTuple):
    """An array like the results that joins them last.

    * `ref`: of these 64 outputs, (tokens of the tile, 64) in shared memory, as a stage of x lies.
    * `through`: the activation whose derivative there is multiplied; None: it is added.
    """

    ref: Any
    through: str | None

    @property
    def combine(self) -> Callable:
        return ops.add_float if self.through is None else THROUGH[self.through]


def load_bias(bias_ref, first, rows: int):
    """rows float32 entries from `first` on, as `store_transposed` takes them."""
    return plgpu.load(bias_ref.at[pl.ds(first, rows)], layout=BIAS, optimized=False)


def store_transposed(
    acc,
    bias,
    out_ref,
    block: int,
    first: int,
    dtype: str,
    activation,
    joining: Joining | None = None,
    gated: bool = False,
) -> None:
    """out_ref (tokens, 64) = activation(acc + bias)[64 * block :][:64, first:][:, :tokens].T.

    Combined with rows `first` on of what joins, if anything does; or, gated, times the next block with its
    bias, with a `PRECISE` activation, as it is of half of the numbers. By stmatrix: four times fewer
    instructions than storing the transposed layout.
    """
    tokens = out_ref.shape[0]

    def store(rows, out, *others):
        lane = _lane_offset()
        address = ops.add_reg(ptx.shared_address(out), lane)
        if others:
            source = ops.add_reg(ptx.shared_address(*others), lane)
        for q in range(tokens // 16):
            b = first // 8 + 2 * q
            pairs = [rows(b + n, h) for n in (0, 1) for h in (0, 1)]
            if others:
                words = _matrices(ops.add(source, 128 * first + 2048 * q))
                found = ptx.floats_of(words, dtype)
                for i, pair in enumerate(pairs):
                    pairs[i] = list(map(joining.combine, pair, found[2 * i : 2 * i + 2]))
            ops.asm(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};",
                "r,r,r,r,r",
                ops.add(address, 2048 * q),
                *(ops.pack(*pair, dtype) for pair in pairs),
            )

    tile, function = plgpu.RefType(SWIZZLED), (PRECISE if gated else FAST).get(activation)
    refs = () if joining is None else (joining.ref,)
    types = [tile for _ in refs]
    _with_epilogue(acc, bias, out_ref, tile, block, function, store, types, refs, gated)


def _matrices(address):
    """Four 8 x 8 matrices, as stmatrix of `store_transposed` stores them."""
    return ptx.asm(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
        address,
        results="rrrr",
    )


def store_float32(
    acc, bias, out_ref, block: int, row, column, activation, gated: bool = False
) -> None:
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
                    ptx.store_float(there, value, inside)

    _with_epilogue(
        acc,
        bias,
        out_ref,
        plgpu.RefType(),
        block,
        PRECISE.get(activation),
        store,
        (SPLAT, SPLAT),
        (row, column),
        gated,
    )


def _with_epilogue(
    acc, bias, out_ref, out_type, block, function, store, types=(), others=(), gated=False
):
    """Calls `store`, with out_ref and others, in a thread's terms.

    rows(b, h) is the pair of neighbouring tokens, with bias and activation, of columns 8 * b on and
    of the thread's row (h = 0) or the one 8 below (h = 1); gated, times that of the next block.
    """
    extra = () if bias is None else (bias,)

    @plgpu.inline_mgpu(arg_types=(ACC, *(BIAS for _ in extra), out_type, *types))
    def body(ctx, acc, *args):
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
        added = args[0].registers.reshape(-1, 2) if extra else None

        def entered(block, b, h):
            pair = registers[block].reshape(-1, 2, 2)[b, h]
            pair = [llvm.extractelement(v, ops.const(0)) for v in pair]
            if added is None:
                return pair
            return [ops.add_float(z, ops.scalar(added[block][h])) for z in pair]

        def rows(b, h):
            pair = entered(block, b, h)
            if function is not None:
                pair = [function(z) for z in pair]
            if gated:
                pair = list(map(ops.multiply_float, pair, entered(block + 1, b, h)))
            return pair

        store(rows, *args[len(extra) :])

    body(acc, *extra, out_ref, *others)


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
