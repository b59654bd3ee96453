"""Adapters beside a Hugging Face folder's weights, in the form of PEFT's LoRA: written and read.

    FOLDER/adapter/adapter_config.json           the rank, the scale, and what has adapters
    FOLDER/adapter/adapter_model.safetensors     lora_A (r, in) and lora_B (out, r) of each

A linear of ours may be several of theirs (queries, keys, values; gate, up). Those that we write share
their lora_A, and each has its columns of adapter_r; `hf_fused` reads others as well.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.files import write_atomically
from slope_jax.dense import ADAPTER_L, ADAPTER_R
from slope_jax.models import hf_names
from slope_jax.models.config import TransformerConfig
from slope_jax.models.hf_families import Source
from slope_jax.models.hf_files import Tensor, all_of, listed, open_files, read_json, save_tensors
from slope_jax.policy import DENSE

FOLDER = "adapter"
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_STEM = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# What AutoPeftModel loads; PEFT has no task for a BERT with its pretraining heads.
_BERT = {
    "base_model_class": "BertForPreTraining",
    "parent_library": "transformers.models.bert.modeling_bert",
}
# Fields of PEFT that change what adapters compute -> the only values that ours can be.
_FIXED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    **dict.fromkeys(
        (
            *("use_dora", "use_qalora", "use_bdlora", "lora_bias"),
            *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        ),
        (None, False),
    ),
}
# Of init_lora_weights, what leaves the folder's weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# rewrite them, and adapters made so add up to nothing with those that are in the folder.
_BORN = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
MERGE = (
    "merge them in PEFT, with PeftModel.from_pretrained(model, ADAPTER).merge_and_unload(), and save"
    " that with save_pretrained"
)


class Adapter(NamedTuple):
    """What `read_adapter` found.

    Attributes:
      path: its folder, for messages.
      rank: of all adapters, of theirs.
      scale: factor on their product.
      tensors: by the names of `hf_families`, ".weight" replaced by ".lora_A.weight", ".lora_B.weight".
    """

    path: Path
    rank: int
    scale: float
    tensors: dict[str, Tensor]


def write_adapter(
    folder: Path, base: Path, config: TransformerConfig, family: str, variables: Mapping, dtype: Any
) -> None:
    """Writes both files.

    Args:
      folder: a new one.
      base: where the model will be, for AutoPeftModelForCausalLM.
      config: of the model.
      variables: layers single.
      dtype: of the tensors.
    """
    tensors, modules = {}, set()
    for source in hf_names.sources(config, family):
        layer = hf_names.at(variables["params"], source.path[:-1])
        if source.path[-1] != "kernel" or ADAPTER_L not in layer:
            continue
        left, right = (np.asarray(layer[name].astype(dtype)) for name in (ADAPTER_L, ADAPTER_R))
        if source.vocabulary is not None:
            right = right[:, : config.vocab_size]
        for name, part in zip(source.names, hf_names.parts_of(config, source, right), strict=True):
            module = hf_names.full_name(family, name).removesuffix(".weight")
            modules.add(module)
            tensors[f"{_STEM}{module}{_A}"] = np.ascontiguousarray(left.T)
            tensors[f"{_STEM}{module}{_B}"] = np.ascontiguousarray(part.T)
    folder.mkdir()
    save_tensors(tensors, folder / _TENSORS)
    described = {
        "peft_type": "LORA",
        "task_type": None if family == "bert" else "CAUSAL_LM",
        "auto_mapping": _BERT if family == "bert" else None,
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.rank,  # PEFT multiplies by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",  # whose Conv1D stores (in, out)
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    write_atomically(folder / _CONFIG, json.dumps(described, indent=2) + "\n")


def read_adapter(folder: Path) -> Adapter | None:
    """The adapters of a Hugging Face folder; None where it has none.

    Raises:
      ValueError: files are missing or damaged, or it is no LoRA that our adapters can be.
    """
    if (folder / _CONFIG).is_file():
        raise ValueError(
            f"{folder / _CONFIG}: adapters are looked for in {folder / FOLDER}; move {_CONFIG} and"
            f" {_TENSORS} there"
        )
    path = folder / FOLDER
    if not any((path / name).is_file() for name in (_CONFIG, _TENSORS)):
        return None
    raw = read_json(path / _CONFIG)
    other = [
        f"{name}={raw.get(name)!r}"
        for name, values in _FIXED.items()
        if raw.get(name, values[0]) not in values
    ]
    born = raw.get("init_lora_weights")
    if (born.lower() if isinstance(born, str) else born) not in _BORN:
        other.append(f"init_lora_weights={born!r}")
    if other or "peft_type" not in raw:
        what = ", ".join(other) or "no peft_type"
        raise ValueError(
            f"{path / _CONFIG}: {what}; our adapters are LoRA of one rank, without more: {MERGE}"
        )
    rank, scale = _numbers(path, raw)
    found = dict(open_files(path, [_TENSORS]))
    names = _names(path, found)
    if not names:
        raise ValueError(
            f"{path / _TENSORS} holds no tensors; take the folder away where there are no adapters"
        )
    return Adapter(path, rank, scale, {ours: found[theirs] for ours, theirs in names.items()})


def check_alone(folder: Path) -> None:
    """Raises a ValueError where the weights of a folder, that calibration is to prune, have adapters."""
    adapter = read_adapter(folder)
    if adapter is not None:
        raise ValueError(
            f"calibration prunes weights that stand alone, but {adapter.path} adds adapters to them:"
            " take that folder out, or leave out calibration"
        )


def _names(path: Path, found: Iterable[str]) -> dict[str, str]:
    """Names of `Adapter.tensors` -> those in the file."""
    surplus = sorted(n for n in found if not (n.startswith(_STEM) and n.endswith((_A, _B))))
    if surplus:
        raise ValueError(
            f"{path / _TENSORS} holds {all_of(surplus)}; ours are adapters of linear layers alone,"
            f" lora_A and lora_B: {MERGE}"
        )
    names: dict[str, list[str]] = {}
    for name in found:
        names.setdefault(hf_names.canonical(name.removeprefix(_STEM)), []).append(name)
    twice = [" and ".join(sorted(same)) for same in names.values() if len(same) > 1]
    if twice:
        raise ValueError(
            f"{path / _TENSORS} holds {listed(sorted(twice))}, which name the same adapter; save it"
            " again with save_pretrained of PEFT, so that one of them is left"
        )
    return {ours: same[0] for ours, same in names.items()}


def _numbers(path: Path, raw: dict[str, Any]) -> tuple[int, float]:
    rank, alpha, roots = (raw.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    wrong = []
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        wrong.append(f"r={rank!r} must be a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        wrong.append(f"lora_alpha={alpha!r} must be a number")
    if not isinstance(roots, bool | None):
        wrong.append(f"use_rslora={roots!r} must be true or false")
    if wrong:
        raise ValueError(f"{path / _CONFIG}: {', '.join(wrong)}; copy or download it again")
    return rank, alpha / (math.sqrt(rank) if roots else rank)


def check_adapter(adapter: Adapter, config: TransformerConfig, family: str) -> None:
    """Whether every tensor is of a pruned linear of the model, and of its shape.

    Args:
      config: of the model; its adapter_rank does not matter.

    Raises:
      ValueError: names all that are not.
    """
    kernels = [s for s in hf_names.sources(config, family) if s.path[-1] == "kernel"]
    owner = {end: s for s in kernels for name in s.names for end in pair(name)}
    unknown = sorted(set(adapter.tensors) - set(owner))
    if unknown:
        raise ValueError(
            f"{adapter.path} has adapters of {all_of(unknown)}, which are no linear layers of our"
            f" {family}: {MERGE}"
        )
    given = [s for s in kernels if adapter.tensors.keys() & {e for n in s.names for e in pair(n)}]
    paths = [hf_names.linear_of(source) for source in given]
    dense = [path for path in paths if config.patterns[path] == DENSE]
    if dense:
        raise ValueError(
            f"{adapter.path} has adapters of {all_of([p.replace('/', '.') for p in dense])}, which"
            f" sparsity {str(config.sparsity)!r} leaves dense, and adapters of ours belong to pruned"
            f" linears. Give a sparsity that prunes these, or {MERGE}"
        )
    sizes = {linear.path: linear for linear in config.linears}
    wrong = []
    for source, path in zip(given, paths, strict=True):
        widths = widths_of(config, source, sizes[path].out_features)
        wrong += _problems(adapter, source, sizes[path].in_features, widths)
    if wrong:
        raise ValueError(
            f"{adapter.path} does not fit our {family}: {listed(wrong)}. To use them all the same, {MERGE}"
        )


def pair(name: str) -> tuple[str, str]:
    """Of a weight: the names of its lora_A and lora_B in `Adapter.tensors`."""
    stem = name.removesuffix(".weight")
    return stem + _A, stem + _B


def widths_of(config: TransformerConfig, source: Source, outputs: int) -> list[int]:
    """Columns of each of their tensors, which are one of ours with so many."""
    width = outputs if source.vocabulary is None else config.vocab_size
    parts = hf_names.parts_of(config, source, np.empty((0, width)))
    return [part.shape[-1] for part in parts]


def _problems(adapter: Adapter, source: Source, inputs: int, widths: list[int]) -> list[str]:
    """What is wrong with the adapters of one linear of ours."""
    wrong = []
    for name, width in zip(source.names, widths, strict=True):
        found = [adapter.tensors.get(end) for end in pair(name)]
        if found == [None, None] and len(widths) > 1:  # some of the linears have adapters
            continue
        shapes = ((adapter.rank, inputs), (width, adapter.rank))
        for end, tensor, shape in zip(pair(name), found, shapes, strict=True):
            if tensor is None:
                wrong.append(f"{end} is missing")
            elif tensor.shape != shape or not tensor.is_float:
                wrong.append(f"{end} is {tensor.dtype}{list(tensor.shape)}, not {list(shape)}")
    return wrong
