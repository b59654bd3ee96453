"""The pieces both models are made of: linears by pattern, embeddings, norm, vocabulary logits."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from slope_jax.dense import SparseDense
from slope_jax.models.config import TransformerConfig
from slope_jax.policy import DENSE

normal_init = nn.initializers.normal(0.02)


def linear(
    config: TransformerConfig,
    pattern: str,
    features: int,
    *,
    name: str | None,
    kernel_init: nn.initializers.Initializer = normal_init,
    activation: str | None = None,
) -> SparseDense:
    """A `SparseDense` as the model's configuration asks; adapters belong to pruned ones only."""
    pruned = pattern != DENSE
    return SparseDense(
        features,
        sparsity=pattern if pruned else None,
        adapter_rank=config.rank if pruned else 0,
        mask_init=config.mask_init,
        implementation=config.implementation,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=kernel_init,
        activation=activation,
        name=name,
    )


class Norm(nn.LayerNorm):
    """LayerNorm with parameters and arithmetic in float32, returned in the dtype of its input."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


def norm(config: TransformerConfig, name: str) -> Norm:
    # The two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large.
    return Norm(
        epsilon=config.norm_epsilon,
        dtype=jnp.float32,
        use_fast_variance=False,
        name=name,
    )


def embedding(config: TransformerConfig, rows: int, name: str) -> nn.Embed:
    """A table of `rows` x hidden, N(0, 0.02)."""
    return nn.Embed(
        rows,
        config.hidden_size,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=normal_init,
        name=name,
    )


def vocabulary_logits(
    x: jax.Array, table: nn.Embed, config: TransformerConfig, bias: jax.Array | None = None
) -> jax.Array:
    """Products of (..., hidden) with the tied token table, the padded columns masked out.

    The result keeps the padded width, a multiple of 8, because slicing would copy the largest array
    of the model; its padded columns are the most negative finite number of the dtype.
    """
    logits = table.attend(x)
    if bias is not None:
        bias = bias.astype(logits.dtype)
        logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
    if config.padded_vocab_size == config.vocab_size:
        return logits
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    lowest = jnp.array(jnp.finfo(logits.dtype).min, logits.dtype)
    return jnp.where(token < config.vocab_size, logits, lowest)


def check_tokens(config: TransformerConfig, input_ids: jax.Array) -> None:
    """Raises a ValueError unless `input_ids` are integers (B, S) with S <= max_positions."""
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"input_ids are {input_ids.dtype}{list(input_ids.shape)}; they must be integers"
            " (batch, sequence)"
        )
    if input_ids.shape[1] > config.max_positions:
        raise ValueError(
            f"a sequence of {input_ids.shape[1]} tokens is longer than max_positions="
            f"{config.max_positions}; shorten it, or build the model with max_positions="
            f"{input_ids.shape[1]} and train those positions"
        )


class Mlp(nn.Module):
    """Two linears, `up` and `down`, around an activation."""

    config: TransformerConfig
    patterns: tuple[tuple[str, str], ...]
    activation: str
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, hidden) to (B, S, hidden)."""
        config, patterns = self.config, dict(self.patterns)
        up = linear(
            config,
            patterns["mlp/up"],
            config.mlp_size,
            activation=self.activation,
            name="up",
        )
        down = linear(
            config,
            patterns["mlp/down"],
            config.hidden_size,
            kernel_init=self.output_init,
            name="down",
        )
        return down(up(x))
