"""Parts of a tile between CTAs: left in global memory by one, added by another.

A flag per part and warpgroup says that it is there; flags are zero when the kernel starts.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import keep, ops
from pallas_kernels.mosaic.keep import CONSUMERS, SPLAT


def leave(kept, partial_ref, flag_ref, index) -> None:
    """Leaves kept in partial_ref[index] and raises flag_ref[index]."""

    @plgpu.inline_mgpu(
        arg_types=(keep.kept_layout(kept.size), plgpu.RefType(), plgpu.RefType(), SPLAT)
    )
    def body(ctx, kept, partial, flag, index):
        address = _partial_address(partial, index, kept.shape[0])
        for i, register in enumerate(kept.registers):
            keep.asm(
                "st.global.v4.f32 [$0], {$1,$2,$3,$4};",
                "l,f,f,f,f",
                ops.add(address, 2048 * i),
                *(llvm.extractelement(register, ops.const(e)) for e in range(4)),
            )
        mutils.warpgroup_barrier()
        thread = llvm.and_(mutils.thread_idx(), ops.const(127))
        keep.asm(
            "{ .reg .pred p; setp.eq.b32 p, $1, 0; @p st.release.gpu.global.b32 [$0], 1; }",
            "l,r,~{memory}",
            _flag_address(flag, index),
            thread,
        )

    body(kept, partial_ref, flag_ref, index)


def add(kept, partial_ref, flag_ref, index):
    """kept + partial_ref[index], once its flag is up."""

    @plgpu.inline_mgpu(
        arg_types=(keep.kept_layout(kept.size), plgpu.RefType(), plgpu.RefType(), SPLAT),
        return_type=keep.kept_type(kept.size),
    )
    def body(ctx, kept, partial, flag, index):
        f32 = ir.F32Type.get()
        keep.asm(
            "{ .reg .pred p; .reg .b32 v; setp.ne.b32 p, $1, 0; @p bra DONE; "
            "AGAIN: ld.acquire.gpu.global.b32 v, [$0]; setp.eq.b32 p, v, 0; @p bra AGAIN; DONE: }",
            "l,r,~{memory}",
            _flag_address(flag, index),
            llvm.and_(mutils.thread_idx(), ops.const(127)),
        )
        mutils.warpgroup_barrier()
        address = _partial_address(partial, index, kept.shape[0])
        four = llvm.StructType.get_literal([f32] * 4)
        loaded = [
            keep.asm("ld.global.v4.f32 {$0,$1,$2,$3}, [$4];", "=f,=f,=f,=f,l",
                 ops.add(address, 2048 * i), result=four)
            for i in range(len(kept.registers))
        ]  # fmt: skip
        theirs = [llvm.extractvalue(f32, register, [e]) for register in loaded for e in range(4)]
        return keep.from_values(
            [llvm.fadd(a, b) for a, b in zip(keep.values_of(kept), theirs, strict=True)]
        )

    return body(kept, partial_ref, flag_ref, index)


def _partial_address(partial, index, count: int):
    i64 = ir.IntegerType.get_signless(64)
    index = ops.add_reg(
        ops.mul(index.registers.item(), CONSUMERS), llvm.lshr(mutils.thread_idx(), ops.const(7))
    )
    thread = llvm.and_(mutils.thread_idx(), ops.const(127))
    base = llvm.ptrtoint(i64, mutils.memref_ptr(partial))
    return ops.add_reg(ops.add_reg(base, ops.wide_mul(index, 4 * count)), ops.wide_mul(thread, 16))


def _flag_address(flag, index):
    i64 = ir.IntegerType.get_signless(64)
    index = ops.add_reg(
        ops.mul(index.registers.item(), CONSUMERS), llvm.lshr(mutils.thread_idx(), ops.const(7))
    )
    base = llvm.ptrtoint(i64, mutils.memref_ptr(flag))
    return ops.add_reg(base, ops.wide_mul(index, 4))
