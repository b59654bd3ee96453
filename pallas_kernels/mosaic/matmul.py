"""y = x @ w on Hopper's sparse tensor cores: `nm_matmul` in Pallas Mosaic GPU.

The sparse operand must be wgmma's A, so a tile is computed transposed, acc[out, token], and is
transposed again on its way out. A may lie MN-major, so the logical compressed form is read as it
is. Persistent CTAs, each with two consumer warpgroups and one producer warp that runs ahead across
tiles; they meet only at two mbarriers per stage (`full`, `empty`). A stage is 64 input features:
x (tokens x 64), values (32 x rows), metadata (8 x rows bytes). One wgmma group stays in flight, so
a stage is released one step late, and the loop is unrolled by two: wgmma.sp reads its metadata
registers asynchronously, and a loop of one step would reload them under the group in flight.
Ragged sizes are left to TMA, which fills loads with zeros and clips stores.

A low-rank product t @ r joins the accumulator in further stages of 32 ranks: r (32 x rows) lies as
values do, and t as x does, only that the instruction is the dense one.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import frame, store, wgmma
from pallas_kernels.mosaic.frame import CONSUMERS, STEP

RANKS = 32  # of the low-rank product per stage


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the product is cut: a CTA takes 128 * blocks outputs x `tokens` tokens at a time.

    `stages` deep, leaving through `slots` buffers of `slot_tokens` tokens per warpgroup; output
    tiles are visited in snakes `snake` wide along the outputs (0) or the tokens (1). A cluster of
    CTAs, `down` along the outputs and `across` along the tokens, loads together what its CTAs share.
    """

    blocks: int = 2
    tokens: int = 192
    stages: int = 4
    slot_tokens: int = 96
    slots: int = 2
    minor: int = 0
    snake: int = 16
    down: int = 1
    across: int = 1

    def __post_init__(self):
        if self.tokens % 8 or not 8 <= self.tokens <= 256:
            raise ValueError(f"{self}: tokens must be a multiple of 8 up to 256")
        if self.tokens % self.slot_tokens or self.slot_tokens % 16:
            raise ValueError(f"{self}: slot_tokens must be a multiple of 16 that divides tokens")
        frame.check_shared_memory(self)

    @property
    def rows(self) -> int:
        return 64 * self.blocks * CONSUMERS

    @property
    def cluster(self) -> int:
        return self.down * self.across

    @property
    def loads(self) -> int:
        """Copies that fill a stage."""
        return 1 + self.rows // 64 + self.rows // 128

    def grid(self, tokens: int, f: int) -> tuple[int, int]:
        """Clusters of output tiles along the outputs and the tokens."""
        return pl.cdiv(f, self.rows * self.down), pl.cdiv(tokens, self.tokens * self.across)

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


def choose(tokens: int, k: int, f: int, *, processors: int = 132) -> Tile:
    """The tile with the shortest time in whole waves of CTAs: full waves at small outputs, the
    fewest bytes per product at large ones.

    >>> choose(65536, 4096, 14336).tokens, choose(2048, 768, 768).tokens
    (192, 128)
    """
    return candidates(tokens, k, f, processors=processors)[0]


