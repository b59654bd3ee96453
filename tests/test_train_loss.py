"""cross_entropy against SciPy and against JAX's own derivative, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from train.loss import cross_entropy

EPS32 = float(jnp.finfo(jnp.float32).eps)
LABELS = np.array([[3, 0, 7, 7], [1, 2, 6, 5]], np.int32)


def logits(dtype=jnp.float32):
    """(2, 4, 8), the last column masked out as a padded vocabulary is."""
    x = 4 * jax.random.normal(jax.random.key(0), (2, 4, 9)).astype(dtype)
    return x.at[..., -1].set(jnp.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(dtype):
    x = logits(dtype)
    (nll, best), back = jax.vjp(lambda x: cross_entropy(x, LABELS), x)
    logs = log_softmax(np.asarray(x, np.float64), axis=-1)
    rows = np.indices(LABELS.shape)
    np.testing.assert_allclose(nll, -logs[(*rows, LABELS)], rtol=32 * EPS32)
    np.testing.assert_array_equal(best, np.asarray(x, np.float64).argmax(-1))
    dnll = jnp.arange(1.0, 9.0).reshape(2, 4)
    (dx,) = back((dnll, np.zeros(best.shape, jax.dtypes.float0)))
    exact = np.exp(logs)
    exact[(*rows, LABELS)] -= 1
    exact *= np.asarray(dnll)[..., None]
    assert dx.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(dx, np.float64), exact, rtol=rounding, atol=64 * EPS32)
    assert not np.any(dx[..., -1])


def test_of_equal_logits_the_first_counts_and_nan_is_seen():
    nll, best = cross_entropy(jnp.zeros((1, 3, 4)).at[0, 1, 2].set(jnp.nan), LABELS[:1, :3] % 4)
    assert best.tolist() == [[0, 2, 0]]
    np.testing.assert_allclose(nll[0, ::2], np.log(4), rtol=4 * EPS32)
    assert np.isnan(nll[0, 1])


def test_the_backward_pass_keeps_the_logits_and_nothing_else_of_their_size():
    x = jnp.zeros((2, 4, 1000), jnp.bfloat16)
    _, back = jax.vjp(lambda x: cross_entropy(x, LABELS), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back))
    assert kept < 1.1 * x.nbytes
