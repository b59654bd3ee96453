"""Tensor core products as inline PTX: sparse and dense `wgmma`, and waiting for them."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_kernels.mosaic import ops, parts
from pallas_kernels.mosaic.frame import STEP

# One swizzle row wide and untiled, so that TMA may clip at any size of the array in memory.
SWIZZLED = (plgpu.SwizzleTransform(128),)
ACC = plgpu.Layout.WGMMA


def acc_type(rows: int, tokens: int):
    return plgpu.ShapeDtypeStruct((rows, tokens), jnp.float32, layout=ACC)


def registers(acc) -> parts.Registers:
    """How a warpgroup holds an accumulator, for `parts`."""
    rows, columns = acc.shape

    def values_of(acc):
        return [
            ops.scalar(register)
            for register in acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat
        ]

    def from_values(values):
        like = _zeros(rows, columns)
        vector = ir.VectorType.get((1,), ir.F32Type.get())
        found = np.empty(like.registers.shape, dtype=object)
        for index, value in zip(np.ndindex(found.shape), values, strict=True):
            undefined = llvm.mlir_undef(vector)
            found[index] = llvm.insertelement(undefined, value, ops.const(0))
        return fa.FragmentedArray(_registers=found, _layout=like.layout, _is_signed=None).to_layout(
            fa.WGMMA_LAYOUT
        )

    return parts.Registers(ACC, acc_type(rows, columns), values_of, from_values)


def multiply_sparse(acc, w_ref, e_ref, x_ref, dtype: str, *, ragged: bool, gated: bool = False):
    """Issues and commits one group, acc += w.T @ x.T over 64 inputs, w sparse.

    The group is in flight on return: neither touch the result before `drain`, nor overwrite the
    shared memory or the metadata registers before the group has retired.

    Args:
      acc: (64 * blocks, tokens) float32, or None to start from zero.
      w_ref: (blocks, 32, 64), survivors of 64 inputs x 64 outputs a block.
      e_ref: uint8 (boxes, 8, 128), the metadata of all consumers' outputs, swizzled.
      x_ref: (tokens, 64).
      ragged: whether parts of the metadata lie outside of the array, read as zeros.
      gated: a box of metadata is of one block of each of two consumers, not of two blocks of one.
    """
    blocks, tokens = w_ref.shape[0], x_ref.shape[0]

    def prepare(w, e, x):
        words = [_metadata_word(e, blocks, block, ragged, gated) for block in range(blocks)]
        w_base, x_base = _descriptor(w), _descriptor(x)

        def issue(registers, block, k, accumulate):
            w_desc, x_desc = _at(w_base, 4096 * block + 2048 * k), _at(x_base, 64 * k)
            return _wgmma_sp(registers, w_desc, x_desc, words[block], k, tokens, dtype, accumulate)

        return issue

    return _group(acc, (w_ref, e_ref, x_ref), 64 * blocks, tokens, 2, prepare)


def multiply_dense(acc, a_ref, x_ref, dtype: str):
    """As `multiply_sparse`, acc += a.T @ x[:, :32].T over 32 inputs; a_ref is (blocks, 32, 64)."""
    blocks, tokens = a_ref.shape[0], x_ref.shape[0]

    def prepare(a, x):
        a_base, x_base = _descriptor(a), _descriptor(x)

        def issue(registers, block, k, accumulate):
            a_desc, x_desc = _at(a_base, 4096 * block + 2048 * k), _at(x_base, 32 * k)
            return _wgmma_dense(registers, a_desc, x_desc, tokens, "1, 0", dtype, accumulate)

        return issue

    return _group(acc, (a_ref, x_ref), 64 * blocks, tokens, 2, prepare)


def multiply_first(acc, l_ref, x_ref, rank_blocks: int, dtype: str, transposed: bool):
    """As `multiply_sparse`, acc (64 * rank_blocks, tokens) += l.T @ x.T over 64 inputs.

    l_ref: (blocks, 32, 64), a pair of blocks for 64 columns of l: the first and last 32 inputs x columns; if
    transposed, the first and last 32 columns x inputs.
    """
    tokens = x_ref.shape[0]

    def prepare(left, x):
        l_base, x_base = _descriptor(left), _descriptor(x)
        step, kind = (32, "0, 0") if transposed else (2048, "1, 0")

        def issue(registers, block, k, accumulate):
            l_desc, x_desc = _at(l_base, 8192 * block + step * k), _at(x_base, 32 * k)
            return _wgmma_dense(registers, l_desc, x_desc, tokens, kind, dtype, accumulate)

        return issue

    return _group(acc, (l_ref, x_ref), 64 * rank_blocks, tokens, STEP // 16, prepare)


def multiply_transposed(acc, a_ref, b_ref, columns: int, dtype: str):
    """Issues and commits one group, acc += a.T @ b, both token-major (MN-major for wgmma).

    As `multiply_sparse`. a_ref: (rows / 64, tokens, 64); b_ref: (blocks, tokens, 64): blocks of 64
    columns of the arrays in memory, of which the first `columns` count.
    """
    tokens, rows = a_ref.shape[1], 64 * a_ref.shape[0]
    block_bytes = 128 * tokens

    def prepare(a, b):
        a_base, b_base = _descriptor(a), _descriptor(b, block_bytes=block_bytes)

        def issue(registers, block, k, accumulate):
            a_desc = _at(a_base, block_bytes * block + 2048 * k)
            b_desc = _at(b_base, 2048 * k)
            return _wgmma_dense(registers, a_desc, b_desc, columns, "1, 1", dtype, accumulate)

        return issue

    return _group(acc, (a_ref, b_ref), rows, columns, tokens // 16, prepare)


def multiply_rows(acc, x_ref, b_ref, columns: int, dtype: str, transposed: bool):
    """As `multiply_transposed`, acc (64, columns) += x @ b over 64 inputs, x_ref being (64, 64).

    b_ref: (blocks, 64, 64), inputs x columns; if transposed, columns x inputs.
    """

    def prepare(x, b):
        x_base, b_base = _descriptor(x), _descriptor(b, block_bytes=16 if transposed else 8192)
        step, kind = (32, "0, 0") if transposed else (2048, "0, 1")

        def issue(registers, block, k, accumulate):
            b_desc, x_desc = _at(b_base, step * k), _at(x_base, 32 * k)
            return _wgmma_dense(registers, x_desc, b_desc, columns, kind, dtype, accumulate)

        return issue

    return _group(acc, (x_ref, b_ref), 64, columns, STEP // 16, prepare)


def _group(acc, refs, rows: int, columns: int, steps: int, prepare):
    """One committed group of `steps` instructions for each 64 rows of the accumulator."""

    def body(ctx, *args):
        acc_arg, operands = args[: len(args) - len(refs)], args[len(args) - len(refs) :]
        acc_value = acc_arg[0] if acc_arg else _zeros(rows, columns)
        acc_value = acc_value.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
        registers = acc_value.registers.copy()
        issue = prepare(*operands)
        nvvm.wgmma_fence_aligned()
        for k in range(steps):
            for block in range(rows // 64):
                new = issue(list(registers[block].flat), block, k, bool(acc_arg) or k > 0)
                registers[block] = np.array(new, dtype=object).reshape(registers[block].shape)
        nvvm.wgmma_commit_group_sync_aligned()
        return fa.FragmentedArray(
            _registers=registers, _layout=acc_value.layout, _is_signed=None
        ).to_layout(fa.WGMMA_LAYOUT)

    accs = () if acc is None else (acc,)
    call = plgpu.inline_mgpu(
        arg_types=(ACC,) * len(accs) + (plgpu.RefType(SWIZZLED),) * len(refs),
        return_type=acc_type(rows, columns),
    )(body)
    return call(*accs, *refs)


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


def _descriptor(ref, block_bytes: int = 16):
    """wgmma's 64-bit matrix descriptor of swizzled rows of 128 bytes, in groups of 8 rows.

    Bits 0-13: address / 16; 16-29: bytes between blocks of 64 columns / 16 (MN-major operands
    wider than 64 only); 32-45: bytes between groups / 16; 62-63: 1 for 128-byte swizzle.
    """
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, mutils.memref_ptr(ref))
    shifted = llvm.lshr(address, ops.const64(4))
    fields = (block_bytes >> 4 << 16) | (1024 >> 4 << 32) | (1 << 62)
    return llvm.or_(llvm.and_(shifted, ops.const64(0x3FFF)), ops.const64(fields))


def _at(descriptor, offset: int):
    """The descriptor of columns or groups `offset` bytes further on."""
    return ops.add(descriptor, offset >> 4)


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


def _metadata_word(e, blocks: int, block: int, ragged: bool, gated: bool):
    """The positions that this thread holds for 64 outputs x 64 inputs.

    With t = 32 * warp + 4 * row8 + quarter it covers the 16 inputs from 16 * quarter on, of the
    outputs 16 * warp + row8 (low half) and 16 * warp + row8 + 8 (high half): of each the two bytes
    2 * quarter and 2 * quarter + 1. Rows of 128 bytes, their 16-byte chunks swizzled.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread = mutils.thread_idx()
    shift = functools.partial(llvm.shl, overflow_flags=ops.NO_WRAP)
    row8 = llvm.and_(llvm.lshr(thread, ops.const(2)), ops.const(7))
    octet = shift(llvm.and_(thread, ops.const(3)), ops.const(1))
    chunk = llvm.xor(llvm.and_(llvm.lshr(thread, ops.const(5)), ops.const(3)), octet)
    low = ops.add_reg(
        ops.add_reg(shift(octet, ops.const(7)), shift(chunk, ops.const(4))),
        row8,
    )
    consumer = llvm.lshr(thread, ops.const(7))
    if blocks == 1 or gated:  # two consumers share a box
        low = ops.add(low, 1024 * block)
        low = llvm.xor(low, shift(consumer, ops.const(6)))
    else:
        low = ops.add_reg(low, shift(consumer, ops.const(10)))
        low = llvm.xor(low, ops.const(64 * block))
    high = llvm.xor(low, ops.const(128 + 16))
    base = llvm.ptrtoint(i32, mutils.memref_ptr(e))
    word = llvm.inline_asm(
        i32,
        [ops.add_reg(base, low), ops.add_reg(base, high)],
        "{ .reg .b32 a, b, c, d; "
        "ld.shared.u8 a, [$1]; ld.shared.u8 b, [$2]; "
        "ld.shared.u8 c, [$1+8]; ld.shared.u8 d, [$2+8]; "
        "prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 $0, a, c, 0x5410; }",
        "=r,r,r",
        asm_dialect=0,
        has_side_effects=True,
    )
    if not ragged:
        return word
    # Two distinct positions are never both 0: a nibble of zeros is none, and becomes (0, 1).
    either = llvm.or_(word, llvm.lshr(word, ops.const(1)))
    missing = llvm.and_(llvm.xor(either, ops.const(-1)), ops.const(0x44444444))
    return llvm.or_(word, missing)


def _wgmma_sp(registers, w_desc, x_desc, word, selector, tokens, dtype, accumulate):
    """One sparse m64 n(tokens) k32: weights MN-major, x K-major."""
    kind = ops.PTX_TYPE[dtype]
    return _wgmma(
        f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind}",
        registers, (("l", w_desc), ("l", x_desc), ("r", word)), f", {selector}", "1, 0", accumulate,
    )  # fmt: skip


def _wgmma_dense(registers, a_desc, b_desc, columns, transposed, dtype, accumulate):
    """One dense m64 n(columns) k16; transposed: for A and B, 1 where MN-major."""
    kind = ops.PTX_TYPE[dtype]
    return _wgmma(
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}",
        registers, (("l", a_desc), ("l", b_desc)), "", transposed, accumulate,
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
        [*registers, *(value for _, value in operands), ops.const(int(accumulate))],
        ptx,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(vec1, out, [i]) for i in range(count)]
