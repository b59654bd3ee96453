"""The values of (x.T @ dy) * mask: `nm_sddmm` in Pallas Mosaic GPU.

Dense wgmma, since both operands are dense; the epilogue stores only what the metadata keeps, so the
dense gradient never reaches memory. The accumulator is (out, in), so that a group of 4 inputs lies
in two neighbouring threads. x and dy are token-major, so both are MN-major for wgmma. Two consumer
warpgroups and one producer warp, as in `matmul`; the epilogue works in a stage of the ring that the
producer leaves empty, while the other stages fill.

Whole waves of tiles take a processor each. The tiles left over are cut along the tokens
(`Schedule`): the processors that share a tile leave their part of it, compressed, in global memory,
and the one with the first tokens adds the others', always in the same order.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import keep, wgmma

CONSUMERS = 2
STEP = 64  # tokens per stage
SHARED_MEMORY = 232448 - 1024  # bytes per CTA, less the barriers


@dataclasses.dataclass(frozen=True)
class Tile:
    """A CTA takes 128 * blocks outputs x `columns` inputs at a time, `stages` deep; tiles are
    visited in snakes `snake` wide along the outputs."""

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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which processor takes which steps of which tile.

    After whole waves of tiles, `sharers` processors take a tile that is left over, each an equal
    share of its steps. With `splits` 0 all processors take part: beside as many sharers as fit,
    which take `share` steps each, the other processors ("fillers") take equal parts of what these
    leave of all tiles, one tile after the other.

    A unit of work is the steps [start, stop) of a tile. One that starts at 0 ends in the output,
    after the parts of the others have been added; each of these leaves its part in a slot.
    Those who wait are the last processors, and those they wait for never wait themselves.
    """

    tiles: int
    steps: int
    splits: int
    processors: int

    def __post_init__(self):
        most = self.processors // self.left if self.left else self.processors
        if not 0 <= self.splits <= max(1, min(most, self.steps)):
            raise ValueError(
                f"splits is {self.splits}; {self.left} tiles left over on {self.processors}"
                f" processors, of {self.steps} steps, take 0 to {max(1, min(most, self.steps))}"
            )

    @property
    def waves(self) -> int:
        return self.tiles // self.processors

    @property
    def left(self) -> int:
        return self.tiles % self.processors

    @property
    def sharers(self) -> int:
        if self.splits or not self.left:
            return self.splits or 1
        return min(self.processors // self.left, self.steps)

    @property
    def share(self) -> int:
        """Steps of a sharer; the last ones may have one less where there are no fillers."""
        return -(-self.steps // self.sharers) if not self.fillers else self._even_share

    @property
    def _even_share(self) -> int:
        return -(-self.left * self.steps // self.processors)

    @property
    def fillers(self) -> int:
        if self.splits or not self.left or self._even_share * self.sharers >= self.steps:
            return 0
        return self.processors - self.left * self.sharers

    @property
    def rest(self) -> int:
        """Steps of each tile that fillers take."""
        return self.steps - self.share * self.sharers if self.fillers else 0

    @property
    def slots(self) -> int:
        if not self.left:
            return 0
        return (self.sharers - 1) * self.left + (self.left + self.fillers if self.fillers else 0)

    def _fill(self, filler):
        """Where a filler starts in the rests of all tiles, laid end to end."""
        return _div(filler * (self.left * self.rest), self.fillers)

    def units(self, processor):
        """How many units a processor takes."""
        if not self.left:
            return jnp.int32(self.waves)
        busy = processor < self.fillers + self.left * self.sharers
        mine = jnp.where(busy, 1, 0)
        if self.fillers:
            first, stop = self._fill(processor), self._fill(processor + 1)
            count = _div(stop - 1, self.rest) - _div(first, self.rest) + 1
            mine = jnp.where(processor < self.fillers, count, mine)
        return self.waves + mine

    def unit(self, processor, number):
        """(tile, start, stop, slot, parts) of a unit: the slot it is left in, or -1 if it is
        finished here; the number of parts to be added then."""
        whole = number < self.waves
        member = processor - self.fillers
        tile = lax.rem(member, jnp.int32(max(self.left, 1)))
        rank = self.sharers - 1 - _div(member, max(self.left, 1))
        if self.fillers:
            start, stop = rank * self.share, (rank + 1) * self.share
        else:
            start, stop = (_div((rank + i) * self.steps, self.sharers) for i in (0, 1))
        slot = jnp.where(rank == 0, -1, (rank - 1) * self.left + tile)
        parts = self.sharers - 1
        if self.fillers:
            first, last = self._fillers_of(tile)
            parts = parts + last - first + 1
            begin, end = self._fill(processor), self._fill(processor + 1)
            filled = _div(begin, self.rest) + number - self.waves
            base = self.share * self.sharers - filled * self.rest
            is_filler = processor < self.fillers
            tile = jnp.where(is_filler, filled, tile)
            start = jnp.where(is_filler, base + jnp.maximum(begin, filled * self.rest), start)
            stop = jnp.where(is_filler, base + jnp.minimum(end, (filled + 1) * self.rest), stop)
            slot = jnp.where(
                is_filler, (self.sharers - 1) * self.left + processor + filled, slot
            )
        return (
            jnp.where(whole, number * self.processors + processor, self.waves * self.processors + tile),
            jnp.where(whole, 0, start),
            jnp.where(whole, self.steps, stop),
            jnp.where(whole, -1, slot),
            jnp.where(whole | (slot >= 0), 0, parts),
        )

    def _fillers_of(self, tile):
        """The first and the last filler that have a part of a tile left over."""
        line = self.left * self.rest

        def filler_at(position):  # the one whose part has this position
            return _div((position + 1) * self.fillers + line - 1, line) - 1

        return filler_at(tile * self.rest), filler_at((tile + 1) * self.rest - 1)

    def slot_of(self, tile, part):
        """The slot of a tile's part."""
        tile = tile - self.waves * self.processors
        shared = part * self.left + tile
        if not self.fillers:
            return shared
        filler = self._fillers_of(tile)[0] + part - (self.sharers - 1)
        filled = (self.sharers - 1) * self.left + filler + tile
        return jnp.where(part < self.sharers - 1, shared, filled)


def _div(x, y: int):
    return lax.div(x, jnp.int32(y))


# Microseconds of a stage and of an epilogue per tile, on an H100 under sustained load, from
# 8192 x 4096 x 14336 (tokens x in x out). They only rank tiles.
TILES = {
    Tile(): (1.09, 4.0),
    Tile(columns=128): (0.76, 3.0),
    Tile(blocks=1, columns=256): (0.76, 3.0),
    Tile(blocks=1, columns=128, stages=6): (0.44, 2.0),
}


def choose(tokens: int, k: int, f: int, *, processors: int = 132) -> tuple[Tile, int]:
    return candidates(tokens, k, f, processors=processors)[0]


def candidates(tokens: int, k: int, f: int, *, processors: int = 132) -> list[tuple[Tile, int]]:
    """Configurations worth timing, the one that `choose` takes first."""
    found = []
    steps = pl.cdiv(tokens, STEP)
    for tile, (stage, epilogue) in TILES.items():
        tiles = pl.cdiv(f, tile.rows) * pl.cdiv(k, tile.columns)
        for splits in range(9):
            try:
                schedule = Schedule(tiles, steps, splits, processors)
            except ValueError:
                continue
            if splits > 1 and not schedule.left:
                continue
            time = schedule.waves * (steps * stage + epilogue)
            if schedule.left:
                time += schedule.share * stage + epilogue * (1 + 0.5 * (schedule.sharers - 1))
                time += 2 * epilogue * bool(schedule.fillers)
            found.append((time, len(found), tile, splits))
    return [(tile, splits) for *_, tile, splits in sorted(found, key=lambda c: c[:2])]


def nm_sddmm(
    x: jax.Array,
    dy: jax.Array,
    metadata: jax.Array,
    tile: Tile,
    splits: int,
    *,
    out_dtype=jnp.float32,
    into: jax.Array | None = None,
    processors: int = 132,
) -> jax.Array:
    """(in / 2, out): the entries of x.T @ dy that 2:4 `metadata` (in / 8, out) keeps.

    Args:
      x: (tokens, in), dy: (tokens, out), bfloat16 or float16; in and out multiples of 8.
      splits: how many processors share a tile of the last wave; 0 for an even share for all.
      out_dtype: float32, bfloat16 or float16.
      into: (in / 2, out) float32 or `out_dtype`, added to the product; in place where it is donated
        and has `out_dtype`.
    """
    (tokens, k), f = x.shape, dy.shape[1]
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype not in (jnp.float32, x.dtype):  # values leave through a stage of x's dtype
        into = None if into is None else into.astype(jnp.float32)
        exact = nm_sddmm(x, dy, metadata, tile, splits, into=into, processors=processors)
        return exact.astype(out_dtype)
    schedule = Schedule(
        tiles=pl.cdiv(f, tile.rows) * pl.cdiv(k, tile.columns),
        steps=pl.cdiv(tokens, STEP),
        splits=splits,
        processors=processors,
    )
    operands = {"dy": dy, "x": x, "metadata": metadata}
    results = {}
    in_place = into is not None and into.dtype == out_dtype
    if in_place:
        operands["out"] = jax.new_ref(into)
    else:
        results["out"] = jax.ShapeDtypeStruct((k // 2, f), out_dtype)
        if into is not None:
            operands["into"] = into
    if schedule.slots:
        shape = (schedule.slots, CONSUMERS, tile.rows // CONSUMERS * tile.columns // 2)
        results["partial"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    scratch = {
        "ring": plgpu.SMEM(
            (tile.stages, (tile.rows + tile.columns) // 64, STEP, 64),
            x.dtype,
            transforms=wgmma.SWIZZLED,
        ),
        "full": plgpu.Barrier(
            num_arrivals=(tile.rows + tile.columns) // 64, num_barriers=tile.stages
        ),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
    }
    names = [*operands, *results]

    def body(*refs, **scratch_refs):
        refs = dict(zip(names, refs, strict=True)) | scratch_refs
        if in_place:
            refs["into"] = refs["out"]
        _Kernel(tile, schedule, refs).run()

    kernel = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        grid=(processors,),
        grid_names=("grid",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch,
        # Safe here: every hand-over of shared memory goes through one of these barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="nm_sddmm",
    )
    found = dict(zip(results, kernel(*operands.values()), strict=True))
    return jax.freeze(operands["out"]) if in_place else found["out"]


class _Kernel:
    """The body: `refs` are the operands, results and scratch by name."""

    def __init__(self, tile: Tile, schedule: Schedule, refs: dict):
        self.tile, self.schedule, self.refs = tile, schedule, refs
        self.dtype = str(refs["x"].dtype)
        self.out_dtype = str(refs["out"].dtype)
        self.staged = self.out_dtype != "float32"
        f, k = refs["dy"].shape[1], refs["x"].shape[1]
        self.grid = (pl.cdiv(f, tile.rows), pl.cdiv(k, tile.columns))
        self.blocks = tile.rows // 64, tile.columns // 64
        if schedule.slots:
            flags = plgpu.SemaphoreType.REGULAR((CONSUMERS * schedule.slots,))
            refs["flags"] = pl.get_global(flags)

    def run(self):
        wg = lax.axis_index("wg")

        @pl.when(wg == CONSUMERS)
        def _producer():
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(self.produce)

        @pl.when(wg < CONSUMERS)
        def _consumer():
            plgpu.set_max_registers(240, action="increase")
            self.consume(wg)

    def each_unit(self, body, init):
        """Calls body(number, tile, row, column, start, stop, slot, parts, carry) -> carry."""
        processor = lax.axis_index("grid")

        def unit(number, carry):
            index, *rest = self.schedule.unit(processor, number)
            row, column = plgpu.planar_snake(index, self.grid, 0, self.tile.snake)
            place = row * self.tile.rows, column * self.tile.columns
            return body(number, index, *place, *rest, carry)

        return lax.fori_loop(0, self.schedule.units(processor), unit, init)

    def next(self, stage):
        return lax.select(stage == self.tile.stages - 1, jnp.int32(0), stage + 1)

    def before(self, stage):
        return lax.select(stage == 0, jnp.int32(self.tile.stages - 1), stage - 1)

    def produce(self):
        refs, tile = self.refs, self.tile
        ring, full, empty = refs["ring"], refs["full"], refs["empty"]

        def acquire(stage, count):
            @pl.when(count >= tile.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

        def unit(number, index, row, column, start, stop, slot, parts, carry):
            def step(i, carry):
                stage, count = carry
                acquire(stage, count)
                tokens = pl.ds((start + i) * STEP, STEP)
                sources = [(refs["dy"], row + 64 * b) for b in range(self.blocks[0])]
                sources += [(refs["x"], column + 64 * b) for b in range(self.blocks[1])]
                for block, (source, first) in enumerate(sources):
                    plgpu.copy_gmem_to_smem(
                        source.at[tokens, pl.ds(first, 64)], ring.at[stage, block], full.at[stage]
                    )
                return self.next(stage), count + 1

            stage, count = lax.fori_loop(0, stop - start, step, carry)
            acquire(stage, count)  # for the epilogue
            for _ in range(sum(self.blocks)):
                plgpu.barrier_arrive(full.at[stage])
            return self.next(stage), count + 1

        self.each_unit(unit, (jnp.int32(0), jnp.int32(0)))

    def consume(self, wg):
        refs, tile = self.refs, self.tile
        ring, full, empty = refs["ring"], refs["full"], refs["empty"]
        mine = pl.ds(wg * tile.blocks, tile.blocks)
        shared = pl.ds(self.blocks[0], self.blocks[1])
        rows = 64 * tile.blocks

        def step(acc, stage, previous):
            plgpu.barrier_wait(full.at[stage])
            acc = wgmma.multiply_transposed(
                acc, ring.at[stage, mine], ring.at[stage, shared], self.dtype
            )
            wgmma.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        def unit(number, index, row, column, start, stop, slot, parts, carry):
            acc = step(None, carry, None)
            if self.staged:

                @pl.when(number > 0)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(empty.at[self.before(carry)])

            def again(_, state):
                acc, previous = state
                here = self.next(previous)
                return step(acc, here, previous), here

            acc, last = lax.fori_loop(1, stop - start, again, (acc, carry))
            stage = self.next(last)
            plgpu.barrier_wait(full.at[stage])
            first_row = row + wg * rows
            keep.fetch_metadata(
                refs["metadata"], ring.at[stage], first_row, column, rows=rows, columns=tile.columns
            )
            acc = wgmma.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            keep.await_metadata()
            kept = keep.select(acc, ring.at[stage])
            plgpu.commit_smem()
            if not self.staged:
                plgpu.barrier_arrive(empty.at[stage])
            self.leave(kept, wg, stage, index, first_row, column, slot, parts)
            return self.next(stage)

        self.each_unit(unit, jnp.int32(0))
        if self.staged:
            plgpu.wait_smem_to_gmem(0)

    def leave(self, kept, wg, stage, index, row, column, slot, parts):
        refs = self.refs
        if not self.schedule.slots:
            return self.finish(kept, wg, stage, row, column)

        @pl.when(slot >= 0)
        def _():
            keep.store_partial(kept, refs["partial"], refs["flags"], slot)

        @pl.when(slot < 0)
        def _():
            def add(part, kept):
                slot = self.schedule.slot_of(index, part)
                return keep.add_partial(kept, refs["partial"], refs["flags"], slot)

            self.finish(lax.fori_loop(0, parts, add, kept), wg, stage, row, column)

    def finish(self, kept, wg, stage, row, column):
        refs, tile = self.refs, self.tile
        rows = 64 * tile.blocks
        if "into" in refs:
            kept = keep.add_into(kept, refs["into"], row, column, rows=rows)
        if not self.staged:
            keep.store(kept, refs["out"], row, column, rows=rows)
            return
        keep.store_staged(kept, refs["ring"].at[stage], self.out_dtype, rows=rows)
        plgpu.commit_smem()
        height = 64 if tile.columns % 128 == 0 else 32
        chunks = tile.columns // 2 // height
        for block in range(tile.blocks):
            for chunk in range(chunks):
                at = (wg * tile.blocks + block) * chunks + chunk
                half = pl.ds(lax.rem(at * height, jnp.int32(64)), height)
                plgpu.copy_smem_to_gmem(
                    refs["ring"].at[stage, lax.div(at * height, jnp.int32(64)), half],
                    refs["out"].at[
                        pl.ds(lax.div(column, jnp.int32(2)) + height * chunk, height),
                        pl.ds(row + 64 * block, 64),
                    ],
                )
