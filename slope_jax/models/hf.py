"""Weights from a Hugging Face folder: config.json and safetensors files."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pallas_kernels import Pattern, compress
from slope_jax.dense import ADAPTER_L, ADAPTER_R
from slope_jax.models import hf_names
from slope_jax.models.bert import Bert, BertConfig
from slope_jax.models.calibration import dense_twin
from slope_jax.models.casting import is_cast
from slope_jax.models.config import TransformerConfig
from slope_jax.models.decoder import Decoder
from slope_jax.models.gpt2 import GPT2, GPT2Config
from slope_jax.models.hf_adapter import (
    FOLDER,
    Adapter,
    check_adapter,
    check_alone,
    read_adapter,
)
from slope_jax.models.hf_files import all_of, checked_folder, read_json
from slope_jax.models.hf_fused import adapter_of, rank_of
from slope_jax.models.hf_weights import Weights, array_of, open_weights
from slope_jax.models.llama import Llama, LlamaConfig
from slope_jax.models.opt import OPT, OPTConfig
from slope_jax.models.registry import check_fields
from slope_jax.models.wanda import check_model, prune_wanda
from slope_jax.policy import DENSE

_MODELS = {
    "bert": (Bert, BertConfig),
    "gpt2": (GPT2, GPT2Config),
    "opt": (OPT, OPTConfig),
    "llama": (Llama, LlamaConfig),
    "mistral": (Llama, LlamaConfig),
}


def load_hf(
    folder: str | Path,
    model: Bert | Decoder,
    *,
    calibration: Iterable[Any] | None = None,
    for_inference: bool = False,
) -> dict[str, Any]:
    """Variables of `model` with the weights of a Hugging Face folder.

    Linears that the model's policy prunes are compressed by the magnitude of the weights in the
    folder, or by Wanda where there is text for it (`prune_wanda`), whatever `mask_init` says; with
    sparsity="dense" the function is that of the folder. Adapters in folder/adapter, LoRA in the form of
    PEFT, are the model's, apart. Rows that pad the vocabulary are zero, and so are the pooler and the
    NSP head of a BERT that has none (BertForMaskedLM). Tensors are read, pruned and cast one after the
    other, so that the device holds the result and one parameter besides, two of a stack of layers;
    for Wanda the dense weights are in host memory, and on the device one layer at a time.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its
        shards, as `save_pretrained` writes them; tensors of 16 or 32 bits.
      model: with adapters of the folder's rank if it has any, else without (add those to a training
        state).
      calibration: batches of tokens (B, S), as `prune_wanda` takes them; None: by magnitude. Of a
        folder without adapters.
      for_inference: kernels, tables and adapters in the model's `dtype`, as `inference_variables`
        casts them, so that those of `param_dtype` never are on the device; else all of `param_dtype`.

    Returns:
      {"params": ...}, and "masks" if anything is pruned: what `model.init` gives, but for dtypes.

    Raises:
      ValueError: a file is missing or damaged, config.json differs from the model (all differences
        are listed), tensors are missing, surplus, of another shape, not finite or not tied, adapters
        are none that the model can have, or the calibration does not fit the model.
      ImportError: safetensors is not installed.

    >>> model = build("gpt2-small", sparsity="2:4")  # doctest: +SKIP
    >>> variables = load_hf("~/models/gpt2", model)  # doctest: +SKIP
    >>> variables = load_hf("~/models/gpt2", model, calibration=[ids])  # doctest: +SKIP
    """
    dtype = model.config.dtype if for_inference else None
    if calibration is None:
        return _load(folder, model, dtype)
    check_alone(checked_folder(folder))
    check_model(model)
    dense = _load(folder, dense_twin(model), None, on_device=False)
    return prune_wanda(model, dense, calibration, for_inference=for_inference)


def _load(
    folder: str | Path, model: Bert | Decoder, dtype: Any, *, on_device: bool = True
) -> dict[str, Any]:
    """Kernels, tables and adapters of a dtype; None: of the parameters'."""
    weights = _weights(folder, model)
    config, pruned = model.config, _pruned_kernels(model.config)
    adapter = _checked_adapter(weights, config)
    variables: dict[str, Any] = {"params": {}, "masks": {}}
    for path, singles in _stacks(config, weights.sources).items():
        leaves = [_leaf(weights, p, pruned.get(p), dtype, on_device) for p in singles]
        for name, parts in zip(("params", "masks"), zip(*leaves, strict=True), strict=True):
            if parts[0] is not None:
                variables[name][path] = parts[0] if len(parts) == 1 else jnp.stack(parts)
        if adapter is not None and singles[0] in pruned:
            pairs = [_adapters(weights, adapter, single, config, dtype) for single in singles]
            for name, parts in zip((ADAPTER_L, ADAPTER_R), zip(*pairs, strict=True), strict=True):
                at = (*path[:-1], name)
                variables["params"][at] = parts[0] if len(parts) == 1 else jnp.stack(parts)
    if weights.infinite:
        raise ValueError(
            f"{weights.folder}: NaN or infinity in {all_of(sorted(weights.infinite))}; copy the folder"
            " again, or save it from a training that went well"
        )
    return {name: traverse_util.unflatten_dict(v) for name, v in variables.items() if v}


