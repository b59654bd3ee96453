"""The compressed N:M matrix: survivors and their positions, independent of any hardware.

Which entries survive, and the bits of every survivor, are defined for all inputs:

* Magnitude is |w| with -0.0 equal to 0.0 and every NaN equal and above Inf, so that a NaN is kept
  and seen, never pruned away. Of equal magnitudes the lower index survives.
* Survivors keep their bits (-0.0 stays -0.0, a NaN keeps its payload), in ascending position.
* Positions in a group are always n distinct ascending ones: a group whose mask keeps fewer than n
  entries is filled up with its lowest unkept positions, and those store the value +0.0.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pattern import Pattern

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedMatrix:
    """An (in, out) matrix of which each m consecutive entries along `axis` keep n.

    * `values`: survivors in order, float32, bfloat16 or float16. The compressed axis has
      size * n / m entries, the other axis is whole.
    * `metadata`: uint8, the position (0 .. m-1) of every survivor in its group, `pattern.bits`
      bits each, packed along the compressed axis as a little-endian bit stream per line: survivor
      p takes bits [p * bits, (p + 1) * bits). 2:4 takes 2 bits, so 9/16 of a dense 16-bit matrix.
    * Positions ascend within a group and never repeat.
    * Both leaves may have more, leading, axes (stacked layers); `shape` is of one matrix.

    >>> w = compress(jnp.arange(1.0, 9.0).reshape(8, 1), "2:4")
    >>> w.values[:, 0].tolist(), w.metadata[:, 0].tolist()
    ([3.0, 4.0, 7.0, 8.0], [238])
    """

    values: jax.Array
    metadata: jax.Array
    pattern: Pattern = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def n(self) -> int:
        return self.pattern.n

    @property
    def m(self) -> int:
        return self.pattern.m

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Stored bytes, values and metadata."""
        return self.values.size * self.values.dtype.itemsize + self.metadata.size

    def with_values(self, values: jax.Array) -> "CompressedMatrix":
        """The same positions with other values (a gradient, a moment, another dtype)."""
        return dataclasses.replace(self, values=values)

    def check(self) -> "CompressedMatrix":
        """Returns itself, or raises a ValueError naming the leaf whose shape or dtype is wrong."""
        if not isinstance(self.pattern, Pattern):
            raise ValueError(
                f"pattern is {self.pattern!r}; a matrix holds a Pattern: Pattern.parse"
            )
        want = compressed_shapes(self.shape, self.pattern, self.axis)
        for name, leaf, shape in zip(
            ("values", "metadata"), (self.values, self.metadata), want, strict=True
        ):
            check_array(leaf, name)
            if leaf.shape[-2:] != shape:
                raise ValueError(
                    f"{name} has shape {leaf.shape}; a {self.pattern} matrix of shape"
                    f" {self.shape} compressed along axis {self.axis} needs {shape}"
                )
        if self.values.shape[:-2] != self.metadata.shape[:-2]:
            raise ValueError(
                f"values {self.values.shape} and metadata {self.metadata.shape} must have the same"
                " leading axes"
            )
        check_dtype(self.values.dtype, "values")
        if self.metadata.dtype != jnp.uint8:
            raise ValueError(f"metadata has dtype {self.metadata.dtype}; it must be uint8")
        return self


def check_compressed(w: Any, what: str = "w") -> None:
    """Raises an error unless `w` is a compressed matrix, or a stack of them, whose parts fit."""
    if not isinstance(w, CompressedMatrix):
        raise TypeError(
            f"{what} is a {type(w).__name__}; it must be a CompressedMatrix: compress(w, '2:4')"
        )
    w.check()


def check_array(value: Any, what: str) -> None:
    """Raises a TypeError unless it has the shape and dtype of an array."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise TypeError(
            f"{what} is a {type(value).__name__}; it must be an array, as of jnp.asarray"
        )


def check_pair(value: Any, what: str) -> None:
    """Raises a TypeError unless it is two arrays."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        found = f"{len(value)} things" if isinstance(value, tuple | list) else type(value).__name__
        raise TypeError(f"{what} is {found}; it must be two arrays, as a tuple")
    for number, array in enumerate(value):
        check_array(array, f"{what}[{number}]")


