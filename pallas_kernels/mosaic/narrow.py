"""t = x @ l with few columns, for many tokens: the first product of adapters.

There is little to multiply and x to read, so CTAs are made many by sharing the inputs: a cluster has
128 tokens, each of its CTAs a part of the inputs. Two consumer warpgroups and a producer warp, as in
`matmul`, but x is wgmma's A, so that t lies as its readers want it. When all have multiplied, every
CTA completes some of the columns: the others send it their sums, into the ring that nobody reads any
more, and it adds them up in order.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import exchange, frame, launch, ops, ptx, wgmma
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.support import MOST_RANK

ROWS = 64  # tokens of a warpgroup
TOKENS = ROWS * CONSUMERS
COLUMNS = 8  # completed by one CTA
SHARES = (1, 2, 3, 4)
UNIT_BYTES = 16 * 128 * CONSUMERS  # four float32 numbers of each thread
HEAD = 128  # bytes for the barrier
REF, SPLAT = plgpu.RefType(), plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class Cut:
    """Clusters of `share` CTAs have 128 tokens each; a CTA's ring has `stages` of 64 inputs."""

    share: int = 1
    stages: int = 4

    def __post_init__(self):
        if self.share not in SHARES:
            raise ValueError(f"{self}: share must be 1 to {SHARES[-1]}, the CTAs of a cluster")
        if self.stages < 2:
            raise ValueError(f"{self}: a ring has at least 2 stages")

    def check(self, k: int, rank: int) -> None:
        """Raises a ValueError unless it fits so many inputs and columns."""
        if self.share > pl.cdiv(k, STEP):
            raise ValueError(f"{self}: {k} inputs leave some CTAs without any, {STEP} at a time")
        if rank % COLUMNS or not COLUMNS <= rank <= MOST_RANK:
            raise ValueError(
                f"rank is {rank}; this kernel takes multiples of {COLUMNS} up to {MOST_RANK}"
            )
        if (sums := self.sums(rank)) > self.stages * stage_bytes(rank):
            raise ValueError(f"{self}: sums of {sums} bytes need more stages")
        needed = self.stages * stage_bytes(rank) + HEAD
        if needed > frame.SHARED_MEMORY:
            raise ValueError(f"{self}: needs {needed} bytes of {frame.SHARED_MEMORY}")

    def units(self, rank: int) -> int:
        """Of `COLUMNS` columns, that a CTA completes at most."""
        return pl.cdiv(rank // COLUMNS, self.share)

    def sums(self, rank: int) -> int:
        """Bytes in the ring, of what all CTAs of a cluster send to one."""
        return self.share * self.units(rank) * UNIT_BYTES if self.share > 1 else 0


def stage_bytes(rank: int) -> int:
    return (TOKENS + pl.cdiv(rank, 64) * 64) * STEP * 2


def choose(tokens: int, k: int, rank: int, *, processors: int = 132) -> Cut:
    """As many CTAs for the same tokens as there are processors for, with as deep a ring as fits.

    Up to four: 16 clusters of eight do not run at once, nor do 32 of four.

    >>> choose(2048, 5120, 80), choose(8192, 4096, 64)
    (Cut(share=4, stages=7), Cut(share=2, stages=9))
    """
    tiles, steps = pl.cdiv(tokens, TOKENS), pl.cdiv(k, STEP)
    share = max(
        share
        for share in SHARES
        if share == 1 or (share <= steps and tiles <= frame.clusters(processors, share))
    )
    most = (frame.SHARED_MEMORY - HEAD) // stage_bytes(rank)
    return Cut(share, min(most, max(3, pl.cdiv(steps, share))))


@launch.once("cut", "transposed")
def narrow_product(
    x: jax.Array, left: jax.Array, cut: Cut, *, transposed: bool = False
) -> jax.Array:
    """x @ left, or x @ left.T, in x's dtype.

    Args:
      x: (tokens, in), bfloat16 or float16; in is a multiple of 8, tokens are any number > 0.
      left: (in, rank) in x's dtype, or (rank, in) if transposed; rank a multiple of 8 up to 128.

    Raises:
      ValueError: the cut does not fit the product.
    """
    tokens = x.shape[0]
    rank = left.shape[0 if transposed else 1]
    cut.check(x.shape[1], rank)
    blocks = pl.cdiv(rank, 64)
    blocked = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=wgmma.SWIZZLED)
    scratch = {
        "ring": blocked((cut.stages, TOKENS // 64 + blocks, STEP, 64)),
        "full": plgpu.Barrier(num_arrivals=TOKENS // 64 + blocks, num_barriers=cut.stages),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=cut.stages),
        "head": plgpu.SMEM((HEAD,), jnp.uint8),
    }
    names = ("x", "left", "t")

    def body(*refs, **scratch_refs):
        refs = dict(zip(names, refs, strict=True)) | scratch_refs
        halves = _Kernel(cut, rank, transposed, refs)
        halves.prepare()
        frame.run(halves.produce, halves.consume)

    cluster = {"cluster": (cut.share,), "cluster_names": ("share",)} if cut.share > 1 else {}
    kernel = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, rank), x.dtype),
        grid=(pl.cdiv(tokens, TOKENS),),
        grid_names=("tile",),
        **cluster,
        scratch_types=scratch,
        **frame.OPTIONS,
        name="narrow_product",
    )
    return kernel(x, left)


