"""LLaMA-3 (Grattafiori et al., 2024, arXiv 2407.21783) and Mistral-7B (Jiang et al., 2023,
arXiv 2310.06825): RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""

import dataclasses
from typing import ClassVar

import jax

from slope_jax.models import rope
from slope_jax.models.decoder import Decoder, DecoderConfig
from slope_jax.models.rope import RopeScaling

FAMILIES = ("llama", "mistral")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """`TransformerConfig` with LLaMA-3's defaults, and:

    Attributes:
      head_dim: width of one head, where that is not hidden_size / num_heads; None: it is, and
        `head_width` says how much.
      num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads queries.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, or a `RopeScaling`, such as that of LLaMA-3.1 and later.
      tied_head: whether the token table makes the logits (LLaMA-3.2's small models); if not, the
        linear "lm_head" does.
      window: tokens that one sees, itself included (Mistral-7B v0.1); None: all before it.
      family: "llama" or "mistral", as which it is exported; without a window the two are one model.
    """

    vocab_size: int = 128_256
    max_positions: int = 8192
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    head_dim: int | None = None
    num_kv_heads: int = 8
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tied_head: bool = False
    window: int | None = None
    family: str = dataclasses.field(default="llama", compare=False)

    sizes = (*DecoderConfig.sizes, "num_kv_heads")
    activation: ClassVar[str] = "silu"
    gated: ClassVar[bool] = True
    position_offset: ClassVar[int | None] = None
    use_bias: ClassVar[bool] = False
    rms_norm: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; choose"
                " a number of these that divides it"
            )
        rope.check_rope(self.head_width, self.rope_theta, self.rope_scaling)
        if self.window is not None and (isinstance(self.window, bool) or self.window < 1):
            raise ValueError(f"window={self.window!r} must be None or a positive integer")
        if not isinstance(self.tied_head, bool):
            raise ValueError(f"tied_head={self.tied_head!r} must be True or False")
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}; choose one of {', '.join(FAMILIES)}")

    @property
    def head_width(self) -> int:
        return super().head_width if self.head_dim is None else self.head_dim

    def _check_heads(self):
        width = self.head_dim
        if width is None:
            super()._check_heads()
        elif isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"head_dim={width!r} must be None or a positive integer")
        elif width * self.num_heads == self.hidden_size:  # as of None, so that the two are equal
            object.__setattr__(self, "head_dim", None)

    def layer_linears(self) -> dict[str, tuple[int, int]]:
        hidden, mlp = self.hidden_size, self.mlp_size
        return {
            "attention/qkv": (hidden, (self.num_heads + 2 * self.num_kv_heads) * self.head_width),
            "attention/output": (self.num_heads * self.head_width, hidden),
            "mlp/gate_up": (hidden, 2 * mlp),
            "mlp/down": (mlp, hidden),
        }

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        speed = rope.frequencies(self.head_width, self.rope_theta, self.rope_scaling)
        return rope.rotary_tables(positions, speed)


# LLaMA-3.2's small models.
_SMALL = {
    "max_positions": 131_072,
    "num_kv_heads": 8,
    "mlp_size": 8192,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
    "tied_head": True,
}

# Grattafiori et al., table 3; Jiang et al., table 1 (the window is v0.1's); of LLaMA-3.2, the published
# config.json; nano is a toy.
VARIANTS = {
    "llama-nano": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_size": 352,
    },
    "llama-3-8b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_size": 14336,
    },
    "llama-3.2-1b": {"num_layers": 16, "hidden_size": 2048, "num_heads": 32, **_SMALL},
    "llama-3.2-3b": {"num_layers": 28, "hidden_size": 3072, "num_heads": 24, **_SMALL},
    "mistral-7b": {
        "vocab_size": 32_000,
        "max_positions": 32_768,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_size": 14336,
        "rope_theta": 10_000.0,
        "window": 4096,
        "family": "mistral",
    },
}


class Llama(Decoder):
    """LLaMA or Mistral with its language-model head; see `Decoder` for its call.

    >>> model = Llama(LlamaConfig(**VARIANTS["llama-nano"], vocab_size=64))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    >>> jax.tree.map(lambda leaf: leaf.shape, shapes["params"]["layers_1_to_3"]["mlp"])
    {'down': {'kernel': (3, 176, 128)}, 'gate_up': {'kernel': (3, 64, 704)}}

    Attributes:
      config: a `LlamaConfig`; `slope_jax.models.build("llama-3-8b", ...)` makes one by name.
    """

    config: LlamaConfig
