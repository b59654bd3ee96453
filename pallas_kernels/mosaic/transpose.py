"""The double-pruned transpose, `nm_transpose`, in Pallas Mosaic GPU: bound by memory, one pass.

A thread turns a block of 8 inputs x 8 outputs in registers (`select`), without shared memory. A
warp is 8 x 4 such blocks, so that whole sectors are read and written: per row of values 32 outputs
in, 64 inputs out. A CTA of 4 warps takes TILE; several CTAs fit on a processor and hide each
other's loads.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.mosaic import launch, ops, select
from pallas_kernels.mosaic.words import Machine, load, store

TILE = (64, 128)  # inputs, outputs


@launch.once("dtype")
def nm_transpose(w: CompressedMatrix, dtype) -> CompressedMatrix:
    """`pallas_kernels.nm_transpose` for pattern 2:4 and sizes that are multiples of 8."""
    (k, f), stack = w.shape, w.values.shape[:-2]
    dtype, depth = jnp.dtype(dtype), math.prod(stack)
    shapes = (*stack, f // 2, k), (*stack, f // 8, k)
    if depth * k * f == 0:
        values, metadata = jnp.zeros(shapes[0], dtype), jnp.zeros(shapes[1], jnp.uint8)
    else:
        grid = (pl.cdiv(k, TILE[0]), pl.cdiv(f, TILE[1]))
        kernel = launch.kernel(
            functools.partial(_kernel, grid=grid, shape=(k, f), target=str(dtype)),
            out_type=(
                jax.ShapeDtypeStruct((depth * f // 2, k), dtype),
                jax.ShapeDtypeStruct((depth * f // 8, k), jnp.uint8),
            ),
            grid=(depth * grid[0] * grid[1],),
            grid_names=("tile",),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            name="nm_transpose",
        )
        values, metadata = kernel(w.values.reshape(-1, f), w.metadata.reshape(-1, f))
        values, metadata = values.reshape(shapes[0]), metadata.reshape(shapes[1])
    return CompressedMatrix(values, metadata, w.pattern, axis=0, shape=(f, k))


def _kernel(values_gmem, metadata_gmem, out_gmem, out_metadata_gmem, *, grid, shape, target):
    source = str(values_gmem.dtype)
    index, columns = lax.axis_index("tile"), jnp.int32(grid[1])
    column, index = lax.rem(index, columns), lax.div(index, columns)
    row, matrix = lax.rem(index, jnp.int32(grid[0])), lax.div(index, jnp.int32(grid[0]))
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 4, splat, splat, splat))
    def body(ctx, *arguments):
        *refs, matrix, row, column = arguments
        matrix, row, column = (x.registers.item() for x in (matrix, row, column))
        _turn_block([mutils.memref_ptr(ref) for ref in refs], matrix, row, column)

    def _turn_block(pointers, matrix, row, column):
        """The calling thread's block; rows and columns of blocks are counted in blocks of 8."""
        k8, f8 = (size // select.SIZE for size in shape)
        thread = mutils.thread_idx()
        lane, warp = llvm.and_(thread, ops.const(31)), llvm.lshr(thread, ops.const(5))
        row = ops.add_reg(ops.mul(row, TILE[0] // 8), llvm.lshr(lane, ops.const(2)))
        column = ops.add_reg(
            ops.mul(column, TILE[1] // 8),
            ops.add_reg(ops.mul(warp, 4), llvm.and_(lane, ops.const(3))),
        )
        inside = llvm.and_(ops.less(row, k8), ops.less(column, f8))
        with mutils.when(llvm.icmp(llvm.ICmpPredicate.ne, inside, ops.const(0))):
            i64 = ir.IntegerType.get_signless(64)
            values, metadata, out, out_metadata = (llvm.ptrtoint(i64, p) for p in pointers)
            # Blocks in the arrays' own order: that of the source by `row`, of the result by `column`.
            row_in = ops.add_reg(ops.mul(matrix, k8), row)
            row_out = ops.add_reg(ops.mul(matrix, f8), column)
            octets = load(_address(metadata, row_in, shape[1], column, 8), 2)
            size = 4 // select.HALVES[source]
            start = _address(values, row_in, 4 * shape[1] * size, column, 8 * size)
            words = [load(ops.add(start, r * shape[1] * size), 2 * size) for r in range(4)]
            words, octets = select.transpose_block(Machine(), words, octets, source, target)
            store(_address(out_metadata, row_out, shape[0], row, 8), octets)
            size = 4 // select.HALVES[target]
            start = _address(out, row_out, 4 * shape[0] * size, row, 8 * size)
            for r in range(4):
                store(ops.add(start, r * shape[0] * size), words[r])

    body(values_gmem, metadata_gmem, out_gmem, out_metadata_gmem, matrix, row, column)


def _address(base, row, row_bytes: int, column, column_bytes: int):
    return ops.add_reg(
        base, ops.add_reg(ops.wide_mul(row, row_bytes), ops.wide_mul(column, column_bytes))
    )