def candidates(tokens: int, k: int, f: int, *, processors: int = 132) -> list[Tile]:
    """All tiles worth timing, the shortest estimate first."""

    def time(tile: Tile) -> float:
        stage, epilogue = TILES[tile]
        waves = pl.cdiv(math.prod(tile.grid(tokens, f)), processors // tile.cluster)
        return waves * (stage * pl.cdiv(k, STEP) + epilogue)

    return sorted(TILES, key=time)


def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    metadata: jax.Array,
    tile: Tile,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    save_preactivation: bool = False,
    out_dtype=None,
    processors: int = 132,
):
    """activation(x @ w + t @ r + bias), and what enters the activation if that is to be saved.

    Args:
      x: (tokens, in), bfloat16 or float16; in is a multiple of 8, tokens are any number > 0.
      values: (in / 2, out) in x's dtype, metadata: uint8 (in / 8, out); out a multiple of 8.
      bias: (out,). low_rank: t (tokens, rank), r (rank, out) in x's dtype, rank a multiple of 8.
      out_dtype: x's dtype (None) or float32.
    """
    tokens, out = x.shape[0], values.shape[1]
    if out % 16:  # the rows of an array for TMA are multiples of 16 bytes
        metadata = jnp.pad(metadata, ((0, 0), (0, 8)))
    out_type = jax.ShapeDtypeStruct((tokens, out), out_dtype or x.dtype)
    operands = {"x": x, "w": values, "e": metadata}
    if low_rank is not None:
        operands |= {"t": low_rank[0], "r": low_rank[1]}
    if bias is not None:
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), (0, -out % (tile.rows * tile.down)))
    results = ("z", "y") if save_preactivation else ("y",)
    blocked = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=wgmma.SWIZZLED)
    empty, cluster = plgpu.Barrier, {}
    if tile.cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("down", "across"))
        cluster = {"cluster": (tile.down, tile.across), "cluster_names": ("down", "across")}
    scratch = {
        "x_smem": blocked((tile.stages, tile.tokens, STEP)),
        "w_smem": blocked((tile.stages, tile.rows // 64, STEP // 2, 64)),
        "e_smem": plgpu.SMEM(
            (tile.stages, tile.rows // 128, STEP // 8, 128),
            jnp.uint8,
            transforms=wgmma.SWIZZLED,
        ),
        "out_smem": blocked((CONSUMERS, tile.slots, tile.slot_tokens, 64)),
        "full": plgpu.Barrier(num_arrivals=tile.loads, num_barriers=tile.stages),
        "empty": empty(num_arrivals=CONSUMERS, num_barriers=tile.stages),
    }

    def body(*refs):
        names = (*operands, *results, *scratch)
        parts = _Kernel(tile, activation, dict(zip(names, refs, strict=True)))
        frame.run(parts.produce, parts.consume)

    kernel = plgpu.kernel(
        body,
        out_type=[out_type] * len(results),
        grid=(processors // tile.cluster,),
        grid_names=("grid",),
        **cluster,
        scratch_types=list(scratch.values()),
        **frame.OPTIONS,
        kernel_name="nm_matmul",
    )
    *preactivation, y = kernel(*operands.values())
    return (y, *preactivation) if save_preactivation else y


class _Kernel:
    """The body: `refs` are the operands, results and scratch by name."""

    def __init__(self, tile: Tile, activation: str | None, refs: dict):
        self.tile, self.activation, self.refs = tile, activation, refs
        self.x, self.w, self.e, self.out = (refs[name] for name in ("x", "w", "e", "y"))
        self.dtype = str(self.x.dtype)
        tokens, k = self.x.shape
        f = self.w.shape[1]
        self.grid = tile.grid(tokens, f)
        self.steps = pl.cdiv(k, STEP)
        self.rank_steps = pl.cdiv(refs["r"].shape[0], RANKS) if "r" in refs else 0
        self.ragged = bool(k % STEP or f % (tile.rows * tile.down))

    def each_tile(self, body):
        """Calls body(first output, first token, tiles done before, stage) -> stage."""
        count = self.grid[0] * self.grid[1]

        @plgpu.nd_loop((count,), collective_axes="grid", init_carry=jnp.int32(0))
        def stage(info, carry):
            tile = self.tile
            row, column = plgpu.planar_snake(info.index[0], self.grid, tile.minor, tile.snake)
            if tile.cluster > 1:
                row = row * tile.down + lax.axis_index("down")
                column = column * tile.across + lax.axis_index("across")
            return body(row * tile.rows, column * tile.tokens, info.local_index, carry)

        return stage

    def next(self, stage):
        return frame.next_stage(stage, self.tile.stages)

    def produce(self):
        tile, refs = self.tile, self.refs
        empty, full = refs["empty"], refs["full"]

        def load(stage, row, k, tokens_source, rows_source, halves):
            copies = [(tokens_source, refs["x_smem"].at[stage], "down")]
            copies += [
                (
                    rows_source.at[halves, pl.ds(row + 64 * b, 64)],
                    refs["w_smem"].at[stage, b],
                    "across",
                )
                for b in range(tile.rows // 64)
            ]
            groups = pl.ds(k * (STEP // 8), STEP // 8)
            copies += [
                (self.e.at[groups, pl.ds(row + 128 * b, 128)], refs["e_smem"].at[stage, b], None)
                for b in range(tile.rows // 128)
            ]
            for source, target, axis in copies:
                shared = axis is not None and getattr(tile, axis) > 1
                plgpu.copy_gmem_to_smem(
                    source, target, full.at[stage], collective_axes=(axis,) if shared else None
                )

        @self.each_tile
        def _tile(row, column, done, stage):
            tokens = pl.ds(column, tile.tokens)
            first = done * (self.steps + self.rank_steps)

            def wait(step, stage):
                @pl.when(first + step >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

            def step(k, stage):
                wait(k, stage)
                x = self.x.at[tokens, pl.ds(k * STEP, STEP)]
                load(stage, row, k, x, self.w, pl.ds(k * (STEP // 2), STEP // 2))
                return self.next(stage)

            def rank_step(j, stage):
                wait(self.steps + j, stage)
                t = refs["t"].at[tokens, pl.ds(j * RANKS, STEP)]
                # The metadata come along unused, so that every stage has as many arrivals.
                load(stage, row, 0, t, refs["r"], pl.ds(j * RANKS, RANKS))
                return self.next(stage)

            stage = lax.fori_loop(0, self.steps, step, stage)
            if not self.rank_steps:
                return stage
            return lax.fori_loop(0, self.rank_steps, rank_step, stage)

        if tile.cluster > 1:  # outlive the last arrivals from the rest of the cluster
            clusters = lax.axis_size("grid")
            tiles = lax.div(math.prod(self.grid) - 1 - lax.axis_index("grid") + clusters, clusters)
            for stage in range(tile.stages):

                @pl.when(tiles * (self.steps + self.rank_steps) > stage)
                def _(stage=stage):
                    plgpu.barrier_wait(empty.at[stage])

    def consume(self, wg):
        tile, refs = self.tile, self.refs
        full, empty = refs["full"], refs["empty"]
        mine = pl.ds(wg * tile.blocks, tile.blocks)

        def issue(acc, stage, previous, *, dense=False):
            plgpu.barrier_wait(full.at[stage])
            w, x = refs["w_smem"].at[stage, mine], refs["x_smem"].at[stage]
            if dense:
                acc = wgmma.multiply_dense(acc, w, x, self.dtype)
            else:
                e = refs["e_smem"].at[stage]
                acc = wgmma.multiply_sparse(acc, w, e, x, self.dtype, ragged=self.ragged)
            wgmma.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        def product(stage):
            acc, last = issue(None, stage, None), stage
            if self.steps % 2 == 0:
                last = self.next(stage)
                acc = issue(acc, last, stage)

            def pair(_, state):
                acc, previous = state
                first = self.next(previous)
                last = self.next(first)
                return issue(issue(acc, first, previous), last, first), last

            def rank_step(_, state):
                acc, previous = state
                here = self.next(previous)
                return issue(acc, here, previous, dense=True), here

            acc, last = lax.fori_loop(0, (self.steps - 1) // 2, pair, (acc, last))
            if self.rank_steps:
                acc, last = lax.fori_loop(0, self.rank_steps, rank_step, (acc, last))
            acc = wgmma.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            return acc, last

        @self.each_tile
        def _tile(row, column, done, stage):
            row += wg * (64 * tile.blocks)
            bias = None
            if "bias" in refs:
                bias = store.load_bias(refs["bias"], row, 64 * tile.blocks)
            acc, last = product(stage)
            self.store(acc, bias, row, column, wg)
            return self.next(last)

        plgpu.wait_smem_to_gmem(0)

    def store(self, acc, bias, row, column, wg):
        tile = self.tile
        results = [(self.out, self.activation)]
        if "z" in self.refs:
            results.insert(0, (self.refs["z"], None))
        if self.out.dtype != self.x.dtype:
            for block, (out, activation) in itertools.product(range(tile.blocks), results):
                store.store_float32(acc, bias, out, block, row + 64 * block, column, activation)
            return
        chunks = itertools.product(
            range(tile.blocks), range(0, tile.tokens, tile.slot_tokens), results
        )
        for count, (block, first, (out, activation)) in enumerate(chunks):
            slot = self.refs["out_smem"].at[wg, count % tile.slots]
            plgpu.wait_smem_to_gmem(tile.slots - 1, wait_read_only=True)
            store.store_transposed(acc, bias, slot, block, first, self.dtype, activation)
            plgpu.commit_smem()
            target = (pl.ds(column + first, tile.slot_tokens), pl.ds(row + 64 * block, 64))
            plgpu.copy_smem_to_gmem(slot, out.at[target])
