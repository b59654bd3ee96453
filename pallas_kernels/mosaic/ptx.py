"""Tensor core products and epilogues as inline PTX, for `plgpu.inline_mgpu`.

The one file that needs unstable corners of JAX (`jax.experimental.mosaic.gpu`, MLIR bindings).
Tested with JAX 0.11.2.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

# One swizzle row wide and untiled, so that TMA may clip at any size of the array in memory.
X_TRANSFORMS = (plgpu.SwizzleTransform(128),)
W_TRANSFORMS = (plgpu.SwizzleTransform(64),)
ACC = plgpu.Layout.WGMMA
PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}

_NO_WRAP = llvm.IntegerOverflowFlags.none


def acc_type(rows: int, tokens: int):
    return plgpu.ShapeDtypeStruct((rows, tokens), jnp.float32, layout=ACC)


def multiply(acc, w_ref, e_ref, x_ref, tokens: int, dtype: str):
    """Issues and commits one group, acc += w (rows, 64 sparse) @ x (tokens, 64).T.

    The group is in flight on return: neither touch the result before `drain`, nor overwrite the
    shared memory or the metadata registers before the group has retired.

    Args:
      acc: (rows, tokens) float32, or None to start from zero.
      w_ref: (rows, 32) values; e_ref: (rows / 64, 1, 128) int32; x_ref: (tokens, 64).
    """
    rows = w_ref.shape[0]

    def body(ctx, *args):
        *acc_arg, w, e, x = args
        acc_value = acc_arg[0] if acc_arg else _zeros(rows, tokens)
        acc_value = acc_value.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
        registers = acc_value.registers.copy()
        words = [_load_words(e, block) for block in range(rows // 64)]
        w_base, x_base = _descriptor(w, swizzle=64), _descriptor(x, swizzle=128)
        nvvm.wgmma_fence_aligned()
        for k in range(2):
            x_desc = _add(x_base, 64 * k >> 4)
            for block in range(rows // 64):
                w_desc = _add(w_base, 4096 * block + 32 * k >> 4)
                accumulate = bool(acc_arg) or k > 0
                new = _wgmma_sp(
                    list(registers[block].flat), w_desc, x_desc, words[block], k, tokens, dtype,
                    accumulate,
                )  # fmt: skip
                registers[block] = np.array(new, dtype=object).reshape(registers[block].shape)
        nvvm.wgmma_commit_group_sync_aligned()
        return fa.FragmentedArray(
            _registers=registers, _layout=acc_value.layout, _is_signed=None
        ).to_layout(fa.WGMMA_LAYOUT)

    refs = (plgpu.RefType(W_TRANSFORMS), plgpu.RefType(), plgpu.RefType(X_TRANSFORMS))
    accs = () if acc is None else (acc,)
    call = plgpu.inline_mgpu(
        arg_types=((ACC,) * len(accs)) + refs, return_type=acc_type(rows, tokens)
    )(body)
    return call(*accs, w_ref, e_ref, x_ref)


def multiply_transposed(acc, a_ref, b_ref, dtype: str):
    """Issues and commits one group, acc += a.T @ b, both token-major (MN-major for wgmma).

    As `multiply`. a_ref: (rows / 64, tokens, 64); b_ref: (columns / 64, tokens, 64): blocks of 64
    columns of the arrays in memory.
    """
    tokens = a_ref.shape[1]
    rows, columns = 64 * a_ref.shape[0], 64 * b_ref.shape[0]

    def body(ctx, *args):
        *acc_arg, a, b = args
        acc_value = acc_arg[0] if acc_arg else _zeros(rows, columns)
        acc_value = acc_value.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
        registers = acc_value.registers.copy()
        block_bytes = 128 * tokens
        a_base = _descriptor(a, swizzle=128)
        b_base = _descriptor(b, swizzle=128, block_bytes=block_bytes)
        nvvm.wgmma_fence_aligned()
        for k in range(tokens // 16):
            b_desc = _add(b_base, 2048 * k >> 4)
            for block in range(rows // 64):
                a_desc = _add(a_base, block_bytes * block + 2048 * k >> 4)
                accumulate = bool(acc_arg) or k > 0
                new = _wgmma_transposed(
                    list(registers[block].flat), a_desc, b_desc, columns, dtype, accumulate
                )
                registers[block] = np.array(new, dtype=object).reshape(registers[block].shape)
        nvvm.wgmma_commit_group_sync_aligned()
        return fa.FragmentedArray(
            _registers=registers, _layout=acc_value.layout, _is_signed=None
        ).to_layout(fa.WGMMA_LAYOUT)

    refs = (plgpu.RefType(X_TRANSFORMS),) * 2
    accs = () if acc is None else (acc,)
    call = plgpu.inline_mgpu(
        arg_types=((ACC,) * len(accs)) + refs, return_type=acc_type(rows, columns)
    )(body)
    return call(*accs, a_ref, b_ref)


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
            block_row = _add(row.registers.item(), 64 * block)
            block_registers = registers[block].reshape(-1, 4)
            _store_block(
                block_registers, metadata, target, block_row, column.registers.item(), groups8, out
            )

    body(acc, metadata_ref, out_ref, row, column)


def wait(in_flight: int) -> None:
    """Waits until at most so many groups are in flight."""

    @plgpu.inline_mgpu()
    def body(ctx):
        nvvm.wgmma_wait_group_sync_aligned(in_flight)

    body()


def drain(acc):
    """Waits for all groups; the barrier keeps the compiler from reading `acc` earlier."""

    @plgpu.inline_mgpu(arg_types=(ACC,), return_type=acc_type(*acc.shape))
    def body(ctx, acc):
        nvvm.wgmma_wait_group_sync_aligned(0)
        return fa.optimization_barrier(acc)

    return body(acc)


def store_transposed(acc, out_ref, block: int, first: int, dtype: str) -> None:
    """out_ref (tokens, 64) = acc[64 * block :][:64, first : first + tokens].T, by stmatrix.

    Four times fewer instructions than storing the transposed layout.
    """
    tokens = out_ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(X_TRANSFORMS)))
    def body(ctx, acc, out):
        i32 = ir.IntegerType.get_signless(32)
        registers = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers[block].reshape(-1, 4)
        address = _add_reg(llvm.ptrtoint(i32, mutils.memref_ptr(out)), _lane_offset())
        for q in range(tokens // 16):
            b = first // 8 + 2 * q
            pairs = [
                _pack(registers[b + n, h], registers[b + n, h + 1], dtype)
                for n in (0, 1)
                for h in (0, 2)
            ]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [_add(address, 2048 * q), *pairs],
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1,$2,$3,$4};",
                "r,r,r,r,r",
                asm_dialect=0,
                has_side_effects=True,
            )

    body(acc, out_ref)


def _lane_offset():
    """Byte offset of the 16-byte row that this lane addresses in a 16-token block."""
    thread = mutils.thread_idx()
    warp = llvm.lshr(llvm.and_(thread, _const(127)), _const(5))
    lane = llvm.and_(thread, _const(31))
    row = llvm.and_(lane, _const(7))
    # matrices: features 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
    feature_half = llvm.and_(llvm.lshr(lane, _const(3)), _const(1))
    token_half = llvm.lshr(lane, _const(4))
    chunk = llvm.or_(llvm.shl(warp, _const(1), overflow_flags=_NO_WRAP), feature_half)
    swizzled = llvm.xor(chunk, row)
    parts = [_mul(token_half, 1024), _mul(row, 128), _mul(swizzled, 16)]
    return _add_reg(_add_reg(parts[0], parts[1]), parts[2])


def _descriptor(ref, swizzle: int, block_bytes: int = 16):
    """wgmma's 64-bit matrix descriptor of rows of `swizzle` bytes, in groups of 8 rows.

    Bits 0-13: address / 16; 16-29: bytes between blocks of 64 columns / 16 (MN-major operands
    wider than 64 only); 32-45: bytes between groups / 16; 62-63: 1 for 128-byte swizzle, 2 for
    64-byte. Columns or groups further on are reached by adding to the address.
    """
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, mutils.memref_ptr(ref))
    shifted = llvm.lshr(address, _const64(4))
    kind = {128: 1, 64: 2}[swizzle]
    fields = (block_bytes >> 4 << 16) | ((8 * swizzle >> 4) << 32) | (kind << 62)
    signed = fields - (1 << 64) if fields >= 1 << 63 else fields
    return llvm.or_(llvm.and_(shifted, _const64(0x3FFF)), _const64(signed))


def _store_block(registers, metadata, target, row, column, groups8, out) -> None:
    """64 rows. A thread holds two columns of a group of 4 in two rows, 8 apart; its neighbour the
    other two. They exchange, so that the even thread has the whole group of the first row and the
    odd one that of the second. A warp then stores two runs of 16 floats.
    """
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    thread = llvm.and_(mutils.thread_idx(), _const(127))
    warp, lane = llvm.lshr(thread, _const(5)), llvm.and_(thread, _const(31))
    odd, second = llvm.and_(lane, _const(1)), llvm.and_(llvm.lshr(lane, _const(1)), _const(1))
    is_odd = llvm.icmp(llvm.ICmpPredicate.ne, odd, _const(0))
    row = _add_reg(
        _add_reg(row, _mul(warp, 16)), _add_reg(_mul(odd, 8), llvm.lshr(lane, _const(2)))
    )
    row_inside = _less(row, out)
    first_octet = llvm.lshr(column, _const(3))
    row_bytes = llvm.zext(i64, row)
    metadata_row = _add_reg(llvm.ptrtoint(i64, mutils.memref_ptr(metadata)), row_bytes)
    target_row = _add_reg(
        llvm.ptrtoint(i64, mutils.memref_ptr(target)),
        llvm.shl(row_bytes, _const64(2), overflow_flags=_NO_WRAP),
    )
    shift = _mul(second, 4)
    for n in range(len(registers)):
        octet = _add(first_octet, n)
        inside = llvm.and_(row_inside, _less(octet, groups8))
        source = _add_reg(metadata_row, _wide_mul(octet, out))
        loaded = llvm.inline_asm(
            i32,
            [source, inside],
            "{ .reg .pred p; .reg .b16 v; setp.ne.b32 p, $2, 0; mov.b16 v, 0; "
            "@p ld.global.nc.u8 v, [$1]; cvt.u32.u16 $0, v; }",
            "=r,l,r",
            asm_dialect=0,
        )
        nibble = llvm.lshr(loaded, shift)
        own = [llvm.extractelement(register, _const(0)) for register in registers[n]]
        theirs = [_from_neighbour(llvm.select(is_odd, own[e], own[2 + e])) for e in (0, 1)]
        group = [llvm.select(is_odd, theirs[e], own[e]) for e in (0, 1)]
        group += [llvm.select(is_odd, own[2 + e], theirs[e]) for e in (0, 1)]
        first_value = _add_reg(_mul(octet, 4), _mul(second, 2))
        address = _add_reg(target_row, _wide_mul(first_value, 4 * out))
        values = [_pick(group, nibble, low_bit) for low_bit in (0, 2)]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, _add(address, 4 * out), *values, inside],
            "{ .reg .pred p; setp.ne.b32 p, $4, 0; "
            "@p st.global.f32 [$0], $2; @p st.global.f32 [$1], $3; }",
            "l,l,f,f,r",
            asm_dialect=0,
            has_side_effects=True,
        )


def _from_neighbour(x):
    """The value of the thread whose number differs in the last bit."""
    return llvm.inline_asm(
        ir.F32Type.get(),
        [x],
        "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;",
        "=f,f",
        asm_dialect=0,
        has_side_effects=True,
    )


def _pick(group, nibble, low_bit: int):
    """The entry of the four that the two bits from `low_bit` on name."""
    bits = [
        llvm.icmp(llvm.ICmpPredicate.ne, llvm.and_(nibble, _const(1 << b)), _const(0))
        for b in (low_bit, low_bit + 1)
    ]
    low, high = (llvm.select(bits[0], group[i + 1], group[i]) for i in (0, 2))
    return llvm.select(bits[1], high, low)


def _less(x, bound: int):
    return _flag(llvm.ICmpPredicate.slt, x, _const(bound))


def _flag(predicate, x, y):
    """0 or 1 in 32 bits."""
    return llvm.zext(ir.IntegerType.get_signless(32), llvm.icmp(predicate, x, y))


def _wide_mul(x, value: int):
    i64 = ir.IntegerType.get_signless(64)
    return llvm.mul(llvm.zext(i64, x), _const64(value), overflow_flags=_NO_WRAP)


def _zeros(rows: int, tokens: int):
    """Registers that are never read (scale-d is 0), so that zeroing costs nothing."""
    f32 = ir.F32Type.get()
    zero = llvm.ConstantOp(f32, ir.FloatAttr.get(f32, 0.0)).result
    acc = fa.FragmentedArray.splat(zero, (rows, tokens), fa.WGMMA_LAYOUT)
    acc = acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
    undefined = llvm.mlir_undef(ir.VectorType.get((1,), f32))
    registers = acc.registers.copy()
    for index in np.ndindex(registers.shape):
        registers[index] = undefined
    return fa.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)


def _load_words(e, block: int):
    words = fa.FragmentedArray.load_strided(
        mutils.memref_slice(e, (block, 0)), is_signed=True, vec_size=1
    )
    return llvm.extractelement(words.registers.flat[0], _const(0))


def _wgmma_sp(registers, w_desc, x_desc, words, selector, tokens, dtype, accumulate):
    """One sparse m64 n(tokens) k32, both operands K-major."""
    kind = PTX_TYPE[dtype]
    return _wgmma(
        f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind}",
        registers, (("l", w_desc), ("l", x_desc), ("r", words)), f", {selector}", "0, 0", accumulate,
    )  # fmt: skip


def _wgmma_transposed(registers, a_desc, b_desc, columns, dtype, accumulate):
    """One dense m64 n(columns) k16, both operands MN-major."""
    kind = PTX_TYPE[dtype]
    return _wgmma(
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}",
        registers, (("l", a_desc), ("l", b_desc)), "", "1, 1", accumulate,
    )  # fmt: skip


def _wgmma(instruction, registers, operands, selector, transposed, accumulate):
    """Accumulator registers are tied to the outputs."""
    vec1 = ir.VectorType.get((1,), ir.F32Type.get())
    count = len(registers)
    constraints = ["=f"] * count + [str(i) for i in range(count)]
    constraints += [kind for kind, _ in operands] + ["n"]
    d = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    *names, scale = (f"${2 * count + i}" for i in range(len(operands) + 1))
    ptx = (
        f"{{ .reg .pred p; setp.ne.b32 p, {scale}, 0; "
        f"{instruction} {d}, {', '.join(names)}{selector}, p, 1, 1, {transposed}; }}\n"
    )
    out = llvm.inline_asm(
        llvm.StructType.get_literal([vec1] * count),
        [*registers, *(value for _, value in operands), _const(int(accumulate))],
        ptx,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(vec1, out, [i]) for i in range(count)]


def _pack(low, high, dtype: str):
    low, high = (llvm.extractelement(v, _const(0)) for v in (low, high))
    i32 = ir.IntegerType.get_signless(32)
    ptx = f"cvt.rn.{PTX_TYPE[dtype]}x2.f32 $0, $2, $1;"
    return llvm.inline_asm(i32, [low, high], ptx, "=r,f,f", asm_dialect=0)


def _const(value: int):
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, value)).result


def _const64(value: int):
    i64 = ir.IntegerType.get_signless(64)
    return llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, value)).result


def _add(x, value: int):
    constant = llvm.ConstantOp(x.type, ir.IntegerAttr.get(x.type, value)).result
    return _add_reg(x, constant)


def _add_reg(x, y):
    return llvm.add(x, y, overflow_flags=_NO_WRAP)


def _mul(x, value: int):
    return llvm.mul(x, _const(value), overflow_flags=_NO_WRAP)
