"""The few-token kernel's inner parts as inline PTX: copies, `mma.sp`, and sums over a cluster.

A warp takes 64 outputs. Lane 4 g + c multiplies, of the 16 stored rows of a k32 step, rows 2 c,
2 c + 1 (and 8 further) of outputs 8 g .. 8 g + 7, as 16-byte pieces of the array in memory. Pairs
of halfwords of two such rows are operand registers of `mma.sp`, if its row g (and g + 8) in product
i of 4 is output 8 g + 2 i (and the next): with the outputs so permuted over the instruction's rows,
neither weights nor metadata nor results ever move between lanes.
"""

import dataclasses
import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import activations, ops

STEP = 64  # inputs that a warp takes at a time: two instructions' k
OUTPUTS = 64  # of a warp
VALUE_BYTES = STEP // 2 * OUTPUTS * 2
WARP_BYTES = VALUE_BYTES + STEP // 8 * OUTPUTS
UNIT_BYTES = 1024
SPLAT = plgpu.Layout.WG_SPLAT
REF = plgpu.RefType()
TUNE = {"prefetch": ".L2::128B"}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a product and of the CTAs that share it."""

    tokens: int
    k: int
    f: int
    dtype: str
    across: int  # warps side by side along the outputs
    along: int  # warps that share the inputs
    split: int  # CTAs of a cluster that share the inputs
    stages: int

    @property
    def width(self) -> int:
        """Tokens in whole instructions of 8."""
        return -(-self.tokens // 8) * 8

    @property
    def warps(self) -> int:
        return self.across * self.along

    @property
    def steps(self) -> int:
        return -(-self.k // STEP)

    @property
    def rounds(self) -> int:
        """Steps of a warp."""
        return -(-self.steps // (self.split * self.along))

    @property
    def stage_bytes(self) -> int:
        return self.warps * WARP_BYTES + self.along * self.width * STEP * 2

    @property
    def units(self) -> int:
        """Sums of a tile in units of 8 outputs of one token a lane."""
        return self.across * self.width // 4

    @property
    def received(self) -> int:
        """Units that a CTA finishes, at most."""
        return -(-self.units // self.split)

    @property
    def receive_offset(self) -> int:
        added = self.along * self.units * UNIT_BYTES if self.along > 1 else 0
        return max(self.stages * self.stage_bytes, added)

    @property
    def barrier_offset(self) -> int:
        received = self.split * self.received * UNIT_BYTES if self.split > 1 else 0
        return self.receive_offset + received

    @property
    def shared_memory(self) -> int:
        return self.barrier_offset + 16

    @property
    def layout(self):
        """Of the sums: 2 * width registers a thread, [product][8 tokens][4]."""
        return plgpu.Layout.WG_STRIDED((256 * self.width,), vec_size=1)

    @property
    def sums(self):
        return plgpu.ShapeDtypeStruct((256 * self.width,), jnp.float32, layout=self.layout)

    def register(self, i: int, n: int, j: int) -> int:
        return (i * (self.width // 8) + n) * 4 + j


class Lane:
    """Where this thread stands."""

    def __init__(self, g: Geometry):
        self.warp = mutils.warp_idx(sync=True)
        self.across = llvm.urem(self.warp, ops.const(g.across))
        self.along = llvm.udiv(self.warp, ops.const(g.across))
        self.lane = llvm.and_(mutils.thread_idx(), ops.const(31))
        self.g, self.c = llvm.lshr(self.lane, ops.const(2)), llvm.and_(self.lane, ops.const(3))

    def matrix_row(self, half: int):
        """Offset of the row that this lane addresses in ldmatrix, of the swizzled (8, 64)."""
        row = llvm.and_(self.lane, ops.const(7))
        chunk = ops.add(llvm.lshr(self.lane, ops.const(3)), 4 * half)
        return sum_of(ops.mul(row, 128), ops.mul(llvm.xor(chunk, row), 16))


def zeros(geometry: Geometry):
    @plgpu.inline_mgpu(return_type=geometry.sums)
    def body(ctx):
        return _to_sums([_float(0.0)] * (2 * geometry.width), geometry)

    return body()


def fetch(geometry: Geometry, weights, ring_ref, tile, step, stage, limit) -> None:
    """Starts and commits the copies of one stage: inputs 64 `step` .. of all warps.

    Args:
      weights: (values, metadata, x) in global memory.
      tile: of outputs; limit: the CTA's last input, in units of 8. Beyond the limit and beyond
        the arrays, zeros arrive.
    """
    g = geometry

    @plgpu.inline_mgpu(arg_types=(REF,) * 4 + (SPLAT,) * 4)
    def body(ctx, values, metadata, x, ring, tile, step, stage, limit):
        tile, step, stage, limit = (s.registers.item() for s in (tile, step, stage, limit))
        lane = Lane(g)
        base = sum_of(_address(ring), ops.mul(stage, g.stage_bytes))
        step = sum_of(step, lane.along)
        output = sum_of(ops.mul(tile, OUTPUTS * g.across), ops.mul(lane.across, OUTPUTS))
        target = sum_of(base, ops.mul(lane.warp, WARP_BYTES))
        _fetch_metadata(g, metadata, lane, step, output, ops.add(target, VALUE_BYTES), limit)
        _fetch_values(g, values, lane, step, output, target, ops.mul(limit, 4))
        _fetch_tokens(g, x, lane, step, _token_base(g, lane, base), ops.mul(limit, 8))
        asm("cp.async.commit_group;")

    body(*weights, ring_ref, tile, step, stage, limit)


def _fetch_values(g, values, lane, step, output, target, bound) -> None:
    """By whole lines of 128 bytes: 8 lanes a row, the rows of 4 readers c at a time."""
    c, chunk = llvm.lshr(lane.lane, ops.const(3)), llvm.and_(lane.lane, ops.const(7))
    row = sum_of(ops.mul(step, 32), ops.mul(c, 2))
    column = sum_of(output, ops.mul(chunk, 8))
    source = _pointer(values, row, 2 * g.f, ops.mul(column, 2))
    left = select(ops.less(column, g.f), minus(bound, row), ops.const(0))
    target = sum_of(target, _spread(c, chunk))
    for piece, further in enumerate((0, 1, 8, 9, 16, 17, 24, 25)):
        _copy(target, 512 * piece, source, 2 * g.f * further, 16, left, further)


def _fetch_metadata(g, metadata, lane, step, output, target, bound) -> None:
    """By 16 bytes, or by 8 where the array's rows are no multiple of 16."""
    count = 16 if g.f % 16 == 0 else 8
    lanes = OUTPUTS // count  # of a row
    for first in range(0, 8 * lanes, 32):
        place = ops.add(lane.lane, first)
        row = sum_of(ops.mul(step, 8), llvm.udiv(place, ops.const(lanes)))
        column = sum_of(output, ops.mul(llvm.urem(place, ops.const(lanes)), count))
        left = select(ops.less(column, g.f), minus(bound, row), ops.const(0))
        byte = ops.mul(place, count)
        chunk = llvm.and_(llvm.lshr(byte, ops.const(4)), ops.const(7))
        to = sum_of(
            target, _spread(llvm.lshr(byte, ops.const(7)), chunk), llvm.and_(byte, ops.const(15))
        )
        _copy(to, 0, _pointer(metadata, row, g.f, column), 0, count, left, 0)


