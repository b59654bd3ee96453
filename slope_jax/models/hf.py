"""Weights from a Hugging Face folder: config.json and safetensors files."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pallas_kernels import compress
from slope_jax.models import hf_names
from slope_jax.models.bert import Bert, BertConfig
from slope_jax.models.calibration import dense_twin
from slope_jax.models.config import TransformerConfig
from slope_jax.models.decoder import Decoder
from slope_jax.models.gpt2 import GPT2, GPT2Config
from slope_jax.models.hf_families import FAMILIES, Source
from slope_jax.models.hf_files import (
    Tensor,
    all_of,
    checked_folder,
    listed,
    open_tensors,
    read_json,
)
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


_compress = jax.jit(compress, static_argnums=1)


def load_hf(
    folder: str | Path, model: Bert | Decoder, *, calibration: Iterable[Any] | None = None
) -> dict[str, Any]:
    """Variables of `model` with the weights of a Hugging Face folder.

    Linears that the model's policy prunes are compressed by the magnitude of the weights in the
    folder, or by Wanda where there is text for it (`prune_wanda`), whatever `mask_init` says; with
    sparsity="dense" the function is that of the folder. Rows that pad the vocabulary are zero. Tensors are read one after the other, so that little more
    memory is needed than the result takes; for Wanda the dense weights are in host memory, and on
    the device one layer at a time.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its
        shards, as `save_pretrained` writes them; tensors of 16 or 32 bits.
      model: without adapters (add those to a training state).
      calibration: batches of tokens (B, S), as `prune_wanda` takes them; None: by magnitude.

    Returns:
      {"params": ...} of `param_dtype`, and "masks" if anything is pruned: what `model.init` gives.

    Raises:
      ValueError: a file is missing or damaged, config.json differs from the model (all differences
        are listed), tensors are missing, surplus, of another shape or not tied, or the calibration
        does not fit the model.
      ImportError: safetensors is not installed.

    >>> model = build("gpt2-small", sparsity="2:4")  # doctest: +SKIP
    >>> variables = load_hf("~/models/gpt2", model)  # doctest: +SKIP
    >>> variables = load_hf("~/models/gpt2", model, calibration=[ids])  # doctest: +SKIP
    """
    if calibration is None:
        return _load(folder, model)
    check_model(model)
    dense = _load(folder, dense_twin(model), on_device=False)
    return prune_wanda(model, dense, calibration)


def _load(folder: str | Path, model: Bert | Decoder, *, on_device: bool = True) -> dict[str, Any]:
    folder = checked_folder(folder)
    config = model.config
    raw = read_json(folder / "config.json")
    family = _family(raw, model)
    _compare(folder, config, hf_names.read_config(raw, family))
    if config.rank:
        raise ValueError(
            f"adapter_rank={config.adapter_rank}: a Hugging Face folder has no adapters; load into"
            " a model with adapter_rank=0, then add them with slope_jax.add_adapters"
        )
    shapes = _dense_shapes(model)
    sources = {source.path: source for source in hf_names.sources(config, family)}
    if set(shapes) != set(sources):
        raise AssertionError(f"names do not cover {set(shapes) ^ set(sources)}")
    tensors = _checked_names(
        folder, sources.values(), _untied(folder, family, open_tensors(folder))
    )
    _check_tensors(folder, config, sources.values(), tensors, shapes)
    pruned = _pruned_kernels(config)
    variables: dict[str, Any] = {"params": {}, "masks": {}}
    for path, singles in _stacks(config, sources).items():
        leaves = [
            _leaf(sources[single], tensors, shapes[single], pruned.get(single), on_device)
            for single in singles
        ]
        for name, parts in zip(("params", "masks"), zip(*leaves, strict=True), strict=True):
            if parts[0] is not None:
                variables[name][path] = parts[0] if len(parts) == 1 else jnp.stack(parts)
    return {name: traverse_util.unflatten_dict(v) for name, v in variables.items() if v}


def from_hf(
    folder: str | Path, *, calibration: Iterable[Any] | None = None, **overrides
) -> tuple[Bert | Decoder, dict[str, Any]]:
    """The model that config.json describes, and its variables as of `load_hf`.

    >>> model, variables = from_hf("~/models/bert-base", sparsity="2:4")  # doctest: +SKIP

    Args:
      folder: as for `load_hf`; "model_type" in config.json is "bert", "gpt2", "opt", "llama" or
        "mistral".
      calibration: as for `load_hf`.
      **overrides: fields of the model's configuration, such as sparsity, dtype, dropout.

    Raises:
      ValueError, ImportError: as `load_hf`, and for an unknown "model_type" or field.
    """
    folder = checked_folder(folder)
    raw = read_json(folder / "config.json")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _MODELS:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {family!r}; choose a folder of {list(_MODELS)}"
        )
    module, config = _MODELS[family]
    check_fields(config.__name__, config, overrides)
    fields = hf_names.read_config(raw, family) | {"dropout": hf_names.dropout(raw, family)}
    model = module(config(**(fields | overrides)))
    return model, load_hf(folder, model, calibration=calibration)


def _family(raw: dict[str, Any], model: Bert | Decoder) -> str:
    ours = [family for family, (module, _) in _MODELS.items() if type(model) is module]
    family = raw.get("model_type", ours[0])
    if family not in ours:
        raise ValueError(
            f"config.json: model_type is {family!r}, but the model is a {' or '.join(ours)}"
        )
    return family


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


def _untied(folder: Path, family: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the copies of tied tensors, which must be equal to what they copy."""
    result = dict(tensors)
    for copy, original in FAMILIES[family].tied.items():
        if copy not in tensors or original not in tensors:
            continue
        if not np.array_equal(result.pop(copy).read(), tensors[original].read()):
            raise ValueError(
                f"{folder}: {copy} differs from {original}, but the model ties the two; weights"
                " with an output table of their own cannot be loaded"
            )
    return result