def check_dtype(dtype, what: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {dtype}; it must be float32, bfloat16 or float16")


def compressed_shapes(
    shape: tuple[int, int], pattern: Pattern | str, axis: int = 0
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of values and metadata of an (in, out) matrix compressed along `axis`."""
    pattern = Pattern.parse(pattern)
    if len(shape) != 2:
        raise ValueError(f"shape {shape} has {len(shape)} axes; a matrix (in, out) has two")
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}; it must be 0 (input) or 1 (output)")
    pattern.check_divides(shape[axis], ("input axis", "output axis")[axis] + f" of shape {shape}")
    values, metadata = list(shape), list(shape)
    values[axis] = pattern.kept(shape[axis])
    metadata[axis] = pattern.metadata_bytes(shape[axis])
    return tuple(values), tuple(metadata)


def compress(
    w: jax.Array, pattern: Pattern | str, *, axis: int = 0, mask: jax.Array | None = None
) -> CompressedMatrix:
    """Keeps n of every m consecutive entries of `w` along `axis`.

    Args:
      w: (..., in, out), float32, bfloat16 or float16.
      pattern: "n:m" or a `Pattern`; m divides the axis.
      axis: 0, the input axis, or 1, the output axis.
      mask: bool, shape of `w`, True keeps. None keeps the largest magnitudes (see the module's
        rules for ties, zeros and NaN). At most n per group; fewer are filled up by zeros.

    Returns:
      The compressed matrix; `decompress` gives `w` where kept and +0.0 elsewhere. Its values have the
      derivatives of the entries that they are, its metadata none.

    Raises:
      ValueError: shapes, dtype or pattern do not fit, or a concrete mask keeps more than n.
    """
    pattern = Pattern.parse(pattern)
    check_array(w, "w")
    check_dtype(w.dtype, "w")
    if w.ndim < 2:
        raise ValueError(f"w has shape {w.shape}; it must be (..., in, out)")
    shape = (w.shape[-2], w.shape[-1])
    compressed_shapes(shape, pattern, axis)
    if mask is not None:
        check_array(mask, "mask")
    if mask is not None and (mask.shape != w.shape or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask is {mask.dtype}{list(mask.shape)}; it must be bool{list(w.shape)}, True keeps"
        )
    if mask is not None:
        _check_mask_count(mask, pattern, axis)
    return CompressedMatrix(*_compress(w, mask, pattern, axis), pattern, axis, shape)


def decompress(w: CompressedMatrix) -> jax.Array:
    """The dense (..., in, out) matrix: survivors at their positions, +0.0 elsewhere."""
    check_compressed(w)
    return _decompress(w)


# Outside of `jax.jit` each operation would be a program of its own, some sixty of them. Bits have no
# derivative, so that of the values is told apart.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _compress(w, mask, pattern: Pattern, axis: int) -> tuple[jax.Array, jax.Array]:
    groups = split_groups(to_bits(w), pattern.m, axis)
    if mask is None:
        keep = largest(magnitude_key(groups, w.dtype), pattern.n, axis=-2)
    else:
        keep = split_groups(mask, pattern.m, axis)
        groups = jnp.where(keep, groups, jnp.zeros((), groups.dtype))
        keep = _fill_up(keep, pattern)
    positions = kept_positions(keep, pattern.n)
    values = from_bits(join_groups(pick(groups, positions), axis), w.dtype)
    return values, pack_positions(join_groups(positions, axis), pattern, axis)


@_compress.defjvp
def _compress_tangent(pattern: Pattern, axis: int, primals, tangents):
    (w, mask), (dw, _) = primals, tangents
    values, metadata = _compress(w, mask, pattern, axis)
    positions = unpack_positions(metadata, pattern, axis, values.shape[axis - 2])
    groups = split_groups(dw, pattern.m, axis)
    if mask is not None:
        groups = jnp.where(split_groups(mask, pattern.m, axis), groups, 0)
    picked = join_groups(pick(groups, split_groups(positions, pattern.n, axis)), axis)
    return (values, metadata), (picked, jax.custom_derivatives.zero_from_primal(metadata))


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)
def _decompress(w: CompressedMatrix) -> jax.Array:
    return from_bits(_placed(w, to_bits(w.values)), w.dtype)


@_decompress.defjvp
def _decompress_tangent(primals, tangents):
    (w,), (dw,) = primals, tangents
    return _decompress(w), _placed(w, dw.values)


def _placed(w: CompressedMatrix, values: jax.Array) -> jax.Array:
    """Where w has its survivors."""
    positions = split_groups(positions_of(w), w.n, w.axis)
    return join_groups(place(split_groups(values, w.n, w.axis), positions, w.m), w.axis)


@functools.partial(jax.jit, inline=True)
def positions_of(w: CompressedMatrix) -> jax.Array:
    """uint8, shape of `values`: the position 0 .. m-1 of every survivor in its group."""
    return unpack_positions(w.metadata, w.pattern, w.axis, w.values.shape[w.axis - 2])


def kept_mask(w: CompressedMatrix) -> jax.Array:
    """bool (..., in, out), True where an entry is stored."""
    return decompress(w.with_values(jnp.ones_like(w.values))) != 0


# Groups. Inside this package a grouped array has shape (..., groups, m or n, lines): the members of
# a group lie along axis -2, whichever axis was compressed.


def split_groups(x: jax.Array, size: int, axis: int) -> jax.Array:
    """(..., in, out) to (..., groups, size, lines): m entries a group, or n survivors."""
    if axis == 1:
        x = jnp.swapaxes(x, -1, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def join_groups(groups: jax.Array, axis: int) -> jax.Array:
    """The inverse of `split_groups`."""
    x = groups.reshape(*groups.shape[:-3], groups.shape[-3] * groups.shape[-2], groups.shape[-1])
    return jnp.swapaxes(x, -1, -2) if axis == 1 else x


# Selection


def to_bits(w: jax.Array) -> jax.Array:
    """Floats as unsigned integers: moved as floats, subnormal numbers may be flushed to zero."""
    return lax.bitcast_convert_type(w, {2: jnp.uint16, 4: jnp.uint32}[w.dtype.itemsize])


def from_bits(bits: jax.Array, dtype) -> jax.Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(bits, dtype)


def magnitude_key(bits: jax.Array, dtype) -> jax.Array:
    """Unsigned integers in the order of |w|, from its bits: all NaN equal and above Inf."""
    magnitude = bits & jnp.array(jnp.iinfo(bits.dtype).max >> 1, bits.dtype)
    infinity = to_bits(jnp.array(jnp.inf, dtype))
    return jnp.minimum(magnitude, infinity + jnp.array(1, bits.dtype))


@functools.partial(jax.jit, static_argnames=("n", "axis"), inline=True)
def largest(key: jax.Array, n: int, axis: int) -> jax.Array:
    """bool: the n largest keys along `axis`; of equal ones the lower index."""
    index = lax.broadcasted_iota(jnp.int32, key.shape, axis % key.ndim)
    rank = jnp.zeros(key.shape, jnp.int32)
    for j in range(key.shape[axis]):
        other = lax.slice_in_dim(key, j, j + 1, axis=axis)
        beats = (other > key) | ((other == key) & (j < index))
        rank = rank + beats.astype(jnp.int32)
    return rank < n


def _check_mask_count(mask: jax.Array, pattern: Pattern, axis: int) -> None:
    if isinstance(mask, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # a constant of a function that is being traced
        most = int(_most_kept(mask, pattern.m, axis))
    if most > pattern.n:
        raise ValueError(
            f"mask keeps {most} of {pattern.m} entries in some group; the pattern {pattern} keeps"
            f" at most {pattern.n}: make it with slope_jax.masks, along the same axis"
        )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _most_kept(mask: jax.Array, m: int, axis: int) -> jax.Array:
    return split_groups(mask, m, axis).sum(-2, dtype=jnp.int32).max(initial=0)


def _fill_up(keep: jax.Array, pattern: Pattern) -> jax.Array:
    """Exactly n per group: the kept ones first, then the lowest others."""
    return largest(keep.astype(jnp.uint8), pattern.n, axis=-2)


def kept_positions(keep: jax.Array, n: int) -> jax.Array:
    """uint8 (..., groups, n, lines): positions of the True entries, ascending (n per group)."""
    count = jnp.zeros(keep[..., 0, :].shape, jnp.uint8)
    positions = [count] * n
    for i in range(keep.shape[-2]):
        kept = keep[..., i, :]
        positions = [
            jnp.where(kept & (count == s), jnp.uint8(i), p) for s, p in enumerate(positions)
        ]
        count = count + kept.astype(jnp.uint8)
    return jnp.stack(positions, axis=-2)


def pick(groups: jax.Array, positions: jax.Array) -> jax.Array:
    """(..., groups, n, lines): the members of each group at `positions`.

    A chain of selects, not a gather: it vectorises and fuses.
    """
    out = jnp.broadcast_to(groups[..., :1, :], positions.shape)
    for i in range(1, groups.shape[-2]):
        out = jnp.where(positions == i, groups[..., i : i + 1, :], out)
    return out


def place(values: jax.Array, positions: jax.Array, m: int) -> jax.Array:
    """The inverse of `pick`: (..., groups, m, lines) with zero where nothing is stored."""
    shape = (*values.shape[:-2], m, values.shape[-1])
    index = lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 2)
    out = jnp.zeros(shape, values.dtype)
    for s in range(values.shape[-2]):
        here = positions[..., s : s + 1, :] == index
        out = jnp.where(here, values[..., s : s + 1, :], out)
    return out


# Packing: `chunk` positions fill `words` whole bytes (4 positions a byte for 2:4; 8 in 3 for 2:8).


def _chunk(bits: int) -> tuple[int, int]:
    positions = 8 // math.gcd(8, bits)
    return positions, positions * bits // 8


def pack_positions(positions: jax.Array, pattern: Pattern, axis: int) -> jax.Array:
    """uint8 positions (shape of values) to the packed bit stream along `axis`."""
    bits = pattern.bits
    x = jnp.swapaxes(positions, -1, -2) if axis == 1 else positions
    if bits == 0:
        packed = jnp.zeros((*x.shape[:-2], 0, x.shape[-1]), jnp.uint8)
    else:
        count, size = _chunk(bits)
        kept = x.shape[-2]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -kept % count), (0, 0)])
        x = split_groups(x, count, 0).astype(jnp.uint32)
        word = sum(x[..., p, :] << jnp.uint32(p * bits) for p in range(count))
        octets = [(word >> jnp.uint32(8 * b)).astype(jnp.uint8) for b in range(size)]
        packed = join_groups(jnp.stack(octets, axis=-2), 0)
        packed = packed[..., : -(-kept * bits // 8), :]
    return jnp.swapaxes(packed, -1, -2) if axis == 1 else packed


def unpack_positions(metadata: jax.Array, pattern: Pattern, axis: int, kept: int) -> jax.Array:
    """The inverse of `pack_positions` for `kept` survivors a line."""
    bits = pattern.bits
    x = jnp.swapaxes(metadata, -1, -2) if axis == 1 else metadata
    if bits == 0:
        index = lax.broadcasted_iota(
            jnp.int32, (*x.shape[:-2], kept, x.shape[-1]), len(x.shape) - 2
        )
        positions = (index % pattern.m).astype(jnp.uint8)
    else:
        count, size = _chunk(bits)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % size), (0, 0)])
        x = split_groups(x, size, 0).astype(jnp.uint32)
        word = sum(x[..., b, :] << jnp.uint32(8 * b) for b in range(size))
        low = jnp.uint32((1 << bits) - 1)
        fields = [((word >> jnp.uint32(p * bits)) & low).astype(jnp.uint8) for p in range(count)]
        positions = join_groups(jnp.stack(fields, axis=-2), 0)[..., :kept, :]
    return jnp.swapaxes(positions, -1, -2) if axis == 1 else positions
