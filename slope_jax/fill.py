"""Words for the masked positions of a text, by a BERT."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slope_jax.models.bert import Bert
from slope_jax.models.variables import check_variables
from slope_jax.prompts import checked_prompts, is_integer


class Filling(NamedTuple):
    """What `fill_masks` returns; `top` candidates for each masked position, likeliest first.

    Attributes:
      positions: int (M, 2), row and place of each masked position, row by row.
      tokens: int32 (M, top).
      probabilities: float32 (M, top).
    """

    positions: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray


def fill_masks(
    model: Bert,
    variables: Mapping[str, Any],
    input_ids: jax.Array,
    mask_token: int,
    *,
    lengths: jax.Array | None = None,
    top: int = 5,
) -> Filling:
    """The likeliest tokens at every masked position, each given all the others as they are.

    Args:
      model: a BERT.
      variables: its {"params": ..., "masks": ...}.
      input_ids: (B, S) integers.
      mask_token: the id that stands for a masked word.
      lengths: (B,) valid tokens of right-padded rows; None: all.
      top: candidates.

    Raises:
      ValueError: not a BERT, ids, lengths or `top` out of range or of another kind, nothing is masked,
        or the variables are not the model's.

    >>> from slope_jax.models import build
    >>> model = build("bert-tiny", vocab_size=64)
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> fill_masks(model, variables, jnp.array([[2, 9, 4, 3]]), mask_token=4).tokens.shape
    (1, 5)
    """
    if not isinstance(model, Bert):
        raise ValueError(f"{type(model).__name__} fills no masks; use a BERT, or generate")
    size = model.config.vocab_size
    if not is_integer(top) or not 1 <= top <= size:
        raise ValueError(f"top={top!r} must be an integer between 1 and {size} tokens")
    ids, lengths = checked_prompts(input_ids, lengths, size, "input_ids")
    valid = np.arange(ids.shape[1])[None] < lengths[:, None]
    positions = np.argwhere((ids == mask_token) & valid)
    if not len(positions):
        raise ValueError(f"no token is {mask_token}, the mask; nothing to fill in {ids.shape}")
    check_variables(model, variables)
    counts = np.bincount(positions[:, 0], minlength=len(ids))
    places = np.zeros((len(ids), counts.max()), np.int32)  # beyond a row's own: its first token
    order = np.arange(places.shape[1])[None] < counts[:, None]
    places[order] = positions[:, 1]
    tokens, probabilities = _likeliest(model, top, variables, jnp.asarray(ids), lengths, places)
    return Filling(positions, np.asarray(tokens)[order], np.asarray(probabilities)[order])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(model, top, variables, ids, lengths, places):
    output = model.apply(variables, ids, lengths=lengths, mlm_positions=places)
    shares = jax.nn.softmax(output.mlm_logits.astype(jnp.float32), axis=-1)
    probabilities, tokens = jax.lax.top_k(shares, top)
    return tokens, probabilities
