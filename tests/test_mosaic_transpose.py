"""nm_transpose on Hopper: its arithmetic on any machine, lowering where JAX can, bits on a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import needs_gpu, needs_jax

from pallas_kernels import Pattern, compress, nm_transpose
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.mosaic import select

DTYPES = ["float32", "bfloat16", "float16"]
BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


class Machine:
    """The kernel's instructions on uint32 arrays."""

    def permute(self, low, high, selector):
        octets = [(word >> np.uint32(8 * b)) & 0xFF for word in (low, high) for b in range(4)]
        out = np.zeros_like(low)
        for place in range(4):
            field = selector >> (4 * place) & 15
            octet = octets[field & 7]
            out |= (np.where(octet & 0x80, 0xFF, 0) if field & 8 else octet).astype(
                np.uint32
            ) << np.uint32(8 * place)
        return out

    def magnitude(self, word, dtype):
        bits = word.view(BITS[dtype])
        first = np.array(1 << (8 * bits.dtype.itemsize - 1), bits.dtype)
        return np.minimum(bits & ~first, bits.dtype.type(INFINITY[dtype] + 1)).view(np.uint32)

    def widen(self, word, half, dtype):
        with np.errstate(invalid="ignore"):
            halves = word.view(np.uint16).reshape(-1, 2)[:, half]
            return halves.copy().view(dtype).astype(np.float32).view(np.uint32)

    def pack(self, low, high, dtype):
        with np.errstate(over="ignore", invalid="ignore"):
            pair = np.stack([low, high], -1).view(np.float32).astype(dtype)
        return pair.view(np.uint32)[:, 0]


