"""SLoPe: static masks, double-pruned backward pass, lazy low-rank adapters (arXiv 2405.16325)."""

from typing import Any

import optax

from slope_jax.rates import pruned_rate, scale_leaves
from train.config import Config
from train.methods.base import Method, check_prunes


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
        factors = {path: self.lr_scale(pattern) for path, pattern in self.kernels.items()}
        others = {path: factor for path, factor in factors.items() if factor != 1}
        return scale_leaves(others) if others else super().after_update()

    def lr_scale(self, pattern: str) -> float:
        """Learning rate of a kernel of a pattern, relative to that of the other parameters.

        LAMB's steps are in proportion to the kernel's norm, which counts its entries already.
        """
        if self.config.pruned_lr_scale is not None:
            return self.config.pruned_lr_scale
        if self.config.optimizer != "adamw":
            return 1.0
        return pruned_rate(pattern)
