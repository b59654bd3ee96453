"""From the names of Hugging Face to ours, by the tables of `hf_families`."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slope_jax.models.config import TransformerConfig
from slope_jax.models.hf_families import FAMILIES, Source
from slope_jax.models.hf_rope import SCALING_NAMES

ABOUT = "slope_jax"  # the entry of config.json that holds what Transformers has no field for

# Constants that older files store as tensors: causal masks, the numbers 0, 1, 2, ..., frequencies.
_BUFFERS = re.compile(
    r"(.*\.)?(attn\.(masked_)?bias|embeddings\.(position|token_type)_ids|rotary_emb\.inv_freq)"
)

# Besides those in the families' tables: what stands for a float is a float, for a count an integer.
_NUMBERS = {
    "head_dim": None,
    "word_embed_proj_dim": None,
    "rope_theta": 1.0,
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 1,
}
_MOST = 2**31 - 1  # of a count
_MOST_LAYERS = 10_000  # far more than there are; each is named before the files are looked at
_OPTIONAL = ("sliding_window",)  # null says that there is none

_PREFIX = {"bert": "bert.", "gpt2": "transformer."}  # "model." for the others
_ANY_PREFIX = re.compile(r"^(bert|transformer|model)\.")
_ALONE = ("cls.", "lm_head.")  # names outside of the base model


def is_buffer(name: str) -> bool:
    return _BUFFERS.fullmatch(name) is not None


def canonical(name: str) -> str:
    """The name without the model's prefix, and with today's names of the norm's parameters."""
    name = _ANY_PREFIX.sub("", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name).replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def name_in_file(family: str, name: str, others: Iterable[str]) -> str:
    """As a file spells it, by its other names: base models are saved without the prefix, too."""
    found = list(others)
    bare = found and not any(map(_ANY_PREFIX.match, found))
    return name if bare else full_name(family, name)


def full_name(family: str, name: str) -> str:
    """The inverse of `canonical`."""
    return name if name.startswith(_ALONE) else _PREFIX.get(family, "model.") + name


def read_config(raw: dict[str, Any], family: str, file: Path) -> dict[str, Any]:
    """Our configuration fields from the content of config.json, which is `file` in messages.

    Raises:
      ValueError: it describes a variation that our models do not have, or holds no numbers where
        these belong.
    """
    table = FAMILIES[family]
    try:
        _check_numbers(raw, family)
        _check_fixed(raw, family)
        return table.finish(raw, {ours: raw.get(*theirs) for ours, theirs in table.fields.items()})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def in_their_names(text: str, family: str) -> str:
    """A message about fields of our configuration, in the names of config.json."""
    table = FAMILIES[family]
    theirs = SCALING_NAMES | {ours: name for ours, (name, _) in table.fields.items()}
    theirs |= {} if table.dropout is None else {"dropout": table.dropout}
    return re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), text)


def _check_fixed(raw: dict[str, Any], family: str) -> None:
    other = [
        f"{key}={raw[key]!r} (ours: {' or '.join(map(repr, values))})"
        for key, values in FAMILIES[family].fixed.items()
        if key in raw and raw[key] not in values
    ]
    if other:
        raise ValueError(
            f"our {family} does not have {', '.join(other)}; give a model that is built as ours is"
        )


def _check_numbers(raw: dict[str, Any], family: str) -> None:
    table = FAMILIES[family]
    defaults = dict(table.fields.values()) | _NUMBERS
    layers = table.fields["num_layers"][0]
    if table.dropout is not None:
        defaults[table.dropout] = 0.1
    nested = {
        key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None
    }
    wrong = [f"{key}={value!r}" for key, value in nested.items() if not isinstance(value, dict)]
    for given in (raw, *(value for value in nested.values() if isinstance(value, dict))):
        for key in defaults.keys() & given.keys():
            value, default = given[key], defaults[key]
            kinds = int | float if isinstance(default, float) else int
            number = isinstance(value, kinds) and not isinstance(value, bool)
            absent = value is None and (default is None or key in _OPTIONAL)
            most = _MOST_LAYERS if key == layers else _MOST
            if not absent and not (number and abs(value) <= most):  # NaN is not, either
                wrong.append(f"{key}={value!r}")
    if wrong:
        raise ValueError(
            f"{', '.join(sorted(wrong))} must be numbers, counts whole ones, none above"
            f" {_MOST} and layers at most {_MOST_LAYERS}; copy or download it again"
        )


def dropout(raw: dict[str, Any], family: str) -> float:
    """The probability after attention and MLP."""
    name = FAMILIES[family].dropout
    return 0.0 if name is None else raw.get(name, 0.1)


def sources(config: TransformerConfig, family: str) -> list[Source]:
    """Every parameter of a dense model with single layers."""
    table, copies = FAMILIES[family], tied(config, family)
    outside = [source for source in table.outside if not copies.keys() & set(source.names)]
    return [*outside, *(s for i in range(config.num_layers) for s in table.layer(i))]


def tied(config: TransformerConfig, family: str) -> dict[str, str]:
    """Tensors that are copies of others in this model -> the originals."""
    return FAMILIES[family].tied if getattr(config, "tied_head", True) else {}


def at(tree: Mapping, path: tuple[str, ...]) -> Any:
    for part in path:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def linear_of(source: Source) -> str:
    """The logical path of the linear that has the parameter."""
    return "/".join(source.path[:-1]).replace("layers_", "layers/", 1)


def parts_of(config: TransformerConfig, source: Source, array: np.ndarray) -> list[np.ndarray]:
    """The columns of each of their tensors: splits the last axis."""
    count = len(source.names)
    if count == 1:
        return [array]
    if "qkv" in source.path:
        queries, keys = (n * config.head_width for n in (config.num_heads, config.num_kv_heads))
        return np.split(array, [queries, queries + keys], axis=-1)
    return np.split(array, count, axis=-1)
