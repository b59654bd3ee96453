"""A BERT with a task's head, its loss, and what it predicts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from slope_jax.models import Bert, BertConfig
from slope_jax.models.layers import normal_init
from train.loss import cross_entropy
from train.tasks.registry import CLASSES, SCORE, SPAN

LONGEST_ANSWER = 30  # tokens
BERT = "bert"  # where the pretrained parameters and masks are

Batch = dict[str, jax.Array]


class TaskModel(nn.Module):
    """BERT without its pretraining heads, dropout, and one dense layer.

    Attributes:
      config: of the BERT; its dropout also stands in front of the head.
      kind: "classes", "score" or "span".
      outputs: numbers for a sequence (classes, score), or for each token (span: first and last).
    """

    config: BertConfig
    kind: str
    outputs: int

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits in float32: (B, outputs), of spans (B, S, outputs)."""
        bert = Bert(self.config, pretraining_heads=False, name=BERT)
        output = bert(input_ids, token_type_ids, lengths, deterministic=deterministic)
        x = output.hidden if self.kind == SPAN else output.pooled
        x = nn.Dropout(self.config.dropout, deterministic=deterministic)(x)
        head = nn.Dense(self.outputs, kernel_init=normal_init, dtype=jnp.float32, name="head")
        return head(x)

    def example_inputs(self, batch: int = 1, length: int = 8) -> dict[str, jax.Array]:
        """Keyword arguments of a call: ids (batch, length) of zeros, all valid."""
        return Bert(self.config, parent=None).example_inputs(batch, length)


def inputs(batch: Batch) -> Batch:
    """What the model takes, from rows of `train.tasks.features.Features`."""
    position = jnp.arange(batch["input_ids"].shape[1])[None, :]
    types = (position >= batch["second"][:, None]) & (position < batch["lengths"][:, None])
    return {
        "input_ids": batch["input_ids"],
        "token_type_ids": types.astype(jnp.int32),
        "lengths": batch["lengths"],
    }


def losses(kind: str, logits: jax.Array, batch: Batch) -> jax.Array:
    """The loss of each sequence, (B,) float32: nats, or a squared error."""
    labels = batch["labels"]
    if kind == CLASSES:
        return cross_entropy(logits, labels)[0]
    if kind == SCORE:
        return (logits[:, 0] - labels) ** 2
    masked = jnp.where(_answerable(batch, first=True)[:, :, None], logits, _lowest(logits))
    return cross_entropy(masked.swapaxes(1, 2), labels)[0].mean(-1)


def predictions(kind: str, logits: jax.Array, batch: Batch) -> Any:
    """Classes (B,), scores (B,), or (logit, first token, last token) of the best span, each (B,)."""
    if kind == CLASSES:
        return logits.argmax(-1)
    if kind == SCORE:
        return logits[:, 0]
    lowest = _lowest(logits)
    inside = _answerable(batch, first=False)
    first, last = (jnp.where(inside, logits[:, :, i], lowest / 4) for i in (0, 1))
    position = jnp.arange(logits.shape[1])
    length = position[None, :] - position[:, None] + 1
    allowed = (length >= 1) & (length <= LONGEST_ANSWER)
    scores = jnp.where(allowed[None], first[:, :, None] + last[:, None, :], lowest)
    best = scores.reshape(len(logits), -1).argmax(-1)
    top = scores.reshape(len(logits), -1).max(-1)
    return top, best // logits.shape[1], best % logits.shape[1]


def _answerable(batch: Batch, *, first: bool) -> jax.Array:
    """(B, S): tokens of the context, and the first token where "not here" is an answer."""
    position = jnp.arange(batch["input_ids"].shape[1])[None, :]
    # The last valid token is [SEP].
    inside = (position >= batch["second"][:, None]) & (position < batch["lengths"][:, None] - 1)
    return inside | (position == 0) if first else inside


def _lowest(logits: jax.Array) -> jax.Array:
    return jnp.finfo(logits.dtype).min