def transpose_on_numpy(w: CompressedMatrix, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Values' bits and metadata: every block at once."""
    k, f = w.shape
    source = str(w.dtype)
    halves = select.HALVES[source]
    values = np.asarray(w.values).view(BITS[source]).reshape(k // 8, 4, f // 8, 8)
    words = values.transpose(1, 0, 2, 3).reshape(4, -1, 8).copy().view(np.uint32)
    octets = np.asarray(w.metadata).reshape(-1, 8).copy().view(np.uint32)
    assert words.shape[-1] == 8 // halves
    rows, metadata = select.transpose_block(
        Machine(),
        [[row[:, j].copy() for j in range(8 // halves)] for row in words],
        [octets[:, 0].copy(), octets[:, 1].copy()],
        source,
        target,
    )
    rows = np.stack([np.stack(row, -1) for row in rows]).view(BITS[target])
    rows = rows.reshape(4, k // 8, f // 8, 8).transpose(2, 0, 1, 3).reshape(f // 2, k)
    metadata = np.stack(metadata, -1).view(np.uint8).reshape(k // 8, f // 8, 8)
    return rows, metadata.transpose(1, 0, 2).reshape(f // 8, k)


def special_bits(dtype: str) -> np.ndarray:
    """Bits of zeros, subnormals, equals, neighbours, Inf and NaN with payloads, in both signs."""
    width = np.dtype(BITS[dtype]).itemsize * 8
    infinity = INFINITY[dtype]
    one = int(np.ones((), dtype).view(BITS[dtype]))
    positive = [0, 1, 2, one, one + 1, infinity - 1, infinity, infinity + 1, infinity + 3]
    quiet = infinity | (infinity & -infinity) >> 1
    positive += [quiet, quiet + 2, (1 << (width - 1)) - 1]
    return np.array(positive + [p | 1 << (width - 1) for p in positive], BITS[dtype])


def adversarial(dtype: str, shape: tuple[int, int], seed: int = 0) -> CompressedMatrix:
    """Special bits beside ordinary numbers, at any positions, whole groups of zeros among them."""
    rng = np.random.default_rng(seed)
    k, f = shape
    bits = rng.choice(special_bits(dtype), (k // 2, f))
    ordinary = rng.standard_normal((k // 2, f)).astype(dtype).view(BITS[dtype])
    bits = np.where(rng.random((k // 2, f)) < 0.5, bits, ordinary)
    bits[:, : f // 8 * 2] &= np.array(1 << (bits.dtype.itemsize * 8 - 1), bits.dtype)
    nibbles = np.array([4, 8, 12, 9, 13, 14], np.uint8)
    metadata = rng.choice(nibbles, (k // 8, f)) | rng.choice(nibbles, (k // 8, f)) << 4
    return CompressedMatrix(
        jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype),
        jnp.asarray(metadata, jnp.uint8),
        Pattern.parse("2:4"),
        0,
        shape,
    ).check()


def to_bits(values) -> np.ndarray:
    return np.asarray(values).view(BITS[str(values.dtype)])


def check_same(values, metadata, expected: CompressedMatrix, exact: bool) -> None:
    """Bit for bit; but of a NaN that was cast, only that it is NaN."""
    np.testing.assert_array_equal(metadata, expected.metadata)
    want = to_bits(expected.values)
    if not exact:
        nan = np.isnan(np.asarray(expected.values, np.float32))
        got_nan = np.isnan(np.asarray(values.view(expected.values.dtype), np.float32))
        np.testing.assert_array_equal(nan, got_nan)
        values, want = np.where(nan, 0, values), np.where(nan, 0, want)
    np.testing.assert_array_equal(values, want)


run = jax.jit(nm_transpose, static_argnames=("dtype", "implementation"))


@functools.cache
def defined(source: str) -> tuple[CompressedMatrix, CompressedMatrix]:
    """A matrix and its transpose in the same dtype."""
    w = adversarial(source, (128, 256))
    return w, run(w, implementation="xla")


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.usefixtures("optimized")  # the payload of a NaN is XLA's to choose
def test_a_blocks_arithmetic_is_the_definition(source, target):
    # Without XLA's cast, which on a CPU may flush subnormal numbers.
    w, expected = defined(source)
    values, metadata = transpose_on_numpy(w, target)
    if target != source:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = np.asarray(expected.values).astype(np.float32).astype(target)
        expected = expected.with_values(cast)
    check_same(values, metadata, expected, source == target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("optimized")  # the payload of a NaN is XLA's to choose
def test_every_order_of_four_magnitudes(dtype):
    """All ties and orders of four outputs, with zero, Inf and NaN among the magnitudes."""
    infinity = INFINITY[dtype]
    levels = np.array([0, 1, infinity - 1, infinity, infinity + 1, infinity + 2], BITS[dtype])
    fours = np.array(list(itertools.product(levels, repeat=4)), BITS[dtype])
    values = np.zeros((4, 4 * len(fours)), BITS[dtype])
    values[0] = fours.reshape(-1)  # first of each group of inputs; the rest are zero
    metadata = np.full((1, values.shape[1]), 0x44, np.uint8)
    w = CompressedMatrix(
        jax.lax.bitcast_convert_type(jnp.asarray(values), dtype),
        jnp.asarray(metadata),
        Pattern.parse("2:4"),
        0,
        (8, values.shape[1]),
    )
    got, positions = transpose_on_numpy(w, dtype)
    check_same(got, positions, run(w, implementation="xla"), True)


@needs_jax
@pytest.mark.parametrize(("source", "target"), [("float32", "bfloat16"), ("float16", "float32")])
def test_the_kernel_lowers_for_cuda_without_a_gpu(source, target):
    from pallas_kernels.mosaic import products

    w = jax.eval_shape(lambda w: compress(w, "2:4"), jax.ShapeDtypeStruct((3, 776, 1000), source))
    traced = jax.jit(lambda w: products.nm_transpose(w, target)).trace(w)
    assert "nm_transpose" in traced.lower(lowering_platforms=("cuda",)).as_text()
    want = jax.eval_shape(lambda w: nm_transpose(w, dtype=target, implementation="xla"), w)
    assert jax.tree.structure(traced.out_info) == jax.tree.structure(want)
    for got, leaf in zip(jax.tree.leaves(traced.out_info), jax.tree.leaves(want), strict=True):
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


# in x out: one block, partial tiles, whole tiles, one row and one column of blocks
SHAPES = [(8, 8), (776, 1000), (1600, 4800), (128, 256), (8, 4096), (4096, 8)]


@needs_gpu
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_bits_of_xla(shape, source):
    w = adversarial(source, shape)
    pruned = run(w, implementation="xla")
    for target in DTYPES if shape == SHAPES[1] else dict.fromkeys([source, "bfloat16"]):
        w_t = run(w, dtype=target, implementation="mosaic")
        expected = pruned.with_values(pruned.values.astype(target))
        check_same(to_bits(w_t.values), w_t.metadata, expected, source == target)
        again = [run(w, dtype=target, implementation="mosaic") for _ in range(3)]
        for other in again:
            np.testing.assert_array_equal(to_bits(other.values), to_bits(w_t.values))
            np.testing.assert_array_equal(other.metadata, w_t.metadata)


@needs_gpu
def test_a_stack_of_matrices_is_transposed_one_by_one():
    layers = [adversarial("float32", (136, 264), seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    at_once = run(stack, implementation="mosaic")
    mapped = jax.vmap(lambda w: nm_transpose(w, implementation="mosaic"))(stack)
    for i, layer in enumerate(layers):
        expected = run(layer, implementation="xla")
        for w_t in (at_once, mapped):
            check_same(to_bits(w_t.values[i]), w_t.metadata[i], expected, True)


@needs_gpu
def test_its_name_is_in_the_profile():
    from pallas_kernels.device_time import device_microseconds

    w = adversarial("bfloat16", (256, 256))
    run(w, implementation="mosaic")
    _, names = device_microseconds(lambda: run(w, implementation="mosaic"), 2)
    assert any("nm_transpose" in name for name in names)
