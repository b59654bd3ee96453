"""Norms of the few-token kernel's inputs: made in registers, on the way from shared memory to the product.

A norm of few tokens that is made apart takes kernels of a few microseconds, which read, reduce and
write. The kernel that makes the tokens leaves their moments instead, those of every 64 entries (see
`epilogue.moments`); the next one adds them up while its weights arrive, and rounds normalised tokens
as they would be rounded in memory.
"""

from typing import NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.epilogue import MOMENTS_BLOCK, moments_shape
from pallas_kernels.mosaic import ops, ptx, warps

assert MOMENTS_BLOCK == warps.OUTPUTS, "a warp leaves the moments of its outputs"


class Form(NamedTuple):
    """Of a norm: layer norm if centred, else that of the root of the mean square."""

    epsilon: float
    centred: bool


def operands(scale, shift, moments) -> dict:
    """What a kernel takes for a norm, by name; shift may be None."""
    given = {"scale": scale, "shift": shift, "moments_of_x": moments}
    return {name: array for name, array in given.items() if array is not None}


def parameters(refs: dict) -> list:
    """Of these operands, or of their references: scale, and shift if there is one."""
    return [refs[name] for name in ("scale", "shift") if name in refs]


def measure(geometry: warps.Geometry, form: Form, moments_ref, shared_ref) -> None:
    """Leaves what `of_token` takes: a warp takes a token at a time, a lane blocks lane, lane + 32, ..."""
    g = geometry

    @plgpu.inline_mgpu(arg_types=(warps.REF, warps.REF))
    def body(ctx, shared, moments):
        lane, base = warps.Lane(g), ptx.shared_address(shared)
        tokens = [ops.add(lane.warp, first) for first in range(0, g.tokens, g.warps)]
        found = [_load_moments(g, lane, moments, token) for token in tokens]
        for token, blocks in zip(tokens, found, strict=True):
            mean, factor = _mean_and_factor(g, form, blocks)
            here = llvm.and_(ops.less(token, g.tokens), ops.less(lane.lane, 1))
            ptx.asm(
                "{ .reg .pred p; setp.ne.b32 p, $3, 0;"
                f" @p st.shared.v2.f32 [$0+{g.measures_offset}], {{$1,$2}}; }}",
                ptx.sum_of(base, ops.mul(token, 8)),
                mean,
                factor,
                here,
            )
        ptx.asm("bar.sync 0;")

    body(shared_ref, moments_ref)


def of_token(geometry: warps.Geometry, base, token) -> tuple:
    """A token's mean and 1 / its spread; behind the last token those of the first."""
    token = ptx.select(ops.less(token, geometry.tokens), token, ops.const(0))
    address = ptx.sum_of(base, ops.mul(token, 8))
    offset = geometry.measures_offset
    return tuple(ptx.asm(f"ld.shared.v2.f32 {{$0,$1}}, [$2+{offset}];", address, results="ff"))


