"""The weights of a Hugging Face folder: checked against a model, and read one by one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from slope_jax.models import hf_names
from slope_jax.models.bert import Bert
from slope_jax.models.calibration import dense_twin
from slope_jax.models.config import TransformerConfig
from slope_jax.models.decoder import Decoder
from slope_jax.models.hf_families import FAMILIES, Source
from slope_jax.models.hf_files import Tensor, all_of, listed, open_tensors, read_json


class Weights(NamedTuple):
    """A folder, checked against a model but for the content of its tensors.

    Attributes:
      folder, family: where it is, and its "model_type".
      sources: of each parameter, layers single, by its path.
      shapes: of these parameters, dense.
      tensors: by name; those of heads that the folder lacks are not there.
      infinite: names of tensors that were found to hold NaN or infinity.
    """

    folder: Path
    family: str
    sources: dict[tuple[str, ...], Source]
    shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct]
    tensors: dict[str, Tensor]
    infinite: set[str]


def open_weights(folder: Path, family: str, model: Bert | Decoder) -> Weights:
    """Opens them, and checks all that can be checked before they are read.

    Args:
      folder: as for `hf.load_hf`.
      family: its "model_type".
      model: that they are for; its sparsity and adapters do not matter.

    Raises:
      ValueError: as `hf.load_hf`.
    """
    config, raw = model.config, read_json(folder / "config.json")
    _compare(folder, config, hf_names.read_config(raw, family, folder / "config.json"))
    sources = {source.path: source for source in hf_names.sources(config, family)}
    tensors = _untied(folder, hf_names.tied(config, family), open_tensors(folder))
    there = _there(family, sources.values(), tensors)
    _check_names(folder, family, there, tensors)
    # Of as many layers as the files have: a config.json that tells of more would take long.
    shapes = _dense_shapes(model)
    if set(shapes) != set(sources):
        raise AssertionError(f"names do not cover {set(shapes) ^ set(sources)}")
    _check_tensors(folder, config, there, tensors, shapes)
    return Weights(folder, family, sources, shapes, tensors, set())


def array_of(weights: Weights, path: tuple[str, ...]) -> np.ndarray:
    """A dense parameter of one layer, of the dtype that the files have."""
    source, want = weights.sources[path], weights.shapes[path]
    if source.names[0] not in weights.tensors:
        return np.zeros(want.shape, want.dtype)
    parts = [_finite(weights, weights.tensors[name]) for name in source.names]
    parts = [part.T if source.transpose else part for part in parts]
    array = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    missing = [(0, size - have) for size, have in zip(want.shape, array.shape, strict=True)]
    return np.pad(array, missing) if any(map(any, missing)) else array


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


def _there(family: str, sources: Iterable[Source], tensors: dict[str, Tensor]) -> list[Source]:
    """Without heads that the folder leaves out whole."""
    absent: set[str] = set()
    for head in FAMILIES[family].optional:
        names = {name for source in sources if source.path[0] == head for name in source.names}
        if names & set(tensors):
            break
        absent.add(head)
    return [source for source in sources if source.path[0] not in absent]


def _untied(folder: Path, tied: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the copies of tied tensors, which must be equal to what they copy."""
    result = dict(tensors)
    for copy, original in tied.items():
        if copy not in tensors or original not in tensors:
            continue
        pair = result.pop(copy), tensors[original]
        if not np.array_equal(*(t.read() for t in pair), equal_nan=True):  # NaN is told of later
            raise ValueError(
                f"{folder}: {pair[0].name} differs from {pair[1].name}, but the model ties the two; weights"
                " with an output table of their own cannot be loaded"
            )
    return result


def _check_names(
    folder: Path, family: str, sources: Iterable[Source], tensors: dict[str, Tensor]
) -> None:
    wanted = {name for source in sources for name in source.names}
    there = [tensor.name for tensor in tensors.values()]
    missing = [hf_names.name_in_file(family, n, there) for n in sorted(wanted - set(tensors))]
    surplus = [tensors[name].name for name in sorted(set(tensors) - wanted)]
    if missing or surplus:
        raise ValueError(
            f"{folder}: tensors missing: {all_of(missing) or 'none'}; surplus:"
            f" {all_of(surplus) or 'none'}. The folder must hold the model with its pretraining"
            " heads (BertForPreTraining or BertForMaskedLM, GPT2LMHeadModel, OPTForCausalLM, ...)"
        )


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
            names = " + ".join(part.name for part in parts)
            wrong.append(f"{names}: {found} for {'/'.join(source.path)} {want}")
    if wrong:
        raise ValueError(
            f"{folder}: tensors of another shape or dtype than the model's: {listed(wrong)}. Copy or"
            " download config.json and the weights again, both of one model"
        )


def _finite(weights: Weights, tensor: Tensor) -> np.ndarray:
    array = tensor.read()
    if not np.isfinite(array).all():
        weights.infinite.add(tensor.name)
    return array


def _dense_shapes(model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    dense = dense_twin(model)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), **dense.example_inputs())
    return traverse_util.flatten_dict(shapes["params"])
