"""y = x @ w on Hopper's sparse tensor cores: `nm_matmul` in Pallas Mosaic GPU.

The sparse operand must be wgmma's A, so a tile is computed transposed, acc[out, token], and is
transposed again on its way out. Persistent CTAs, each with two consumer warpgroups and one
producer warp that runs ahead across tiles; they meet only at two mbarriers per stage (`full`,
`empty`). A stage is 64 input features: x (tokens x 64), values (rows x 32), metadata. One wgmma
group stays in flight, so a stage is released one step late, and the loop is unrolled by two:
wgmma.sp reads its metadata registers asynchronously, and a loop of one step would reload them
under the group in flight. Ragged sizes are left to TMA, which fills loads with zeros and clips
stores.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import store, wgmma
from pallas_kernels.mosaic.order import OrderedWeight

STEP = 64  # input features per stage
CONSUMERS = 2
SHARED_MEMORY = 232448 - 1024  # bytes per CTA, less the barriers


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the product is cut: a CTA takes 128 * blocks outputs x `tokens` tokens at a time.

    `stages` deep, leaving through `slots` buffers of `slot_tokens` tokens per warpgroup; output
    tiles are visited in snakes `snake` wide along the outputs (0) or the tokens (1).
    """

    blocks: int = 2
    tokens: int = 192
    stages: int = 4
    slot_tokens: int = 96
    slots: int = 2
    minor: int = 0
    snake: int = 16

    def __post_init__(self):
        if self.tokens % 8 or not 8 <= self.tokens <= 256:
            raise ValueError(f"{self}: tokens must be a multiple of 8 up to 256")
        if self.tokens % self.slot_tokens or self.slot_tokens % 16:
            raise ValueError(f"{self}: slot_tokens must be a multiple of 16 that divides tokens")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self}: needs {self.shared_memory} bytes of {SHARED_MEMORY}")

    @property
    def rows(self) -> int:
        return 64 * self.blocks * CONSUMERS

    @property
    def shared_memory(self) -> int:
        stage = self.tokens * STEP * 2 + self.rows * (STEP + 8)
        return self.stages * stage + CONSUMERS * self.slots * self.slot_tokens * 128


# Microseconds of a stage and of an epilogue per tile, on an H100 under sustained load, from
# 8192 x 4096 x 14336 and 8192 x 768 x 3072 (tokens x in x out). They only rank tiles.
TILES = {
    Tile(): (0.740, 1.5),
    Tile(tokens=128, slot_tokens=64, stages=5): (0.543, 0.7),
    Tile(blocks=1, tokens=256, slot_tokens=64): (0.565, 0.7),
    Tile(blocks=1, stages=5): (0.449, 0.7),
    Tile(blocks=1, tokens=128, slot_tokens=64, stages=6): (0.385, 0.5),
}


def choose_tile(tokens: int, k: int, f: int, *, processors: int = 132) -> Tile:
    """The tile with the shortest time in whole waves of CTAs: full waves at small outputs, the
    fewest bytes per product at large ones.

    >>> choose_tile(65536, 4096, 14336).tokens, choose_tile(2048, 768, 768).tokens
    (192, 128)
    """

    def time(tile: Tile) -> float:
        stage, epilogue = TILES[tile]
        waves = pl.cdiv(pl.cdiv(f, tile.rows) * pl.cdiv(tokens, tile.tokens), processors)
        return waves * (stage * pl.cdiv(k, STEP) + epilogue)

    return min(TILES, key=time)


