"""Parts of a tile between the CTAs of a cluster, in shared memory: the first one gets those of all others.

For CTAs that have one tile in all: a place is filled once.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx
from pallas_kernels.mosaic.frame import CONSUMERS
from pallas_kernels.mosaic.parts import SPLAT, Registers

HEAD = 128  # bytes for a barrier of each warpgroup
REF = plgpu.RefType()


def nbytes(parts: int, values: int) -> int:
    """Of shared memory, for so many parts of `values` float32 numbers."""
    return HEAD + 4 * parts * values if parts else 0


def prepare(ref, parts: int, values: int) -> None:
    """All threads of all CTAs, before any sends: `ref` will receive so many parts of `values` numbers."""
    expected = 4 * parts * values // CONSUMERS

    @plgpu.inline_mgpu(arg_types=(REF,))
    def body(ctx, ref):
        for wg in range(CONSUMERS):
            expect(ops.add(ptx.shared_address(ref), 8 * wg), ops.const(expected))
        ptx.asm("fence.mbarrier_init.release.cluster;")
        ptx.asm("barrier.cluster.arrive.release.aligned;")

    body(ref)


def send(mine, held: Registers, ref, part) -> None:
    """A warpgroup's `mine` into place `part` of the first CTA."""

    @plgpu.inline_mgpu(arg_types=(held.layout, REF, SPLAT))
    def body(ctx, mine, ref, part):
        values = held.values_of(mine)
        here = ptx.shared_address(ref)
        place = _place(here, len(values), part.registers.item())
        barrier = ptx.sum_of(here, ops.mul(_warpgroup(), 8))
        ptx.asm("barrier.cluster.wait.acquire.aligned;")
        target, barrier = (of_cta(address, 0) for address in (place, barrier))
        for i in range(0, len(values), 4):
            ptx.asm(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
                f" [$0+{512 * i}], {{$2,$3,$4,$5}}, [$1];",
                target,
                barrier,
                *values[i : i + 4],
            )

    body(mine, ref, part)


def receive(mine, held: Registers, ref, parts: int):
    """`mine` and all parts, added in order."""

    @plgpu.inline_mgpu(arg_types=(held.layout, REF), return_type=held.type)
    def body(ctx, mine, ref):
        here = ptx.shared_address(ref)
        ptx.asm("barrier.cluster.wait.acquire.aligned;")
        wait(ptx.sum_of(here, ops.mul(_warpgroup(), 8)))
        values = held.values_of(mine)
        for part in range(parts):
            place = _place(here, len(values), ops.const(part))
            for i in range(0, len(values), 4):
                theirs = ptx.asm(
                    f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{512 * i}];", place, results="ffff"
                )
                values[i : i + 4] = ptx.add_floats(values[i : i + 4], theirs)
        return held.from_values(values)

    return body(mine, ref)


# What a CTA receives once, in inline code: bytes that others store into its shared memory.


def expect(barrier, count) -> None:
    """One thread prepares a barrier for so many bytes; a fence and a barrier of the cluster must follow."""
    ptx.asm(
        "{ .reg .pred p; setp.eq.s32 p, $2, 0; @p mbarrier.init.shared.b64 [$0], 1;"
        " @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
        barrier,
        count,
        mutils.thread_idx(),
    )


def of_cta(address, owner: int):
    """An address of shared memory, in another CTA of the cluster."""
    return ptx.asm(f"mapa.shared::cluster.u32 $0, $1, {owner};", address, results="r", pure=True)


def wait(barrier) -> None:
    """Until all bytes are there."""
    ptx.asm(
        "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"
        " p, [$0], 0; @!p bra WAIT; }",
        barrier,
    )


def _warpgroup():
    return llvm.lshr(mutils.thread_idx(), ops.const(7))


def _place(here, values: int, part):
    """The thread's first 16 bytes of a part, in which those of all threads take turns."""
    number = ptx.sum_of(ops.mul(part, CONSUMERS), _warpgroup())
    thread = llvm.and_(mutils.thread_idx(), ops.const(127))
    return ops.add(ptx.sum_of(here, ops.mul(number, 512 * values), ops.mul(thread, 16)), HEAD)
