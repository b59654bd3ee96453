"""Scalar operations of one GPU thread, in MLIR, for bodies of `plgpu.inline_mgpu`.

The files of this package that import `jaxlib.mlir` or `jax.experimental.mosaic.gpu` need unstable
corners of JAX. Tested with JAX 0.11.2.
"""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}
NO_WRAP = llvm.IntegerOverflowFlags.none


def const(value: int):
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, value)).result


def const64(value: int):
    i64 = ir.IntegerType.get_signless(64)
    return llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, value)).result


def add(x, value: int):
    constant = llvm.ConstantOp(x.type, ir.IntegerAttr.get(x.type, value)).result
    return add_reg(x, constant)


def add_reg(x, y):
    return llvm.add(x, y, overflow_flags=NO_WRAP)


def mul(x, value: int):
    return llvm.mul(x, const(value), overflow_flags=NO_WRAP)


def wide_mul(x, value: int):
    i64 = ir.IntegerType.get_signless(64)
    return llvm.mul(llvm.zext(i64, x), const64(value), overflow_flags=NO_WRAP)


def less(x, bound: int):
    return flag(llvm.ICmpPredicate.slt, x, const(bound))


def flag(predicate, x, y):
    """0 or 1 in 32 bits."""
    return llvm.zext(ir.IntegerType.get_signless(32), llvm.icmp(predicate, x, y))


def asm(ptx: str, constraints: str, *operands, result=None):
    return llvm.inline_asm(
        result or ir.Type.parse("!llvm.void"),
        list(operands),
        ptx,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )


def scalar(register):
    """The one element of a vector<1>, or the scalar itself."""
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, const(0))
    return register


def add_float(x, y):
    return llvm.fadd(x, y)


def multiply_float(x, y):
    return llvm.fmul(x, y)


def pack(low, high, dtype: str):
    """Two float32 rounded to 16 bits, side by side."""
    i32 = ir.IntegerType.get_signless(32)
    ptx = f"cvt.rn.{PTX_TYPE[dtype]}x2.f32 $0, $2, $1;"
    return llvm.inline_asm(i32, [low, high], ptx, "=r,f,f", asm_dialect=0)
