"""SR-STE: dense weights, masked anew by magnitude in each step (Zhou et al., arXiv 2102.04010)."""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax import traverse_util

from pallas_kernels import compress
from slope_jax import TrainState, masks
from train.config import Config
from train.methods.base import Method, Tree, check_prunes, masked, rebuilt, replace_leaves

_compress = jax.jit(compress, static_argnums=1)


class SrSte(Method):
    """y = x @ (w * m), and the gradient of w * m moves all of w; what m prunes decays besides.

    With SGD the rule is w <- w - lr (g + decay (1 - m) w). AdamW's decays stand beside the moments:

        w <- w - lr (adam(g) + weight_decay w + decay (1 - m) w)
    """

    fields = frozenset(("sparsity", "mask_decay"))
    about = "masks by magnitude in each step, pruned weights decay"
    default_decay = 2e-4

    @classmethod
    def check(cls, config: Config) -> None:
        check_prunes(config)

    @property
    def decay(self) -> float:
        """Factor of the pruned weights in the update (or in the gradient)."""
        given = self.config.mask_decay
        return self.default_decay if given is None else given

    def options(self) -> dict[str, Any]:
        return {"sparsity": self.config.sparsity, "simulated": True}

    def after_update(self) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, params: self._decayed(updates, params))

    def variables(self, params: Tree, masks: Tree) -> dict[str, Tree]:
        kept = self._map_kernels(lambda path, w: masked(w, self._mask(path, w)), params)
        return {"params": replace_leaves(params, kept), "masks": masks}

    def finished(self, model: nn.Module, state: TrainState) -> tuple[nn.Module, dict[str, Tree]]:
        compressed = self._map_kernels(
            lambda path, w: _compress(w, self.kernels[path]), state.params
        )
        values = {path: w.values for path, w in compressed.items()}
        metadata = {path: w.metadata for path, w in compressed.items()}
        return rebuilt(model, simulated=False), {
            "params": replace_leaves(state.params, values),
            "masks": traverse_util.unflatten_dict(metadata),
        }

    def _decayed(self, updates: Tree, params: Tree) -> Tree:
        def add(path, g, w):
            return g + self.decay * masked(w, ~self._mask(path, w)).astype(g.dtype)

        return replace_leaves(updates, self._map_kernels(add, updates, params))

    def _mask(self, path, w):
        return masks.magnitude_mask(w, self.kernels[path])
