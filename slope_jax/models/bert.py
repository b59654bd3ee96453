"""BERT (Devlin et al., 2019, arXiv 1810.04805): encoder, pooler, MLM and NSP heads."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from slope_jax.models.attention import Attention, Context
from slope_jax.models.config import Linear, TransformerConfig
from slope_jax.models.layers import (
    Mlp,
    check_tokens,
    embedding,
    kept_sum,
    linear,
    norm,
    normal_init,
    vocabulary_logits,
)
from slope_jax.models.stack import run_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig):
    """`TransformerConfig` with BERT's defaults, and `type_vocab_size` kinds of segments."""

    vocab_size: int = 30522
    max_positions: int = 512
    type_vocab_size: int = 2
    norm_epsilon: float = 1e-12

    sizes = (*TransformerConfig.sizes, "type_vocab_size")

    def head_linears(self) -> tuple[Linear, ...]:
        hidden = self.hidden_size
        return (
            Linear("pooler", hidden, hidden),
            Linear("mlm/transform", hidden, hidden),
            Linear("mlm/decoder", hidden, self.padded_vocab_size, tied=True),
            Linear("nsp", hidden, 2),
        )


def _variant(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "mlp_size": 4 * hidden,
    }


# Base and large: Devlin et al., section 3. Smaller ones: Turc et al., 2019, arXiv 1908.08962.
VARIANTS = {
    "bert-tiny": _variant(2, 128, 2),
    "bert-mini": _variant(4, 256, 4),
    "bert-small": _variant(4, 512, 8),
    "bert-base": _variant(12, 768, 12),
    "bert-large": _variant(24, 1024, 16),
}


class BertOutput(NamedTuple):
    """What `Bert` returns.

    Attributes:
      mlm_logits: (B, S, V), or (B, P, V) with `mlm_positions`; V is the padded vocabulary, its
        padded columns hold the most negative number of the dtype. None without pretraining heads.
      nsp_logits: (B, 2); class 0: the second segment follows the first. None without them.
      pooled: (B, hidden), tanh of the pooler on the first token.
      hidden: (B, S, hidden), output of the last layer.
    """

    mlm_logits: jax.Array | None
    nsp_logits: jax.Array | None
    pooled: jax.Array
    hidden: jax.Array