def _checked_names(
    folder: Path, sources: Iterable[Source], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    wanted = {name for source in sources for name in source.names}
    missing, surplus = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or surplus:
        raise ValueError(
            f"{folder}: tensors missing: {all_of(missing) or 'none'}; surplus:"
            f" {all_of(surplus) or 'none'}. The folder must hold the model with its pretraining"
            " heads (BertForPreTraining, GPT2LMHeadModel, OPTForCausalLM, ...)"
        )
    return tensors


def _check_tensors(folder, config, sources: Iterable[Source], tensors, shapes) -> None:
    """Shapes and dtypes of all tensors, before any of them is read."""
    wrong = []
    for source in sources:
        parts = [tensors[name] for name in source.names]
        joined = [part.shape[::-1] if source.transpose else part.shape for part in parts]
        want = list(shapes[source.path].shape)
        if source.vocabulary is not None:
            want[source.vocabulary] = config.vocab_size
        same = all(len(shape) == len(want) and [*shape[:-1]] == want[:-1] for shape in joined)
        if not (same and sum(shape[-1] for shape in joined) == want[-1]) or not all(
            part.is_float for part in parts
        ):
            found = ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
            wrong.append(f"{' + '.join(source.names)}: {found} for {'/'.join(source.path)} {want}")
    if wrong:
        raise ValueError(
            f"{folder}: tensors of another shape or dtype than the model's: {listed(wrong)}"
        )


def _leaf(source: Source, tensors, want: jax.ShapeDtypeStruct, pattern: str | None, on_device):
    """A parameter of one layer and its metadata, None where it is dense."""
    parts = [tensors[name].read() for name in source.names]
    parts = [part.T if source.transpose else part for part in parts]
    array = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    missing = [(0, size - have) for size, have in zip(want.shape, array.shape, strict=True)]
    array = np.pad(array, missing) if any(map(any, missing)) else array
    array = array.astype(want.dtype)
    if pattern is None:
        return jnp.asarray(array) if on_device else array, None
    compressed = _compress(array, pattern)
    return compressed.values, compressed.metadata


def _dense_shapes(model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    dense = dense_twin(model)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), **dense.example_inputs())
    return traverse_util.flatten_dict(shapes["params"])


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
