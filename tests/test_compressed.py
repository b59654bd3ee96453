"""Compression against a brute-force oracle in plain Python, bit for bit."""

import itertools

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import CompressedMatrix, Pattern, compress, decompress

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8", "3:7", "1:16", "5:16", "4:4"]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 0.5], np.float32
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def bits(x):
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[np.asarray(x).dtype.itemsize])


def oracle_positions(group, n):
    """The n largest magnitudes, ties to the lower index, NaN above all; ascending."""

    def size(i):
        value = abs(float(group[i]))
        return (1, 0.0) if np.isnan(value) else (0, value)

    order = sorted(range(len(group)), key=lambda i: (*(-s for s in size(i)), i))
    return sorted(order[:n])


def oracle(w, pattern, axis):
    """Dense result, values and positions, group by group."""
    lines = np.moveaxis(np.asarray(w), axis, -1)
    dense = np.zeros_like(lines)
    values, positions = [], []
    for line in np.ndindex(lines.shape[:-1]):
        kept_values, kept_positions = [], []
        for start in range(0, lines.shape[-1], pattern.m):
            group = lines[line][start : start + pattern.m]
            keep = oracle_positions(group, pattern.n)
            kept_positions += keep
            kept_values += [group[i] for i in keep]
            for i in keep:
                dense[line][start + i] = group[i]
        values.append(kept_values)
        positions.append(kept_positions)
    shape = (*lines.shape[:-1], -1)
    back = lambda a, dtype: np.moveaxis(np.array(a, dtype).reshape(shape), -1, axis)  # noqa: E731
    return np.moveaxis(dense, -1, axis), back(values, lines.dtype), back(positions, np.uint8)


def special_matrix(pattern, axis, dtype, seed=0):
    shape = (4 * pattern.m, 24) if axis == 0 else (24, 4 * pattern.m)
    return jnp.asarray(np.random.default_rng(seed).choice(SPECIAL, shape)).astype(dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PATTERNS)
def test_matches_the_oracle_bit_for_bit_on_special_values(text, dtype, axis):
    pattern = Pattern.parse(text)
    w = special_matrix(pattern, axis, dtype)
    c = compiled.compress(w, text, axis=axis)
    dense, values, positions = oracle(w, pattern, axis)
    np.testing.assert_array_equal(bits(c.values), bits(values))
    np.testing.assert_array_equal(compiled.positions_of(c), positions)
    np.testing.assert_array_equal(bits(compiled.decompress(c)), bits(dense))


@pytest.mark.parametrize("text", PATTERNS)
def test_metadata_is_a_little_endian_bit_stream(text):
    pattern = Pattern.parse(text)
    w = jax.random.normal(jax.random.key(0), (3 * pattern.m, 5))
    c = compiled.compress(w, text)
    positions = np.asarray(compiled.positions_of(c))
    for column in range(w.shape[1]):
        stream = [p >> b & 1 for p in positions[:, column] for b in range(pattern.bits)]
        expected = np.packbits(np.array(stream, np.uint8), bitorder="little")
        np.testing.assert_array_equal(c.metadata[:, column], expected)


def test_2_4_in_16_bits_takes_nine_sixteenths():
    w = jnp.zeros((64, 32), jnp.bfloat16)
    assert compiled.compress(w, "2:4").nbytes * 16 == w.nbytes * 9


