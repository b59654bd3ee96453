"""The few-token kernel's products, by `mma.sp`, and how its CTAs are laid out.

A warp takes 64 outputs. Lane 4 g + c multiplies, of the 16 stored rows of a k32 step, rows 2 c,
2 c + 1 (and 8 further) of outputs 8 g .. 8 g + 7, as 16-byte pieces of the array in memory. Pairs
of halfwords of two such rows are operand registers of `mma.sp`, if its row g (and g + 8) in product
i of 4 is output 8 g + 2 i (and the next): with the outputs so permuted over the instruction's rows,
neither weights nor metadata nor results ever move between lanes.
"""

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops, ptx

STEP = 64  # inputs that a warp takes at a time: two instructions' k
OUTPUTS = 64  # of a warp
VALUE_BYTES = STEP // 2 * OUTPUTS * 2
WARP_BYTES = VALUE_BYTES + STEP // 8 * OUTPUTS
UNIT_BYTES = 1024
SPLAT = plgpu.Layout.WG_SPLAT
REF = plgpu.RefType()


def array_type(registers: int, dtype=jnp.float32):
    """Of an array of so many registers a thread, as inline code takes and returns them."""
    shape = (128 * registers,)
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WG_STRIDED(shape, vec_size=1))


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
    norms: int = 0  # parameters of a norm of the tokens: scale, shift; 0 for none
    rank: int = 0  # of an adapter whose first product is made as well; a multiple of 8

    @property
    def width(self) -> int:
        """Tokens in whole instructions of 8."""
        return -(-self.tokens // 8) * 8

    @property
    def warps(self) -> int:
        return self.across * self.along

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def steps(self) -> int:
        return -(-self.k // STEP)

    @property
    def rounds(self) -> int:
        """Steps of a warp."""
        return -(-self.steps // (self.split * self.along))

    @property
    def stage_bytes(self) -> int:
        return self.warps * WARP_BYTES + self.along * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Of a step's tokens, and of a norm's parameters and an adapter's rows for its inputs."""
        return self.left_offset + STEP * 2 * self.rank

    @property
    def left_offset(self) -> int:
        """Of an adapter's rows, 8 columns of all of them at a time, behind a step's tokens."""
        return STEP * (2 * self.width + 4 * self.norms)

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
    def measures_offset(self) -> int:
        """Of each token's mean and spread, see `normed.measure`."""
        return self.barrier_offset + 16

    @property
    def shared_memory(self) -> int:
        return self.measures_offset + (8 * self.tokens if self.norms else 0)

    @property
    def sums(self):
        """2 * width registers a thread, [product][8 tokens][4], and those of an adapter's first product."""
        return array_type(self.registers)

    @property
    def registers(self) -> int:
        return 2 * self.width + 4 * (self.rank // 8) * -(-self.width // 16)

    @property
    def layout(self):
        return self.sums.layout

    def register(self, i: int, n: int, j: int) -> int:
        return (i * (self.width // 8) + n) * 4 + j

    def first_register(self, block: int, pair: int) -> int:
        """Of the first product's 8 columns `block`, for 16 tokens: lane 4 g + c has columns 2 c and
        2 c + 1 of tokens g and g + 8."""
        return 2 * self.width + 4 * (block * -(-self.width // 16) + pair)


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
        return ptx.sum_of(ops.mul(row, 128), ops.mul(llvm.xor(chunk, row), 16))


def spread(row, chunk):
    """Offset of 16 bytes in 4 rows of 128: neither 8 lanes that write a row, nor lanes 4 g + c that
    read chunk g of row c, meet a bank twice."""
    return ptx.sum_of(ops.mul(row, 128), ops.mul(llvm.xor(chunk, ops.mul(row, 2)), 16))


def token_base(g, lane, base):
    """Of a stage's tokens; behind them are the norm's parameters."""
    return ptx.sum_of(ops.add(base, g.warps * WARP_BYTES), ops.mul(lane.along, g.token_bytes))


def zeros(geometry: Geometry):
    @plgpu.inline_mgpu(return_type=geometry.sums)
    def body(ctx):
        return array_of([ptx.number(0.0)] * geometry.registers)

    return body()


def multiply(geometry: Geometry, acc, ring_ref, stage, normalise=None):
    """acc + the product of a stage.

    Args:
      normalise: of `normed.in_registers`, if the tokens are to be normalised.
    """
    g = geometry

    @plgpu.inline_mgpu(arg_types=(g.layout, REF, SPLAT), return_type=g.sums)
    def body(ctx, acc, ring, stage):
        lane = Lane(g)
        ring = ptx.shared_address(ring)
        base = ptx.sum_of(ring, ops.mul(stage.registers.item(), g.stage_bytes))
        source = ptx.sum_of(base, ops.mul(lane.warp, WARP_BYTES))
        words = _metadata_words(lane, ops.add(source, VALUE_BYTES))
        rows = ptx.sum_of(source, spread(lane.c, lane.g))
        tokens = token_base(g, lane, base)
        normal = None if normalise is None else normalise(g, lane, ring, tokens)
        sums = values_of(acc)
        for half in range(2):
            a = operands(
                [
                    ptx.asm(
                        f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{512 * (4 * half + piece)}];",
                        rows,
                        results="rrrr",
                    )
                    for piece in range(4)
                ]
            )
            inputs, all_tokens = ptx.sum_of(tokens, lane.matrix_row(half)), []
            for n in range(g.width // 8):
                b = ptx.asm(
                    f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}}, [$4+{1024 * n}];",
                    inputs,
                    results="rrrr",
                )
                if normal is not None:
                    b = normal(half, n, b)
                all_tokens.append(b)
                for i in range(4):
                    mma(g, sums, i, n, a[i], b, words[i], half)
            if g.rank:
                _add_first(g, sums, lane, tokens, half, all_tokens)
        return array_of(sums)

    return body(acc, ring_ref, stage)


def _add_first(g: Geometry, sums, lane, tokens, half: int, all_tokens: list) -> None:
    """The tokens' products with an adapter's rows, of 32 inputs.

    What lanes hold of tokens for `mma.sp` is what they need for tokens as rows of `mma`.
    """
    rows = ops.add(ptx.sum_of(tokens, ops.mul(lane.lane, 16)), g.left_offset + 512 * half)
    nothing = [ops.const(0)] * 4
    for block in range(g.rank // 8):
        left = ptx.asm(
            f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0,$1,$2,$3}}, [$4+{1024 * block}];",
            rows,
            results="rrrr",
        )
        for pair, low in enumerate(all_tokens[::2]):
            high = ([*all_tokens, nothing])[2 * pair + 1]
            at = g.first_register(block, pair)
            for q in (0, 2):
                a = [low[q], high[q], low[q + 1], high[q + 1]]
                sums[at : at + 4] = instruction(g.dtype, sums[at : at + 4], a, left[q : q + 2])


def _metadata_words(lane, source):
    """For each product, the word of rows g and g + 8 for the 16 inputs 16 c .. of 64: this lane's
    turn is at half c / 2."""
    offset = ops.mul(llvm.and_(lane.g, ops.const(1)), 8)
    chunk = llvm.lshr(lane.g, ops.const(1))
    low, high = (
        ptx.asm(
            "ld.shared.v2.b32 {$0,$1}, [$2];",
            ptx.sum_of(source, spread(lane.c, ops.add(chunk, 4 * octet)), offset),
            results="rr",
        )
        for octet in range(2)
    )
    return [
        ptx.asm(f"prmt.b32 $0, $1, $2, {order};", low[i // 2], high[i // 2], results="r", pure=True)
        for i, order in enumerate((0x5140, 0x7362) * 2)
    ]


def operands(pieces):
    """Registers of A for each product, from a lane's rows 2 c, 2 c + 1, and 8 further."""

    def pair(i: int, first: int, order: int):
        a, b = pieces[first][i], pieces[first + 1][i]
        return ptx.asm(f"prmt.b32 $0, $1, $2, {order};", a, b, results="r", pure=True)

    return [
        [pair(i, first, order) for first in (0, 2) for order in (0x5410, 0x7632)] for i in range(4)
    ]


def mma(g: Geometry, sums, i: int, n: int, a, b, words=None, selector: int = 0) -> None:
    """sums[product i, tokens 8 n ..] += a @ b, by a sparse k32 or a dense k16 instruction."""
    at = [g.register(i, n, j) for j in range(4)]
    new = instruction(g.dtype, [sums[j] for j in at], a, b, words, selector)
    for j, value in zip(at, new, strict=True):
        sums[j] = value


def instruction(dtype: str, sums: list, a, b, words=None, selector: int = 0) -> list:
    """Four sums a lane + a @ b."""
    kind = ops.PTX_TYPE[dtype]
    if words is None:
        name, k, metadata = "mma", 16, ()
        tail = "{$8,$9}, {$0,$1,$2,$3};"
    else:
        name, k, metadata = "mma.sp::ordered_metadata", 32, (words,)
        tail = f"{{$8,$9,$10,$11}}, {{$0,$1,$2,$3}}, $12, {selector};"
    return ptx.asm(
        f"{name}.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
        f" {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {tail}",
        *a,
        *b,
        *metadata,
        results="ffff",
        tied=sums,
        pure=True,
    )


def values_of(array) -> list:
    return [llvm.extractelement(r, ops.const(0)) for r in array.registers.flat]


def array_of(values):
    """The array of so many registers a thread, of which `values` are this thread's."""
    vector = ir.VectorType.get((1,), values[0].type)
    registers = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        registers[i] = llvm.insertelement(llvm.mlir_undef(vector), value, ops.const(0))
    is_signed = None if values[0].type == ir.F32Type.get() else True
    layout = array_type(len(values)).layout.to_mgpu()
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)
