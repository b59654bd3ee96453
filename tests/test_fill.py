"""Filling masks against the whole softmax of every row by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import models
from slope_jax.fill import fill_masks

MASK = 4


def test_candidates_are_the_largest_of_the_softmax_of_each_row_alone():
    model = models.build("bert-tiny", vocab_size=61)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 61, (3, 9))
    lengths = np.array([9, 6, 4])
    ids[0, [2, 7]] = ids[1, 3] = ids[2, 6] = MASK  # the last one is padding
    logits_of = jax.jit(lambda ids: model.apply(variables, ids).mlm_logits)
    found = fill_masks(
        model, variables, jnp.asarray(ids), MASK, lengths=jnp.asarray(lengths), top=3
    )
    assert found.positions.tolist() == [[0, 2], [0, 7], [1, 3]]
    for (row, place), tokens, shares in zip(*found, strict=True):
        alone = jnp.asarray(ids[row : row + 1, : lengths[row]])
        logits = np.asarray(logits_of(alone))[0, place, :61].astype(np.float64)
        exact = np.exp(logits) / np.exp(logits).sum()
        assert tokens.tolist() == np.argsort(-exact)[:3].tolist()
        np.testing.assert_allclose(shares, exact[tokens], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "ids", "top", "message"),
    [
        ("gpt2-nano", [[4]], 5, "fills no masks"),
        ("bert-tiny", [[5, 6]], 5, "no token is 4"),
        ("bert-tiny", [[4]], 99, "top=99 must lie between 1 and 61"),
    ],
)
def test_bad_input_is_named(name, ids, top, message):
    model = models.build(name, vocab_size=61)
    with pytest.raises(ValueError, match=message):
        fill_masks(model, {}, jnp.asarray(ids), MASK, top=top)