def _fetch_tokens(g, x, lane, step, target, bound) -> None:
    """Rows of 128 bytes, swizzled; the warps side by side share the work."""
    pieces, threads = 8 * g.width, 32 * g.across
    for first in range(0, pieces, threads):
        piece = ops.add(sum_of(ops.mul(lane.across, 32), lane.lane), first)
        token, chunk = llvm.lshr(piece, ops.const(3)), llvm.and_(piece, ops.const(7))
        swizzled = llvm.xor(chunk, llvm.and_(token, ops.const(7)))
        column = sum_of(ops.mul(step, STEP), ops.mul(chunk, 8))
        to = sum_of(target, ops.mul(token, 128), ops.mul(swizzled, 16))
        left = select(ops.less(token, g.tokens), minus(bound, column), ops.const(0))
        here = ops.less(piece, pieces) if first + threads > pieces else None
        _copy(to, 0, _pointer(x, token, 2 * g.k, ops.mul(column, 2)), 0, 16, left, 0, here)


def wait(geometry: Geometry, in_flight: int) -> None:
    """Waits for all but `in_flight` stages, of all warps that share them."""
    g = geometry

    @plgpu.inline_mgpu()
    def body(ctx):
        asm(f"cp.async.wait_group {in_flight};")
        if g.across == 1:
            asm("bar.warp.sync 0xffffffff;")
        elif g.along == 1:
            asm("bar.sync 0;")
        else:
            asm(f"bar.sync $0, {32 * g.across};", ops.add(Lane(g).along, 1))

    body()


