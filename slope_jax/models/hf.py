"""Weights from a Hugging Face folder: config.json and safetensors files."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pallas_kernels import compress
from slope_jax.models import hf_names
from slope_jax.models.bert import Bert, BertConfig
from slope_jax.models.config import TransformerConfig
from slope_jax.models.gpt2 import GPT2, GPT2Config
from slope_jax.models.stack import stack_layers
from slope_jax.policy import DENSE

_MODELS = {"bert": (Bert, BertConfig), "gpt2": (GPT2, GPT2Config)}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf(folder: str | Path, model: Bert | GPT2) -> dict[str, Any]:
    """Variables of `model` with the weights of a Hugging Face folder.

    Linears that the model's policy prunes are compressed by the magnitude of the weights in the
    folder, whatever `mask_init` says; with sparsity="dense" the function is that of the folder.
    Rows that pad the vocabulary are zero.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its
        shards, as `save_pretrained` writes them; tensors of 16 or 32 bits.
      model: without adapters (add those to a training state).

    Returns:
      {"params": ...} of `param_dtype`, and "masks" if anything is pruned: what `model.init` gives.

    Raises:
      ValueError: a file is missing or damaged, config.json differs from the model (all differences
        are listed), or tensors are missing, surplus, of another shape or not tied.
      ImportError: safetensors is not installed.

    >>> model = build("gpt2-small", sparsity="2:4")  # doctest: +SKIP
    >>> variables = load_hf("~/models/gpt2", model)  # doctest: +SKIP
    """
    folder = _checked_folder(folder)
    family = "bert" if isinstance(model, Bert) else "gpt2"
    config = model.config
    _compare(folder, config, hf_names.read_config(_read_json(folder / "config.json"), family))
    if config.rank:
        raise ValueError(
            f"adapter_rank={config.adapter_rank}: a Hugging Face folder has no adapters; load into"
            " a model with adapter_rank=0, then add them with slope_jax.add_adapters"
        )
    params = _convert(folder, model, hf_names.sources(config, family), _read_tensors(folder))
    variables: dict[str, Any] = {"params": {}, "masks": {}}
    pruned = _pruned_kernels(config)
    for path, array in params.items():
        leaf = jnp.asarray(array)
        if path in pruned:
            compressed = compress(leaf, pruned[path])
            leaf = compressed.values
            variables["masks"][path] = compressed.metadata
        variables["params"][path] = leaf
    variables = {name: traverse_util.unflatten_dict(v) for name, v in variables.items() if v}
    return stack_layers(variables, config)


def from_hf(folder: str | Path, **overrides) -> tuple[Bert | GPT2, dict[str, Any]]:
    """The model that config.json describes, and its variables as of `load_hf`.

    >>> model, variables = from_hf("~/models/bert-base", sparsity="2:4")  # doctest: +SKIP

    Args:
      folder: as for `load_hf`; "model_type" in config.json is "bert" or "gpt2".
      **overrides: fields of `BertConfig` or `GPT2Config`, such as sparsity, dtype, dropout.

    Raises:
      ValueError, ImportError: as `load_hf`, and for an unknown "model_type".
    """
    folder = _checked_folder(folder)
    raw = _read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in _MODELS:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {family!r}; choose a folder of {list(_MODELS)}"
        )
    module, config = _MODELS[family]
    fields = hf_names.read_config(raw, family) | {"dropout": hf_names.dropout(raw, family)}
    model = module(config(**(fields | overrides)))
    return model, load_hf(folder, model)


def _checked_folder(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds config.json")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; save the model with save_pretrained") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def _compare(folder: Path, config: TransformerConfig, theirs: dict[str, Any]) -> None:
    different = [
        f"{name}: folder {value}, model {getattr(config, name)}"
        for name, value in theirs.items()
        if value != getattr(config, name)
    ]
    if different:
        raise ValueError(
            f"{folder / 'config.json'} differs from the model in {'; '.join(different)}. Build the"
            " model with the folder's values, or let from_hf build it"
        )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors by the names that `hf_names` uses, buffers left out."""
    if (folder / _INDEX).exists():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / _INDEX} has no 'weight_map'; copy or download it again")
        files = sorted(set(shards.values()))
    else:
        shards, files = {}, [_SINGLE]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= _read_file(folder / file)
    lost = sorted(set(shards) - set(tensors))
    if lost:
        raise ValueError(f"{folder / _INDEX} names tensors that no shard holds: {_listed(lost)}")
    return {
        hf_names.canonical(name): tensor
        for name, tensor in tensors.items()
        if not hf_names.is_buffer(name)
    }


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "reading Hugging Face folders needs safetensors: pip install 'slope-jax[hf]'"
        ) from None
    if not path.exists():
        present = _listed(sorted(p.name for p in path.parent.iterdir())) or "nothing"
        raise ValueError(
            f"{path} is missing; the folder holds {present}. Weights in another format become"
            " safetensors by from_pretrained and save_pretrained of Transformers"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut off ({error}); copy or download it again"
        ) from None


