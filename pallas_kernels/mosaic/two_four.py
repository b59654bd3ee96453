"""Other patterns as 2:4, which is what the tensor cores know. No dense matrix on the way."""

import jax
import jax.numpy as jnp

from pallas_kernels import compressed
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def as_two_four(w: CompressedMatrix) -> CompressedMatrix:
    """The same matrix (of a pattern in `support.FITTING`, along axis 0) as 2:4.

    The same as compressing the dense matrix by its mask: zeros fill up where w keeps fewer.
    """
    if w.pattern == TWO_FOUR:
        return w
    positions = compressed.split_groups(compressed.positions_of(w), w.n, 0)
    if w.m == 2:  # two groups are one of 2:4, and their values stay where they are
        pairs = compressed.split_groups(compressed.join_groups(positions, 0), 2, 0)
        pairs = pairs + jnp.array([[0], [2]], jnp.uint8).reshape((1,) * (pairs.ndim - 2) + (2, 1))
        return _matrix(w.values, pairs, w)
    bits = compressed.split_groups(compressed.to_bits(w.values), w.n, 0)
    quads = [_quad(bits, positions, number) for number in range(w.m // 4)]
    bits, positions = (_joined(parts) for parts in zip(*quads, strict=True))
    values = compressed.from_bits(compressed.join_groups(bits, 0), w.dtype)
    return _matrix(values, positions, w)


def values_of(two_four: jax.Array, w: CompressedMatrix) -> jax.Array:
    """Those of w's own positions, from (..., in / 2, out) where `as_two_four(w)` has values."""
    if 2 * w.n == w.m:
        return two_four
    positions = compressed.split_groups(compressed.positions_of(w), w.n, 0)
    quad, place = positions // 4, positions % 4
    slot = (place != 0).astype(jnp.uint8)
    if w.n == 2:
        together = quad[..., :1, :] == quad[..., 1:, :]
        slot = jnp.where(together, jnp.array([[0], [1]], jnp.uint8)[None], slot)
    groups = compressed.split_groups(two_four, w.m // 2, 0)
    return compressed.join_groups(compressed.pick(groups, 2 * quad + slot), 0)


def _quad(bits: jax.Array, positions: jax.Array, number: int):
    """Two values and two positions of the 4 entries `number` of each group, which hold 0 to 2."""
    survivors = []
    for s in range(positions.shape[-2]):
        here = positions[..., s, :] // 4 == number
        value = jnp.where(here, bits[..., s, :], jnp.zeros((), bits.dtype))
        survivors.append((here, value, jnp.where(here, positions[..., s, :] % 4, jnp.uint8(0))))
    # One at most: its place is 0 where there is none, and so is its value.
    value, place = (sum(parts[1:], parts[0]) for parts in list(zip(*survivors, strict=True))[1:])
    first = place == 0
    none, one = jnp.zeros((), value.dtype), jnp.uint8(1)
    values = [jnp.where(first, value, none), jnp.where(first, none, value)]
    places = [jnp.zeros_like(place), jnp.where(first, one, place)]
    if len(survivors) == 2:
        both = survivors[0][0] & survivors[1][0]
        values = [jnp.where(both, s[1], v) for s, v in zip(survivors, values, strict=True)]
        places = [jnp.where(both, s[2], p) for s, p in zip(survivors, places, strict=True)]
    return jnp.stack(values, axis=-2), jnp.stack(places, axis=-2)


def _joined(quads) -> jax.Array:
    """(..., groups, 2, lines) of each quad to (..., groups * quads, 2, lines)."""
    x = jnp.stack(quads, axis=-3)
    return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])


def _matrix(values: jax.Array, positions: jax.Array, w: CompressedMatrix) -> CompressedMatrix:
    metadata = compressed.pack_positions(compressed.join_groups(positions, 0), TWO_FOUR, 0)
    return CompressedMatrix(values, metadata, TWO_FOUR, 0, w.shape)
