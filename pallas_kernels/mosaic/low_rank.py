"""Products of few tokens with a dense matrix, by `mma` straight from memory: both of an adapter.

A warp takes units of 16 rows of the matrix, and 64 columns. The instruction may take the rows in
any order, so lane 4 g + c loads rows 4 c .. 4 c + 3 of columns 8 g .. 8 g + 7, as 16-byte pieces,
and the same 4 entries of token g.
"""

import itertools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import normed, ops, ptx, warps

UNIT = 16
PIECES = 4  # rows of a lane


class Product:
    """t @ r, of which this CTA (`share` of `sharers`) multiplies unit share, share + sharers, ...

    Args:
      t_ref: (tokens, rows) in the geometry's dtype, or float32 (parts, tokens, rows): summands,
        which are added up in order and rounded.
      r_ref: (rows, columns) in that dtype; rows are a multiple of 4.
      norm: scale, and shift if there is one, float32 (rows,), of a norm of t that `normed.measure`
        has measured by the time of `add`; none for t as it is.
    """

    def __init__(self, geometry: warps.Geometry, t_ref, r_ref, tile, share, sharers: int, norm=()):
        self.geometry, self.refs, self.place = geometry, (t_ref, r_ref, *norm), (tile, share)
        self.norms = len(norm)
        self.rows, self.sharers = r_ref.shape[0], sharers
        self.parts = t_ref.shape[0] if len(t_ref.shape) == 3 else 1
        self.entry = t_ref.dtype.itemsize  # and the words of 4 entries
        assert self.rows % PIECES == 0, r_ref.shape

    @property
    def unit_words(self) -> int:
        tokens = self.parts * self.geometry.width // 8 * self.entry
        return 4 * PIECES + tokens + PIECES * self.norms

    @property
    def batches(self) -> list[range]:
        """Units of a warp whose loads are in flight together: as many as registers hold."""
        count = -(-self.rows // (UNIT * self.sharers * self.geometry.along))
        size = max(1, (192 - 2 * self.geometry.width) // self.unit_words)
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def start(self):
        """Starts the first loads; the result is for `add`, which waits for them."""
        return self._load(self.batches[0])

    def add(self, acc, started, shared_ref=None):
        """acc + t @ r. shared_ref: the CTA's shared memory, where t is normalised."""
        acc = self._multiply(acc, started, shared_ref)
        for batch in self.batches[1:]:
            acc = self._multiply(acc, self._load(batch), shared_ref)
        return acc

    def _load(self, batch: range):
        g = self.geometry
        result = warps.array_type(len(batch) * self.unit_words, jnp.int32)

        @plgpu.inline_mgpu(
            arg_types=(*(warps.REF,) * len(self.refs), warps.SPLAT, warps.SPLAT),
            return_type=result,
        )
        def body(ctx, t, r, *others):
            *norm, tile, share = others
            lane = warps.Lane(g)
            tile, share = tile.registers.item(), share.registers.item()
            column = ptx.sum_of(
                ops.mul(tile, warps.OUTPUTS * g.across),
                ops.mul(lane.across, warps.OUTPUTS),
                ops.mul(lane.g, 8),
            )
            words = []
            for number in batch:
                unit = ops.mul(ops.add(share, number * self.sharers), g.along)
                row = ops.mul(ptx.sum_of(unit, lane.along), UNIT)
                row = ptx.sum_of(row, ops.mul(lane.c, PIECES))
                words += self._matrix_words(r, row, column) + self._token_words(t, lane, row)
                for ref in norm:
                    source = ptx.global_address(ref, ops.const(0), 0, ops.mul(row, 4))
                    words += ptx.load(source, ops.less(row, self.rows), PIECES)
            return warps.array_of(words)

        return body(*self.refs, *self.place)

    def _matrix_words(self, r, row, column) -> list:
        f = self.geometry.f
        source = ptx.global_address(r, row, 2 * f, ops.mul(column, 2))
        inside = llvm.and_(ops.less(column, f), ops.less(row, self.rows))
        pieces = (ptx.load(ops.add(source, 2 * f * i), inside, 4) for i in range(PIECES))
        return list(itertools.chain.from_iterable(pieces))

    def _token_words(self, t, lane, row) -> list:
        g, entry = self.geometry, self.entry
        source = ptx.global_address(t, lane.g, entry * self.rows, ops.mul(row, entry))
        inside, words = ops.less(row, self.rows), []
        for first, part in itertools.product(range(0, g.width, 8), range(self.parts)):
            known = llvm.and_(inside, ops.less(ops.add(lane.g, first), g.tokens))
            further = (part * g.tokens + first) * self.rows * entry
            words += ptx.load(ops.add(source, further), known, entry)
        return words

    def _multiply(self, acc, words, shared_ref):
        g = self.geometry
        shared = () if not self.norms else (shared_ref,)

        @plgpu.inline_mgpu(
            arg_types=(
                g.layout,
                warps.array_type(words.shape[0] // 128).layout,
                *(warps.REF,) * len(shared),
            ),
            return_type=g.sums,
        )
        def body(ctx, acc, words, *shared):
            sums, words = warps.values_of(acc), iter(warps.values_of(words))
            measures = [self._measures(block, *shared) for block in range(g.width // 8)]

            def take(count: int) -> list:
                return list(itertools.islice(words, count))

            while pieces := take(4 * PIECES):
                a = warps.operands([pieces[i : i + 4] for i in range(0, len(pieces), 4)])
                tokens = [
                    self._rounded([take(self.entry) for _ in range(self.parts)])
                    for _ in range(g.width // 8)
                ]
                norm = [take(PIECES) for _ in range(self.norms)]
                for n, b in enumerate(tokens):
                    b = self._normalised(b, measures[n], norm)
                    for i in range(4):
                        warps.mma(g, sums, i, n, a[i], b)
            return warps.array_of(sums)

        return body(acc, words, *shared)

    def _measures(self, block: int, shared=None):
        """Of this lane's token of a block of 8."""
        if shared is None:
            return None
        g = self.geometry
        token = ops.add(warps.Lane(g).g, 8 * block)
        return normed.of_token(g, ptx.shared_address(shared), token)

    def _normalised(self, words: list, measures, norm: list[list]) -> list:
        if not norm:
            return words
        f32, dtype = ir.F32Type.get(), self.geometry.dtype
        scale, *shift = ([llvm.bitcast(f32, word) for word in part] for part in norm)
        values = ptx.floats_of(words, dtype)
        values = normed.normalised(values, measures, scale, shift[0] if shift else None)
        return [ptx.pack(values[i], values[i + 1], dtype) for i in (0, 2)]

    def _rounded(self, parts: list[list]) -> list:
        """4 entries as pairs in the geometry's dtype."""
        if self.entry == 2:
            return parts[0]
        sums = None
        for part in parts:
            part = [llvm.bitcast(ir.F32Type.get(), word) for word in part]
            sums = part if sums is None else ptx.add_floats(sums, part)
        dtype = self.geometry.dtype
        return [ptx.pack(sums[i], sums[i + 1], dtype) for i in (0, 2)]


class Second:
    """t @ r, where this warp's part of t is what `warps.multiply` has left in its registers.

    Args:
      r_ref: (rank, columns) in the geometry's dtype.
    """

    def __init__(self, geometry: warps.Geometry, r_ref, tile):
        self.geometry, self.r, self.tile = geometry, r_ref, tile

    @property
    def units(self) -> int:
        return -(-self.geometry.rank // UNIT)

    def start(self):
        """Starts the loads of r; the result is for `add`."""
        g = self.geometry
        result = warps.array_type(self.units * 4 * PIECES, jnp.int32)

        @plgpu.inline_mgpu(arg_types=(warps.REF, warps.SPLAT), return_type=result)
        def body(ctx, r, tile):
            lane, words = warps.Lane(g), []
            column = ptx.sum_of(
                ops.mul(tile.registers.item(), warps.OUTPUTS * g.across),
                ops.mul(lane.across, warps.OUTPUTS),
                ops.mul(lane.g, 8),
            )
            for unit, further in itertools.product(range(self.units), (0, 1, 8, 9)):
                row = ops.add(ops.mul(lane.c, 2), UNIT * unit + further)
                source = ptx.global_address(r, row, 2 * g.f, ops.mul(column, 2))
                inside = llvm.and_(ops.less(column, g.f), ops.less(row, g.rank))
                words += ptx.load(source, inside, 4)
            return warps.array_of(words)

        return body(self.r, self.tile)

    def add(self, acc, words):
        """acc + t @ r, where t keeps twice the digits of the geometry's dtype: warps' parts of t may
        be far larger than t, and rounded each by itself they would not cancel."""
        g = self.geometry

        @plgpu.inline_mgpu(
            arg_types=(g.layout, warps.array_type(words.shape[0] // 128).layout),
            return_type=g.sums,
        )
        def body(ctx, acc, words):
            sums, words = warps.values_of(acc), warps.values_of(words)
            pieces = [words[i : i + 4] for i in range(0, len(words), 4)]
            for unit in range(self.units):
                a = warps.operands(pieces[PIECES * unit : PIECES * (unit + 1)])
                for n in range(g.width // 8):
                    b = [self._tokens(sums, 2 * unit + block, n) for block in (0, 1)]
                    for digits, i in itertools.product(zip(*b, strict=True), range(4)):
                        warps.mma(g, sums, i, n, a[i], digits)
            return warps.array_of(sums)

        return body(acc, words)

    def _tokens(self, sums, block: int, n: int):
        """8 columns of 8 tokens of t: rounded, and what the rounding left."""
        g = self.geometry
        if block >= g.rank // 8:
            return ops.const(0), ops.const(0)
        at = g.first_register(block, n // 2) + 2 * (n % 2)
        pair = sums[at : at + 2]
        rounded = ptx.pack(*pair, g.dtype)
        left = [
            llvm.fsub(value, near)
            for value, near in zip(pair, ptx.floats_of([rounded], g.dtype), strict=True)
        ]
        return rounded, ptx.pack(*left, g.dtype)