def in_registers(g: warps.Geometry, lane: warps.Lane, shared, tokens):
    """A function of (half, block, four words of operand B of the block's tokens): normalised words.

    Args:
      tokens: address of the stage's tokens, with the parameters behind them.
    """
    measures = [of_token(g, shared, ops.add(lane.g, 8 * n)) for n in range(g.width // 8)]
    known: dict[int, list] = {}

    def normal(half: int, n: int, words: list) -> list:
        if half not in known:
            known[half] = [_parameters_of(g, lane, tokens, half, i) for i in range(g.norms)]
        values = normalised(ptx.floats_of(words, g.dtype), measures[n], *known[half])
        return [ptx.pack(values[i], values[i + 1], g.dtype) for i in range(0, 8, 2)]

    return normal


def _parameters_of(g, lane, tokens, half: int, number: int) -> list:
    """Those of the 8 inputs of a lane's operand B: 2 c, 2 c + 1, and 8, 16, 24 further."""
    first = warps.STEP * (2 * g.width + 4 * number) + 128 * half
    source = ptx.sum_of(tokens, ops.mul(lane.c, 8))
    return [
        value
        for i in range(4)
        for value in ptx.asm(
            f"ld.shared.v2.f32 {{$0,$1}}, [$2+{first + 32 * i}];", source, results="ff"
        )
    ]


def normalised(values: list, measures: tuple, scale: list, shift: list | None = None) -> list:
    """(value - mean) * (factor * scale) + shift."""
    mean, factor = measures
    factors = [llvm.fmul(factor, s) for s in scale]
    values = [llvm.fmul(llvm.fsub(v, mean), f) for v, f in zip(values, factors, strict=True)]
    return values if shift is None else ptx.add_floats(values, shift)


def store_moments(g: warps.Geometry, lane, ref, values: list, of_matrix, place) -> None:
    """Of 64 outputs of a token, of which the lanes 4 g + c have 8 each.

    Args:
      of_matrix: whether the lane's outputs are any.
      place: the token, the number of its 64 outputs, and whether there are such.
    """
    token, block, inside = place
    values = [ptx.select(of_matrix, value, ptx.number(0.0)) for value in values]
    total = ptx.over_lanes(_sum(values), (4, 8, 16))
    mean = llvm.fmul(total, _share(block, g.f))
    squares = [llvm.fmul(v, v) for v in (llvm.fsub(value, mean) for value in values)]
    squares = ptx.select(of_matrix, _sum(squares), ptx.number(0.0))
    spread = ptx.over_lanes(squares, (4, 8, 16))
    ptx.asm(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.f32 [$0], {$1,$2}; }",
        ptx.global_address(ref, token, 8 * moments_shape(g.f)[0], ops.mul(block, 8)),
        total,
        spread,
        llvm.and_(inside, ops.less(lane.g, 1)),
    )


def _load_moments(g, lane, moments, token) -> list[tuple]:
    """(sum, mean, sum of squares about it, entries) of a lane's blocks; zeros where there is none."""
    count, _ = moments_shape(g.k)
    found = []
    for first in range(0, count, 32):
        block = ops.add(lane.lane, first)
        inside = llvm.and_(ops.less(block, count), ops.less(token, g.tokens))
        source = ptx.global_address(moments, token, 8 * count, ops.mul(block, 8))
        total, spread = (
            llvm.bitcast(ir.F32Type.get(), word) for word in ptx.load(source, inside, 2)
        )
        mean = llvm.fmul(total, _share(block, g.k))
        entries = _of_block(block, g.k, float)
        found.append((total, mean, spread, ptx.select(inside, entries, ptx.number(0.0))))
    return found


def _mean_and_factor(g, form: Form, blocks: list[tuple]) -> tuple:
    """The mean (zero if the norm leaves it in) and 1 / sqrt(variance + epsilon), in every lane."""
    lanes = (16, 8, 4, 2, 1)
    mean = ptx.number(0.0)
    if form.centred:
        total = ptx.over_lanes(_sum([total for total, *_ in blocks]), lanes)
        mean = llvm.fmul(total, ptx.number(1 / g.k))
    terms = []
    for _, own_mean, spread, entries in blocks:
        away = llvm.fsub(own_mean, mean)
        terms.append(llvm.fadd(spread, llvm.fmul(entries, llvm.fmul(away, away))))
    variance = llvm.fmul(ptx.over_lanes(_sum(terms), lanes), ptx.number(1 / g.k))
    factor = ptx.asm(
        "rsqrt.approx.f32 $0, $1;",
        llvm.fadd(variance, ptx.number(form.epsilon)),
        results="f",
        pure=True,
    )
    return mean, factor


def _of_block(block, size: int, function):
    """function(entries of the block) as a float32: the last one may have fewer."""
    last, rest = divmod(size, MOMENTS_BLOCK)
    whole = ptx.number(function(MOMENTS_BLOCK))
    if not rest:
        return whole
    return ptx.select(ops.less(block, last), whole, ptx.number(function(rest)))


def _share(block, size: int):
    """1 / entries of the block."""
    return _of_block(block, size, lambda entries: 1 / entries)


def _sum(values: list):
    """By halves, so that additions do not wait for each other."""
    while len(values) > 1:
        pairs = [llvm.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]