@settings(max_examples=60, deadline=None)
@given(
    w=hnp.arrays(np.float32, (8, 3), elements=st.floats(width=32)),
    text=st.sampled_from(["1:2", "2:4", "1:4", "2:8"]),
)
def test_any_bits_survive(w, text):
    w = jnp.asarray(w)
    c = compiled.compress(w, text)
    mask = np.asarray(compiled.kept_mask(c))
    assert (mask.reshape(-1, c.m, 3).sum(1) == c.n).all()
    np.testing.assert_array_equal(bits(compiled.decompress(c)), np.where(mask, bits(w), 0))
    again = compiled.compress(compiled.decompress(c), text, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(bits(again.values), bits(c.values))
    np.testing.assert_array_equal(again.metadata, c.metadata)


def test_every_mask_of_a_group_of_four():
    """All 11 masks with at most two of four: kept as they are, padded by the lowest others."""
    rows = [m for m in itertools.product([False, True], repeat=4) if sum(m) <= 2]
    mask = np.array(rows).T
    w = jnp.asarray(np.arange(1.0, 45.0, dtype=np.float32).reshape(4, 11))
    c = compiled.compress(w, "2:4", mask=jnp.asarray(mask))
    np.testing.assert_array_equal(compiled.decompress(c), np.where(mask, w, 0))
    positions = np.asarray(compiled.positions_of(c))
    for column, row in enumerate(rows):
        kept = [i for i in range(4) if row[i]]
        padding = [i for i in range(4) if not row[i]][: 2 - len(kept)]
        assert positions[:, column].tolist() == sorted(kept + padding)


def test_masked_out_nan_and_inf_leave_nothing_behind():
    w = jnp.array([[jnp.nan], [jnp.inf], [1.0], [2.0]])
    mask = jnp.array([[False], [False], [True], [False]])
    c = compress(w, "2:4", mask=mask)
    assert c.values[:, 0].tolist() == [0.0, 1.0]


def test_leading_axes_and_vmap_agree_with_one_matrix_at_a_time():
    w = jax.random.normal(jax.random.key(0), (3, 8, 6))
    stacked = compiled.compress(w, "2:4")
    mapped = jax.vmap(lambda w: compiled.compress(w, "2:4"))(w)
    for i in range(3):
        one = compiled.compress(w[i], "2:4")
        for many in (stacked, mapped):
            np.testing.assert_array_equal(many.values[i], one.values)
            np.testing.assert_array_equal(many.metadata[i], one.metadata)
    np.testing.assert_array_equal(
        compiled.decompress(stacked)[2], compiled.decompress(compiled.compress(w[2], "2:4"))
    )


def test_is_a_pytree_with_two_leaves_and_static_shape():
    c = compress(jnp.ones((8, 4)), "2:4")
    assert [leaf.shape for leaf in jax.tree.leaves(c)] == [(4, 4), (1, 4)]
    shapes = jax.eval_shape(lambda w: compress(w, "2:4"), jnp.ones((8, 4)))
    assert isinstance(shapes, CompressedMatrix)
    assert shapes.shape == (8, 4)


@pytest.mark.parametrize("text", ["3:2", "0:4", "2:17", "2-4", "", "a:b", None, "2:4:8"])
def test_bad_patterns_name_themselves(text):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(text)


ONE_COLUMN = np.arange(4) == np.full((4, 1), 1)  # whole, and the others empty


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress(jnp.ones((6, 4)), "2:4"), "input axis.*6 entries.*multiple of 4"),
        (lambda: compress(jnp.ones((4, 6)), "2:4", axis=1), "output axis.*6 entries"),
        (lambda: compress(jnp.ones((4, 4)), "2:4", axis=2), "axis is 2"),
        (lambda: compress(jnp.ones((4, 4), jnp.int32), "2:4"), "int32"),
        (lambda: compress(jnp.ones(4), "2:4"), r"\(4,\)"),
        (lambda: compress(jnp.ones((4, 4)), "2:4", mask=jnp.asarray(ONE_COLUMN)), "keeps 4 of 4"),
        (lambda: compress(jnp.ones((4, 4)), "2:4", mask=jnp.ones((4, 4))), "must be bool"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mismatched_leaves_are_named():
    c = compress(jnp.ones((8, 4)), "2:4")
    with pytest.raises(ValueError, match=r"values has shape \(3, 4\)"):
        decompress(c.with_values(c.values[:3]))
    with pytest.raises(ValueError, match="uint8"):
        CompressedMatrix(c.values, c.metadata.astype(jnp.int32), c.pattern, 0, (8, 4)).check()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:8", "4:4"])
def test_values_have_the_derivative_of_the_entries_that_they_are(pattern, axis):
    """Of what is kept that of the entries themselves, of the rest zero, on the way there and back."""
    w = jax.random.normal(jax.random.key(0), (16, 8))
    whole = decompress(compress(w, pattern, axis=axis)) != 0
    some = whole & (jax.random.uniform(jax.random.key(1), w.shape) < 0.5)
    for mask, kept in ((None, whole), (some, some)):

        def squares(w, mask=mask):
            found = compress(w, pattern, axis=axis, mask=mask)
            return (found.values**2).sum()

        def cubes(w, mask=mask):
            return (decompress(compress(w, pattern, axis=axis, mask=mask)) ** 3).sum()

        exact = np.where(kept, w, 0)
        np.testing.assert_array_equal(jax.jit(jax.grad(squares))(w), 2 * exact)
        np.testing.assert_allclose(jax.grad(cubes)(w), 3 * exact**2, rtol=1e-6)
        ahead = jax.jvp(squares, (w,), (w,))[1]
        np.testing.assert_allclose(ahead, (2 * exact**2).sum(), rtol=1e-6)
