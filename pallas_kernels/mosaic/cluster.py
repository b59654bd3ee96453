"""CTAs of the kernels for few tokens: launch, sums over warps and over a cluster, and the epilogue."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import activations, exchange, launch, normed, ops, ptx, warps


def kernel(geometry: warps.Geometry, body, *, out_type, grid: dict[str, int], name: str):
    """A kernel on a grid of clusters of CTAs, each the `share`-th of its cluster if not alone.

    `body` gets operands, results, and the CTA's shared memory.
    """
    g = geometry
    clusters = {"cluster": (g.split,), "cluster_names": ("share",)}
    return launch.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=g.warps // 4,
        thread_name="wg",
        **(clusters if g.split > 1 else {}),
        scratch_types=[plgpu.SMEM((g.shared_memory,), jnp.uint8)],
        # Safe here: the inline parts hold their own barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name=name,
    )


def share_of(geometry: warps.Geometry) -> jax.Array:
    """The number of this CTA in its cluster."""
    return lax.axis_index("share") if geometry.split > 1 else jnp.int32(0)


def open_exchange(geometry: warps.Geometry, ring_ref, share) -> None:
    """Prepares the barrier at which this CTA will receive the sums of its cluster."""
    g = geometry
    if g.split == 1:
        return

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT))
    def body(ctx, ring, share):
        units = ptx.minus(ops.const(g.units + g.split - 1), share.registers.item())
        expected = ops.mul(llvm.udiv(units, ops.const(g.split)), warps.UNIT_BYTES * g.split)
        exchange.expect(ops.add(ptx.shared_address(ring), g.barrier_offset), expected)
        ptx.asm("fence.mbarrier_init.release.cluster;")
        ptx.asm("barrier.cluster.arrive.relaxed.aligned;")

    body(ring_ref, share)


def finish(
    geometry: warps.Geometry, acc, ring_ref, tile, share, refs, activation=None, first_row=0
) -> None:
    """y = activation(z) + residual, z = acc, summed over the warps and CTAs that share inputs, + bias.

    Always in the same order: the warps of a CTA add theirs in shared memory, and the CTAs of a
    cluster send each other the units that they are to complete.

    Args:
      refs: "y", and "z", "bias", "residual" and "moments" if there are any, in global memory.
      first_row: of y, z and residual, which the first token has.
    """
    g = geometry
    names = ("y", "z", "bias", "residual", "moments")
    used = {name: refs[name] for name in names if name in refs}

    @plgpu.inline_mgpu(
        arg_types=(g.layout, warps.REF, *(warps.SPLAT,) * 3, *(warps.REF,) * len(used))
    )
    def body(ctx, acc, ring, tile, share, row, *arrays):
        tile, share, row = (s.registers.item() for s in (tile, share, row))
        lane = warps.Lane(g)
        ring = ptx.shared_address(ring)
        arrays = dict(zip(used, arrays, strict=True))
        complete = functools.partial(_complete, g, lane, tile, row, arrays, activation)
        units = (_own_units if g.along == 1 else _added_units)(g, lane, ring, warps.values_of(acc))
        ptx.asm("cp.async.wait_group 0;")
        if g.split == 1:
            for unit, known, values in units:
                complete(unit, known, values)
            return
        ptx.asm("barrier.cluster.wait.acquire.aligned;")
        for unit, known, values in units:
            _send(g, lane, ring, share, unit, known, values)
        exchange.wait(ops.add(ring, g.barrier_offset))
        for unit, known, values in _received_units(g, lane, ring, share):
            complete(unit, known, values)

    body(acc, ring_ref, tile, share, jnp.int32(first_row), *used.values())


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
        total = values if total is None else ptx.add_floats(total, values)
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


def _complete(g, lane, tile, first_row, arrays, activation, unit, known, values) -> None:
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
    of_matrix = inside = ops.less(column, g.f)
    if known is not None:
        inside = llvm.and_(inside, known)
    if "bias" in arrays:
        values = ptx.add_floats(values, _load_floats(arrays["bias"], column, inside))
    inside = llvm.and_(inside, ops.less(token, g.tokens))
    row = ptx.sum_of(token, first_row)
    if "z" in arrays:
        _store(arrays["z"], values, row, column, inside, g.f)
    if activation is not None:
        values = [activations.PRECISE[activation](z) for z in values]
    if "residual" in arrays:
        values = ptx.add_floats(values, _load_floats(arrays["residual"], column, inside, row, g.f))
    _store(arrays["y"], values, row, column, inside, g.f)
    if "moments" in arrays:
        values = _as_stored(values, ptx.dtype_of(arrays["y"]))
        block = ptx.sum_of(ops.mul(tile, g.across), across)
        place = (token, block, inside)
        normed.store_moments(g, lane, arrays["moments"], values, of_matrix, place)


def _as_stored(values: list, dtype: str) -> list:
    if dtype == "float32":
        return values
    words = [ptx.pack(values[i], values[i + 1], dtype) for i in range(0, 8, 2)]
    return ptx.floats_of(words, dtype)


def _store(out, values, row, column, inside, f: int) -> None:
    dtype = ptx.dtype_of(out)
    if dtype == "float32":
        target = ptx.global_address(out, row, 4 * f, ops.mul(column, 4))
        ptx.store16(target, values[:4], inside)
        ptx.store16(ops.add(target, 16), values[4:], inside)
    else:
        target = ptx.global_address(out, row, 2 * f, ops.mul(column, 2))
        words = [ptx.pack(values[i], values[i + 1], dtype) for i in range(0, 8, 2)]
        ptx.store16(target, words, inside)


def _load_floats(ref, column, inside, row=None, f: int = 0):
    """8 consecutive elements as float32, of a row of `f` if it has rows, zero where not inside."""
    dtype = ptx.dtype_of(ref)
    size = 4 if dtype == "float32" else 2
    row = ops.const(0) if row is None else row
    source = ptx.global_address(ref, row, size * f, ops.mul(column, size))
    if dtype == "float32":
        words = [*ptx.load(source, inside, 4), *ptx.load(ops.add(source, 16), inside, 4)]
        return [llvm.bitcast(ir.F32Type.get(), word) for word in words]
    return ptx.floats_of(ptx.load(source, inside, 4), dtype)
