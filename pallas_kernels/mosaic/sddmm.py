"""The values of (x.T @ dy) * mask: `nm_sddmm` in Pallas Mosaic GPU.

Dense wgmma, since both operands are dense; the epilogue stores only what the metadata keeps, so the
dense gradient never reaches memory. x and dy are token-major, so both are MN-major for wgmma. Two
consumer warpgroups of 64 input x `COLUMNS` output features, one producer warp. The tokens are split
so that all processors have work; the partial sums are float32.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import ptx

STEP = 64  # tokens per stage
CONSUMERS = 2
ROWS, COLUMNS = 64 * CONSUMERS, 256
STAGES = 4
MAX_SPLITS = 16


def nm_sddmm(
    x: jax.Array, dy: jax.Array, metadata: jax.Array, *, processors: int = 132
) -> jax.Array:
    """float32 (in / 2, out): the entries of x.T @ dy that 2:4 `metadata` (in / 8, out) keeps.

    x: (tokens, in), dy: (tokens, out), bfloat16 or float16; in and out multiples of 8.
    """
    (tokens, k), f = x.shape, dy.shape[1]
    splits = choose_splits(
        pl.cdiv(k, ROWS) * pl.cdiv(f, COLUMNS), pl.cdiv(tokens, STEP), processors
    )
    blocks = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=ptx.X_TRANSFORMS)
    kernel = plgpu.kernel(
        functools.partial(_kernel, splits=splits, dtype=str(x.dtype)),
        out_type=jax.ShapeDtypeStruct((splits, k // 2, f), jnp.float32),
        grid=(processors,),
        grid_names=("grid",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types={
            "x_smem": blocks((STAGES, CONSUMERS, STEP, 64)),
            "dy_smem": blocks((STAGES, COLUMNS // 64, STEP, 64)),
            "full": plgpu.Barrier(num_arrivals=CONSUMERS + COLUMNS // 64, num_barriers=STAGES),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        },
        # Safe here: every hand-over of shared memory goes through one of these barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="nm_sddmm",
    )
    return kernel(x, dy, metadata).sum(0)


def choose_splits(tiles: int, steps: int, processors: int) -> int:
    """Into how many parts to cut the tokens: full waves, less what the partial sums cost."""
    best, best_score = 1, 0.0
    for splits in range(1, MAX_SPLITS + 1):
        if splits > 1 and steps // splits < 16:
            break
        units = tiles * splits
        score = units / (processors * -(-units // processors)) - 0.004 * splits
        if score > best_score:
            best, best_score = splits, score
    return best


def _kernel(x_gmem, dy_gmem, e_gmem, out_gmem, x_smem, dy_smem, full, empty, *, splits, dtype):
    (tokens, k), f = x_gmem.shape, dy_gmem.shape[1]
    rows, columns, steps = pl.cdiv(k, ROWS), pl.cdiv(f, COLUMNS), pl.cdiv(tokens, STEP)
    wg = lax.axis_index("wg")

    def unit(index):
        split = lax.div(index, jnp.int32(rows * columns))
        rest = lax.rem(index, jnp.int32(rows * columns))
        start = lax.div(split * steps, jnp.int32(splits))
        stop = lax.div((split + 1) * steps, jnp.int32(splits))
        return split, lax.rem(rest, jnp.int32(rows)), lax.div(rest, jnp.int32(rows)), start, stop

    def next_stage(stage):
        return lax.select(stage == STAGES - 1, jnp.int32(0), stage + 1)

    each_unit = functools.partial(plgpu.nd_loop, (splits * rows * columns,), collective_axes="grid")

    def produce():
        @each_unit(init_carry=(jnp.int32(0), jnp.int32(0)))
        def _unit(info, carry):
            _, row, column, start, stop = unit(info.index[0])

            def step(i, carry):
                stage, count = carry

                @pl.when(count >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                here = pl.ds((start + i) * STEP, STEP)
                for source, target, first in (
                    (x_gmem, x_smem, row * ROWS),
                    (dy_gmem, dy_smem, column * COLUMNS),
                ):
                    for block in range(target.shape[1]):
                        plgpu.copy_gmem_to_smem(
                            source.at[here, pl.ds(first + 64 * block, 64)],
                            target.at[stage, block],
                            full.at[stage],
                        )
                return next_stage(stage), count + 1

            return lax.fori_loop(0, stop - start, step, carry)

    @pl.when(wg == CONSUMERS)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(produce)

    @pl.when(wg < CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(240, action="increase")

        def step(acc, stage, previous):
            plgpu.barrier_wait(full.at[stage])
            acc = ptx.multiply_transposed(acc, x_smem.at[stage, wg], dy_smem.at[stage], dtype)
            ptx.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        @each_unit(init_carry=jnp.int32(0))
        def _unit(info, carry):
            split, row, column, start, stop = unit(info.index[0])
            acc = step(None, carry, None)

            def again(_, state):
                acc, previous = state
                here = next_stage(previous)
                return step(acc, here, previous), here

            acc, last = lax.fori_loop(1, stop - start, again, (acc, carry))
            acc = ptx.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            ptx.store_kept(acc, e_gmem, out_gmem.at[split], row * ROWS + wg * 64, column * COLUMNS)
            return next_stage(last)