class _Kernel:
    """The body: `refs` are the operands, result and scratch by name."""

    def __init__(self, cut: Cut, rank: int, transposed: bool, refs: dict):
        self.cut, self.rank, self.transposed, self.refs = cut, rank, transposed, refs
        self.dtype = str(refs["x"].dtype)
        self.steps = pl.cdiv(refs["x"].shape[1], STEP)
        self.share = lax.axis_index("share") if cut.share > 1 else jnp.int32(0)

    def bounds(self):
        """The first of this CTA's steps, and the first that is not."""
        return (lax.div((self.share + i) * self.steps, jnp.int32(self.cut.share)) for i in (0, 1))

    def next(self, stage):
        return frame.next_stage(stage, self.cut.stages)

    def prepare(self):
        """The barrier at which this CTA will receive what it completes."""
        cut, units = self.cut, self.rank // COLUMNS
        if cut.share == 1:
            return

        @plgpu.inline_mgpu(arg_types=(REF, SPLAT))
        def body(ctx, head, share):
            own = ptx.minus(ops.const(units + cut.share - 1), share.registers.item())
            expected = ops.mul(llvm.udiv(own, ops.const(cut.share)), UNIT_BYTES * cut.share)
            exchange.expect(ptx.shared_address(head), expected)
            ptx.asm("fence.mbarrier_init.release.cluster;")

        body(self.refs["head"], self.share)

    def produce(self):
        refs, cut = self.refs, self.cut
        ring, full = refs["ring"], refs["full"]
        row = lax.axis_index("tile") * TOKENS
        zero = row - row  # TMA may read beyond the ends, and constants may not
        start, stop = self.bounds()

        def step(k, carry):
            stage, count = carry

            @pl.when(count >= cut.stages)
            def _():
                plgpu.barrier_wait(refs["empty"].at[stage])

            inputs = pl.ds(k * STEP, STEP)
            sources = [
                refs["x"].at[pl.ds(row + first, 64), inputs] for first in range(0, TOKENS, 64)
            ]
            for first in range(0, self.rank, 64):
                columns = pl.ds(zero + first, 64)
                place = (columns, inputs) if self.transposed else (inputs, columns)
                sources.append(refs["left"].at[place])
            for block, source in enumerate(sources):
                plgpu.copy_gmem_to_smem(source, ring.at[stage, block], full.at[stage])
            return self.next(stage), count + 1

        lax.fori_loop(start, stop, step, (jnp.int32(0), jnp.int32(0)))

    def consume(self, wg):
        refs = self.refs
        start, stop = self.bounds()
        blocks = pl.ds(TOKENS // 64, pl.cdiv(self.rank, 64))

        def step(acc, stage):
            plgpu.barrier_wait(refs["full"].at[stage])
            x, left = refs["ring"].at[stage, wg], refs["ring"].at[stage, blocks]
            return wgmma.multiply_rows(acc, x, left, self.rank, self.dtype, self.transposed)

        def again(_, state):
            acc, previous = state
            here = self.next(previous)
            acc = step(acc, here)
            wgmma.wait(1)
            plgpu.barrier_arrive(refs["empty"].at[previous])
            return acc, here

        first = (step(None, jnp.int32(0)), jnp.int32(0))
        acc, _ = lax.fori_loop(start + 1, stop, again, first)
        self.finish(wgmma.drain(acc), wg)

    def finish(self, acc, wg):
        """Stores the sums, of all CTAs that share the inputs."""
        cut, rank = self.cut, self.rank
        held = wgmma.registers(acc)
        row = lax.axis_index("tile") * TOKENS + wg * ROWS
        used = (self.refs["ring"], self.refs["head"], self.refs["t"])

        @plgpu.inline_mgpu(
            arg_types=(held.layout, plgpu.RefType(wgmma.SWIZZLED), REF, REF, SPLAT, SPLAT)
        )
        def body(ctx, acc, ring, head, t, row, share):
            values, row, share = held.values_of(acc), row.registers.item(), share.registers.item()
            store = functools.partial(_store, t, row, self.dtype, rank)
            units = [values[i : i + 4] for i in range(0, len(values), 4)]
            if cut.share == 1:
                for unit, four in enumerate(units):
                    store(ops.const(COLUMNS * unit), four)
                return
            ring, barrier = ptx.shared_address(ring), ptx.shared_address(head)
            # Of all that have not ended: producers have, when all is loaded.
            ptx.asm("barrier.cluster.arrive.release.aligned;")
            ptx.asm("barrier.cluster.wait.acquire.aligned;")
            place = _place(ring, share, cut.units(rank))
            for unit, four in enumerate(units):
                number, owner = divmod(unit, cut.share)
                _send(ops.add(place, number * UNIT_BYTES), barrier, owner, four)
            exchange.wait(barrier)
            for number in range(cut.units(rank)):
                column = ops.mul(ops.add(share, number * cut.share), COLUMNS)
                total = None
                for part in range(cut.share):
                    here = _place(ring, ops.const(part), cut.units(rank))
                    four = _load(ops.add(here, number * UNIT_BYTES))
                    total = four if total is None else ptx.add_floats(total, four)
                store(column, total)

        body(acc, *used, row, self.share)


def _thread():
    return llvm.and_(mutils.thread_idx(), ops.const(128 * CONSUMERS - 1))


def _place(ring, part, units: int):
    """Where this thread's numbers of a part's first unit lie."""
    return ptx.sum_of(ring, ops.mul(part, units * UNIT_BYTES), ops.mul(_thread(), 16))


def _send(place, barrier, owner: int, four) -> None:
    target, barrier = (exchange.of_cta(address, owner) for address in (place, barrier))
    ptx.asm(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
        " [$0], {$2,$3,$4,$5}, [$1];",
        target,
        barrier,
        *four,
    )


def _load(place) -> list:
    return ptx.asm("ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", place, results="ffff")


def _store(t, first_row, dtype: str, rank: int, column, four) -> None:
    """Two neighbouring columns of two rows, 8 apart, unless they lie outside of t (tokens, rank)."""
    tokens = t.type.shape[0]
    thread = llvm.and_(mutils.thread_idx(), ops.const(127))
    lane, warp = llvm.and_(thread, ops.const(31)), llvm.lshr(thread, ops.const(5))
    row = ptx.sum_of(first_row, ops.mul(warp, 16), llvm.lshr(lane, ops.const(2)))
    column = ops.add_reg(column, ops.mul(llvm.and_(lane, ops.const(3)), 2))
    target = ptx.global_address(t, row, 2 * rank, ops.mul(column, 2))
    known = ops.less(column, rank)
    for half in (0, 1):
        inside = llvm.and_(known, ops.less(row, tokens - 8 * half))
        ptx.asm(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }",
            ops.add(target, 16 * rank * half),
            ptx.pack(*four[2 * half : 2 * half + 2], dtype),
            inside,
        )