def _weights(folder: str | Path, model: Bert | Decoder) -> Weights:
    folder = checked_folder(folder)
    return open_weights(folder, _family(folder, model), model)


def _checked_adapter(weights: Weights, config: TransformerConfig) -> Adapter | None:
    adapter = read_adapter(weights.folder)
    if adapter is None and config.rank:
        raise ValueError(
            f"adapter_rank={config.adapter_rank}: {weights.folder} has no adapters; load into"
            " a model with adapter_rank=0, then add them with slope_jax.add_adapters"
        )
    if adapter is None:
        return None
    check_adapter(adapter, config, weights.family)
    rank = rank_of(adapter, config, weights.family)
    if rank != config.rank:
        raise ValueError(
            f"adapter_rank={config.adapter_rank}: {adapter.path} holds adapters of rank"
            f" {rank}; build the model with that, or take that folder out"
        )
    return adapter


def is_pruned(folder: str | Path, sparsity: Any) -> bool:
    """Whether a folder's weights are of a sparsity already, so that pruning them changes nothing.

    Kernels are read one by one, up to the first that is not. False, too, where the sparsity prunes
    nothing or does not fit the sizes.

    Args:
      folder, sparsity: as for `from_hf`.

    Raises:
      ValueError: as `load_hf`, apart from what adapters are wrong.
    """
    folder = checked_folder(folder)
    weights = _weights(folder, _built(folder, {"sparsity": DENSE}))
    try:
        pruned = _pruned_kernels(_built(folder, {"sparsity": sparsity}).config)
    except ValueError:  # its sizes cannot be so
        return False
    return bool(pruned) and all(
        _has_pattern(array_of(weights, path), Pattern.parse(pattern))
        for path, pattern in pruned.items()
    )


def _has_pattern(kernel: np.ndarray, pattern: Pattern) -> bool:
    groups = (kernel != 0).reshape(-1, pattern.m, kernel.shape[-1])
    return int(groups.sum(1).max()) <= pattern.n


def from_hf(
    folder: str | Path,
    *,
    calibration: Iterable[Any] | None = None,
    for_inference: bool = False,
    **overrides,
) -> tuple[Bert | Decoder, dict[str, Any]]:
    """The model that config.json describes, with the folder's adapters, and its variables as of `load_hf`.

    >>> model, variables = from_hf("~/models/bert-base", sparsity="2:4")  # doctest: +SKIP

    Args:
      folder: as for `load_hf`; "model_type" in config.json is "bert", "gpt2", "opt", "llama" or
        "mistral".
      calibration, for_inference: as for `load_hf`.
      **overrides: fields of the model's configuration, such as sparsity, dtype, dropout.

    Raises:
      ValueError, ImportError: as `load_hf`, and for an unknown "model_type" or field.
    """
    folder = checked_folder(folder)
    model = _built(folder, overrides)
    adapter = None if "adapter_rank" in overrides else read_adapter(folder)
    if adapter is not None:
        family = _family(folder, model)
        check_adapter(adapter, model.config, family)
        rank = rank_of(adapter, model.config, family)
        model = _built(folder, overrides | {"adapter_rank": rank})
    return model, load_hf(folder, model, calibration=calibration, for_inference=for_inference)


