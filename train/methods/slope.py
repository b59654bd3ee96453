"""SLoPe: static masks, double-pruned backward pass, lazy low-rank adapters (arXiv 2405.16325)."""

from typing import Any

from train.config import Config
from train.methods.base import Method, check_prunes


class Slope(Method):
    """All of it is in the model: `slope_jax.SparseDense` and `slope_jax.add_adapters`."""

    fields = frozenset(
        {
            "sparsity",
            "mask_init",
            "backward",
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
