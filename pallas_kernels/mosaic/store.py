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
    * `sums`: for the sums over the tokens of what is stored: float32 (chunks of tokens, out) in global
      memory, the row to fill, and the first output; or None.
    """

    ref: Any
    through: str | None
    sums: tuple[Any, Any, Any] | None = None

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
) -> None:
    """out_ref (tokens, 64) = activation(acc + bias)[64 * block :][:64, first:][:, :tokens].T.

    By stmatrix: four times fewer instructions than storing the transposed layout.
    """
    tokens, refs, types = out_ref.shape[0], (), ()
    if joining is not None:
        refs, types = (joining.ref,), (plgpu.RefType(SWIZZLED),)
        if joining.sums is not None:
            refs, types = (*refs, *joining.sums), (*types, plgpu.RefType(), SPLAT, SPLAT)

    def store(rows, out, *others):
        lane = _lane_offset()
        address = ops.add_reg(ptx.shared_address(out), lane)
        if others:
            source = ops.add_reg(ptx.shared_address(others[0]), lane)
        totals = [ptx.number(0.0)] * 2
        for q in range(tokens // 16):
            b = first // 8 + 2 * q
            pairs = [rows(b + n, h) for n in (0, 1) for h in (0, 1)]
            if others:
                words = _matrices(ops.add(source, 128 * first + 2048 * q))
                found = ptx.floats_of(words, dtype)
                for i, pair in enumerate(pairs):
                    pairs[i] = list(map(joining.combine, pair, found[2 * i : 2 * i + 2]))
                    totals[i % 2] = llvm.fadd(totals[i % 2], llvm.fadd(*pairs[i]))
            ops.asm(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};",
                "r,r,r,r,r",
                ops.add(address, 2048 * q),
                *(ops.pack(*pair, dtype) for pair in pairs),
            )
        if others[1:]:
            _store_sums(totals, joining.sums[0].shape[1], *others[1:])

    function = FAST.get(activation)
    out_type = plgpu.RefType(SWIZZLED)
    _with_epilogue(acc, bias, out_ref, out_type, block, function, store, types, refs)


def _matrices(address):
    """Four 8 x 8 matrices, as stmatrix of `store_transposed` stores them."""
    return ptx.asm(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
        address,
        results="rrrr",
    )


def _store_sums(totals, features: int, sums, chunk, row) -> None:
    """Adds up what the four lanes of a row have, and stores it in the row of `chunk`."""
    lane, feature = _lane_and_feature(row)
    first = llvm.icmp(llvm.ICmpPredicate.eq, llvm.and_(lane, ops.const(3)), ops.const(0))
    for h, total in enumerate(totals):
        total = ptx.over_lanes(total, (1, 2))
        here = ops.add(feature, 8 * h)
        inside = llvm.and_(
            llvm.zext(ir.IntegerType.get_signless(32), first), ops.less(here, features)
        )
        there = ptx.global_address(sums, chunk.registers.item(), 4 * features, ops.mul(here, 4))
        _store_float(there, total, inside)


def _store_float(address, value, inside) -> None:
    ops.asm(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }",
        "l,f,r",
        address,
        value,
        inside,
    )


def _lane_and_feature(row):
    """This thread's lane, and the first of its two rows of accumulators, whose first is `row`."""
    thread = llvm.and_(mutils.thread_idx(), ops.const(127))
    lane = llvm.and_(thread, ops.const(31))
    warp = llvm.lshr(thread, ops.const(5))
    inside = ops.add_reg(ops.mul(warp, 16), llvm.lshr(lane, ops.const(2)))
    return lane, ops.add_reg(row.registers.item(), inside)


def store_float32(acc, bias, out_ref, block: int, row, column, activation) -> None:
    """As `store_transposed`, float32 and straight to the whole (tokens, out) array in memory.

    A warp stores runs of 8 features, whole sectors. row and column: where the block lies.
    """
    tokens, features = out_ref.shape

    def store(rows, out, row, column):
        i64 = ir.IntegerType.get_signless(64)
        lane, feature = _lane_and_feature(row)
        token = ops.add_reg(column.registers.item(), ops.mul(llvm.and_(lane, ops.const(3)), 2))
        place = ops.add_reg(ops.wide_mul(token, 4 * features), ops.wide_mul(feature, 4))
        address = ops.add_reg(llvm.ptrtoint(i64, mutils.memref_ptr(out)), place)
        for h in (0, 1):
            feature_inside = ops.less(feature, features - 8 * h)
            for b in range(acc.shape[1] // 8):
                for e, value in enumerate(rows(b, h)):
                    inside = llvm.and_(feature_inside, ops.less(token, tokens - 8 * b - e))
                    there = ops.add(address, 4 * (features * (8 * b + e) + 8 * h))
                    _store_float(there, value, inside)

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
    )


def _with_epilogue(acc, bias, out_ref, out_type, block, function, store, types=(), others=()):
    """Calls `store`, with out_ref and others, in a thread's terms: rows(b, h) is the pair of neighbouring tokens, finished,
    of columns 8 * b on and of the thread's row (h = 0) or the one 8 below (h = 1)."""
    extra = () if bias is None else (bias,)

    @plgpu.inline_mgpu(arg_types=(ACC, *(BIAS for _ in extra), out_type, *types))
    def body(ctx, acc, *args):
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers[block].reshape(-1, 2, 2)
        added = args[0].registers.reshape(-1, 2)[block] if extra else None

        def rows(b, h):
            pair = [llvm.extractelement(v, ops.const(0)) for v in registers[b, h]]
            if added is not None:
                pair = [ops.add_float(z, ops.scalar(added[h])) for z in pair]
            return pair if function is None else [function(z) for z in pair]

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
