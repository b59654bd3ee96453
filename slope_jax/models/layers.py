"""The pieces all models are made of: linears by pattern, embeddings, norm, vocabulary logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from pallas_kernels import epilogue
from slope_jax.dense import PRODUCT, SparseDense, inverse_rank_normal
from slope_jax.models.config import TransformerConfig
from slope_jax.normed import Normed, Stream
from slope_jax.policy import DENSE
from slope_jax.sharded import split_sections
from slope_jax.sharded_tables import sharded_head, sharded_take
from slope_jax.sharding import WHOLE, active_mesh, constrain, cut_of

normal_init = nn.initializers.normal(0.02)


def linear(
    config: TransformerConfig,
    pattern: str,
    features: int,
    *,
    name: str | None,
    kernel_init: nn.initializers.Initializer | None = None,
    activation: str | None = None,
    sections: tuple[int, ...] | None = None,
) -> SparseDense:
    """A `SparseDense` as the model's configuration asks; adapters belong to pruned ones only.

    `kernel_init` None is N(0, init_std).
    """
    pruned = pattern != DENSE
    simulated = pruned and config.simulated
    return SparseDense(
        features,
        use_bias=config.use_bias,
        sparsity=pattern if pruned else None,
        adapter_rank=config.rank if pruned else 0,
        adapter_l_init=functools.partial(inverse_rank_normal, scale=config.adapter_scale),
        mask_init=config.mask_init,
        implementation=config.implementation,
        backward=config.backward,
        simulated=bool(simulated),
        dot_general_cls=simulated if isinstance(simulated, type) else None,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=kernel_init or nn.initializers.normal(config.init_std),
        activation=activation,
        sections=sections,
        name=name,
    )


def _is_sum(primitive: Any, *_, **__) -> bool:
    return primitive is jax.lax.reduce_sum_p


# The backward pass recomputes a norm: of its arrays in float32 just the moments of the rows are kept.
# XLA must not see where they come from (by `prevent_cse`), or it makes fewer and slower kernels.
_recomputed = functools.partial(nn.remat, policy=_is_sum)


class Norm(nn.LayerNorm):
    """LayerNorm with parameters and arithmetic in float32, returned in the dtype of its input."""

    @_recomputed
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm, computed like `Norm`."""

    @_recomputed
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


def kept_sum(x: jax.Array) -> jax.Array:
    """x, named for policies of rematerialisation, where a product has added a residual.

    Behind another operation: of a named value itself, JAX would keep a norm as well.
    """
    return checkpoint_name(x[None], PRODUCT)[0]


def norm(config: TransformerConfig, name: str | None) -> Norm | RMSNorm:
    """The norm of the model's family."""
    if config.rms_norm:
        return RMSNorm(epsilon=config.norm_epsilon, dtype=jnp.float32, name=name)
    # The two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large.
    return Norm(
        epsilon=config.norm_epsilon,
        dtype=jnp.float32,
        use_fast_variance=False,
        name=name,
    )


def later(module: Norm | RMSNorm, stream: Stream) -> Normed:
    """A module's norm of the stream, for the linear that multiplies it to make."""
    centred = isinstance(module, Norm)
    shift = module.get_variable("params", "bias") if centred else None
    scale = module.get_variable("params", "scale")
    return Normed(stream.x, epilogue.Norm(scale, shift, module.epsilon, centred, stream.moments))


class Embed(nn.Embed):
    """A table whose rows are cast after they are taken, not before.

    Gradients of rows then add up in the table's dtype: in bfloat16, a row that a thousand tokens
    share would lose most of them, and GPUs add 16-bit numbers in memory one by one.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Integers (...) to (..., features)."""
        if self._is_sharded():
            if cut_of(self.path) is not WHOLE:
                return sharded_take(self.embedding, inputs, self.dtype)
            whole = constrain(self.embedding, PartitionSpec())
            return jnp.take(whole, inputs, axis=0).astype(self.dtype)
        return jnp.take(self.embedding, inputs, axis=0).astype(self.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """(..., features) to (..., rows): products with every row."""
        if self._is_sharded():
            return sharded_head(query, self.embedding, self.dtype)
        return super().attend(query)

    def _is_sharded(self) -> bool:
        return active_mesh() is not None and not self.is_initializing()


def embedding(config: TransformerConfig, rows: int, name: str | None) -> Embed:
    """A table of `rows` x hidden, N(0, init_std)."""
    return Embed(
        rows,
        config.hidden_size,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(config.init_std),
        name=name,
    )


def vocabulary_logits(
    x: jax.Array, table: nn.Embed, config: TransformerConfig, bias: jax.Array | None = None
) -> jax.Array:
    """Products of (..., hidden) with the tied token table, the padded columns masked out."""
    logits = table.attend(x)
    if bias is not None:
        bias = bias.astype(logits.dtype)
        logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
    return mask_padding(logits, config)


def mask_padding(logits: jax.Array, config: TransformerConfig) -> jax.Array:
    """Logits whose padded columns are the most negative finite number of the dtype.

    They keep the padded width, a multiple of 8, because slicing would copy the largest array of the
    model.
    """
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
    def __call__(
        self,
        x: jax.Array | Normed,
        residual: jax.Array | Stream | None = None,
        *,
        training: bool = False,
    ) -> jax.Array | Stream:
        """(B, S, hidden) to (B, S, hidden), added to the residual if one is given.

        Args:
          training: whether gradients follow, for which the activation keeps what entered it.
        """
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
        return down(up(x, activated=training and down.joins), residual)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def gated(gate_up: jax.Array, activation: str) -> jax.Array:
    """activation(gate) * up of (..., 2 * mlp), in float32, returned in the dtype of the input.

    The backward pass recomputes it, so that nothing but `gate_up` is kept.
    """
    halves = split_sections(gate_up, (gate_up.shape[-1] // 2,) * 2)
    return epilogue.gate_of(*halves, activation)


class GatedMlp(nn.Module):
    """activation(gate) * up, then `down`; gate and up are the columns [gate | up] of one linear."""

    config: TransformerConfig
    patterns: tuple[tuple[str, str], ...]
    activation: str
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self,
        x: jax.Array | Normed,
        residual: jax.Array | Stream | None = None,
        *,
        training: bool = False,
    ) -> jax.Array | Stream:
        """As `Mlp`; in training, and with `remat`, whose policies go by names, what `gate_up` makes has one,
        and the gate is apart."""
        config, patterns = self.config, dict(self.patterns)
        gate_up = linear(
            config,
            patterns["mlp/gate_up"],
            2 * config.mlp_size,
            sections=(config.mlp_size,) * 2,
            name="gate_up",
        )
        down = linear(
            config,
            patterns["mlp/down"],
            config.hidden_size,
            kernel_init=self.output_init,
            name="down",
        )
        if gate_up.joins and not (training or config.remat):
            return down(gate_up(x, gate=self.activation), residual)
        return down(gated(gate_up(x), self.activation), residual)
