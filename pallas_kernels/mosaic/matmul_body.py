"""The body of `matmul`: what its producer warp and its consumer warpgroups do."""

import itertools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import exchange, frame, input_sums, parts, store, wgmma
from pallas_kernels.mosaic.first_tiles import FirstTiles
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.matmul_tiles import Tile
from pallas_kernels.mosaic.schedule import Schedule

RANKS = 32  # of the low-rank product per stage


class Unit(NamedTuple):
    """The stages [start, stop) of the tile `index`, whose first output and token are `row` and
    `column`; left in `slot`, or finished here (-1) with the parts of so many `others`."""

    index: jax.Array
    row: jax.Array
    column: jax.Array
    start: jax.Array | int
    stop: jax.Array | int
    slot: jax.Array
    others: jax.Array


class Kernel:
    """`refs` are the operands, results and scratch by name; the results, "z" and one or several "y".

    With "l" among them, `firsts` tiles of the schedule are of t = x @ l; l may be transposed. If `gated`, the
    blocks of a warpgroup are a gate and what it multiplies: the same outputs of the halves of w's.
    """

    def __init__(
        self,
        tile: Tile,
        schedule: Schedule,
        activation: str | None,
        through: str | None,
        sections: tuple[int, ...] | None,
        refs: dict,
        firsts: int = 0,
        transposed: bool = False,
        gated: bool = False,
    ):
        self.tile, self.schedule, self.refs = tile, schedule, refs
        self.activation, self.through = activation, through
        self.x, self.w, self.e = frame.sections("x", refs), refs["w"], refs["e"]
        self.sections, self.gated = sections, gated
        self.dtype = str(self.x[0].dtype)
        self.sizes = [x.shape[1] for x in self.x]
        tokens, k = self.x[0].shape[0], sum(self.sizes)
        f = self.w.shape[1]
        self.grid = tile.grid(tokens, f)
        self.together, self.multicast = tile.along > 1, tile.down * tile.across > 1
        self.shared = schedule.slots > 0 or self.together
        # A unit of a shared tile is of whole pairs; a stage beyond the end reads zeros.
        self.steps = 2 * schedule.steps if self.shared else pl.cdiv(k, STEP)
        self.rank_steps = pl.cdiv(refs["r"].shape[0], RANKS) if "r" in refs else 0
        self.joining_steps = tile.rows // 64 if "joining" in refs else 0
        self.ragged = k != self.steps * STEP or f % (tile.rows * tile.down) > 0
        self.firsts = FirstTiles(self, firsts, transposed) if firsts else None
        flags = schedule.slots * tile.cluster + (self.firsts.flags if firsts else 0)
        if flags:
            refs["flags"] = pl.get_global(plgpu.SemaphoreType.REGULAR((CONSUMERS * flags,)))

    def each_unit(self, body, init):
        """Calls body(unit, carry) -> carry for what this CTA is to do."""
        processor, tile, schedule = lax.axis_index("grid"), self.tile, self.schedule

        def unit(number, carry):
            index, start, stop, slot, others = schedule.unit(processor, number)
            place = index - self.firsts.count if self.firsts else index
            row, column = plgpu.planar_snake(place, self.grid, tile.minor, tile.snake)
            if self.multicast:
                row = row * tile.down + lax.axis_index("down")
                column = column * tile.across + lax.axis_index("across")
            if self.together:
                rank = lax.axis_index("along")
                start, stop = (
                    lax.div((rank + i) * schedule.steps, jnp.int32(tile.along)) for i in (0, 1)
                )
                slot = rank - 1  # the first one finishes the tile
            start, stop = (2 * start, 2 * stop) if self.shared else (0, self.steps)
            place = row * tile.rows, column * tile.tokens
            return body(Unit(index, *place, start, stop, slot, others), carry)

        first = self.firsts.of_processor(processor) if self.firsts else 0
        return lax.fori_loop(first, schedule.units(processor), unit, init)

    @property
    def member(self):
        """This CTA's number in its cluster."""
        if not self.multicast:
            return jnp.int32(0)
        return lax.axis_index("down") * self.tile.across + lax.axis_index("across")

    def of_last(self, unit, steps: int):
        """Steps that belong to the unit that finishes a tile."""
        return jnp.where(unit.slot < 0, steps, 0) if self.shared else steps

    def next(self, stage):
        return frame.next_stage(stage, self.tile.stages)

    def after(self, stage, steps):
        return lax.rem(stage + jnp.int32(steps), jnp.int32(self.tile.stages))

    def produce(self):
        tile, refs = self.tile, self.refs
        empty, full = refs["empty"], refs["full"]

        def load(stage, row, k, rows_source, halves):
            copies = [
                (
                    rows_source.at[halves, pl.ds(self.first_output(row, b), 64)],
                    refs["w_smem"].at[stage, b],
                    "across",
                )
                for b in range(tile.rows // 64)
            ]
            for source, target, axis in copies:
                copy(source, target, stage, axis)
            self.load_metadata(copy, stage, row, k)

        def copy(source, target, stage, axis):
            shared = axis is not None and getattr(tile, axis) > 1
            plgpu.copy_gmem_to_smem(
                source, target, full.at[stage], collective_axes=(axis,) if shared else None
            )

        def load_tokens(stage, source, axis="down"):
            copy(source, refs["x_smem"].at[stage], stage, axis)

        def load_inputs(stage, tokens, k, axis="down"):
            def inputs(number, first):
                load_tokens(stage, self.x[number].at[tokens, pl.ds(first, STEP)], axis)

            frame.in_section(self.sizes, k * STEP, inputs)

        def acquire(stage, count):
            @pl.when(count >= tile.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

        def unit(unit, carry):
            tokens = pl.ds(unit.column, tile.tokens)

            def step(k, carry):
                stage, count = carry
                acquire(stage, count)
                load_inputs(stage, tokens, k)
                load(stage, unit.row, k, self.w, pl.ds(k * (STEP // 2), STEP // 2))
                return self.next(stage), count + 1

            def rank_step(j, carry):
                stage, count = carry
                acquire(stage, count)
                load_tokens(stage, refs["t"].at[tokens, pl.ds(j * RANKS, STEP)])
                # The metadata come along unused, so that every stage has as many arrivals.
                load(stage, unit.row, 0, refs["r"], pl.ds(j * RANKS, RANKS))
                return self.next(stage), count + 1

            def joining_step(j, carry):
                stage, count = carry
                acquire(stage, count)
                outputs = refs["joining"].at[tokens, pl.ds(unit.row + 64 * j, 64)]
                load_tokens(stage, outputs, axis=None)
                load(stage, unit.row, 0, self.w, pl.ds(0, STEP // 2))
                return self.next(stage), count + 1

            carry = lax.fori_loop(unit.start, unit.stop, step, carry)
            if self.rank_steps:
                ranks = self.of_last(unit, self.rank_steps)
                if self.firsts:
                    pl.when(ranks > 0)(lambda: self.firsts.wait(unit.column))
                carry = lax.fori_loop(0, ranks, rank_step, carry)
            if self.joining_steps:
                blocks = self.of_last(unit, self.joining_steps)
                carry = lax.fori_loop(0, blocks, joining_step, carry)
            return carry

        carry = (jnp.int32(0), jnp.int32(0))
        if self.firsts:
            carry = self.firsts.produce(acquire, copy, load_inputs, carry)
        _, count = self.each_unit(unit, carry)
        if self.multicast:  # outlive the last arrivals from the rest of the cluster
            for stage in range(tile.stages):

                @pl.when(count > stage)
                def _(stage=stage):
                    plgpu.barrier_wait(empty.at[stage])

    def load_metadata(self, copy, stage, row, k):
        groups = pl.ds(k * (STEP // 8), STEP // 8)
        for b in range(self.tile.rows // 128):
            first = self.first_output(row, b) if self.gated else row + 128 * b
            copy(
                self.e.at[groups, pl.ds(first, 128)], self.refs["e_smem"].at[stage, b], stage, None
            )

    def first_output(self, row, block: int):
        """Of w, for a block of 64 rows of the tile that begins with a row; if gated, of the halves in turn."""
        if not self.gated:
            return row + 64 * block
        half = self.w.shape[1] // 2
        return lax.div(row, jnp.int32(2)) + (64 * (block // 2) + half * (block % 2))

    def consume(self, wg):
        tile, refs = self.tile, self.refs
        full, empty = refs["full"], refs["empty"]
        mine = pl.ds(wg * tile.blocks, tile.blocks)

        def issue(acc, stage, previous, *, dense=False, add_up=None):
            plgpu.barrier_wait(full.at[stage])
            w, x = refs["w_smem"].at[stage, mine], refs["x_smem"].at[stage]
            if dense:
                acc = wgmma.multiply_dense(acc, w, x, self.dtype)
            else:
                e = refs["e_smem"].at[stage]
                options = {"ragged": self.ragged, "gated": self.gated}
                acc = wgmma.multiply_sparse(acc, w, e, x, self.dtype, **options)
            if add_up is not None:
                self.add_up(x, *add_up)
            wgmma.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        def product(unit, stage):
            acc, last = issue(None, stage, None, add_up=(unit, 0)), stage
            if self.steps % 2 == 0:
                last = self.next(stage)
                acc = issue(acc, last, stage, add_up=(unit, 1))

            def pair(number, state):
                acc, previous = state
                first = self.next(previous)
                last = self.next(first)
                step = 2 * number + (2 - self.steps % 2)
                acc = issue(acc, first, previous, add_up=(unit, step))
                return issue(acc, last, first, add_up=(unit, step + 1)), last

            def rank_step(_, state):
                acc, previous = state
                here = self.next(previous)
                return issue(acc, here, previous, dense=True), here

            pairs = lax.div(jnp.int32(unit.stop - unit.start - 1), jnp.int32(2))
            acc, last = lax.fori_loop(0, pairs, pair, (acc, last))
            if self.rank_steps:
                ranks = self.of_last(unit, self.rank_steps)
                acc, last = lax.fori_loop(0, ranks, rank_step, (acc, last))
            acc = wgmma.drain(acc)
            plgpu.barrier_arrive(empty.at[last])
            return acc, last

        def unit(unit, stage):
            row = unit.row + wg * (64 * tile.blocks)
            bias = None
            if "bias" in refs:
                bias = store.load_bias(refs["bias"], row, 64 * tile.blocks)
            acc, last = product(unit, stage)
            stage = self.next(last)
            self.leave(acc, bias, row, unit, stage, wg)
            if self.joining_steps:
                stage = self.after(stage, self.of_last(unit, self.joining_steps))
            return stage

        stage = jnp.int32(0)
        if self.firsts:
            stage = self.firsts.consume(wg, stage)
        self.each_unit(unit, stage)
        plgpu.wait_smem_to_gmem(0)

    def add_up(self, x, unit, number):
        """The tokens of a step's inputs, in one of the CTAs that have these tokens."""
        if "sums" not in self.refs:
            return
        tile = self.tile
        step = jnp.int32(unit.start + number)  # loops count in int64 where JAX has it
        rows = jnp.int32(self.grid[0] * tile.down)

        @pl.when(lax.rem(step, rows) == lax.div(unit.row, jnp.int32(tile.rows)))
        def _():
            place = lax.div(unit.column, jnp.int32(tile.tokens))
            input_sums.store(x, self.refs["sums"], place, step)

    def leave(self, acc, bias, row, unit, stage, wg):
        refs, cluster = self.refs, self.tile.cluster
        if not self.shared:
            return self.store(acc, bias, row, unit.column, stage, wg)
        if self.together:
            return self.bring_together(acc, bias, row, unit, stage, wg)

        member = self.member
        held = wgmma.registers(acc)

        @pl.when(unit.slot >= 0)
        def _():
            slot = unit.slot * cluster + member
            parts.leave(acc, held, refs["partial"], refs["flags"], slot)

        @pl.when(unit.slot < 0)
        def _():
            def add(part, acc):
                slot = self.schedule.slot_of(unit.index, part) * cluster + member
                return parts.add(acc, held, refs["partial"], refs["flags"], slot)

            added = lax.fori_loop(0, unit.others, add, acc)
            self.store(added, bias, row, unit.column, stage, wg)

    def bring_together(self, acc, bias, row, unit, stage, wg):
        held, place = wgmma.registers(acc), self.refs["exchange"]

        @pl.when(unit.slot >= 0)
        def _():
            exchange.send(acc, held, place, unit.slot)

        @pl.when(unit.slot < 0)
        def _():
            added = exchange.receive(acc, held, place, self.tile.along - 1)
            self.store(added, bias, row, unit.column, stage, wg)

    def store(self, acc, bias, row, column, stage, wg):
        tile, refs = self.tile, self.refs
        full, empty = refs["full"], refs["empty"]
        results = [("y", self.activation)]
        if "z" in refs:
            results.insert(0, ("z", None))
        blocks = range(tile.blocks)
        if self.gated:
            row, blocks = lax.div(row, jnp.int32(2)), range(1)
        if "y" in refs and refs["y"].dtype != self.x[0].dtype:
            for block, (name, activation) in itertools.product(blocks, results):
                place = row + 64 * block, column
                store.store_float32(acc, bias, refs[name], block, *place, activation, self.gated)
            return

        mine = self.after(stage, wg * tile.blocks)
        if self.joining_steps:
            # The other warpgroup's, which alone reads them.
            first = self.after(stage, (CONSUMERS - 1 - wg) * tile.blocks)
            others = [self.after(first, block) for block in range(tile.blocks)]
            for other in others:
                plgpu.barrier_wait(full.at[other])
            frame.meet()  # in a cluster one warp's arrival is that of all
            for other in others:
                plgpu.barrier_arrive(empty.at[other])
        chunks = range(0, tile.tokens, tile.slot_tokens)
        stores = itertools.product(blocks, chunks, results)
        for count, (block, first, (name, activation)) in enumerate(stores):
            slot = refs["out_smem"].at[wg, count % tile.slots]
            here = self.after(mine, block)
            if self.joining_steps and first == 0 and name == results[0][0]:
                plgpu.barrier_wait(full.at[here])
            joining = None
            if self.joining_steps and name == "y":
                joining = store.Joining(refs["x_smem"].at[here], self.through)
            plgpu.wait_smem_to_gmem(tile.slots - 1, wait_read_only=True)
            store.store_transposed(
                acc, bias, slot, block, first, self.dtype, activation, joining, self.gated
            )
            plgpu.commit_smem()
            if joining is not None and first == chunks[-1]:  # all warps have read it
                plgpu.barrier_arrive(empty.at[here])
            self.send(name, slot, column + first, row + 64 * block)

    def send(self, name: str, slot, column, row):
        """A slot of 64 outputs on its way to memory, of the section that has them."""
        tokens = pl.ds(column, self.tile.slot_tokens)
        if self.sections is None:
            plgpu.copy_smem_to_gmem(slot, self.refs[name].at[tokens, pl.ds(row, 64)])
            return

        def put(number, first):  # what lies beyond the last section, TMA clips
            out = self.refs[f"{name}{number}"]
            plgpu.copy_smem_to_gmem(slot, out.at[tokens, pl.ds(first, 64)])

        frame.in_section(self.sections, row, put)
