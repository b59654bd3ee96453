"""Tensor core products as inline PTX: sparse and dense `wgmma`, and waiting for them."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_kernels.mosaic import ops

# One swizzle row wide and untiled, so that TMA may clip at any size of the array in memory.
X_TRANSFORMS = (plgpu.SwizzleTransform(128),)
W_TRANSFORMS = (plgpu.SwizzleTransform(64),)
ACC = plgpu.Layout.WGMMA


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
            x_desc = ops.add(x_base, 64 * k >> 4)
            for block in range(rows // 64):
                w_desc = ops.add(w_base, 4096 * block + 32 * k >> 4)
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
            b_desc = ops.add(b_base, 2048 * k >> 4)
            for block in range(rows // 64):
                a_desc = ops.add(a_base, block_bytes * block + 2048 * k >> 4)
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


def _descriptor(ref, swizzle: int, block_bytes: int = 16):
    """wgmma's 64-bit matrix descriptor of rows of `swizzle` bytes, in groups of 8 rows.

    Bits 0-13: address / 16; 16-29: bytes between blocks of 64 columns / 16 (MN-major operands
    wider than 64 only); 32-45: bytes between groups / 16; 62-63: 1 for 128-byte swizzle, 2 for
    64-byte. Columns or groups further on are reached by adding to the address.
    """
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, mutils.memref_ptr(ref))
    shifted = llvm.lshr(address, ops.const64(4))
    kind = {128: 1, 64: 2}[swizzle]
    fields = (block_bytes >> 4 << 16) | ((8 * swizzle >> 4) << 32) | (kind << 62)
    signed = fields - (1 << 64) if fields >= 1 << 63 else fields
    return llvm.or_(llvm.and_(shifted, ops.const64(0x3FFF)), ops.const64(signed))


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
    return llvm.extractelement(words.registers.flat[0], ops.const(0))


def _wgmma_sp(registers, w_desc, x_desc, words, selector, tokens, dtype, accumulate):
    """One sparse m64 n(tokens) k32, both operands K-major."""
    kind = ops.PTX_TYPE[dtype]
    return _wgmma(
        f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind}",
        registers, (("l", w_desc), ("l", x_desc), ("r", words)), f", {selector}", "0, 0", accumulate,
    )  # fmt: skip


def _wgmma_transposed(registers, a_desc, b_desc, columns, dtype, accumulate):
    """One dense m64 n(columns) k16, both operands MN-major."""
    kind = ops.PTX_TYPE[dtype]
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
        [*registers, *(value for _, value in operands), ops.const(int(accumulate))],
        ptx,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(vec1, out, [i]) for i in range(count)]
