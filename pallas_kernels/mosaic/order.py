"""The order in which Hopper's sparse tensor cores read a 2:4 weight. Derived, never stored.

`wgmma.sp` takes the sparse operand as A, rows = output features. For every 64 rows x 64 columns
(input features) a thread of the 128 holds one 32-bit word of positions: with t = 32 * warp +
4 * row8 + 2 * sel + half it covers the 16 columns 16 * (2 * sel + half) of the rows
16 * warp + row8 (low 16 bits) and 16 * warp + row8 + 8 (high 16 bits). 16 columns are 4 groups of
two 2-bit positions, low first: just the two bytes that the logical metadata holds for them, so
ordering metadata only moves bytes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compressed
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.pattern import Pattern

TWO_FOUR = Pattern(2, 4)
ROWS, COLUMNS = 64, 128  # weights are padded to multiples of these, with zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderedWeight:
    """An (in, out) weight for `wgmma.sp`, padded by zeros to F = out and K = in.

    * `values`: (F, K / 2), survivors 2:4 along K.
    * `metadata`: int32 (F / 64, K / 64, 128), see the module.
    """

    values: jax.Array
    metadata: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


def order(w: CompressedMatrix, dtype) -> OrderedWeight:
    """The kernel's form of `w`, with values in `dtype`."""
    w = as_two_four(w)
    k, f = w.shape
    pad_k, pad_f = -k % COLUMNS, -f % ROWS
    values = jnp.pad(w.values.astype(dtype), ((0, pad_k // 2), (0, pad_f)))
    # Padding must hold two distinct positions: 0 and 1, the nibble 0b0100.
    metadata = jnp.pad(w.metadata, ((0, pad_k // 8), (0, pad_f)), constant_values=0x44)
    return OrderedWeight(values.T, order_metadata(metadata), w.shape)


def order_metadata(metadata: jax.Array) -> jax.Array:
    """uint8 (K / 8, F), two groups of 4 a byte, to int32 (F / 64, K / 64, 128)."""
    columns, rows = metadata.shape
    octets = metadata.reshape(columns // 8, 2, 2, 2, rows // 64, 4, 2, 8)
    # [k64, sel, half, byte, f64, warp, high, row8] -> [f64, k64, warp, row8, sel, half, high, byte]
    octets = octets.transpose(4, 0, 5, 7, 1, 2, 6, 3)
    words = lax.bitcast_convert_type(octets.reshape(rows // 64, columns // 8, 128, 4), jnp.int32)
    return words


def as_two_four(w: CompressedMatrix) -> CompressedMatrix:
    """The same matrix as 2:4, with stored zeros where the pattern keeps fewer."""
    if w.pattern == TWO_FOUR:
        return w
    mask = compressed.kept_mask(w)
    return compressed.compress(compressed.decompress(w), TWO_FOUR, mask=mask)