class BertLayer(nn.Module):
    """Post-norm encoder layer: attention, then MLP, each added and normalised."""

    config: BertConfig
    patterns: tuple[tuple[str, str], ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        config, patterns = self.config, self.patterns
        dropout = functools.partial(nn.Dropout, config.dropout, deterministic=self.deterministic)
        attention = Attention(config, patterns, False, normal_init, name="attention")
        mlp = Mlp(config, patterns, "gelu", normal_init, name="mlp")
        norms = norm(config, "attention_norm"), norm(config, "mlp_norm")
        training = not self.deterministic
        if not (training and config.dropout):  # the products add the residual
            x = norms[0](kept_sum(attention(x, context, x)))
            return norms[1](kept_sum(mlp(x, x, training=training))), None
        x = norms[0](x + dropout()(attention(x, context)))
        return norms[1](x + dropout()(mlp(x, training=training))), None


class Embeddings(nn.Module):
    """Token, position and segment tables, summed and normalised; the token table is tied."""

    config: BertConfig

    def setup(self):
        config = self.config
        self.token = embedding(config, config.padded_vocab_size, None)
        self.position = embedding(config, config.max_positions, None)
        self.token_type = embedding(config, config.type_vocab_size, None)
        self.norm = norm(config, None)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """(B, S) token and segment ids to (B, S, hidden)."""
        positions = jnp.arange(input_ids.shape[1])[None, :]
        x = self.token(input_ids) + self.token_type(token_type_ids) + self.position(positions)
        return self.norm(x)


class MlmHead(nn.Module):
    """Transform, GELU, norm, then the tied decoder with a bias."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: nn.Embed) -> jax.Array:
        config = self.config
        transform = linear(
            config,
            config.patterns["mlm/transform"],
            config.hidden_size,
            activation="gelu",
            name="transform",
        )
        x = norm(config, "norm")(transform(x))
        bias = self.param(
            "bias", nn.initializers.zeros, (config.padded_vocab_size,), config.param_dtype
        )
        return vocabulary_logits(x, table, config, bias)


class Bert(nn.Module):
    """BERT with its two pretraining heads, or without them, to put another head on.

    >>> model = Bert(BertConfig(**VARIANTS["bert-tiny"], vocab_size=64))
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> jax.jit(model.apply)(variables, jnp.ones((2, 16), jnp.int32)).mlm_logits.shape
    (2, 16, 64)

    Attributes:
      config: a `BertConfig`; `slope_jax.models.build("bert-base", ...)` makes one by name.
      pretraining_heads: False leaves out the parameters and the logits of MLM and NSP.
    """

    config: BertConfig
    pretraining_heads: bool = True

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array | None = None,
        lengths: jax.Array | None = None,
        *,
        mlm_positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> BertOutput:
        """Hidden states and the logits of both heads.

        Args:
          input_ids: (B, S) integers, S <= max_positions.
          token_type_ids: (B, S) integers, the segment of every token; None is all zero.
          lengths: (B,) integers >= 1, valid tokens of each right-padded row; None is all valid.
            What stands behind them does not reach the valid positions.
          mlm_positions: (B, P) integers; MLM logits at these positions only, so that the product
            with the vocabulary runs on P rows, not S. None: at all positions.
          deterministic: False turns dropout on, which needs an rng named "dropout".

        Raises:
          ValueError: shapes or dtypes do not fit, or S > max_positions.
        """
        config = self.config
        check_tokens(config, input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        _check_batch(input_ids, token_type_ids, lengths, mlm_positions)
        lengths = None if lengths is None else lengths.astype(jnp.int32)

        embeddings = Embeddings(config, name="embeddings")
        x = embeddings(input_ids, token_type_ids)
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        hidden = run_layers(BertLayer, config, x, Context(lengths), deterministic)

        pooler = linear(config, config.patterns["pooler"], config.hidden_size, name="pooler")
        pooled = jnp.tanh(pooler(hidden[:, 0]))
        if not self.pretraining_heads:
            return BertOutput(None, None, pooled, hidden)
        nsp = linear(config, config.patterns["nsp"], 2, name="nsp")
        x = hidden
        if mlm_positions is not None:
            x = jnp.take_along_axis(hidden, mlm_positions[:, :, None], axis=1)
        mlm_logits = MlmHead(config, name="mlm")(x, embeddings.token)
        return BertOutput(mlm_logits, nsp(pooled), pooled, hidden)

    def example_inputs(self, batch: int = 1, length: int = 8) -> dict[str, jax.Array]:
        """Keyword arguments of a call: ids (batch, length) of zeros, all valid."""
        length = min(length, self.config.max_positions)
        ids = jnp.zeros((batch, length), jnp.int32)
        lengths = jnp.full((batch,), length, jnp.int32)
        return {"input_ids": ids, "token_type_ids": ids, "lengths": lengths}


def _check_batch(input_ids, token_type_ids, lengths, mlm_positions) -> None:
    batch = input_ids.shape[0]
    wanted = (
        ("token_type_ids", token_type_ids, tuple(input_ids.shape)),
        ("lengths", lengths, (batch,)),
        ("mlm_positions", mlm_positions, (batch, None)),
    )
    for name, array, shape in wanted:
        if array is None:
            continue
        same_rank = array.ndim == len(shape)
        fits = same_rank and all(w in (None, g) for w, g in zip(shape, array.shape, strict=True))
        if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
            wants = str(list(shape)).replace("None", "P")
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; for input_ids of"
                f" {list(input_ids.shape)} it must be integers {wants}"
            )
