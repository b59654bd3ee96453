"""SLoPe: static masks, double-pruned backward pass, lazy low-rank adapters (arXiv 2405.16325)."""

from collections.abc import Container
from typing import Any

import optax
from flax import traverse_util

from train.config import Config
from train.methods.base import Method, Path, check_prunes


class Slope(Method):
    """All of it is in the model: `slope_jax.SparseDense` and `slope_jax.add_adapters`."""

    fields = frozenset(
        {
            "sparsity",
            "mask_init",
            "backward",
            "pruned_lr_scale",
            "adapter_rank",
            "adapter_start",
            "adapter_init_scale",
            "adapter_lr_scale",
        }
    )
    about = "static masks, kernels stored compressed"
    adapts = True

    @classmethod
    def check(cls, config: Config) -> None:
        check_prunes(config)

    def options(self) -> dict[str, Any]:
        config = self.config
        return {
            "sparsity": config.sparsity,
            "mask_init": config.mask_init,
            "backward": config.backward,
        }

    def after_update(self) -> optax.GradientTransformation:
        scale = self.config.pruned_lr_scale
        return super().after_update() if scale == 1 else _scaled(self.kernels, scale)


def _scaled(kernels: Container[Path], factor: float) -> optax.GradientTransformation:
    """Updates of some parameters, by their paths, times a factor."""

    def update_fn(updates, state, params=None):
        flat = traverse_util.flatten_dict(updates)
        scaled = {path: factor * u if path in kernels else u for path, u in flat.items()}
        return traverse_util.unflatten_dict(scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
