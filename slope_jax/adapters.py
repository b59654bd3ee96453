"""Lazy low-rank adapters: joined to a training state by path, with nothing else disturbed."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from jax.tree_util import DictKey, GetAttrKey, keystr

from slope_jax.dense import ADAPTER_L, ADAPTER_R
from slope_jax.inputs import example_inputs, split, unboxed
from slope_jax.state import TrainState

ADAPTER, BASE = "adapter", "base"


def adapter_labels(params: Any) -> Any:
    """The tree of `params` with "adapter" at adapter leaves and "base" at all others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(path), params)


def lazy_adapters(
    tx: optax.GradientTransformation, adapter_tx: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """`tx` for all parameters, with a state of their own for adapters that join later.

    Adam corrects the bias of its moments by its step count. Adapters are born with zero moments
    late in training, so they need a count of their own: the parts of an optimizer that keep moments
    go inside this wrapper. Clipping by the global norm goes outside, so that the norm covers all
    gradients, and so does the learning rate. A schedule that ends at zero leaves adapters that join
    late where they are: scale `adapter_tx` against that, as `train.optimizer` does.

    Args:
      tx: the transformation, for example `optax.scale_by_adam()`.
      adapter_tx: another one for the adapters; None for the same.

    >>> tx = optax.chain(
    ...     optax.clip_by_global_norm(1.0),
    ...     lazy_adapters(optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))),
    ...     optax.scale_by_learning_rate(optax.linear_schedule(1e-3, 0.0, 1000)),
    ... )
    """
    adapter_tx = tx if adapter_tx is None else adapter_tx
    return optax.partition({BASE: tx, ADAPTER: adapter_tx}, adapter_labels)


def add_adapters(
    state: TrainState, model: nn.Module, key: jax.Array, *args, **kwargs
) -> tuple[TrainState, int]:
    """Joins newborn adapters to a training state that has none (SLoPe, section 2.3).

    Existing parameters and optimizer state are carried bit for bit, matched by path. Newborn
    leaves get fresh optimizer state. As long as one of adapter_l, adapter_r starts at zero (the
    default of `SparseDense`), the function is unchanged.

    Args:
      state: a state without adapters, whose optimizer has a `lazy_adapters` part.
      model: the same model with `adapter_rank` > 0.
      key: PRNG key for the newborn parameters.
      *args, **kwargs: example inputs for `model.init`; by default `model.example_inputs()`.

    Returns:
      (the state with adapters, whose `apply_fn` is the new model's; the number of linear layers
      touched, each layer of a scanned stack counted).

    Raises:
      ValueError: adapters are there already, the model differs in anything but adapters or gives
        none to a sparse layer, or the optimizer has no `lazy_adapters` part.
    """
    if _adapter_leaves(state.params):
        raise ValueError("the state has adapters already; add_adapters takes a state without any")
    if any(
        isinstance(leaf, meta.AxisMetadata)
        for leaf in traverse_util.flatten_dict(state.params).values()
    ):
        raise ValueError(
            "parameters of the state are boxed with the names of their axes, which would hide them"
            " from the optimizer; create the state from flax.linen.unbox(variables)"
        )
    newborns, wanted = _born(_initialiser(model, args, kwargs), key)
    params = _with_newborns(state.params, wanted, newborns)
    count = _count_layers(params, state.masks)
    opt_state = _carry(state.opt_state, state.tx.init(params))
    return state.replace(apply_fn=model.apply, params=params, opt_state=opt_state), count


def _label(path: tuple) -> str:
    last = path[-1]
    return ADAPTER if getattr(last, "key", None) in (ADAPTER_L, ADAPTER_R) else BASE


def _initialiser(model: nn.Module, args: tuple, kwargs: dict):
    args, kwargs = example_inputs(model, args, kwargs)
    arrays, join = split(args, kwargs)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]

    def init(key):
        args, kwargs = join([jax.numpy.zeros(x.shape, x.dtype) for x in shapes])
        return unboxed(model.init(key, *args, **kwargs)["params"])

    return init


def _adapter_leaves(params: Any) -> dict[tuple[str, ...], Any]:
    flat = traverse_util.flatten_dict(params)
    return {path: leaf for path, leaf in flat.items() if path[-1] in (ADAPTER_L, ADAPTER_R)}


def _born(init: Callable, key: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    """The leaves of all adapters, and the shapes of all parameters; the model is traced once."""
    shapes = []

    def newborns(key):  # under jit the rest of the initialisation is dead code
        params = init(key)
        shapes.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
        return {"/".join(p): leaf for p, leaf in _adapter_leaves(params).items()}

    return jax.jit(newborns)(key), shapes[0]


def _with_newborns(old: Any, wanted: Any, newborns: dict[str, jax.Array]) -> Any:
    old_flat, wanted_flat = traverse_util.flatten_dict(old), traverse_util.flatten_dict(wanted)
    if not newborns:
        raise ValueError("the model has no adapters; build it with adapter_rank > 0")
    described = {path: (leaf.shape, leaf.dtype) for path, leaf in old_flat.items()}
    expected = {
        path: (leaf.shape, leaf.dtype)
        for path, leaf in wanted_flat.items()
        if path[-1] not in (ADAPTER_L, ADAPTER_R)
    }
    if described != expected:
        differing = sorted(
            "/".join(path)
            for path in described.keys() | expected.keys()
            if described.get(path) != expected.get(path)
        )
        raise ValueError(
            "the model differs from the state in more than its adapters: " + ", ".join(differing)
        )
    return traverse_util.unflatten_dict(
        {p: old_flat[p] if p in old_flat else newborns["/".join(p)] for p in wanted_flat}
    )


def _count_layers(params: Any, masks: Any) -> int:
    adapters = _adapter_leaves(params)
    touched = {path[:-1]: leaf for path, leaf in adapters.items() if path[-1] == ADAPTER_L}
    sparse = {path[:-1] for path in traverse_util.flatten_dict(masks)}
    if missed := sparse - touched.keys():
        raise ValueError(
            "these sparse layers got no adapters: " + ", ".join(sorted(map("/".join, missed)))
        )
    return sum(math.prod(leaf.shape[:-2]) for leaf in touched.values())


def _carry(old: Any, new: Any) -> Any:
    """The new optimizer state with every leaf of the old one in its place."""
    old_leaves = {
        keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(old)
        if not _is_newborn(path)
    }
    new_leaves, treedef = jax.tree_util.tree_flatten_with_path(new)
    if not any(map(_is_partition, jax.tree.leaves(new, is_leaf=_is_partition))):
        raise ValueError(
            "the optimizer keeps no separate state for adapters, so their moments would miss their"
            " bias correction: wrap its moments in slope_jax.lazy_adapters(...) from the start"
        )
    carried = [
        leaf if _is_newborn(path) else old_leaves.pop(keystr(path), leaf)
        for path, leaf in new_leaves
    ]
    if old_leaves:
        raise ValueError("optimizer state that fits no parameter: " + ", ".join(old_leaves))
    return treedef.unflatten(carried)


def _is_partition(node: Any) -> bool:
    return ADAPTER in getattr(node, "inner_states", ())


def _is_newborn(path: tuple) -> bool:
    return (GetAttrKey("inner_states"), DictKey(ADAPTER)) in itertools.pairwise(path)
