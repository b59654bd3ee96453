"""Causal decoders: GPT-2, OPT and LLaMA are one module and a table of what sets them apart."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from slope_jax.models.attention import Attention, Context
from slope_jax.models.config import Linear, TransformerConfig
from slope_jax.models.layers import (
    GatedMlp,
    Mlp,
    check_tokens,
    embedding,
    kept_sum,
    later,
    linear,
    mask_padding,
    norm,
    vocabulary_logits,
)
from slope_jax.models.stack import run_layers
from slope_jax.normed import Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
    """`TransformerConfig` of a pre-norm causal decoder.

    Constants of a model family (its papers', not fields), besides those of `TransformerConfig`:
      activation: of the MLP.
      gated: the MLP multiplies activation(gate) by up, two projections fused in "mlp/gate_up".
      position_offset: unused rows at the start of the learned position table; None: no table.
      embedding_dropout: whether dropout acts on the embeddings.
      tied_head: whether the token table makes the logits; if not, the linear "lm_head" does.
    """

    activation: ClassVar[str]
    gated: ClassVar[bool] = False
    position_offset: ClassVar[int | None] = 0
    embedding_dropout: ClassVar[bool] = False
    tied_head: ClassVar[bool] = True

    def head_linears(self) -> tuple[Linear, ...]:
        return (Linear("lm_head", self.hidden_size, self.padded_vocab_size, tied=self.tied_head),)

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """`rope.rotary_tables` of integer positions (B, S), where queries and keys are rotated."""
        return None


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig
    patterns: tuple[tuple[str, str], ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array | Stream, context: Context) -> tuple[jax.Array | Stream, None]:
        config, patterns = self.config, self.patterns
        dropout = functools.partial(nn.Dropout, config.dropout, deterministic=self.deterministic)
        # Two projections a layer add to the residual stream; this keeps its variance at the end.
        residual_init = nn.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
        attention = Attention(config, patterns, True, residual_init, name="attention")
        kind = GatedMlp if config.gated else Mlp
        mlp = kind(config, patterns, config.activation, residual_init, name="mlp")
        norms = norm(config, "attention_norm"), norm(config, "mlp_norm")
        decodes = context.positions is not None and not self.is_initializing()
        if decodes and self.deterministic:
            # Decoding: kernels of few tokens make the norms and add the residuals.
            stream = x if isinstance(x, Stream) else Stream(x)
            stream = attention(later(norms[0], stream), context, stream)
            stream = mlp(later(norms[1], stream), stream)
            return stream if isinstance(x, Stream) else stream.x, None
        training = not self.deterministic
        if not (training and config.dropout):  # the products add the residual
            x = kept_sum(attention(norms[0](x), context, x))
            return mlp(norms[1](x), x, training=training), None
        x = x + dropout()(attention(norms[0](x), context))
        return x + dropout()(mlp(norms[1](x), training=training)), None


class Embeddings(nn.Module):
    """The token table, plus the table of learned positions where the model has one."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.token = embedding(config, config.padded_vocab_size, None)
        if config.position_offset is not None:
            self.position = embedding(config, config.max_positions + config.position_offset, None)

    def __call__(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """(B, S) tokens and (1 or B, S) positions to (B, S, hidden)."""
        x = self.token(input_ids)
        if self.config.position_offset is None:
            return x
        return x + self.position(positions + self.config.position_offset)


class Decoder(nn.Module):
    """A decoder with its language-model head; made by name with `slope_jax.models.build`.

    Attributes:
      config: of a subclass of `DecoderConfig`.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        *,
        positions: jax.Array | None = None,
        logits_at: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits (B, S, V) for the token after each; V is the padded vocabulary.

        Args:
          input_ids: (B, S) integers, S <= max_positions.
          positions: (B, S) integers < max_positions, where the tokens stand after those that the
            collection `cache` holds (see `init_cache`); None: the first S positions.
          logits_at: (B, K) integers < S; logits (B, K, V) of these tokens only, so that the product
            with the vocabulary runs on K rows. None: of all.
          deterministic: False turns dropout on, which needs an rng named "dropout".

        Returns:
          Logits in the compute dtype (take their softmax in float32); the padded columns hold the
          most negative number of the dtype.

        Raises:
          ValueError: shapes or dtypes do not fit, or S > max_positions.
        """
        config = self.config
        check_tokens(config, input_ids)
        _check_places(input_ids, positions, logits_at)
        places = jnp.arange(input_ids.shape[1])[None, :] if positions is None else positions
        embeddings = Embeddings(config, name="embeddings")
        x = embeddings(input_ids, places)
        if config.embedding_dropout:
            x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        context = Context(rotary=config.rotary(places), positions=positions)
        decodes = positions is not None and deterministic and not self.is_initializing()
        x = run_layers(DecoderLayer, config, Stream(x) if decodes else x, context, deterministic)
        x = x.x if decodes else x
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        x = norm(config, "norm")(x)
        if config.tied_head:
            return vocabulary_logits(x, embeddings.token, config)
        pattern = config.patterns["lm_head"]
        return mask_padding(
            linear(config, pattern, config.padded_vocab_size, name="lm_head")(x), config
        )

    def example_inputs(self, batch: int = 1, length: int = 8) -> dict[str, jax.Array]:
        """Keyword arguments of a call: ids (batch, length) of zeros."""
        length = min(length, self.config.max_positions)
        return {"input_ids": jnp.zeros((batch, length), jnp.int32)}


def _check_places(input_ids, positions, logits_at) -> None:
    batch, length = input_ids.shape
    for name, array, wants in (
        ("positions", positions, (batch, length)),
        ("logits_at", logits_at, (batch, None)),
    ):
        if array is None:
            continue
        fits = array.ndim == 2 and array.shape[0] == batch and wants[1] in (None, array.shape[1])
        if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; for input_ids of"
                f" {list(input_ids.shape)} it must be integers"
                f" {str(list(wants)).replace('None', 'K')}"
            )
