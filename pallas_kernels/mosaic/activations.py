"""Activations of one float32 register, and the factors by which gradients go back through them.

Two versions of each activation: `PRECISE`, within a few units of float32's last place, and `FAST`, within
3e-4 * |z|: half of the hardware's tanh, which is within 2^-11 of its result, and of a fit. Where the result
is near z, that is a seventh of bfloat16's rounding, and about float16's. Where it is near 0, at negative z,
it is more than the rounding of so small a result. An epilogue has no tensor core work beside it, so that its
length counts: `FAST` takes one special-function instruction, the tanh, where `PRECISE` takes two, 2^x and
1/x. Derivatives are those of `FAST`, within 1e-3.
"""

import functools
import math

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

LOG2_E = math.log2(math.e)
# erfc(x) = exp(-x^2) (a1 t + ... + a5 t^5), t = 1 / (1 + p x), within 1.5e-7 for x >= 0.
# (Abramowitz and Stegun 7.1.26)
ERFC_P = 0.3275911
ERFC_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
# erf(z / sqrt 2) = tanh(z (c0 + c1 z^2 + c2 z^4)); fitted, so that gelu is within 2.6e-5 for
# |z| < 6, where it ends.
ERF_C = (7.97507884e-01, 3.70056461e-02, -3.51516808e-04)
ERF_SQUARED_END = 40.0
FLAT_FROM = 6.25  # derivatives of |z| beyond are those there; 12.5 for silu
TANH_C = (math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715)


def relu(z):
    return _ptx("max.NaN.f32 $0, $1, $2;", z, _float(0.0))


def precise_silu(z):
    return _mul(z, _sigmoid(z))


def precise_gelu_tanh(z):
    """z / (1 + exp(-2 u)), u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    inner = _polynomial(_mul(z, z), [2 * c for c in TANH_C])
    return _mul(z, _sigmoid(_mul(z, inner)))


def precise_gelu(z):
    """max(z, 0) - |z| erfc(|z| / sqrt 2) / 2: nothing cancels."""
    size = _ptx("{ .reg .f32 a; abs.f32 a, $1; min.f32 $0, a, $2; }", z, _float(30.0))
    t = _reciprocal(_fma(size, _float(ERFC_P / math.sqrt(2)), _float(1.0)))
    series = _mul(_polynomial(t, [-a / 2 for a in ERFC_A]), t)
    decay = _power_of_two(_mul(_mul(size, size), _float(-LOG2_E / 2)))
    return _fma(_mul(series, decay), size, relu(z))


def fast_silu(z):
    return _half_of_one_plus_tanh(z, _mul(z, _float(0.5)))


def fast_gelu_tanh(z):
    return _half_of_one_plus_tanh(z, _mul(z, _polynomial(_mul(z, z), TANH_C)))


def fast_gelu(z):
    squared = _ptx("min.f32 $0, $1, $2;", _mul(z, z), _float(ERF_SQUARED_END))
    return _half_of_one_plus_tanh(z, _mul(z, _polynomial(squared, ERF_C)))


def through_relu(gradient, y):
    """The gradient where y, or what entered relu, is positive; 0 elsewhere."""
    return _ptx(
        "{ .reg .pred p; setp.gt.f32 p, $2, $3; selp.f32 $0, $1, $3, p; }", gradient, y, _float(0.0)
    )


def through_silu(gradient, z):
    z = _within(z, 2 * FLAT_FROM)
    return _through_half_of_one_plus_tanh(gradient, z, (0.5,))


def through_gelu_tanh(gradient, z):
    return _through_half_of_one_plus_tanh(gradient, _within(z, FLAT_FROM), TANH_C)


def through_gelu(gradient, z):
    return _through_half_of_one_plus_tanh(gradient, _within(z, FLAT_FROM), ERF_C)


PRECISE = {
    "relu": relu,
    "gelu": precise_gelu,
    "gelu_tanh": precise_gelu_tanh,
    "silu": precise_silu,
}
FAST = {"relu": relu, "gelu": fast_gelu, "gelu_tanh": fast_gelu_tanh, "silu": fast_silu}
THROUGH = {
    "relu": through_relu,
    "gelu": through_gelu,
    "gelu_tanh": through_gelu_tanh,
    "silu": through_silu,
}


def _half_of_one_plus_tanh(z, u):
    half = _mul(z, _float(0.5))
    return _fma(half, _ptx("tanh.approx.f32 $0, $1;", u), half)


def _through_half_of_one_plus_tanh(gradient, z, coefficients):
    """gradient times the derivative of z (1 + tanh u) / 2, u = z (c0 + c1 z^2 + ...), which is
    (1 + t) / 2 + (1 - t^2) (c0 z + 3 c1 z^3 + ...) / 2, t = tanh u."""
    squared = _mul(z, z)
    inner = _polynomial(squared, coefficients)
    slope = _polynomial(squared, [(2 * i + 1) * c / 2 for i, c in enumerate(coefficients)])
    t = _ptx("tanh.approx.f32 $0, $1;", _mul(z, inner))
    bell = _fma(_mul(t, _float(-1.0)), t, _float(1.0))
    half = _fma(t, _float(0.5), _float(0.5))
    return _mul(gradient, _fma(_mul(z, slope), bell, half))


def _within(z, bound: float):
    ptx = "{ .reg .f32 a; min.NaN.f32 a, $1, $2; max.NaN.f32 $0, a, $3; }"
    return _ptx(ptx, z, _float(bound), _float(-bound))


def _sigmoid(z):
    power = _power_of_two(_mul(z, _float(-LOG2_E)))
    return _reciprocal(_ptx("add.f32 $0, $1, $2;", power, _float(1.0)))


def _polynomial(x, coefficients):
    *low, top = (_float(c) for c in coefficients)
    return functools.reduce(lambda p, c: _fma(p, x, c), reversed(low), top)


def _power_of_two(x):
    return _ptx("ex2.approx.ftz.f32 $0, $1;", x)


def _reciprocal(x):
    return _ptx("rcp.approx.ftz.f32 $0, $1;", x)


def _mul(x, y):
    return _ptx("mul.f32 $0, $1, $2;", x, y)


def _fma(x, y, z):
    return _ptx("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def _ptx(instruction, *operands):
    kinds = ",".join(["=f"] + ["f"] * len(operands))
    return llvm.inline_asm(ir.F32Type.get(), list(operands), instruction, kinds, asm_dialect=0)


def _float(value: float):
    f32 = ir.F32Type.get()
    return llvm.ConstantOp(f32, ir.FloatAttr.get(f32, value)).result
