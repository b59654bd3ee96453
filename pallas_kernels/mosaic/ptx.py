"""Inline PTX and addresses of one GPU thread, for bodies of `plgpu.inline_mgpu`."""

import functools

from jax.experimental.mosaic.gpu import utils as mutils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops


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


def shared_address(ref):
    """Address in shared memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mutils.memref_ptr(ref))


def global_address(ref, row, row_bytes: int, column_bytes):
    """Address in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mutils.memref_ptr(ref))
    return sum_of(base, ops.wide_mul(row, row_bytes), llvm.zext(i64, column_bytes))


def load(source, inside, words: int):
    """2 or 4 consecutive words of 32 bits; zeros where not inside.

    Without `.nc`, by which ptxas may move a load behind barriers.
    """
    names = [f"${i}" for i in range(words)]
    zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
    return asm(
        f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {zeros}"
        f" @p ld.global.v{words}.b32 {{{','.join(names)}}}, [${words}]; }}",
        source,
        inside,
        results="r" * words,
        early=True,
    )


def store16(target, four, inside) -> None:
    asm(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.global.v4.b32 [$0], {$1,$2,$3,$4}; }",
        target,
        *(llvm.bitcast(ir.IntegerType.get_signless(32), value) for value in four),
        inside,
    )


def store_float(target, value, inside) -> None:
    asm("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }", target, value, inside)


def pack(low, high, dtype: str):
    ptx = f"cvt.rn.{ops.PTX_TYPE[dtype]}x2.f32 $0, $2, $1;"
    return asm(ptx, low, high, results="r", pure=True)


def floats_of(words: list, dtype: str) -> list:
    """Two float32 of every word of two 16-bit numbers."""
    kind = ops.PTX_TYPE[dtype]
    return [
        value
        for word in words
        for value in asm(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; "
            f"cvt.f32.{kind} $0, l; cvt.f32.{kind} $1, h; }}",
            word,
            results="ff",
            pure=True,
        )
    ]


def dtype_of(ref) -> str:
    element = str(ir.MemRefType(ref.type).element_type)
    return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[element]


def number(value: float):
    f32 = ir.F32Type.get()
    return llvm.ConstantOp(f32, ir.FloatAttr.get(f32, value)).result


def select(condition, x, y):
    return llvm.select(llvm.icmp(llvm.ICmpPredicate.ne, condition, ops.const(0)), x, y)


def minus(x, y):
    return llvm.sub(x, y, overflow_flags=ops.NO_WRAP)


def of_lane(value, distance: int):
    """The float32 of the lane whose number differs by this power of two."""
    return asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;", value, results="f")


def over_lanes(value, distances: tuple[int, ...]):
    """The sum over lanes whose numbers differ by these, in each of them."""
    for distance in distances:
        value = llvm.fadd(value, of_lane(value, distance))
    return value


def sum_of(first, *rest):
    return functools.reduce(ops.add_reg, rest, first)


def add_floats(x: list, y: list) -> list:
    return [llvm.fadd(a, b) for a, b in zip(x, y, strict=True)]