def _built(folder: Path, overrides: dict[str, Any]) -> Bert | Decoder:
    file = folder / "config.json"
    raw = read_json(file)
    family = raw.get("model_type")
    if not is_known(family):
        raise ValueError(f"{file}: model_type {family!r}; choose a folder of {', '.join(_MODELS)}")
    module, config = _MODELS[family]
    check_fields(config.__name__, config, overrides)
    fields = hf_names.read_config(raw, family, file) | {"dropout": hf_names.dropout(raw, family)}
    fields |= {"family": family} if config is LlamaConfig else {}
    try:
        return module(config(**(fields | overrides)))
    except ValueError:
        _check_by_itself(file, family, config, fields)
        raise


def _check_by_itself(
    file: Path, family: str, config: type[TransformerConfig], fields: dict[str, Any]
) -> None:
    """Raises a ValueError in the names of the file if it is wrong whatever else is asked for."""
    try:
        config(**fields, sparsity=DENSE)
    except ValueError as error:
        told = hf_names.in_their_names(str(error), family)
        raise ValueError(f"{file}: {told}. Correct it, or copy or download it again") from None


def described(folder: str | Path, **overrides) -> Bert | Decoder:
    """The model that `from_hf` would fill, but for adapters; no weights are read.

    Raises:
      ValueError: as `from_hf`, for what config.json and the fields tell.
    """
    return _built(checked_folder(folder), overrides)


def is_known(family: Any) -> bool:
    """Whether it is a "model_type" that we have, in whatever a config.json holds."""
    return isinstance(family, str) and family in _MODELS


def _family(folder: Path, model: Bert | Decoder) -> str:
    file = folder / "config.json"
    ours = [family for family, (module, _) in _MODELS.items() if type(model) is module]
    family = read_json(file).get("model_type", ours[0])
    if family not in ours:
        raise ValueError(
            f"{file}: model_type is {family!r}, but the model is a {' or '.join(ours)}; give a folder"
            " of that, or let from_hf build the model"
        )
    return family


def _adapters(
    weights: Weights,
    adapter: Adapter,
    path: tuple[str, ...],
    config: TransformerConfig,
    dtype: Any,
) -> list[jax.Array]:
    """adapter_l and adapter_r of one kernel."""
    source, want = weights.sources[path], weights.shapes[path]
    pair = adapter_of(adapter, source, config, *want.shape)
    if not all(np.isfinite(array).all() for array in pair):
        weights.infinite.add(f"{FOLDER}/{source.names[0]}")
    return [jnp.asarray(_rounded(array, want.dtype, dtype)) for array in pair]


def _leaf(
    weights: Weights, path: tuple[str, ...], pattern: str | None, dtype: Any, on_device: bool
):
    """A parameter of one layer and its metadata, None where it is dense."""
    array, full = array_of(weights, path), weights.shapes[path].dtype
    dtype = dtype if is_cast(path[-1]) else None
    if pattern is None:
        array = _rounded(array, full, dtype)
        return jnp.asarray(array) if on_device else array, None
    if not np.can_cast(
        array.dtype, full
    ):  # else the file's dtype has the same values, in fewer bytes
        array = array.astype(full)
    return _compress(array, pattern, full if dtype is None else dtype)


def _rounded(array: np.ndarray, full: Any, dtype: Any) -> np.ndarray:
    """Of the dtype of the parameters, then of `dtype`, on the host; at once where that is the same."""
    if dtype is not None and np.can_cast(array.dtype, full):
        return array.astype(dtype, copy=False)
    array = array.astype(full, copy=False)
    return array if dtype is None else array.astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _compress(array: jax.Array, pattern: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Values of a dtype, chosen from what the array holds, and metadata."""
    compressed = compress(array, pattern)
    return compressed.values.astype(dtype), compressed.metadata


def _stacks(
    config: TransformerConfig, paths: Iterable[tuple[str, ...]]
) -> dict[tuple, list[tuple]]:
    """Parameter paths of `config` -> the single layers' paths that each of them stacks."""
    segment_of = {
        f"layers_{i}": segment.name
        for segment in config.segments
        for i in range(segment.start, segment.stop)
    }
    stacks: dict[tuple, list[tuple]] = {}
    for path in paths:
        stacks.setdefault((segment_of.get(path[0], path[0]), *path[1:]), []).append(path)
    return stacks


def _pruned_kernels(config: TransformerConfig) -> dict[tuple[str, ...], str]:
    """Parameter path of every pruned kernel, layers apart -> pattern."""
    return {
        (*re.sub(r"^layers/", "layers_", path).split("/"), "kernel"): pattern
        for path, pattern in config.patterns.items()
        if pattern != DENSE
    }
