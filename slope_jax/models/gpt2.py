"""GPT-2 (Radford et al., 2019): a pre-norm causal decoder with a tied vocabulary."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from slope_jax.models.attention import Attention
from slope_jax.models.config import Linear, TransformerConfig
from slope_jax.models.layers import Mlp, check_tokens, embedding, norm, vocabulary_logits
from slope_jax.models.stack import run_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(TransformerConfig):
    """`TransformerConfig` with GPT-2's defaults."""

    vocab_size: int = 50257
    max_positions: int = 1024
    norm_epsilon: float = 1e-5

    def head_linears(self) -> tuple[Linear, ...]:
        return (Linear("lm_head", self.hidden_size, self.padded_vocab_size, tied=True),)


def _variant(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "mlp_size": 4 * hidden,
    }


# Radford et al., table 2 (heads of 64); nano is a toy of the same shape, for tests and trials.
VARIANTS = {
    "gpt2-nano": _variant(4, 128, 4),
    "gpt2-small": _variant(12, 768, 12),
    "gpt2-medium": _variant(24, 1024, 16),
    "gpt2-large": _variant(36, 1280, 20),
    "gpt2-xl": _variant(48, 1600, 25),
}


class GPT2Layer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: GPT2Config
    patterns: tuple[tuple[str, str], ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, lengths: None) -> tuple[jax.Array, None]:
        config, patterns = self.config, self.patterns
        dropout = functools.partial(nn.Dropout, config.dropout, deterministic=self.deterministic)
        # Two projections a layer add to the residual stream; this keeps its variance at the end.
        residual_init = nn.initializers.normal(0.02 / math.sqrt(2 * config.num_layers))
        attention = Attention(config, patterns, True, residual_init, name="attention")
        x = x + dropout()(attention(norm(config, "attention_norm")(x), lengths))
        mlp = Mlp(config, patterns, "gelu_tanh", residual_init, name="mlp")
        x = x + dropout()(mlp(norm(config, "mlp_norm")(x)))
        return x, None


class Embeddings(nn.Module):
    """Token and position tables, summed; the token table is tied to the logits."""

    config: GPT2Config

    def setup(self):
        config = self.config
        self.token = embedding(config, config.padded_vocab_size, None)
        self.position = embedding(config, config.max_positions, None)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """(B, S) to (B, S, hidden)."""
        return self.token(input_ids) + self.position(jnp.arange(input_ids.shape[1])[None, :])


class GPT2(nn.Module):
    """GPT-2 with its language-model head.

    >>> model = GPT2(GPT2Config(**VARIANTS["gpt2-nano"], vocab_size=64))
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> jax.jit(model.apply)(variables, jnp.ones((2, 16), jnp.int32)).shape
    (2, 16, 64)

    Attributes:
      config: a `GPT2Config`; `slope_jax.models.build("gpt2-small", ...)` makes one by name.
    """

    config: GPT2Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits (B, S, V) for the token after each; V is the padded vocabulary.

        Args:
          input_ids: (B, S) integers, S <= max_positions.
          deterministic: False turns dropout on, which needs an rng named "dropout".

        Returns:
          Logits in the compute dtype (take their softmax in float32); the padded columns hold the
          most negative number of the dtype.

        Raises:
          ValueError: shapes or dtypes do not fit, or S > max_positions.
        """
        config = self.config
        check_tokens(config, input_ids)
        embeddings = Embeddings(config, name="embeddings")
        x = nn.Dropout(config.dropout, deterministic=deterministic)(embeddings(input_ids))
        x = run_layers(GPT2Layer, config, x, None, deterministic)
        return vocabulary_logits(norm(config, "norm")(x), embeddings.token, config)

    def example_inputs(self, batch: int = 1, length: int = 8) -> dict[str, jax.Array]:
        """Keyword arguments of a call: ids (batch, length) of zeros."""
        length = min(length, self.config.max_positions)
        return {"input_ids": jnp.zeros((batch, length), jnp.int32)}
