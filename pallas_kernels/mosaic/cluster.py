"""The few-token kernel's end: sums over warps and over the CTAs of a cluster, and the epilogue."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import activations, ops, ptx, warps


def open_exchange(geometry: warps.Geometry, ring_ref, share) -> None:
    """Prepares the barrier at which this CTA will receive the sums of its cluster."""
    g = geometry
    if g.split == 1:
        return

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT))
    def body(ctx, ring, share):
        units = ptx.minus(ops.const(g.units + g.split - 1), share.registers.item())
        expected = ops.mul(llvm.udiv(units, ops.const(g.split)), warps.UNIT_BYTES * g.split)
        ptx.asm(
            "{ .reg .pred p; setp.eq.s32 p, $2, 0; @p mbarrier.init.shared.b64 [$0], 1;"
            " @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
            ops.add(ptx.shared_address(ring), g.barrier_offset),
            expected,
            mutils.thread_idx(),
        )
        ptx.asm("fence.mbarrier_init.release.cluster;")
        ptx.asm("barrier.cluster.arrive.relaxed.aligned;")

    body(ring_ref, share)


def finish(geometry: warps.Geometry, acc, ring_ref, tile, share, refs, activation) -> None:
    """y = activation(z), z = acc, summed over the warps and CTAs that share inputs, + bias.

    Always in the same order: the warps of a CTA add theirs in shared memory, and the CTAs of a
    cluster send each other the units that they are to complete.

    Args:
      refs: "y", and "z" and "bias" if there are any, in global memory.
    """
    g = geometry
    used = {name: refs[name] for name in ("y", "z", "bias") if name in refs}

    @plgpu.inline_mgpu(
        arg_types=(g.layout, warps.REF, warps.SPLAT, warps.SPLAT, *(warps.REF,) * len(used))
    )
    def body(ctx, acc, ring, tile, share, *arrays):
        tile, share = tile.registers.item(), share.registers.item()
        lane = warps.Lane(g)
        ring = ptx.shared_address(ring)
        arrays = dict(zip(used, arrays, strict=True))
        complete = functools.partial(_complete, g, lane, tile, arrays, activation)
        units = (_own_units if g.along == 1 else _added_units)(g, lane, ring, warps.from_sums(acc))
        ptx.asm("cp.async.wait_group 0;")
        if g.split == 1:
            for unit, known, values in units:
                complete(unit, known, values)
            return
        ptx.asm("barrier.cluster.wait.acquire.aligned;")
        for unit, known, values in units:
            _send(g, lane, ring, share, unit, known, values)
        ptx.asm(
            "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"
            " p, [$0], 0; @!p bra WAIT; }",
            ops.add(ring, g.barrier_offset),
        )
        for unit, known, values in _received_units(g, lane, ring, share):
            complete(unit, known, values)

    body(acc, ring_ref, tile, share, *used.values())


# Units: (number in the tile, whether there is one or None for always, 8 values a lane).


def _own_units(g, lane, ring, sums):
    """Of a warp that has its inputs to itself: straight from its registers."""
    for pair in range(g.width // 4):
        n, e = divmod(pair, 2)
        unit = ops.add(ops.mul(lane.across, g.width // 4), pair)
        yield unit, None, [sums[g.register(j // 2, n, 2 * (j % 2) + e)] for j in range(8)]


def _added_units(g, lane, ring, sums):
    """Of all warps: laid down in the ring, which nobody reads any more, and added."""
    ring = ptx.sum_of(ring, ops.mul(lane.lane, 16))
    target = ptx.sum_of(ring, ops.mul(lane.warp, 256 * g.width))
    ptx.asm("bar.sync 0;")
    for pair, (_, _, values) in enumerate(_own_units(g, lane, ring, sums)):
        for q in range(2):
            ptx.asm(
                f"st.shared.v4.f32 [$0+{warps.UNIT_BYTES * pair + 512 * q}], {{$1,$2,$3,$4}};",
                target,
                *values[4 * q : 4 * q + 4],
            )
    ptx.asm("bar.sync 0;")
    for first in range(0, g.units, g.warps):
        unit = ops.add(lane.warp, first)
        known = None if first + g.warps <= g.units else ops.less(unit, g.units)
        place = unit if known is None else ptx.select(known, unit, ops.const(0))
        address = ptx.sum_of(ring, ops.mul(place, warps.UNIT_BYTES))
        yield unit, known, _sum_units(address, g.along, g.units)


def _received_units(g, lane, ring, share):
    ring = ptx.sum_of(ring, ops.mul(lane.lane, 16))
    for first in range(0, g.received, g.warps):
        number = ops.add(lane.warp, first)
        unit = ptx.sum_of(ops.mul(number, g.split), share)
        known = ops.less(unit, g.units)
        place = ops.mul(ptx.select(known, number, ops.const(0)), warps.UNIT_BYTES)
        address = ops.add(ptx.sum_of(ring, place), g.receive_offset)
        yield unit, known, _sum_units(address, g.split, g.received)


def _sum_units(address, count: int, apart: int):
    """The sum of `count` values of a unit, `apart` units from one to the next."""
    total = None
    for part in range(count):
        first = warps.UNIT_BYTES * apart * part
        values = [
            value
            for offset in (first, first + 512)
            for value in ptx.asm(
                f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{offset}];", address, results="ffff"
            )
        ]
        total = values if total is None else _add(total, values)
    return total


def _send(g, lane, ring, share, unit, known, values) -> None:
    """To the CTA that completes this unit."""
    number, owner = llvm.udiv(unit, ops.const(g.split)), llvm.urem(unit, ops.const(g.split))
    place = ops.mul(ptx.sum_of(ops.mul(share, g.received), number), warps.UNIT_BYTES)
    target = ops.add(ptx.sum_of(ring, place, ops.mul(lane.lane, 16)), g.receive_offset)
    target, barrier = (
        ptx.asm("mapa.shared::cluster.u32 $0, $1, $2;", address, owner, results="r", pure=True)
        for address in (target, ops.add(ring, g.barrier_offset))
    )
    guard = () if known is None else (known,)
    test, when = ("setp.ne.b32 p, $6, 0;", "@p ") if guard else ("", "")
    for q in range(2):
        ptx.asm(
            f"{{ .reg .pred p; {test}"
            f" {when}st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
            f" [$0+{512 * q}], {{$2,$3,$4,$5}}, [$1]; }}",
            target,
            barrier,
            *values[4 * q : 4 * q + 4],
            *guard,
        )


def _complete(g, lane, tile, arrays, activation, unit, known, values) -> None:
    pairs = g.width // 4
    across, pair = llvm.udiv(unit, ops.const(pairs)), llvm.urem(unit, ops.const(pairs))
    token = ptx.sum_of(
        ops.mul(llvm.lshr(pair, ops.const(1)), 8),
        ops.mul(lane.c, 2),
        llvm.and_(pair, ops.const(1)),
    )
    column = ptx.sum_of(
        ops.mul(tile, warps.OUTPUTS * g.across), ops.mul(across, warps.OUTPUTS), ops.mul(lane.g, 8)
    )
    inside = ops.less(column, g.f)
    if known is not None:
        inside = llvm.and_(inside, known)
    if "bias" in arrays:
        values = _add(values, _load_floats(arrays["bias"], column, inside))
    inside = llvm.and_(inside, ops.less(token, g.tokens))
    if "z" in arrays:
        _store(arrays["z"], values, token, column, inside, g.f)
    if activation is not None:
        values = [activations.PRECISE[activation](z) for z in values]
    _store(arrays["y"], values, token, column, inside, g.f)


def _store(out, values, token, column, inside, f: int) -> None:
    dtype = ptx.dtype_of(out)
    if dtype == "float32":
        target = ptx.global_address(out, token, 4 * f, ops.mul(column, 4))
        ptx.store16(target, values[:4], inside)
        ptx.store16(ops.add(target, 16), values[4:], inside)
    else:
        target = ptx.global_address(out, token, 2 * f, ops.mul(column, 2))
        words = [ptx.pack(values[i], values[i + 1], dtype) for i in range(0, 8, 2)]
        ptx.store16(target, words, inside)


def _load_floats(ref, column, inside):
    """8 consecutive elements as float32, zero where not inside."""
    dtype = ptx.dtype_of(ref)
    source = ptx.global_address(
        ref, ops.const(0), 0, ops.mul(column, 4 if dtype == "float32" else 2)
    )
    if dtype == "float32":
        words = [*ptx.load16(source, inside), *ptx.load16(ops.add(source, 16), inside)]
        return [llvm.bitcast(ir.F32Type.get(), word) for word in words]
    kind = ops.PTX_TYPE[dtype]
    return [
        value
        for word in ptx.load16(source, inside)
        for value in ptx.asm(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; "
            f"cvt.f32.{kind} $0, l; cvt.f32.{kind} $1, h; }}",
            word,
            results="ff",
            pure=True,
        )
    ]


def _add(x, y):
    return [llvm.fadd(a, b) for a, b in zip(x, y, strict=True)]
