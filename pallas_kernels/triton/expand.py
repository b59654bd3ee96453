"""PTX that turns compressed groups into dense ones, two lines of them at a time.

For ascending positions p0 < p1 the two bits of each tell, alone or as a pair, where a value goes:

    p0 == 0: neither bit of p0    p1 == 1: not the high bit of p1
    p0 == 1: the low bit          p1 == 2: not the low bit
    p0 == 2: the high bit         p1 == 3: both bits

So a bit, spread over the 16 bits of a value, is a mask, and an entry is one or two of lop3. `prmt`
spreads the top bit of a byte.
"""

SPREAD = "0xAA88"  # the sign of byte 0 twice, the sign of byte 2 twice
# The truth table of lop3 is the function itself of a = 0xF0, b = 0xCC, c = 0xAA.
NEITHER = "0x10"  # a & ~b & ~c
BOTH = "0x80"  # a & b & c
UNLESS = "0xF4"  # a | (b & ~c)


def expand_ptx() -> str:
    """Eight dense entries ($0 .. $7) of four values ($8 .. $11) and one byte of metadata ($12).

    Every register holds two 16-bit numbers, of two lines; the byte is widened to 16 bits.
    """
    code = [".reg .b32 shifted, v, low0, high0, low1, high1;"]
    for group in (0, 1):
        for place, mask in enumerate(("low0", "high0", "low1", "high1")):
            code += [
                f"shl.b32 shifted, $12, {7 - 4 * group - place};",
                f"prmt.b32 {mask}, shifted, 0, {SPREAD};",
            ]
        w0, w1, w2, w3 = (f"${4 * group + i}" for i in range(4))
        v0, v1 = (f"${8 + 2 * group + i}" for i in range(2))
        code += [
            f"lop3.b32 {w0}, {v0}, low0, high0, {NEITHER};",
            f"and.b32 v, {v0}, low0;",
            f"lop3.b32 {w1}, v, {v1}, high1, {UNLESS};",
            f"and.b32 v, {v0}, high0;",
            f"lop3.b32 {w2}, v, {v1}, low1, {UNLESS};",
            f"lop3.b32 {w3}, {v1}, low1, high1, {BOTH};",
        ]
    return "{ " + " ".join(code) + " }"


def constraints() -> str:
    """Outputs are written before the last input is read, hence '&'."""
    return ",".join(["=&r"] * 8 + ["r"] * 5)
