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

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import frame, keep, launch, parts, wgmma
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.schedule import Schedule
from pallas_kernels.mosaic.sddmm_tiles import Tile, candidates, choose
from pallas_kernels.sections import Sections

__all__ = ["Tile", "candidates", "choose", "nm_sddmm"]


@launch.once("tile", "out_dtype", "processors")
def nm_sddmm(
    x: jax.Array,
    dy: jax.Array | Sections,
    metadata: jax.Array,
    tile: Tile,
    *,
    out_dtype=jnp.float32,
    into: jax.Array | None = None,
    processors: int = 132,
) -> jax.Array:
    """(in / 2, out): the entries of x.T @ dy that 2:4 `metadata` (in / 8, out) keeps.

    Args:
      x: (tokens, in), dy: (tokens, out), bfloat16 or float16; in and out multiples of 8,
        sections of dy of 64.
      out_dtype: float32, bfloat16 or float16.
      into: (in / 2, out) float32 or `out_dtype`, added to the product; in place where it is donated
        and has `out_dtype`.
    """
    (tokens, k), f = x.shape, dy.shape[1]
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype not in (jnp.float32, x.dtype):  # values leave through a stage of x's dtype
        into = None if into is None else into.astype(jnp.float32)
        exact = nm_sddmm(x, dy, metadata, tile, into=into, processors=processors)
        return exact.astype(out_dtype)
    schedule = tile.schedule(tokens, k, f, processors)
    operands = frame.named("dy", dy) | {"x": x, "metadata": metadata}
    results = {}
    in_place = into is not None and into.dtype == out_dtype
    if in_place:
        operands["out"] = into
    else:
        results["out"] = jax.ShapeDtypeStruct((k // 2, f), out_dtype)
        if into is not None:
            operands["into"] = into
    if schedule.slots:
        shape = (
            schedule.slots * tile.cluster,
            CONSUMERS,
            tile.rows // CONSUMERS * tile.columns // 2,
        )
        results["partial"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    empty, cluster = plgpu.Barrier, {}
    if tile.cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("down", "across"))
        cluster = {"cluster": (tile.down, tile.across), "cluster_names": ("down", "across")}
    scratch = {
        "ring": plgpu.SMEM(
            (tile.stages, sum(tile.boxes), STEP, 64),
            x.dtype,
            transforms=wgmma.SWIZZLED,
        ),
        "full": plgpu.Barrier(num_arrivals=sum(tile.boxes), num_barriers=tile.stages),
        "empty": empty(num_arrivals=CONSUMERS, num_barriers=tile.stages),
    }
    names = [*operands, *results]

    def body(*refs, **scratch_refs):
        refs = dict(zip(names, refs, strict=True)) | scratch_refs
        if in_place:
            refs["into"] = refs["out"]
        halves = _Kernel(tile, schedule, refs)
        frame.run(halves.produce, halves.consume)

    kernel = launch.kernel(
        body,
        out_type=tuple(results.values()),
        grid=(schedule.processors,),
        grid_names=("grid",),
        **cluster,
        scratch_types=scratch,
        **frame.OPTIONS,
        name="nm_sddmm",
    )
    if in_place:
        return launch.in_place(kernel, operands, "out")[1][0]
    return dict(zip(results, kernel(*operands.values()), strict=True))["out"]


class _Kernel:
    """The body: `refs` are the operands, results and scratch by name."""

    def __init__(self, tile: Tile, schedule: Schedule, refs: dict):
        self.tile, self.schedule, self.refs = tile, schedule, refs
        self.dtype = str(refs["x"].dtype)
        self.out_dtype = str(refs["out"].dtype)
        self.staged = self.out_dtype != "float32"
        self.dy = frame.sections("dy", refs)
        self.sizes = [dy.shape[1] for dy in self.dy]
        self.grid = tile.grid(refs["x"].shape[1], sum(self.sizes))
        self.boxes = tile.boxes
        if schedule.slots:
            flags = plgpu.SemaphoreType.REGULAR((CONSUMERS * schedule.slots * tile.cluster,))
            refs["flags"] = pl.get_global(flags)

    def each_unit(self, body, init):
        """Calls body(number, tile, row, column, start, stop, slot, others, carry) -> carry."""
        processor = lax.axis_index("grid")

        def unit(number, carry):
            index, *rest = self.schedule.unit(processor, number)
            row, column = plgpu.planar_snake(index, self.grid, 0, self.tile.snake)
            if self.tile.cluster > 1:
                row = row * self.tile.down + lax.axis_index("down")
                column = column * self.tile.across + lax.axis_index("across")
            place = row * self.tile.rows, column * self.tile.columns
            return body(number, index, *place, *rest, carry)

        return lax.fori_loop(0, self.schedule.units(processor), unit, init)

    def next(self, stage):
        return frame.next_stage(stage, self.tile.stages)

    def before(self, stage):
        return lax.select(stage == 0, jnp.int32(self.tile.stages - 1), stage - 1)

    def produce(self):
        refs, tile = self.refs, self.tile
        ring, full, empty = refs["ring"], refs["full"], refs["empty"]

        def acquire(stage, count):
            @pl.when(count >= tile.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

        def unit(number, index, row, column, start, stop, slot, others, carry):
            def step(i, carry):
                stage, count = carry
                acquire(stage, count)
                tokens = pl.ds((start + i) * STEP, STEP)

                def copy(source, block, axis, first):
                    plgpu.copy_gmem_to_smem(
                        source.at[tokens, pl.ds(first, 64)],
                        ring.at[stage, block],
                        full.at[stage],
                        collective_axes=(axis,) if getattr(tile, axis) > 1 else None,
                    )

                for b in range(self.boxes[0]):

                    def outputs(number, first, b=b):
                        copy(self.dy[number], b, "across", first)

                    frame.in_section(self.sizes, row + 64 * b, outputs)
                for b in range(self.boxes[1]):
                    copy(refs["x"], self.boxes[0] + b, "down", column + 64 * b)
                return self.next(stage), count + 1

            stage, count = lax.fori_loop(0, stop - start, step, carry)
            acquire(stage, count)  # for the epilogue
            for _ in range(sum(self.boxes)):
                plgpu.barrier_arrive(full.at[stage])
            return self.next(stage), count + 1

        _, count = self.each_unit(unit, (jnp.int32(0), jnp.int32(0)))
        if tile.cluster > 1:  # outlive the last arrivals from the rest of the cluster
            for stage in range(tile.stages):

                @pl.when(count > stage)
                def _(stage=stage):
                    plgpu.barrier_wait(empty.at[stage])

    def consume(self, wg):
        refs, tile = self.refs, self.tile
        ring, full, empty = refs["ring"], refs["full"], refs["empty"]
        mine = pl.ds(wg * tile.blocks, tile.blocks)
        shared = pl.ds(self.boxes[0], self.boxes[1])
        rows = 64 * tile.blocks

        def step(acc, stage, previous):
            plgpu.barrier_wait(full.at[stage])
            acc = wgmma.multiply_transposed(
                acc, ring.at[stage, mine], ring.at[stage, shared], tile.columns, self.dtype
            )
            wgmma.wait(1)
            if previous is not None:
                plgpu.barrier_arrive(empty.at[previous])
            return acc

        def unit(number, index, row, column, start, stop, slot, others, carry):
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
            self.leave(kept, wg, stage, index, first_row, column, slot, others)
            return self.next(stage)

        stage = self.each_unit(unit, jnp.int32(0))
        if self.staged:
            plgpu.wait_smem_to_gmem(0)

            @pl.when(self.schedule.units(lax.axis_index("grid")) > 0)
            def _():
                plgpu.barrier_arrive(empty.at[self.before(stage)])

    def leave(self, kept, wg, stage, index, row, column, slot, others):
        refs, cluster = self.refs, self.tile.cluster
        if not self.schedule.slots:
            return self.finish(kept, wg, stage, row, column)

        member = jnp.int32(0)
        if cluster > 1:
            member = lax.axis_index("down") * self.tile.across + lax.axis_index("across")

        @pl.when(slot >= 0)
        def _():
            parts.leave(
                kept, keep.registers(kept), refs["partial"], refs["flags"], slot * cluster + member
            )

        @pl.when(slot < 0)
        def _():
            def add(part, kept):
                slot = self.schedule.slot_of(index, part) * cluster + member
                return parts.add(kept, keep.registers(kept), refs["partial"], refs["flags"], slot)

            self.finish(lax.fori_loop(0, others, add, kept), wg, stage, row, column)

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
        height = math.gcd(tile.columns // 2, 64)  # values per box, so that none straddles two
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
