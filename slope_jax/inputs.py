"""What a model is called with: example inputs, of which arrays alone are traced."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta


def example_inputs(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The given example inputs, or else the model's own."""
    if args or kwargs:
        return args, kwargs
    if not hasattr(model, "example_inputs"):
        raise ValueError(
            f"{type(model).__name__} has no example_inputs(); pass example inputs after the others"
        )
    inputs = model.example_inputs()
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def split(args: tuple, kwargs: dict) -> tuple[list[Any], Callable[[list[Any]], tuple[tuple, dict]]]:
    """The arrays and shapes among a call's inputs, and what joins them, or others, to the rest.

    The rest stays as it is given: a model decides by `deterministic=True`, which cannot be traced.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def join(traced: list[Any]) -> tuple[tuple, dict]:
        joined = list(leaves)
        for i, leaf in zip(arrays, traced, strict=True):
            joined[i] = leaf
        return jax.tree.unflatten(tree, joined)

    return [leaves[i] for i in arrays], join


def eval_shape(function: Callable, /, *args, **kwargs) -> Any:
    """`jax.eval_shape`, but only arrays and shapes are traced, and `function` is always called."""
    arrays, join = split(args, kwargs)

    def call(arrays):  # a new function each time, or a cached trace would call nothing
        args, kwargs = join(arrays)
        return function(*args, **kwargs)

    return jax.eval_shape(call, arrays)


def unboxed(tree: Any) -> Any:
    """`flax.core.meta.unbox` without the constraints that it puts on what axes are named of, on a mesh."""

    def leaf(box: Any) -> Any:
        if isinstance(box, meta.Partitioned):
            return box.unbox(apply_constraint=False)
        return meta.unbox(box)

    return jax.tree.map(leaf, tree, is_leaf=lambda box: isinstance(box, meta.AxisMetadata))


def _is_array(leaf: Any) -> bool:
    """Not a class such as `np.float32`, nor a number of NumPy's, which a model may count by."""
    arrays = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return arrays and not isinstance(leaf, type | np.generic)