def _convert(folder, model, sources, tensors: dict[str, np.ndarray]) -> dict[tuple, np.ndarray]:
    """Dense parameters of single layers by path, in the dtypes and shapes of the model."""
    shapes = _dense_shapes(model)
    if set(shapes) != {source.path for source in sources}:
        raise AssertionError(f"names do not cover {set(shapes) ^ {s.path for s in sources}}")
    tensors = _untied(folder, tensors)
    wanted = {name for source in sources for name in source.names}
    missing, surplus = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or surplus:
        raise ValueError(
            f"{folder}: tensors missing: {_listed(missing) or 'none'}; surplus:"
            f" {_listed(surplus) or 'none'}. The folder must hold the model with its pretraining"
            " heads (BertForPreTraining, GPT2LMHeadModel)"
        )
    params, wrong = {}, []
    for source in sources:
        want = shapes[source.path]
        parts = [tensors.pop(name) for name in source.names]
        parts = [part.T if source.transpose else part for part in parts]
        array = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        rows = model.config.vocab_size if source.vocabulary else want.shape[0]
        if array.shape != (rows, *want.shape[1:]) or array.dtype.name not in _DTYPES:
            wrong.append(
                f"{' + '.join(source.names)}: {array.dtype}{list(array.shape)} for"
                f" {'/'.join(source.path)} {[rows, *want.shape[1:]]}"
            )
            continue
        array = np.pad(array, [(0, want.shape[0] - rows)] + [(0, 0)] * (array.ndim - 1))
        params[source.path] = array.astype(want.dtype)
    if wrong:
        raise ValueError(
            f"{folder}: tensors of another shape or dtype than the model's: {_listed(wrong)}"
        )
    return params


_DTYPES = ("float32", "bfloat16", "float16")


def _dense_shapes(model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    config = dataclasses.replace(model.config, sparsity=DENSE, scan=False)
    dense = type(model)(config)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), **dense.example_inputs())
    return traverse_util.flatten_dict(shapes["params"])


def _pruned_kernels(config: TransformerConfig) -> dict[tuple[str, ...], str]:
    """Parameter path of every pruned kernel, layers apart -> pattern."""
    return {
        (*re.sub(r"^layers/", "layers_", path).split("/"), "kernel"): pattern
        for path, pattern in config.patterns.items()
        if pattern != DENSE
    }


def _untied(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the copies of tied tensors, which must be equal to what they copy."""
    result = dict(tensors)
    for copy, original in hf_names.TIED.items():
        if copy not in tensors or original not in tensors:
            continue
        if not np.array_equal(result.pop(copy), tensors[original]):
            raise ValueError(
                f"{folder}: {copy} differs from {original}, but the model ties the two; weights"
                " with an output table of their own cannot be loaded"
            )
    return result


def _listed(items: list[str], limit: int = 12) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