def multiply(geometry: Geometry, acc, ring_ref, stage):
    """acc + the product of a stage."""
    g = geometry

    @plgpu.inline_mgpu(arg_types=(g.layout, REF, SPLAT), return_type=g.sums)
    def body(ctx, acc, ring, stage):
        lane = Lane(g)
        base = sum_of(_address(ring), ops.mul(stage.registers.item(), g.stage_bytes))
        source = sum_of(base, ops.mul(lane.warp, WARP_BYTES))
        words = _metadata_words(lane, ops.add(source, VALUE_BYTES))
        rows = sum_of(source, _spread(lane.c, lane.g))
        tokens = _token_base(g, lane, base)
        sums = _from_sums(acc)
        for half in range(2):
            a = _operands(
                [
                    asm(
                        f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{512 * (4 * half + piece)}];",
                        rows,
                        results="rrrr",
                    )
                    for piece in range(4)
                ]
            )
            address = sum_of(tokens, lane.matrix_row(half))
            for n in range(g.width // 8):
                b = asm(
                    f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}}, [$4+{1024 * n}];",
                    address,
                    results="rrrr",
                )
                for i in range(4):
                    _mma(g, sums, i, n, a[i], b, words[i], half)
        return _to_sums(sums, g)

    return body(acc, ring_ref, stage)


