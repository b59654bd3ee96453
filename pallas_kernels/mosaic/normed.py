"""Norms of the few-token kernel's inputs: made by every CTA for itself while its weights arrive.

A norm of few tokens is read, reduced and written in several kernels of a few microseconds. Here each
CTA reads the tokens' rows, which are in the cache, takes their means and spreads, and leaves its share
of the normalised inputs in shared memory, rounded as they would be in memory.
"""

from typing import NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx, warps

MOST_WORDS = 64  # of the rows that a thread keeps from one pass to the next
CHUNK = 8  # inputs that a thread takes at once


class Form(NamedTuple):
    """Of a norm: layer norm if centred, else that of the root of the mean square."""

    epsilon: float
    centred: bool


def prepare(geometry: warps.Geometry, form: Form, refs: dict, ring_ref, first, last) -> None:
    """Leaves the normalised inputs 64 `first` .. 64 `last` where `warps.multiply` looks for them.

    Args:
      refs: "x", "scale", and "shift" if there is one, in global memory; the last two float32 (in,).
    """
    g = geometry
    used = {name: refs[name] for name in ("x", "scale", "shift") if name in refs}

    @plgpu.inline_mgpu(arg_types=(*(warps.REF,) * (1 + len(used)), warps.SPLAT, warps.SPLAT))
    def body(ctx, ring, *arguments):
        *arrays, first, last = arguments
        arrays = dict(zip(used, arrays, strict=True))
        thread, base = mutils.thread_idx(), ptx.shared_address(ring)
        rows = _Rows(g, arrays["x"], thread)
        means = _means(g, form, rows, thread, base)
        scales = _scales(g, form, rows, means, thread, base)
        first, last = (s.registers.item() for s in (first, last))
        _store_share(g, rows, arrays, (means, scales), (thread, base, first, last))
        ptx.asm("bar.sync 0;")

    body(ring_ref, *used.values(), first, last)


def measure(geometry: warps.Geometry, form: Form, refs: dict, ring_ref) -> None:
    """Leaves what `of_token` takes; for kernels that normalise what they have in registers."""
    g = geometry

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.REF))
    def body(ctx, ring, x):
        thread, base = mutils.thread_idx(), ptx.shared_address(ring)
        rows = _Rows(g, x, thread)
        means = _means(g, form, rows, thread, base)
        scales = _scales(g, form, rows, means, thread, base)
        for token, (mean, scale) in enumerate(zip(means, scales, strict=True)):
            ptx.asm(
                "{ .reg .pred p; setp.eq.s32 p, $3, 0;"
                f" @p st.shared.v2.f32 [$0+{g.measures_offset + 8 * token}], {{$1,$2}}; }}",
                base,
                ptx.number(0.0) if mean is None else mean,
                scale,
                thread,
            )
        ptx.asm("bar.sync 0;")

    body(ring_ref, refs["x"])


def of_token(geometry: warps.Geometry, base, token) -> tuple:
    """A token's mean and 1 / its spread."""
    address = ptx.sum_of(base, ops.mul(token, 8))
    offset = geometry.measures_offset
    return tuple(ptx.asm(f"ld.shared.v2.f32 {{$0,$1}}, [$2+{offset}];", address, results="ff"))


def normalised(values: list, measures: tuple, scale: list, shift: list | None) -> list:
    """(value - mean) * (factor * scale) + shift."""
    mean, factor = measures
    if mean is not None:
        values = [llvm.fsub(value, mean) for value in values]
    factors = [llvm.fmul(factor, s) for s in scale]
    values = [llvm.fmul(v, f) for v, f in zip(values, factors, strict=True)]
    return values if shift is None else ptx.add_floats(values, shift)


