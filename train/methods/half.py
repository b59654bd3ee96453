"""Half of the blocks, dense: what as many parameters as 2:4 keeps could do otherwise."""

from typing import Any

from slope_jax.models import variant_config
from slope_jax.policy import DENSE
from train.config import Config
from train.methods.base import Method


class Half(Method):
    """The variant with every second block left out, or rather, with half as many."""

    about = "half of the blocks, nothing is pruned"

    @classmethod
    def check(cls, config: Config) -> None:
        layers = variant_config(config.model).num_layers
        if layers % 2:
            raise ValueError(
                f"--method=half needs a model with an even number of blocks; {config.model} has"
                f" {layers}"
            )

    def options(self) -> dict[str, Any]:
        layers = variant_config(self.config.model).num_layers
        return {"sparsity": DENSE, "num_layers": layers // 2}