def _metadata_words(lane, source):
    """For each product, the word of rows g and g + 8 for the 16 inputs 16 c .. of 64: this lane's
    turn is at half c / 2."""
    offset = ops.mul(llvm.and_(lane.g, ops.const(1)), 8)
    chunk = llvm.lshr(lane.g, ops.const(1))
    low, high = (
        asm(
            "ld.shared.v2.b32 {$0,$1}, [$2];",
            sum_of(source, _spread(lane.c, ops.add(chunk, 4 * octet)), offset),
            results="rr",
        )
        for octet in range(2)
    )
    return [
        asm(f"prmt.b32 $0, $1, $2, {order};", low[i // 2], high[i // 2], results="r", pure=True)
        for i, order in enumerate((0x5140, 0x7362) * 2)
    ]


def multiply_low_rank(geometry: Geometry, acc, t_ref, r_ref, tile, share):
    """acc + t @ r, of which this CTA (`share` of the cluster) adds every split-th 16 rows."""
    g = geometry
    rank = r_ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(g.layout, REF, REF, SPLAT, SPLAT), return_type=g.sums)
    def body(ctx, acc, t, r, tile, share):
        lane = Lane(g)
        sums = _from_sums(acc)
        column = sum_of(
            ops.mul(tile.registers.item(), OUTPUTS * g.across),
            ops.mul(lane.across, OUTPUTS),
            ops.mul(lane.g, 8),
        )
        inside = ops.less(column, g.f)
        start = sum_of(ops.mul(share.registers.item(), g.along), lane.along)
        for first in range(0, -(-rank // 16), g.split * g.along):
            row = sum_of(ops.mul(ops.add(start, first), 16), ops.mul(lane.c, 2))
            source = _pointer(r, row, 2 * g.f, ops.mul(column, 2))
            a = _operands(
                [
                    _load16(
                        ops.add(source, 2 * g.f * further),
                        llvm.and_(inside, ops.less(ops.add(row, further), rank)),
                    )
                    for further in (0, 1, 8, 9)
                ]
            )
            for n in range(g.width // 8):
                token = ops.add(lane.g, 8 * n)
                source = _pointer(t, token, 2 * rank, ops.mul(row, 2))
                known = ops.less(token, g.tokens)
                b = [
                    _load4(
                        ops.add(source, 2 * further),
                        llvm.and_(known, ops.less(ops.add(row, further), rank)),
                    )
                    for further in (0, 8)
                ]
                for i in range(4):
                    _mma(g, sums, i, n, a[i], b)
        return _to_sums(sums, g)

    return body(acc, t_ref, r_ref, tile, share)


def open_exchange(geometry: Geometry, ring_ref, share) -> None:
    """Prepares the barrier at which this CTA will receive the sums of its cluster."""
    g = geometry
    if g.split == 1:
        return

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT))
    def body(ctx, ring, share):
        units = minus(ops.const(g.units + g.split - 1), share.registers.item())
        expected = ops.mul(llvm.udiv(units, ops.const(g.split)), UNIT_BYTES * g.split)
        asm(
            "{ .reg .pred p; setp.eq.s32 p, $2, 0; @p mbarrier.init.shared.b64 [$0], 1;"
            " @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
            ops.add(_address(ring), g.barrier_offset),
            expected,
            mutils.thread_idx(),
        )
        asm("fence.mbarrier_init.release.cluster;")
        asm("barrier.cluster.arrive.relaxed.aligned;")

    body(ring_ref, share)


def finish(geometry: Geometry, acc, ring_ref, tile, share, refs, activation) -> None:
    """y = activation(z), z = acc, summed over the warps and CTAs that share inputs, + bias.

    Always in the same order: the warps of a CTA add theirs in shared memory, and the CTAs of a
    cluster send each other the units that they are to complete.

    Args:
      refs: "y", and "z" and "bias" if there are any, in global memory.
    """
    g = geometry
    used = {name: refs[name] for name in ("y", "z", "bias") if name in refs}

    @plgpu.inline_mgpu(arg_types=(g.layout, REF, SPLAT, SPLAT, *(REF,) * len(used)))
    def body(ctx, acc, ring, tile, share, *arrays):
        tile, share = tile.registers.item(), share.registers.item()
        lane = Lane(g)
        ring = _address(ring)
        arrays = dict(zip(used, arrays, strict=True))
        complete = functools.partial(_complete, g, lane, tile, arrays, activation)
        units = (_own_units if g.along == 1 else _added_units)(g, lane, ring, _from_sums(acc))
        asm("cp.async.wait_group 0;")
        if g.split == 1:
            for unit, known, values in units:
                complete(unit, known, values)
            return
        asm("barrier.cluster.wait.acquire.aligned;")
        for unit, known, values in units:
            _send(g, lane, ring, share, unit, known, values)
        asm(
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
    ring = sum_of(ring, ops.mul(lane.lane, 16))
    target = sum_of(ring, ops.mul(lane.warp, 256 * g.width))
    asm("bar.sync 0;")
    for pair, (_, _, values) in enumerate(_own_units(g, lane, ring, sums)):
        for q in range(2):
            asm(
                f"st.shared.v4.f32 [$0+{UNIT_BYTES * pair + 512 * q}], {{$1,$2,$3,$4}};",
                target,
                *values[4 * q : 4 * q + 4],
            )
    asm("bar.sync 0;")
    for first in range(0, g.units, g.warps):
        unit = ops.add(lane.warp, first)
        known = None if first + g.warps <= g.units else ops.less(unit, g.units)
        place = unit if known is None else select(known, unit, ops.const(0))
        address = sum_of(ring, ops.mul(place, UNIT_BYTES))
        yield unit, known, _sum_units(address, g.along, g.units)


def _received_units(g, lane, ring, share):
    ring = sum_of(ring, ops.mul(lane.lane, 16))
    for first in range(0, g.received, g.warps):
        number = ops.add(lane.warp, first)
        unit = sum_of(ops.mul(number, g.split), share)
        known = ops.less(unit, g.units)
        place = ops.mul(select(known, number, ops.const(0)), UNIT_BYTES)
        address = ops.add(sum_of(ring, place), g.receive_offset)
        yield unit, known, _sum_units(address, g.split, g.received)


def _sum_units(address, count: int, apart: int):
    total = None
    for part in range(count):
        values = [
            value
            for q in range(2)
            for value in asm(
                f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{UNIT_BYTES * apart * part + 512 * q}];",
                address,
                results="ffff",
            )
        ]
        total = values if total is None else _add(total, values)
    return total


def _send(g, lane, ring, share, unit, known, values) -> None:
    """To the CTA that completes this unit."""
    number, owner = llvm.udiv(unit, ops.const(g.split)), llvm.urem(unit, ops.const(g.split))
    place = ops.mul(sum_of(ops.mul(share, g.received), number), UNIT_BYTES)
    target = ops.add(sum_of(ring, place, ops.mul(lane.lane, 16)), g.receive_offset)
    target, barrier = (
        asm("mapa.shared::cluster.u32 $0, $1, $2;", address, owner, results="r", pure=True)
        for address in (target, ops.add(ring, g.barrier_offset))
    )
    guard = () if known is None else (known,)
    test, when = ("setp.ne.b32 p, $6, 0;", "@p ") if guard else ("", "")
    for q in range(2):
        asm(
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
    token = sum_of(
        ops.mul(llvm.lshr(pair, ops.const(1)), 8),
        ops.mul(lane.c, 2),
        llvm.and_(pair, ops.const(1)),
    )
    column = sum_of(ops.mul(tile, OUTPUTS * g.across), ops.mul(across, OUTPUTS), ops.mul(lane.g, 8))
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
    dtype = _dtype(out)
    if dtype == "float32":
        target = _pointer(out, token, 4 * f, ops.mul(column, 4))
        _store16(target, values[:4], inside)
        _store16(ops.add(target, 16), values[4:], inside)
    else:
        target = _pointer(out, token, 2 * f, ops.mul(column, 2))
        words = [_pack(values[i], values[i + 1], dtype) for i in range(0, 8, 2)]
        _store16(target, words, inside)


def _load_floats(ref, column, inside):
    """8 consecutive elements as float32, zero where not inside."""
    dtype = _dtype(ref)
    source = _pointer(ref, ops.const(0), 0, ops.mul(column, 4 if dtype == "float32" else 2))
    if dtype == "float32":
        words = [*_load16(source, inside), *_load16(ops.add(source, 16), inside)]
        return [llvm.bitcast(ir.F32Type.get(), word) for word in words]
    kind = ops.PTX_TYPE[dtype]
    return [
        value
        for word in _load16(source, inside)
        for value in asm(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; "
            f"cvt.f32.{kind} $0, l; cvt.f32.{kind} $1, h; }}",
            word,
            results="ff",
            pure=True,
        )
    ]


def _operands(pieces):
    """Registers of A for each product, from a lane's rows 2 c, 2 c + 1, and 8 further."""

    def pair(i: int, first: int, order: int):
        a, b = pieces[first][i], pieces[first + 1][i]
        return asm(f"prmt.b32 $0, $1, $2, {order};", a, b, results="r", pure=True)

    return [
        [pair(i, first, order) for first in (0, 2) for order in (0x5410, 0x7632)] for i in range(4)
    ]


def _mma(g: Geometry, sums, i: int, n: int, a, b, words=None, selector: int = 0) -> None:
    """sums[product i, tokens 8 n ..] += a @ b, by a sparse k32 or a dense k16 instruction."""
    at = [g.register(i, n, j) for j in range(4)]
    kind = ops.PTX_TYPE[g.dtype]
    if words is None:
        name, k, metadata = "mma", 16, ()
        tail = "{$8,$9}, {$0,$1,$2,$3};"
    else:
        name, k, metadata = "mma.sp::ordered_metadata", 32, (words,)
        tail = f"{{$8,$9,$10,$11}}, {{$0,$1,$2,$3}}, $12, {selector};"
    new = asm(
        f"{name}.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
        f" {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {tail}",
        *a,
        *b,
        *metadata,
        results="ffff",
        tied=[sums[j] for j in at],
        pure=True,
    )
    for j, value in zip(at, new, strict=True):
        sums[j] = value


def _copy(target, target_at, source, source_at, count, left, needed, here=None) -> None:
    """Starts a copy of `count` bytes if left > needed, else of as many zeros."""
    kind = "cg" if count == 16 else "ca"
    test, when = ("setp.ne.b32 q, $3, 0;", "@q ") if here is not None else ("", "")
    asm(
        f"{{ .reg .pred p, q; .reg .b32 size; {test}"
        f" setp.gt.s32 p, $2, {needed}; selp.b32 size, {count}, 0, p;"
        f" {when}cp.async.{kind}.shared.global{TUNE['prefetch']}"
        f" [$0+{target_at}], [$1+{source_at}], {count}, size; }}",
        target,
        source,
        left,
        *(() if here is None else (here,)),
    )


def _spread(row, chunk):
    """Offset of 16 bytes in 4 rows of 128: neither 8 lanes that write a row, nor lanes 4 g + c that
    read chunk g of row c, meet a bank twice."""
    return sum_of(ops.mul(row, 128), ops.mul(llvm.xor(chunk, ops.mul(row, 2)), 16))


def _token_base(g, lane, base):
    return sum_of(ops.add(base, g.warps * WARP_BYTES), ops.mul(lane.along, g.width * STEP * 2))


def _load16(source, inside):
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    return asm(
        f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros}"
        " @p ld.global.nc.v4.b32 {$0,$1,$2,$3}, [$4]; }",
        source,
        inside,
        results="rrrr",
        early=True,
    )


def _load4(source, inside):
    return asm(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
        source,
        inside,
        results="r",
        early=True,
    )


def _store16(target, four, inside) -> None:
    asm(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.global.v4.b32 [$0], {$1,$2,$3,$4}; }",
        target,
        *(llvm.bitcast(ir.IntegerType.get_signless(32), value) for value in four),
        inside,
    )


def _pack(low, high, dtype: str):
    ptx = f"cvt.rn.{ops.PTX_TYPE[dtype]}x2.f32 $0, $2, $1;"
    return asm(ptx, low, high, results="r", pure=True)


def _dtype(ref) -> str:
    element = str(ir.MemRefType(ref.type).element_type)
    return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[element]


def _add(x, y):
    return [llvm.fadd(a, b) for a, b in zip(x, y, strict=True)]


def select(condition, x, y):
    return llvm.select(llvm.icmp(llvm.ICmpPredicate.ne, condition, ops.const(0)), x, y)


def minus(x, y):
    return llvm.sub(x, y, overflow_flags=ops.NO_WRAP)


def sum_of(first, *rest):
    return functools.reduce(ops.add_reg, rest, first)


def _pointer(ref, row, row_bytes: int, column_bytes):
    """Address in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mutils.memref_ptr(ref))
    return sum_of(base, ops.wide_mul(row, row_bytes), llvm.zext(i64, column_bytes))


def _address(ref):
    """Address in shared memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mutils.memref_ptr(ref))