def nm_matmul(x: jax.Array, w: OrderedWeight, tile: Tile, *, processors: int = 132) -> jax.Array:
    """(tokens, in) @ (in, out) in x's dtype, bfloat16 or float16; in and out multiples of 8."""
    tokens, out = x.shape[0], w.shape[1]
    dtype = str(x.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, tile=tile, dtype=dtype),
        out_type=jax.ShapeDtypeStruct((tokens, out), x.dtype),
        grid=(processors,),
        grid_names=("grid",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types={
            "x_smem": plgpu.SMEM(
                (tile.stages, tile.tokens, STEP), x.dtype, transforms=wgmma.X_TRANSFORMS
            ),
            "w_smem": plgpu.SMEM(
                (tile.stages, tile.rows, STEP // 2), x.dtype, transforms=wgmma.W_TRANSFORMS
            ),
            "e_smem": plgpu.SMEM((tile.stages, tile.rows // 64, 1, 128), jnp.int32),
            "out_smem": plgpu.SMEM(
                (CONSUMERS, tile.slots, tile.slot_tokens, 64),
                x.dtype,
                transforms=wgmma.X_TRANSFORMS,
            ),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=tile.stages),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
        },
        # Safe here: every hand-over of shared memory goes through one of these barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="nm_matmul",
    )
    return kernel(w.values, w.metadata, x)


def _kernel(
    w_gmem, e_gmem, x_gmem, out_gmem, x_smem, w_smem, e_smem, out_smem, full, empty, *, tile, dtype
):
    steps = e_gmem.shape[1]
    grid = (
        pl.cdiv(w_gmem.shape[0], tile.rows),
        pl.cdiv(x_gmem.shape[0], tile.tokens),
    )
    wg = lax.axis_index("wg")

    def next_stage(stage):
        return lax.select(stage == tile.stages - 1, jnp.int32(0), stage + 1)

    each_tile = functools.partial(
        plgpu.nd_loop,
        (grid[0] * grid[1],),
        collective_axes="grid",
        init_carry=jnp.int32(0),
    )

    def place(info):
        return plgpu.planar_snake(info.index[0], grid, tile.minor, tile.snake)

    def produce():
        @each_tile()
        def _tile(info, carry):
            row, column = place(info)
            w_rows = pl.ds(row * tile.rows, tile.rows)
            e_rows = pl.ds(row * (tile.rows // 64), tile.rows // 64)
            x_rows = pl.ds(column * tile.tokens, tile.tokens)

            def step(k, stage):
                @pl.when(info.local_index * steps + k >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                halves = pl.ds(k * (STEP // 2), STEP // 2)
                for source, target in (
                    (x_gmem.at[x_rows, pl.ds(k * STEP, STEP)], x_smem),
                    (w_gmem.at[w_rows, halves], w_smem),
                    (e_gmem.at[e_rows, pl.ds(k, 1)], e_smem),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[stage], full.at[stage])
                return next_stage(stage)

            return lax.fori_loop(0, steps, step, carry)

    def store_tile(acc, row, column):
        count = 0
        for block in range(tile.blocks):
            for first in range(0, tile.tokens, tile.slot_tokens):
                slot = out_smem.at[wg, count % tile.slots]
                plgpu.wait_smem_to_gmem(tile.slots - 1, wait_read_only=True)
                store.store_transposed(acc, slot, block, first, dtype)
                plgpu.commit_smem()
                target = (
                    pl.ds(column + first, tile.slot_tokens),
                    pl.ds(row + 64 * block, 64),
                )
                plgpu.copy_smem_to_gmem(slot, out_gmem.at[target])
                count += 1

    @pl.when(wg == CONSUMERS)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(produce)

    @pl.when(wg < CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(240, action="increase")
        w_rows = pl.ds(wg * (64 * tile.blocks), 64 * tile.blocks)
        e_rows = pl.ds(wg * tile.blocks, tile.blocks)

        def step(acc, stage, previous):
            plgpu.barrier_wait(full.at[stage])
            acc = wgmma.multiply(
                acc,
                w_smem.at[stage, w_rows],
                e_smem.at[stage, e_rows],
                x_smem.at[stage],
                tile.tokens,
                dtype,
            )
            wgmma.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        @each_tile()
        def _tile(info, carry):
            row, column = place(info)
            second = next_stage(carry)
            acc = step(None, carry, None)
            acc = step(acc, second, carry)

            def pair(_, state):
                acc, previous = state
                first = next_stage(previous)
                last = next_stage(first)
                return step(step(acc, first, previous), last, first), last

            acc, last = lax.fori_loop(1, steps // 2, pair, (acc, second))
            acc = wgmma.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            store_tile(acc, row * tile.rows + wg * (64 * tile.blocks), column * tile.tokens)
            return next_stage(last)

        plgpu.wait_smem_to_gmem(0)
