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
    found = fill_masks(model, variables, jnp.asarray(ids), MASK, lengths=lengths.tolist(), top=3)
    assert found.positions.tolist() == [[0, 2], [0, 7], [1, 3]]
    for (row, place), tokens, shares in zip(*found, strict=True):
        alone = jnp.asarray(ids[row : row + 1, : lengths[row]])
        logits = np.asarray(logits_of(alone))[0, place, :61].astype(np.float64)
        exact = np.exp(logits) / np.exp(logits).sum()
        assert tokens.tolist() == np.argsort(-exact)[:3].tolist()
        np.testing.assert_allclose(shares, exact[tokens], rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[5, 6]], {}, "no token is 4"),
        ([[4]], {"top": 99}, "top=99 must be an integer between 1 and 61"),
        ([[4]], {"top": 2.5}, "top=2.5 must be an integer"),
        ([[4, 61]], {}, r"input_ids\[0, 1\]=61 is no token: ids must lie between 0 and 60"),
        ([[4, -1]], {}, r"input_ids\[0, 1\]=-1 is no token"),
        ([4], {}, r"input_ids are int64\[1\]; they must be integers \(batch, tokens\)"),
        ([[4], [4, 5]], {}, "input_ids have rows of different lengths"),
        ([[4, 5]], {"lengths": [3]}, r"lengths=\[3\]; for input_ids of \[1, 2\]"),
    ],
)
def test_bad_input_is_named(ids, options, message):
    model = models.build("bert-tiny", vocab_size=61)
    with pytest.raises(ValueError, match=message):
        fill_masks(model, {}, ids, MASK, **options)


def test_a_decoder_fills_no_masks():
    with pytest.raises(ValueError, match="GPT2 fills no masks; use a BERT, or generate"):
        fill_masks(models.build("gpt2-nano", vocab_size=61), {}, [[4]], MASK)