def _float(value: float):
    f32 = ir.F32Type.get()
    return llvm.ConstantOp(f32, ir.FloatAttr.get(f32, value)).result


def _from_sums(acc) -> list:
    return [llvm.extractelement(r, ops.const(0)) for r in acc.registers.flat]


def _to_sums(values, g: Geometry):
    vector = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        registers[i] = llvm.insertelement(llvm.mlir_undef(vector), value, ops.const(0))
    return fa.FragmentedArray(_registers=registers, _layout=g.layout.to_mgpu(), _is_signed=None)


def asm(ptx, *operands, results="", tied=(), pure=False, early=False):
    """Inline PTX; `tied` are inputs in the registers of the results.

    Returns nothing, one value or a list, as `results` ("r" 32 bits, "f" float32) says.
    """
    kinds = {"i32": "r", "i64": "l", "f32": "f"}
    types = {"r": ir.IntegerType.get_signless(32), "f": ir.F32Type.get()}
    outputs = [types[kind] for kind in results]
    constraints = [("=&" if early else "=") + kind for kind in results]
    constraints += [kinds[str(operand.type)] for operand in operands]
    constraints += [str(i) for i in range(len(tied))]
    if not outputs:
        result_type = ir.Type.parse("!llvm.void")
    elif len(outputs) == 1:
        result_type = outputs[0]
    else:
        result_type = llvm.StructType.get_literal(outputs)
    out = llvm.inline_asm(
        result_type,
        [*operands, *tied],
        ptx,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=not pure,
    )
    if len(outputs) <= 1:
        return out
    return [llvm.extractvalue(kind, out, [i]) for i, kind in enumerate(outputs)]
