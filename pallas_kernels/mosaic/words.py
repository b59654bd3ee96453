"""32-bit words of a GPU thread with Python's operators, and the `Machine` that `select` asks for."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic import ops

INFINITY = {"float32": "0x7F800000", "bfloat16": "0x7F807F80", "float16": "0x7C007C00"}


class Word:
    """An i32 of MLIR. Operators take another word or an int, as uint32 arrays of NumPy do."""

    def __init__(self, value):
        self.value = value

    def __and__(self, other):
        return Word(llvm.and_(self.value, _value(other)))

    def __or__(self, other):
        return Word(llvm.or_(self.value, _value(other)))

    def __xor__(self, other):
        return Word(llvm.xor(self.value, _value(other)))

    def __invert__(self):
        return self ^ 0xFFFFFFFF

    def __lshift__(self, bits: int):
        return Word(llvm.shl(self.value, _value(bits), overflow_flags=ops.NO_WRAP))

    def __add__(self, other):
        return Word(llvm.add(self.value, _value(other), overflow_flags=ops.NO_WRAP))

    def __sub__(self, other):
        return Word(llvm.sub(self.value, _value(other), overflow_flags=ops.NO_WRAP))


class Machine:
    """The instructions that have no operator; see `select`."""

    def permute(self, low: Word, high: Word, selector: int) -> Word:
        return _instruction(f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", low, high)

    def magnitude(self, word: Word, dtype: str) -> Word:
        """The smaller of |word| and Inf, where any NaN gives the one canonical NaN."""
        kind = {"float32": "f32", "bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
        register = "f32" if dtype == "float32" else "b32"
        return _instruction(
            f"{{ .reg .{register} x, infinity; mov.b32 x, $1; mov.b32 infinity, {INFINITY[dtype]};"
            f" abs.{kind} x, x; min.NaN.{kind} x, x, infinity; mov.b32 $0, x; }}",
            "=r,r",
            word,
        )

    def widen(self, word: Word, half: int, dtype: str) -> Word:
        if dtype == "bfloat16":
            return word & 0xFFFF0000 if half else word << 16
        return _instruction(
            "{ .reg .b16 low, high; .reg .f32 wide; mov.b32 {low, high}, $1; "
            f"cvt.f32.f16 wide, {'high' if half else 'low'}; mov.b32 $0, wide; }}",
            "=r,r",
            word,
        )

    def pack(self, low: Word, high: Word, dtype: str) -> Word:
        return _instruction(
            "{ .reg .f32 low, high; mov.b32 low, $1; mov.b32 high, $2; "
            f"cvt.rn.{ops.PTX_TYPE[dtype]}x2.f32 $0, high, low; }}",
            "=r,r,r",
            low,
            high,
        )


def load(address, count: int) -> list[Word]:
    """`count` words, by loads of at most 16 bytes through the read-only path."""
    if count > 4:
        return load(address, 4) + load(ops.add(address, 16), count - 4)
    names = ", ".join(f"${i}" for i in range(count))
    i32 = ir.IntegerType.get_signless(32)
    loaded = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * count),
        [address],
        f"ld.global.nc.v{count}.b32 {{{names}}}, [${count}];",
        ",".join(["=r"] * count + ["l"]),
        asm_dialect=0,
    )
    return [Word(llvm.extractvalue(i32, loaded, [i])) for i in range(count)]


def store(address, words: list[Word]) -> None:
    """Consecutive words, by stores of at most 16 bytes."""
    if len(words) > 4:
        store(address, words[:4])
        store(ops.add(address, 16), words[4:])
        return
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *(word.value for word in words)],
        f"st.global.v{len(words)}.b32 [$0], {{{names}}};",
        ",".join(["l"] + ["r"] * len(words)),
        asm_dialect=0,
        has_side_effects=True,
    )


def _value(x):
    if isinstance(x, Word):
        return x.value
    return ops.const(x - (1 << 32) if x >> 31 else x)


def _instruction(ptx: str, constraints: str, *words: Word) -> Word:
    i32 = ir.IntegerType.get_signless(32)
    operands = [word.value for word in words]
    return Word(llvm.inline_asm(i32, operands, ptx, constraints, asm_dialect=0))
