"""GPT-2 (Radford et al., 2019): a pre-norm causal decoder with a tied vocabulary."""

import dataclasses
from typing import ClassVar

from slope_jax.models.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """`TransformerConfig` with GPT-2's defaults."""

    vocab_size: int = 50257
    max_positions: int = 1024
    norm_epsilon: float = 1e-5

    activation: ClassVar[str] = "gelu_tanh"
    embedding_dropout: ClassVar[bool] = True


def _variant(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "mlp_size": 4 * hidden,
    }


# Radford et al., table 2 (heads of 64); nano is a toy of the same shape, for tests and trials, and
# mini is small enough to compare many runs.
VARIANTS = {
    "gpt2-nano": _variant(4, 128, 4),
    "gpt2-mini": _variant(6, 384, 6),
    "gpt2-small": _variant(12, 768, 12),
    "gpt2-medium": _variant(24, 1024, 16),
    "gpt2-large": _variant(36, 1280, 20),
    "gpt2-xl": _variant(48, 1600, 25),
}


class GPT2(Decoder):
    """GPT-2 with its language-model head; see `Decoder` for its call.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> model = GPT2(GPT2Config(**VARIANTS["gpt2-nano"], vocab_size=64))
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> jax.jit(model.apply)(variables, jnp.ones((2, 16), jnp.int32)).shape
    (2, 16, 64)

    Attributes:
      config: a `GPT2Config`; `slope_jax.models.build("gpt2-small", ...)` makes one by name.
    """

    config: GPT2Config
