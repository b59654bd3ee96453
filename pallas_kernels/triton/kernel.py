"""The Triton program; importing this needs triton."""

import triton
import triton.language as tl

from pallas_kernels.triton import expand

EXPAND_PTX = tl.constexpr(expand.expand_ptx())
EXPAND_CONSTRAINTS = tl.constexpr(expand.constraints())


@triton.jit
def _entry(x4, i: tl.constexpr, dtype: tl.constexpr):
    """Entry i of four that lie in one int64."""
    return (x4 >> (16 * i)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def nm_matmul(
    x_ptr,
    values_ptr,
    metadata_ptr,
    y_ptr,
    TOKENS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    STEPS: tl.constexpr,
    PHASED: tl.constexpr,
    X_LINES: tl.constexpr,
):
    """y[split, token, out], the sum over one split of the input features.

    A line is 8 input features: one byte of metadata, four values, two int64 of x. The dense entry
    j = 0 .. 7 of every line is a matrix of its own, and so is x[:, j::8], so nothing has to be
    interleaved, and all that happens to x and w on their way to the tensor core is elementwise:
    the compiler then does it in the registers that `mma` reads. Transposed, acc[out, token], since
    warps are laid out along the rows: each expands its own part of the weight, once. But each picks
    x apart for itself; where that costs much, x comes apart already (PHASED: 8, tokens, X_LINES).
    """
    dtype = values_ptr.dtype.element_ty
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    line = tl.arange(0, BLOCK_LINES)
    first = tl.program_id(2) * (STEPS * BLOCK_LINES)

    token_rows = token[None, :].to(tl.int64)
    if PHASED:
        x_ptrs = x_ptr + first + token_rows * X_LINES + line[:, None]
    else:
        x_ptr = x_ptr.to(tl.pointer_type(tl.int64)) + 2 * first
        x_ptrs = x_ptr + token_rows * (IN // 4) + 2 * line[:, None]
    metadata_ptrs = metadata_ptr + first.to(tl.int64) * OUT + line[None, :] * OUT + out[:, None]
    values_ptr += first.to(tl.int64) * (4 * OUT)
    values_ptrs = values_ptr + line[None, :] * (4 * OUT) + out[:, None]

    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for step in range(STEPS):
        here = first + step * BLOCK_LINES + line
        w_inside = (here < IN // 8)[None, :] & (out < OUT)[:, None]
        x_inside = (here < X_LINES)[:, None] & (token < TOKENS)[None, :]
        metadata = tl.load(metadata_ptrs, mask=w_inside, other=0)
        v0 = tl.load(values_ptrs, mask=w_inside, other=0)
        v1 = tl.load(values_ptrs + OUT, mask=w_inside, other=0)
        v2 = tl.load(values_ptrs + 2 * OUT, mask=w_inside, other=0)
        v3 = tl.load(values_ptrs + 3 * OUT, mask=w_inside, other=0)
        w = tl.inline_asm_elementwise(
            EXPAND_PTX,
            EXPAND_CONSTRAINTS,
            [v0, v1, v2, v3, metadata.to(tl.uint16)],
            dtype=(dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype),
            is_pure=True,
            pack=2,
        )
        if PHASED:
            for j in tl.static_range(8):
                x = tl.load(x_ptrs + j * (TOKENS * X_LINES), mask=x_inside, other=0)
                acc = tl.dot(w[j], x, acc)
        else:
            low = tl.load(x_ptrs, mask=x_inside, other=0)
            high = tl.load(x_ptrs + 1, mask=x_inside, other=0)
            for j in tl.static_range(4):
                acc = tl.dot(w[j], _entry(low, j, dtype), acc)
            for j in tl.static_range(4):
                acc = tl.dot(w[4 + j], _entry(high, j, dtype), acc)
        metadata_ptrs += BLOCK_LINES * OUT
        values_ptrs += 4 * BLOCK_LINES * OUT
        x_ptrs += BLOCK_LINES if PHASED else 2 * BLOCK_LINES

    y_ptr += tl.program_id(2).to(tl.int64) * TOKENS * OUT
    y_ptrs = y_ptr + token_rows * OUT + out[:, None]
    y_inside = (token < TOKENS)[None, :] & (out < OUT)[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_inside)
