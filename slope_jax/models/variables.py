"""Variables held to the model that they are given to, by names and shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import meta

from pallas_kernels.epilogue import RANK_MULTIPLE
from slope_jax.dense import ADAPTER_L, ADAPTER_R, MASKS
from slope_jax.models.bert import Bert
from slope_jax.models.decoder import Decoder
from slope_jax.models.hf_files import listed
from slope_jax.models.stack import Path, layers_of, unstack_layers

_NAMES = ("params", MASKS)
_FORM = f"{{'params': ..., '{MASKS}': ...}}, as model.init or what loads models gives them"


def check_variables(
    model: Bert | Decoder, variables: Mapping[str, Any], *, any_stack: bool = False
) -> None:
    """Raises a ValueError unless they are the model's: arrays, shapes or tracers, of any dtype.

    Cheap enough to be asked for every prompt. Collections besides params and masks are not looked at.

    Args:
      any_stack: take layers stacked or single, whichever the model has.
    """
    wanted = _wanted(model)
    given = _given(variables, wanted.tree)
    leaves, structure = jax.tree.flatten(given)
    # Not `np.shape`, which takes as long as all the rest.
    shapes = tuple([getattr(leaf, "shape", None) for leaf in leaves])
    if structure == wanted.structure and shapes == wanted.shapes:
        return
    boxes = jax.tree.leaves(given, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    if any(isinstance(leaf, meta.AxisMetadata) for leaf in boxes):
        raise ValueError(
            "the variables are boxed with the names of their axes; give flax.linen.unbox(variables)"
        )
    found, ours = leaves_by_path(given), leaves_by_path(wanted.tree)
    if any_stack:
        found, ours = _apart(found), _apart(ours)
    elif found != ours and (prepared := _prepared(found)) == _prepared(ours):
        one, other = ("model", "them") if ours != prepared else ("variables", "it")
        raise ValueError(
            f"the variables are not in the form of this {type(model).__name__}, layers in stacks or apart,"
            f" adapters filled up or not; use the {one} that inference_variables returned with {other}"
        )
    if found.keys() > ours.keys() and all(found[path] == ours[path] for path in ours):
        surplus = ["/".join(path) for path in sorted(found.keys() - ours.keys())]
        raise ValueError(
            f"the variables hold what this {type(model).__name__} has not, as adapters where adapter_rank is"
            f" 0 or masks where sparsity is dense: {listed(surplus)}. Give the model that they are of, or"
            " leave them out"
        )
    if wrong := differences(found, ours):  # none, where they are mappings of another kind
        raise ValueError(
            f"the variables are not those of this {type(model).__name__}; give its own. In shape"
            f" differ {listed(wrong)}"
        )


def leaves_by_path(variables: Any, of: Callable[[Any], Any] = np.shape) -> dict[Path, Any]:
    """What `of` says of each leaf, by the names on the way there."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {tuple(str(getattr(k, "key", k)) for k in path): of(leaf) for path, leaf in leaves}


def differences(
    found: Mapping[Path, Any], wanted: Mapping[Path, Any], where: str = "in the model"
) -> list[str]:
    """What there is to say of each path at which the two are not equal."""
    return [
        f"{'/'.join(path)}: {found.get(path, 'none')} here, {wanted.get(path, 'none')} {where}"
        for path in sorted(found.keys() | wanted.keys())
        if found.get(path) != wanted.get(path)
    ]


class _Wanted(NamedTuple):
    tree: dict[str, Any]
    structure: Any  # of the tree
    shapes: tuple[tuple[int, ...], ...]  # of its leaves


@functools.lru_cache(maxsize=64)
def _wanted(model: Bert | Decoder) -> _Wanted:
    # In stacks, a hundred layers are traced as one; and what multiplies may be for another device.
    fields = {"scan": True, "remat": False, "implementation": "xla", "attention": "xla"}
    stacked = type(model)(dataclasses.replace(model.config, **fields))

    def init() -> dict[str, Any]:
        variables = stacked.init(jax.random.key(0), **stacked.example_inputs())
        return variables if model.config.scan else unstack_layers(variables)

    made = jax.eval_shape(init)
    tree = {name: made[name] for name in _NAMES if made.get(name)}
    leaves, structure = jax.tree.flatten(tree)
    return _Wanted(tree, structure, tuple(leaf.shape for leaf in leaves))


def _given(variables: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What there is of the collections that count."""
    if not isinstance(variables, Mapping):
        raise ValueError(f"the variables are a {type(variables).__name__}; give {_FORM}")
    given = {name: variables.get(name) for name in _NAMES}
    given = {name: tree for name, tree in given.items() if isinstance(tree, Mapping) and tree}
    if wanted.keys() - given.keys():
        raise ValueError(
            f"the variables hold {listed(sorted(map(str, variables))) or 'nothing'}; this model has"
            f" {' and '.join(wanted)}: give {_FORM}"
        )
    return given


def _apart(shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, tuple[int, ...]]:
    """Shapes of the layers one by one, where they stand in stacks."""
    found = {}
    for path, shape in shapes.items():
        collection, name, *rest = path
        layers = layers_of(name)
        if layers is None or shape[:1] != (len(layers),):
            found[path] = shape
        else:
            found |= {(collection, f"layers_{i}", *rest): shape[1:] for i in layers}
    return found


def _prepared(shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, tuple[int, ...]]:
    """As `inference_variables` makes them: layers apart, and adapters of a rank that kernels take."""
    axes = {ADAPTER_L: 1, ADAPTER_R: 0}
    found = _apart(shapes)
    for path, shape in found.items():
        if path[-1] in axes and len(shape) == 2:
            axis = axes[path[-1]]
            rank = -(-shape[axis] // RANK_MULTIPLE) * RANK_MULTIPLE
            found[path] = (*shape[:axis], rank, *shape[axis + 1 :])
    return found
