"""Layers as scanned stacks: consecutive layers of equal patterns share one program."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from slope_jax.dense import MASKS, PRODUCT, WORKING
from slope_jax.models.cache import CACHE
from slope_jax.models.config import Segment, TransformerConfig
from slope_jax.normed import Stream

# The rng of modules that round or sample gradients, see `TransformerConfig.simulated`.
GRADIENT = "gradient"

Path = tuple[str, ...]

_NAME = re.compile(r"layers_(\d+)(?:_to_(\d+))?")


def run_layers(
    layer: type[nn.Module],
    config: TransformerConfig,
    x: jax.Array | Stream,
    context: Any,
    deterministic: bool,
) -> jax.Array | Stream:
    """All layers, one after the other; called inside a compact method.

    A run of layers with equal patterns is one `nn.scan` whose variables have a leading layer axis,
    named "layers_1_to_11"; a single layer has none and is named "layers_0".

    Args:
      layer: module class with fields config, patterns, deterministic, whose call maps (x, context)
        to (x, None).
      x: (B, S, hidden), or a stream of it; scans carry no moments, which the first layer may not know.
      context: a pytree that every layer gets, such as `attention.Context`.
    """
    for segment in config.segments:
        run = _segment(layer, config, segment, deterministic)
        if isinstance(x, Stream) and segment.stop - segment.start > 1:
            x = Stream(run(x.x, context)[0])
        else:
            x, _ = run(x, context)
    return x


def _segment(
    layer: type[nn.Module], config: TransformerConfig, segment: Segment, deterministic: bool
) -> nn.Module:
    count = segment.stop - segment.start
    if config.remat:
        layer = nn.remat(
            layer,
            # A scan separates the two passes already; without one XLA would merge them again.
            prevent_cse=count == 1,
            policy=None if config.remat is True else _policy(config.remat),
        )
    if count > 1:
        layer = nn.scan(
            layer,
            variable_axes={"params": 0, MASKS: 0, WORKING: 0, CACHE: 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True, GRADIENT: True},
            in_axes=nn.broadcast,
            length=count,
        )
    return layer(config, segment.patterns, deterministic, name=segment.name)


def _policy(name: str):
    if name == "linears_saveable":
        return jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return getattr(jax.checkpoint_policies, name)


def layers_of(name: str) -> range | None:
    """Numbers of the layers that a stack holds, by its name, such as "layers_1_to_11"; None: it is none."""
    match = _NAME.fullmatch(name)
    return range(int(match[1]), int(match[2]) + 1) if match and match[2] else None


def unstack_layers(
    variables: Mapping[str, Any], each: Callable[[Path, Any], Any] | None = None
) -> dict[str, Any]:
    """Variables with one entry a layer, "layers_0", "layers_1", ..., as of `scan=False`.

    Args:
      variables: {"params": ..., "masks": ...} of a model; every collection is converted.
      each: what becomes of a leaf of the result, from its path ("params", "layers_0", ...) and the
        leaf; called for one after the other, as they are taken out of their stacks. None: nothing.
    """
    return {name: _unstack(name, collection, each) for name, collection in variables.items()}


def stack_layers(variables: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `unstack_layers`: variables in the stacks that `config` scans over.

    Raises:
      ValueError: the layers in `variables` are not those of `config`.
    """
    return {name: _stack(name, collection, config) for name, collection in variables.items()}


def _unstack(
    of: str, collection: Mapping[str, Any], each: Callable[[Path, Any], Any] | None = None
) -> dict[str, Any]:
    result = {}

    def add(path: Path, leaf: Any) -> None:
        result[path] = leaf if each is None else each((of, *path), leaf)

    for (name, *rest), leaf in traverse_util.flatten_dict(collection).items():
        layers = layers_of(name)
        if layers is None:
            add((name, *rest), leaf)
            continue
        for row, i in enumerate(layers):
            add((f"layers_{i}", *rest), jax.tree.map(lambda x, row=row: x[row], leaf))
    return traverse_util.unflatten_dict(result)


def _stack(of: str, collection: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    layers = _unstack(of, collection)
    result = {name: tree for name, tree in layers.items() if not _NAME.fullmatch(name)}
    found = {name for name in layers if _NAME.fullmatch(name)}
    for segment in config.segments:
        names = [f"layers_{i}" for i in range(segment.start, segment.stop)]
        trees = [layers[name] for name in names if name in found]
        found.difference_update(names)
        if not trees:
            continue  # A collection without entries here, such as the masks of dense layers.
        if len(trees) != len(names):
            raise ValueError(f"variables hold only some of {names[0]} .. {names[-1]}")
        stacked = len(names) > 1
        result[segment.name] = (
            jax.tree.map(lambda *leaves: _joined(leaves), *trees) if stacked else trees[0]
        )
    if found:
        raise ValueError(
            f"variables hold {', '.join(sorted(found))}, but the model has"
            f" {config.num_layers} layers"
        )
    return result


def _joined(leaves: tuple[Any, ...]) -> Any:
    """One stack; of NumPy arrays in NumPy, so that they stay on the host."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)
