"""t = x @ l within `matmul`: tiles of t, which CTAs make before they turn to those of the product.

Such a tile has as many tokens as one of the product, and as many ranks as a stage has room for; x comes through
the ring as always, and l in the place of the weight. The accumulator is t.T, of which each warpgroup has half of
the tokens, rounded up to what is stored at a time: a few in the middle may be made twice. t leaves for memory,
and a flag of each warpgroup says so; the producer of every CTA waits for those of its tokens before it loads t,
which is at the end of a tile. The CTAs that make t are the same in number as tiles are, and the others multiply
by w meanwhile: to read x once more then takes little time of its own, where a kernel of its own would wait for
memory. Nobody waits long if t takes no longer than one of the first tiles: so its inputs may be cut in two
(`slices`), and the CTA with the last ones adds what the other has left it.

CTAs wait for others here, so all of a launch must come to run. Where t has no more tiles than there are CTAs,
those that make it are the first ones to start; else CTAs wait for later ones as well, which need a place
beside them: there is one for each (`frame.clusters`), unless others keep the processors forever.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import parts, store, wgmma
from pallas_kernels.mosaic.frame import CONSUMERS, STEP

RANKS = 64  # of an accumulator's rows
STORED = 16  # tokens, at a time


class Unit(NamedTuple):
    """Tokens [tile.tokens * block, ...) and a part of the ranks, by the stages [start, stop) of the inputs."""

    block: jax.Array
    part: jax.Array
    slice: jax.Array
    start: jax.Array
    stop: jax.Array


class Cut(NamedTuple):
    """How t of one tile's tokens is cut: `parts` of `rank_blocks` blocks of ranks, each made in `slices` of
    the inputs; a warpgroup has `half` of the tokens."""

    parts: int
    rank_blocks: int
    slices: int
    half: int

    @classmethod
    def of(cls, tile, k: int, rank: int) -> "Cut":
        """l is in a stage in the place of the weight, which has room for half as many ranks as outputs."""
        parts = pl.cdiv(rank, tile.rows // 2)
        rank_blocks = pl.cdiv(pl.cdiv(rank, RANKS), parts) if parts else 0
        half = STORED * pl.cdiv(tile.tokens, CONSUMERS * STORED)
        return cls(parts, rank_blocks, max(1, min(tile.slices, pl.cdiv(k, STEP))), half)


class FirstTiles:
    """`kernel` is the `matmul_body.Kernel` they are made in; its refs have "l", and "t" as a result.

    Args:
      count: how many tiles the processors share; the schedule's first ones.
      transposed: l is (rank, in).
    """

    def __init__(self, kernel, count: int, transposed: bool):
        self.kernel, self.count, self.transposed = kernel, count, transposed
        self.tile, self.refs = kernel.tile, kernel.refs
        self.left = self.refs["l"]
        self.steps = pl.cdiv(sum(kernel.sizes), STEP)
        self.cut = Cut.of(self.tile, sum(kernel.sizes), self.left.shape[0 if transposed else 1])
        self.base = kernel.schedule.slots * self.tile.cluster  # of the flags
        self.flags = count * self.tile.cluster

    def of_processor(self, processor):
        """How many of them a processor makes."""
        return share(self.count, self.kernel.schedule.processors, processor)

    def each(self, body, init):
        """Calls body(unit, carry) -> carry."""
        processor, every = lax.axis_index("grid"), self.kernel.schedule.processors

        def one(number, carry):
            return body(self.unit(number * every + processor), carry)

        return lax.fori_loop(0, self.of_processor(processor), one, init)

    def unit(self, index) -> Unit:
        """What a processor makes as the tile of this index. The last slice alone waits, for those ahead of it."""
        parts, slices = jnp.int32(self.cut.parts), jnp.int32(self.cut.slices)
        group, slice_ = lax.div(index, slices), lax.rem(index, slices)
        block = lax.div(group, parts) * self.tile.cluster + self.kernel.member
        steps = (lax.div((slice_ + i) * self.steps, slices) for i in (0, 1))
        return Unit(block, lax.rem(group, parts), slice_, *steps)

    def place(self, block, part):
        """Among the tiles of t."""
        return block * self.cut.parts + part

    def place_left(self, unit, slice_):
        """In `t_parts`, of what a slice leaves for the last one; and behind `base`, of its flag."""
        return self.place(unit.block, unit.part) * (self.cut.slices - 1) + slice_

    def flag(self, block, part):
        """Of a tile of t that is there; behind those of what others have left."""
        left = self.flags // self.cut.slices * (self.cut.slices - 1)
        return self.base + left + self.place(block, part)

    def tokens_of(self, wg):
        """The first token of a warpgroup's in a tile."""
        return wg * (self.tile.tokens - self.cut.half)

    def wait(self, column) -> None:
        """In the producer: until t of a tile's tokens is in memory."""
        block = lax.div(column, jnp.int32(self.tile.tokens))
        for part in range(self.cut.parts):
            parts.await_all(self.refs["flags"], self.flag(block, part))

    def produce(self, acquire, copy, load_inputs, carry):
        """Loads all of this CTA's; `acquire`, `copy` and `load_inputs` as the kernel's own tiles do."""
        tile = self.tile
        together = "down" if tile.down > 1 else "across"  # l is the same for the whole cluster

        def load_left(stage, k, first):
            for b in range(tile.rows // 64):
                ranks, half = RANKS * (b // 2), 32 * (b % 2)
                place = pl.ds(k * STEP + half, 32), pl.ds(first + ranks, RANKS)
                if self.transposed:
                    place = pl.ds(first + ranks + half, 32), pl.ds(k * STEP, STEP)
                copy(self.left.at[place], self.refs["w_smem"].at[stage, b], stage, together)

        def unit(unit, carry):
            zero = unit.block - unit.block  # TMA may read beyond the ends, and constants may not
            first = unit.part * (RANKS * self.cut.rank_blocks)

            def step(k, carry):
                stage, count = carry
                acquire(stage, count)
                load_inputs(stage, pl.ds(unit.block * tile.tokens, tile.tokens), k, None)
                load_left(stage, k, first)
                # Unused, so that each stage has as many arrivals.
                self.kernel.load_metadata(copy, stage, zero, 0)
                return self.kernel.next(stage), count + 1

            return lax.fori_loop(unit.start, unit.stop, step, carry)

        return self.each(unit, carry)

    def consume(self, wg, stage):
        """Multiplies and stores them; the stage that comes after."""
        full, empty = self.refs["full"], self.refs["empty"]

        def issue(acc, stage, previous):
            plgpu.barrier_wait(full.at[stage])
            left = self.refs["w_smem"].at[stage]
            x = self.refs["x_smem"].at[stage, pl.ds(self.tokens_of(wg), self.cut.half)]
            dtype, transposed = self.kernel.dtype, self.transposed
            acc = wgmma.multiply_first(acc, left, x, self.cut.rank_blocks, dtype, transposed)
            wgmma.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        def again(_, state):
            acc, previous = state
            here = self.kernel.next(previous)
            return issue(acc, here, previous), here

        def unit(unit, stage):
            first = issue(None, stage, None), stage
            acc, last = lax.fori_loop(1, unit.stop - unit.start, again, first)
            acc = wgmma.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            self.leave(acc, unit, wg)
            return self.kernel.next(last)

        return self.each(unit, stage)

    def leave(self, acc, unit, wg) -> None:
        """What the last inputs give is stored, with what all others have left."""
        others = self.cut.slices - 1
        if not others:
            return self.store(acc, unit, wg)
        held, flags, left = wgmma.registers(acc), self.refs["flags"], self.refs["t_parts"]

        @pl.when(unit.slice < others)
        def _():
            place = self.place_left(unit, unit.slice)
            parts.leave(acc, held, left, flags, place, self.base + place)

        @pl.when(unit.slice == others)
        def _():
            added = acc
            for other in range(others):
                place = self.place_left(unit, other)
                added = parts.add(added, held, left, flags, place, self.base + place)
            self.store(added, unit, wg)

    def store(self, acc, unit, wg) -> None:
        tile, refs, cut = self.tile, self.refs, self.cut
        size = min(tile.slot_tokens, cut.half)
        places = [
            (rows, first) for rows in range(cut.rank_blocks) for first in range(0, cut.half, size)
        ]
        for count, (rows, first) in enumerate(places):
            slot = refs["out_smem"].at[wg, count % tile.slots, pl.ds(0, size)]
            plgpu.wait_smem_to_gmem(tile.slots - 1, wait_read_only=True)
            store.store_transposed(acc, None, slot, rows, first, self.kernel.dtype, None)
            plgpu.commit_smem()
            tokens = pl.ds(unit.block * tile.tokens + self.tokens_of(wg) + first, size)
            ranks = pl.ds(RANKS * (unit.part * cut.rank_blocks + rows), RANKS)
            plgpu.copy_smem_to_gmem(slot, refs["t"].at[tokens, ranks])
        plgpu.wait_smem_to_gmem(0)
        parts.announce(refs["flags"], self.flag(unit.block, unit.part))


def share(count: int, processors: int, processor):
    """How many of `count` tiles a processor makes, if these are dealt out in turn."""
    return lax.div(jnp.int32(count + processors - 1) - processor, jnp.int32(processors))


def obstacle(tile, schedule, count: int) -> str | None:
    """Why a product that is cut so cannot make t, in `count` tiles of its schedule's, or None."""
    if tile.along > 1:
        return f"{tile}: CTAs that share tiles along the inputs make no t"
    if (half := Cut.of(tile, 0, 0).half) % min(half, tile.slot_tokens):
        return f"{tile}: a warpgroup's {half} tokens are no multiple of its slots' tokens"
    if schedule.slots and schedule.waves * schedule.processors < count:
        return f"{tile}: {schedule.tiles} tiles are no whole wave, and others than whole ones make no t"
    return None
