"""What sets a method of pretraining apart; the defaults are those of a model that is just trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util

from slope_jax import TrainState
from slope_jax.models import variant_config
from slope_jax.policy import DENSE

if TYPE_CHECKING:
    from train.config import Config

Path = tuple[str, ...]
Tree = Mapping[str, Any]


class Method:
    """A method: what its model is, what its products multiply by, what joins its gradient.

    The optimizer moves `state.params`. In each step

        masks = update_masks(params, masks, step)
        used  = variables(params, masks)                what the model is called with
        grads = gradient(d loss / d used, params, masks)

    all of it inside the compiled step, once for all micro-batches of a batch. A method whose kernels
    are masked so is *simulated*: its products are dense, and so is its memory.

    Attributes:
      config: the run.
      kernels: path in the tree of parameters of every kernel that the method prunes -> pattern.
    """

    fields: ClassVar[frozenset[str]] = frozenset()  # of Config, that have a meaning here
    about: ClassVar[str] = ""  # for the log
    noisy: ClassVar[bool] = False  # whether the backward pass draws random numbers
    adapts: ClassVar[bool] = False  # whether adapters can join

    @property
    def simulated(self) -> bool:
        """Whether its products are dense ones of kernels that it masks."""
        return bool(self.options().get("simulated", False))

    def __init__(self, config: Config):
        self.config = config
        model = variant_config(config.model, scan=config.scan, **self.options())
        self.kernels = pruned_kernels(model)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises a ValueError for fields that do not go together."""

    def options(self) -> dict[str, Any]:
        """Fields of the model's configuration."""
        return {"sparsity": DENSE}

    def after_update(self) -> optax.GradientTransformation:
        """Joins the optimizer's update ahead of the learning rate."""
        return optax.identity()

    def initial_masks(self, params: Tree, masks: Tree) -> Tree:
        """The masks of the state, from the model's own."""
        return masks

    def start(
        self, state: TrainState, model: nn.Module, batches: Any, say: Callable[[str], None]
    ) -> TrainState:
        """The state before the first step of a new run. `batches` are those it will train on."""
        return state

    def at(self, step: int) -> Method:
        """The method as it goes on after `step` steps."""
        return self

    @property
    def turns(self) -> dict[int, str]:
        """Steps after which `at` gives something else, and what to tell the user then."""
        return {}

    def update_masks(self, params: Tree, masks: Tree, step: jax.Array) -> Tree:
        return masks

    def variables(self, params: Tree, masks: Tree) -> dict[str, Tree]:
        return {"params": params, "masks": masks}

    def gradient(self, grads: Tree, params: Tree, masks: Tree) -> Tree:
        return grads

    def finished(self, model: nn.Module, state: TrainState) -> tuple[nn.Module, dict[str, Tree]]:
        """The trained model and its variables, as they are evaluated, served and fine-tuned."""
        return model, self.variables(state.params, state.masks)

    def _map_kernels(self, function: Callable, *trees: Tree) -> dict[Path, jax.Array]:
        """function(path, leaf of each tree) of every kernel that is pruned.

        Of NumPy arrays to NumPy arrays: the device has one layer of one kernel at a time.
        """
        flat = [traverse_util.flatten_dict(tree) for tree in trees]
        return {
            path: _mapped(functools.partial(function, path), [tree[path] for tree in flat])
            for path in self.kernels
        }


def _mapped(function: Callable, leaves: list[Any]) -> Any:
    if not isinstance(leaves[0], np.ndarray):
        return function(*leaves)
    if leaves[0].ndim == 2:
        return jax.device_get(function(*leaves))
    layers = [jax.device_get(function(*layer)) for layer in zip(*leaves, strict=True)]
    return jax.tree.map(lambda *rows: np.stack(rows), *layers)


def replace_leaves(tree: Tree, leaves: Mapping[Path, jax.Array]) -> dict[str, Any]:
    """The tree with other leaves at some paths."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(tree) | dict(leaves))


def masked(w: jax.Array, mask: jax.Array) -> jax.Array:
    """`w` where the mask keeps, +0.0 elsewhere."""
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def pruned_kernels(config: Any) -> dict[Path, str]:
    """Path of every pruned kernel in the parameters of a model -> its pattern."""
    found = {}
    for segment in config.segments:
        for path, pattern in segment.patterns:
            found[segment.name, *path.split("/"), "kernel"] = pattern
    for linear in config.head_linears():
        found[*linear.path.split("/"), "kernel"] = config.patterns[linear.path]
    return {path: pattern for path, pattern in found.items() if pattern != DENSE}


def rebuilt(model: nn.Module, **fields: Any) -> nn.Module:
    """The same model with other fields in its configuration."""
    return type(model)(dataclasses.replace(model.config, **fields))


def check_prunes(config: Config) -> None:
    """Raises a ValueError unless the configured sparsity prunes something."""
    if not pruned_kernels(variant_config(config.model, sparsity=config.sparsity)):
        raise ValueError(
            f"sparsity {config.sparsity!r} prunes nothing, so that --method={config.method} would"
            " train the dense model; give a pattern such as 2:4, or --method=dense"
        )