class _Rows:
    """Of all tokens, as a thread reads them: chunks thread, thread + threads, ..."""

    def __init__(self, geometry: warps.Geometry, x, thread):
        g = self.geometry = geometry
        self.x, self.thread = x, thread
        self.chunks = g.k // CHUNK
        self.rounds = -(-self.chunks // g.threads)
        kept = self.rounds * g.tokens * CHUNK // 2 <= MOST_WORDS
        self.known = {} if kept else None

    def inside(self, turn: int):
        """Whether the thread has a chunk in this turn; None: all have."""
        if (turn + 1) * self.geometry.threads <= self.chunks:
            return None
        return ops.less(ops.add(self.thread, turn * self.geometry.threads), self.chunks)

    def floats(self, token: int, turn: int) -> list:
        if self.known is not None and (token, turn) in self.known:
            return floats_of(self.known[token, turn], self.geometry.dtype)
        chunk = ops.add(self.thread, turn * self.geometry.threads)
        words = self.words(token, chunk, self.inside(turn))
        if self.known is not None:
            self.known[token, turn] = words
        return floats_of(words, self.geometry.dtype)

    def words(self, token: int, chunk, inside) -> list:
        g = self.geometry
        source = ptx.global_address(self.x, ops.const(token), 2 * g.k, ops.mul(chunk, 2 * CHUNK))
        return ptx.load(source, ops.const(1) if inside is None else inside, 4)


def _means(g, form: Form, rows: _Rows, thread, base) -> list:
    if not form.centred:
        return [None] * g.tokens
    sums = []
    for token in range(g.tokens):
        values = [v for turn in range(rows.rounds) for v in rows.floats(token, turn)]
        sums.append(_sum(values))  # what is not there is zero
    return [_scaled(total, 1 / g.k) for total in _over_threads(g, sums, thread, base, 0)]


def _scales(g, form: Form, rows: _Rows, means: list, thread, base) -> list:
    """1 / sqrt(variance + epsilon)."""
    sums = []
    for token, mean in enumerate(means):
        terms = []
        for turn in range(rows.rounds):
            inside = rows.inside(turn)
            for value in rows.floats(token, turn):
                value = value if mean is None else llvm.fsub(value, mean)
                square = llvm.fmul(value, value)
                if inside is not None and mean is not None:
                    square = ptx.select(inside, square, ptx.number(0.0))
                terms.append(square)
        sums.append(_sum(terms))
    return [
        ptx.asm(
            "rsqrt.approx.f32 $0, $1;",
            llvm.fadd(_scaled(total, 1 / g.k), ptx.number(form.epsilon)),
            results="f",
            pure=True,
        )
        for total in _over_threads(g, sums, thread, base, 1)
    ]


def _store_share(g, rows: _Rows, arrays, statistics, place) -> None:
    thread, base, first, last = place
    count = ops.mul(ptx.minus(last, first), warps.STEP // CHUNK)
    # A CTA without steps multiplies weights of zero all the same, and by numbers.
    filled = ptx.select(ops.less(count, 1), ops.const(warps.STEP // CHUNK), count)
    for turn in range(-(-g.share_steps * (warps.STEP // CHUNK) // g.threads)):
        local = ops.add(thread, turn * g.threads)
        chunk = ptx.sum_of(ops.mul(first, warps.STEP // CHUNK), local)
        mine = ops.flag(llvm.ICmpPredicate.slt, local, filled)
        known = ops.flag(llvm.ICmpPredicate.slt, local, count)
        inside = llvm.and_(known, ops.less(chunk, rows.chunks))
        scale = _eight(arrays["scale"], chunk, inside)
        shift = _eight(arrays["shift"], chunk, inside) if "shift" in arrays else None
        for token, (mean, factor) in enumerate(zip(*statistics, strict=True)):
            values = floats_of(rows.words(token, chunk, inside), g.dtype)
            values = normalised(values, (mean, factor), scale, shift)
            words = [ptx.pack(values[i], values[i + 1], g.dtype) for i in range(0, CHUNK, 2)]
            row = ptx.sum_of(base, ops.mul(llvm.lshr(local, ops.const(3)), g.tokens * 128))
            at = llvm.xor(llvm.and_(local, ops.const(7)), ops.const(token % 8))
            ptx.asm(
                "{ .reg .pred p; setp.ne.b32 p, $5, 0;"
                f" @p st.shared.v4.b32 [$0+{g.token_offset + 128 * token}], {{$1,$2,$3,$4}}; }}",
                ptx.sum_of(row, ops.mul(at, 16)),
                *words,
                mine,
            )


def _over_threads(g, sums: list, thread, base, number: int) -> list:
    """The sum of each over all threads, in the same order in every thread."""
    sums = list(sums)
    for distance in (16, 8, 4, 2, 1):
        sums = [
            llvm.fadd(
                value,
                ptx.asm(
                    f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;",
                    value,
                    results="f",
                ),
            )
            for value in sums
        ]
    at = g.statistics_offset + 4 * number * g.tokens * g.warps
    warp = llvm.lshr(thread, ops.const(5))
    target = ptx.sum_of(base, ops.mul(warp, 4))
    for token, value in enumerate(sums):
        ptx.asm(f"st.shared.f32 [$0+{at + 4 * g.warps * token}], $1;", target, value)
    ptx.asm("bar.sync 0;")
    totals = []
    for token in range(g.tokens):
        parts = [
            part
            for first in range(0, g.warps, 4)
            for part in ptx.asm(
                f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{at + 4 * (g.warps * token + first)}];",
                base,
                results="ffff",
            )
        ]
        totals.append(_sum(parts))
    return totals


def _eight(ref, chunk, inside) -> list:
    """8 float32 of a row of parameters."""
    source = ptx.global_address(ref, ops.const(0), 0, ops.mul(chunk, 4 * CHUNK))
    words = [*ptx.load(source, inside, 4), *ptx.load(ops.add(source, 16), inside, 4)]
    return [llvm.bitcast(ptx.number(0.0).type, word) for word in words]


def floats_of(words: list, dtype: str) -> list:
    """Two float32 of every word of two 16-bit numbers."""
    kind = ops.PTX_TYPE[dtype]
    return [
        value
        for word in words
        for value in ptx.asm(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; "
            f"cvt.f32.{kind} $0, l; cvt.f32.{kind} $1, h; }}",
            word,
            results="ff",
            pure=True,
        )
    ]


def _sum(values: list):
    """By halves, so that additions do not wait for each other."""
    while len(values) > 1:
        pairs = [llvm.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


def _scaled(value, factor: float):
    return llvm.fmul(value, ptx.number(factor))
