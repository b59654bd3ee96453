"""Which tokens may be drawn; how, and by which keys, is tested with generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import sampling

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_likely_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def kept(top_k, top_p):
        return np.isfinite(sampling.likely(logits, top_k, top_p))[0].tolist()

    assert kept(2, None) == [False, True, False, True]
    assert kept(None, jnp.float32(0.69)) == [False, True, False, True]
    assert kept(None, jnp.float32(0.71)) == [False, True, True, True]
    assert kept(None, jnp.float32(1e-9)) == [False, True, False, False]
    assert kept(None, jnp.float32(1e-45)) == [False, True, False, False]  # a zero, to XLA
    assert kept(None, jnp.float32(1.0)) == [True] * 4
    # Of the two that top_k leaves, the first holds 4/7.
    assert kept(2, jnp.float32(0.55)) == [False, True, False, False]


def test_of_equally_likely_tokens_the_lower_ids_are_kept():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0], [0.0] * 6])  # bf16 knows few values
    for top_k, kept in ((1, [[1], [0]]), (3, [[1, 2, 4], [0, 1, 2]]), (5, [[0, 1, 2, 4, 5], [0, 1, 2, 3, 4]])):  # fmt: skip
        found = sampling.likely(logits, top_k, None)
        assert [np.flatnonzero(np.isfinite(row)).tolist() for row in found] == kept
        for row, ids in enumerate(kept):
            np.testing.assert_array_equal(found[row, ids], logits[row, ids])
    # The tied ones hold e^2 / (4 e^2 + e + 1) = 0.222 each of the first row, a sixth of the second.
    found = sampling.likely(logits, None, jnp.float32(0.4))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in found] == [[1, 2], [0, 1, 2]]
    both = sampling.likely(logits, 4, jnp.float32(0.6))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in both] == [[1, 2, 4], [0, 1, 2]]


@pytest.mark.parametrize(
    ("size", "k"), [(50304, 50), (50304, 17), (8191, 100), (4001, 20), (97, 40)]
)
def test_the_largest_of_groups_are_those_of_all(size, k):
    """By NumPy's stable sort, of numbers with many ties, and of rows with hardly any that are finite."""
    numbers = np.random.default_rng(0).normal(size=(6, size)).astype(np.float32)
    logits = np.round(numbers * 4) / 4
    logits[3] = 1.0
    logits[4] = -np.inf
    logits[5, 30:-2] = -np.inf
    logits += 0.0  # no zero below another
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    falling, tokens = jax.jit(sampling._top, static_argnums=1)(logits, k)
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_array_equal(falling, np.take_along_axis(logits, order, axis=-1))
