"""The values of (x.T @ dy) * mask: `nm_sddmm` in Pallas Mosaic GPU.

Dense wgmma, since both operands are dense; the epilogue stores only what the metadata keeps, so the
dense gradient never reaches memory. The accumulator is (out, in), so that a group of 4 inputs lies
in two neighbouring threads. x and dy are token-major, so both are MN-major for wgmma. Two consumer
warpgroups and one producer warp, as in `matmul`. Where the tiles alone leave processors idle, the
tokens are split, and the partial sums added by XLA.
"""

import dataclasses
import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import keep, wgmma
from pallas_kernels.mosaic.matmul import CONSUMERS, SHARED_MEMORY

STEP = 64  # tokens per stage
MAX_SPLITS = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    """A CTA takes 128 * blocks outputs x `columns` inputs at a time, `stages` deep."""

    blocks: int = 2
    columns: int = 192
    stages: int = 4
    snake: int = 8

    def __post_init__(self):
        if self.columns % 64 or not 64 <= self.columns <= 256:
            raise ValueError(f"{self}: columns must be a multiple of 64 up to 256")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self}: needs {self.shared_memory} bytes of {SHARED_MEMORY}")

    @property
    def rows(self) -> int:
        return 64 * self.blocks * CONSUMERS

    @property
    def shared_memory(self) -> int:
        return self.stages * (self.rows + self.columns) * STEP * 2


# Microseconds of a stage and of an epilogue per tile, on an H100 under sustained load, from
# 8192 x 4096 x 14336 (tokens x in x out). They only rank tiles.
TILES = {
    Tile(): (1.09, 4.0),
    Tile(columns=128): (0.76, 3.0),
    Tile(blocks=1, columns=256): (0.76, 3.0),
    Tile(blocks=1, columns=128, stages=6): (0.44, 2.0),
}
PARTIAL_BYTES_PER_MICROSECOND = 2.5e6


def choose(tokens: int, k: int, f: int, *, processors: int = 132) -> tuple[Tile, int]:
    """The tile and the number of splits with the shortest time, partial sums counted."""

    def time(choice: tuple[Tile, int]) -> float:
        tile, splits = choice
        stage, epilogue = TILES[tile]
        units = pl.cdiv(f, tile.rows) * pl.cdiv(k, tile.columns) * splits
        product = pl.cdiv(units, processors) * (
            stage * pl.cdiv(pl.cdiv(tokens, STEP), splits) + epilogue
        )
        partial_bytes = 0 if splits == 1 else 2 * splits * k * f * 2
        return product + partial_bytes / PARTIAL_BYTES_PER_MICROSECOND

    most = min(MAX_SPLITS, pl.cdiv(tokens, STEP))
    return min(itertools.product(TILES, range(1, most + 1)), key=time)


def nm_sddmm(
    x: jax.Array,
    dy: jax.Array,
    metadata: jax.Array,
    tile: Tile,
    splits: int,
    *,
    processors: int = 132,
) -> jax.Array:
    """float32 (in / 2, out): the entries of x.T @ dy that 2:4 `metadata` (in / 8, out) keeps.

    x: (tokens, in), dy: (tokens, out), bfloat16 or float16; in and out multiples of 8.
    """
    k, f = x.shape[1], dy.shape[1]
    blocks = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=wgmma.SWIZZLED)
    loads = (tile.rows + tile.columns) // 64
    kernel = plgpu.kernel(
        functools.partial(_kernel, tile=tile, splits=splits, dtype=str(x.dtype)),
        out_type=jax.ShapeDtypeStruct((splits, k // 2, f), jnp.float32),
        grid=(processors,),
        grid_names=("grid",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types={
            "dy_smem": blocks((tile.stages, tile.rows // 64, STEP, 64)),
            "x_smem": blocks((tile.stages, tile.columns // 64, STEP, 64)),
            "full": plgpu.Barrier(num_arrivals=loads, num_barriers=tile.stages),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
        },
        # Safe here: every hand-over of shared memory goes through one of these barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="nm_sddmm",
    )
    return kernel(dy, x, metadata).sum(0)


def _kernel(
    dy_gmem, x_gmem, e_gmem, out_gmem, dy_smem, x_smem, full, empty, *, tile, splits, dtype
):
    tokens, f = dy_gmem.shape
    grid = (pl.cdiv(f, tile.rows), pl.cdiv(x_gmem.shape[1], tile.columns))
    tiles, steps = grid[0] * grid[1], pl.cdiv(tokens, STEP)
    wg = lax.axis_index("wg")

    def unit(index):
        split = lax.div(index, jnp.int32(tiles))
        row, column = plgpu.planar_snake(lax.rem(index, jnp.int32(tiles)), grid, 0, tile.snake)
        start = lax.div(split * steps, jnp.int32(splits))
        stop = lax.div((split + 1) * steps, jnp.int32(splits))
        return split, row * tile.rows, column * tile.columns, start, stop

    def next_stage(stage):
        return lax.select(stage == tile.stages - 1, jnp.int32(0), stage + 1)

    each_unit = functools.partial(plgpu.nd_loop, (splits * tiles,), collective_axes="grid")

    def produce():
        @each_unit(init_carry=(jnp.int32(0), jnp.int32(0)))
        def _unit(info, carry):
            _, row, column, start, stop = unit(info.index[0])

            def step(i, carry):
                stage, count = carry

                @pl.when(count >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                here = pl.ds((start + i) * STEP, STEP)
                for source, target, first in (
                    (dy_gmem, dy_smem, row),
                    (x_gmem, x_smem, column),
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
        mine = pl.ds(wg * tile.blocks, tile.blocks)

        def step(acc, stage, previous):
            plgpu.barrier_wait(full.at[stage])
            acc = wgmma.multiply_transposed(acc, dy_smem.at[stage, mine], x_smem.at[stage], dtype)
            wgmma.wait(1)
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
            acc = wgmma.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            first_row = row + wg * (64 * tile.blocks)
            keep.store_kept(acc, e_gmem, out_gmem.at[split], first_row, column)
            return next_stage(last)
