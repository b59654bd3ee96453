"""Models by name."""

import dataclasses
import difflib
import math

import jax

from slope_jax.models import bert, gpt2, llama, opt
from slope_jax.models.config import TransformerConfig
from slope_jax.models.decoder import Decoder

_FAMILIES = (
    (bert.Bert, bert.BertConfig, bert.VARIANTS),
    (gpt2.GPT2, gpt2.GPT2Config, gpt2.VARIANTS),
    (opt.OPT, opt.OPTConfig, opt.VARIANTS),
    (llama.Llama, llama.LlamaConfig, llama.VARIANTS),
)

VARIANTS = tuple(name for _, _, variants in _FAMILIES for name in variants)


def variant_config(name: str, **overrides) -> TransformerConfig:
    """The frozen configuration of a named variant, some fields replaced.

    Raises:
      ValueError: an unknown variant or field (with the choices), or a value out of range.
    """
    for _, config, variants in _FAMILIES:
        if name in variants:
            check_fields(name, config, overrides)
            return config(**(variants[name] | overrides))
    raise ValueError(
        f"unknown model {name!r}{_suggestion(name, VARIANTS)}; choose one of {', '.join(VARIANTS)}"
    )


def build(name: str, **overrides) -> bert.Bert | Decoder:
    """The model of a named variant.

    >>> build("bert-base", sparsity="2:4,2:8", adapter_rank=0.0156).config.rank
    12

    Args:
      name: one of `VARIANTS`.
      **overrides: fields of the variant's configuration (`BertConfig`, `GPT2Config`, `OPTConfig`,
        `LlamaConfig`) that differ from it.

    Raises:
      ValueError: an unknown variant or field (with the choices), or a value out of range.
    """
    config = variant_config(name, **overrides)
    return next(model for model, kind, _ in _FAMILIES if isinstance(config, kind))(config)


def count_parameters(model: bert.Bert | Decoder) -> int:
    """Numbers stored in the `params` of a model, survivors and padded vocabulary rows included.

    Nothing is allocated.

    >>> count_parameters(build("gpt2-small", sparsity="dense")) - 7 * 768  # 7 padded rows
    124439808
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def check_fields(name: str, config: type[TransformerConfig], overrides) -> None:
    """Raises ValueError, with the choices, for an override that is no field of the configuration."""
    fields = [field.name for field in dataclasses.fields(config)]
    for field in overrides:
        if field not in fields:
            raise ValueError(
                f"{name} has no field {field!r}{_suggestion(field, fields)}; choose from"
                f" {', '.join(fields)}"
            )


def _suggestion(word: object, choices) -> str:
    close = difflib.get_close_matches(str(word), choices, n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
