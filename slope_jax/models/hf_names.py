"""From the names of Hugging Face to ours, by the tables of `hf_families`."""

import re
from typing import Any

from slope_jax.models.config import TransformerConfig
from slope_jax.models.hf_families import FAMILIES, Source

# Constants that older files store as tensors: causal masks, the numbers 0, 1, 2, ..., frequencies.
_BUFFERS = re.compile(
    r"(.*\.)?(attn\.(masked_)?bias|embeddings\.(position|token_type)_ids|rotary_emb\.inv_freq)"
)


def is_buffer(name: str) -> bool:
    return _BUFFERS.fullmatch(name) is not None


def canonical(name: str) -> str:
    """The name without the model's prefix, and with today's names of the norm's parameters."""
    name = re.sub(r"^(bert|transformer|model)\.", "", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name).replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def read_config(raw: dict[str, Any], family: str) -> dict[str, Any]:
    """Our configuration fields from the content of config.json.

    Raises:
      ValueError: it describes a variation that our models do not have.
    """
    table = FAMILIES[family]
    other = [
        f"{key}={raw[key]!r} (ours: {' or '.join(map(repr, values))})"
        for key, values in table.fixed.items()
        if key in raw and raw[key] not in values
    ]
    if other:
        raise ValueError(f"config.json: our {family} does not have {', '.join(other)}")
    return table.finish(raw, {ours: raw.get(*theirs) for ours, theirs in table.fields.items()})


def dropout(raw: dict[str, Any], family: str) -> float:
    """The probability after attention and MLP."""
    name = FAMILIES[family].dropout
    return 0.0 if name is None else raw.get(name, 0.1)


def sources(config: TransformerConfig, family: str) -> list[Source]:
    """Every parameter of a dense model with single layers."""
    table = FAMILIES[family]
    return [*table.outside, *(s for i in range(config.num_layers) for s in table.layer(i))]
