"""OPT (Zhang et al., 2022, arXiv 2205.01068): GPT-3's shape with ReLU, pre-norm, tied vocabulary.

OPT-350m is not among the variants: alone among its siblings it normalises after each branch and
projects its embeddings.
"""

import dataclasses
from typing import ClassVar

from slope_jax.models.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(DecoderConfig):
    """`TransformerConfig` with OPT's defaults.

    The position table has two rows more than `max_positions`: position i is row i + 2, as in the
    published weights. Initialisation is the paper's N(0, 0.006), section 2.2.
    """

    vocab_size: int = 50272
    max_positions: int = 2048
    norm_epsilon: float = 1e-5

    activation: ClassVar[str] = "relu"
    position_offset: ClassVar[int] = 2
    init_std: ClassVar[float] = 0.006


def _variant(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "mlp_size": 4 * hidden,
    }


# Zhang et al., table 1; nano is a toy of the same shape, for tests and trials.
VARIANTS = {
    "opt-nano": _variant(4, 128, 4),
    "opt-125m": _variant(12, 768, 12),
    "opt-1.3b": _variant(24, 2048, 32),
    "opt-2.7b": _variant(32, 2560, 32),
    "opt-6.7b": _variant(32, 4096, 32),
    "opt-13b": _variant(40, 5120, 40),
    "opt-30b": _variant(48, 7168, 56),
    "opt-66b": _variant(64, 9216, 72),
}


class OPT(Decoder):
    """OPT with its language-model head; see `Decoder` for its call.

    >>> import jax
    >>> model = OPT(OPTConfig(**VARIANTS["opt-nano"], vocab_size=64))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    >>> shapes["params"]["embeddings"]["position"]["embedding"].shape
    (2050, 128)

    Attributes:
      config: an `OPTConfig`; `slope_jax.models.build("opt-13b", ...)` makes one by name.
    """

    config: OPTConfig
