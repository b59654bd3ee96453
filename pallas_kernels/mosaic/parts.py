"""Parts of a tile between CTAs: left in global memory by one, added by another.

A flag per part and warpgroup says that it is there; flags are zero when the kernel starts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops
from pallas_kernels.mosaic.frame import CONSUMERS

SPLAT = plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class Registers:
    """How a warpgroup holds what it computes: the layout and type of the array, a thread's values
    of it, a multiple of four float32 numbers, and the array of such values."""

    layout: Any
    type: plgpu.ShapeDtypeStruct
    values_of: Callable
    from_values: Callable


def leave(mine, held: Registers, partial_ref, flag_ref, index, number=None) -> None:
    """Leaves `mine` in partial_ref[index] and raises flag_ref[number]; None: of the index."""

    @plgpu.inline_mgpu(arg_types=(held.layout, plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT))
    def body(ctx, mine, partial, flag, index, number):
        values = held.values_of(mine)
        address = _partial_address(partial, index, len(values))
        for i in range(0, len(values), 4):
            ops.asm(
                "st.global.v4.f32 [$0], {$1,$2,$3,$4};",
                "l,f,f,f,f",
                ops.add(address, 512 * i),
                *values[i : i + 4],
            )
        mutils.warpgroup_barrier()
        _raise(_flag_address(flag, number))

    body(mine, partial_ref, flag_ref, index, index if number is None else number)


def add(mine, held: Registers, partial_ref, flag_ref, index, number=None):
    """mine + partial_ref[index], once its flag is up, which is that of `leave`."""

    @plgpu.inline_mgpu(
        arg_types=(held.layout, plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT),
        return_type=held.type,
    )
    def body(ctx, mine, partial, flag, index, number):
        f32 = ir.F32Type.get()
        thread = llvm.and_(mutils.thread_idx(), ops.const(127))
        _await(_flag_address(flag, number), thread)
        mutils.warpgroup_barrier()
        values = held.values_of(mine)
        address = _partial_address(partial, index, len(values))
        four = llvm.StructType.get_literal([f32] * 4)
        added = []
        for i in range(0, len(values), 4):
            theirs = ops.asm(
                "ld.global.v4.f32 {$0,$1,$2,$3}, [$4];",
                "=f,=f,=f,=f,l",
                ops.add(address, 512 * i),
                result=four,
            )
            pairs = enumerate(values[i : i + 4])
            added += [llvm.fadd(value, llvm.extractvalue(f32, theirs, [e])) for e, value in pairs]
        return held.from_values(added)

    return body(mine, partial_ref, flag_ref, index, index if number is None else number)


def announce(flag_ref, index) -> None:
    """Raises flag_ref[index] of this warpgroup, whose stores by TMA have been made."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def body(ctx, flag, index):
        ops.asm("fence.proxy.async;", "~{memory}")
        mutils.warpgroup_barrier()
        _raise(_flag_address(flag, index))

    body(flag_ref, index)


def await_all(flag_ref, index) -> None:
    """Waits in a warp for flag_ref[index] of all warpgroups; loads by TMA may follow."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def body(ctx, flag, index):
        i64 = ir.IntegerType.get_signless(64)
        base = llvm.ptrtoint(i64, mutils.memref_ptr(flag))
        address = ops.add_reg(base, ops.wide_mul(index.registers.item(), 4 * CONSUMERS))
        for consumer in range(CONSUMERS):
            _await(ops.add(address, 4 * consumer), ops.const(0))
        ops.asm("bar.warp.sync 0xffffffff; fence.proxy.async;", "~{memory}")

    body(flag_ref, index)


def _raise(address) -> None:
    ops.asm(
        "{ .reg .pred p; setp.eq.b32 p, $1, 0; @p st.release.gpu.global.b32 [$0], 1; }",
        "l,r,~{memory}",
        address,
        llvm.and_(mutils.thread_idx(), ops.const(127)),
    )


def _await(address, thread) -> None:
    """Until the flag is up, in threads that are 0."""
    ops.asm(
        "{ .reg .pred p; .reg .b32 v; setp.ne.b32 p, $1, 0; @p bra DONE; "
        "AGAIN: ld.acquire.gpu.global.b32 v, [$0]; setp.eq.b32 p, v, 0; @p bra AGAIN; DONE: }",
        "l,r,~{memory}",
        address,
        thread,
    )


def _partial_address(partial, index, values: int):
    i64 = ir.IntegerType.get_signless(64)
    index = ops.add_reg(
        ops.mul(index.registers.item(), CONSUMERS), llvm.lshr(mutils.thread_idx(), ops.const(7))
    )
    thread = llvm.and_(mutils.thread_idx(), ops.const(127))
    base = llvm.ptrtoint(i64, mutils.memref_ptr(partial))
    return ops.add_reg(
        ops.add_reg(base, ops.wide_mul(index, 512 * values)), ops.wide_mul(thread, 16)
    )


def _flag_address(flag, index):
    i64 = ir.IntegerType.get_signless(64)
    index = ops.add_reg(
        ops.mul(index.registers.item(), CONSUMERS), llvm.lshr(mutils.thread_idx(), ops.const(7))
    )
    base = llvm.ptrtoint(i64, mutils.memref_ptr(flag))
    return ops.add_reg(base, ops.wide_mul(index, 4))
