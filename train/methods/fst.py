"""FST: transposable 2:4 masks in the MLPs, then a dense finish (Hu et al., arXiv 2404.01847)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from slope_jax import TrainState
from slope_jax.models import stack_layers, unstack_layers
from slope_jax.policy import DENSE, SparsityPolicy
from train.config import Config
from train.methods.base import Method, Tree, masked, rebuilt, replace_leaves
from train.methods.products import MvueProduct, check_tokens
from train.methods.transposable import transposable_mask

SPARSITY = SparsityPolicy(((r"layers/\d+/mlp/.*", "2:4"), (".*", DENSE)))


class Fst(Method):
    """Masks are found anew every `mask_every` steps and kept in the state, dense kernels beside them.

        y  = x @ (w * m),  dx = dy @ (w * m).T             m is 2:4 along both axes
        dw = x.T @ mvue(dy) + decay (1 - m) w              ahead of clipping and moments

    The last `dense_finish` of all steps train the dense weights.
    """

    fields = frozenset(("mask_decay", "mask_every", "dense_finish"))
    about = "transposable 2:4 masks in the MLPs, dy estimated 2:4 for dw, dense at the end"
    noisy = True
    default_decay = 6e-5

    @classmethod
    def check(cls, config: Config) -> None:
        check_tokens(config)

    @property
    def decay(self) -> float:
        given = self.config.mask_decay
        return self.default_decay if given is None else given

    @property
    def finish_step(self) -> int:
        """Steps completed when the masks are lifted."""
        total = self.config.total_steps
        return total - round(self.config.dense_finish * total)

    @property
    def turns(self) -> dict[int, str]:
        return {self.finish_step: "masks are lifted: dense from here on"}

    def at(self, step: int) -> Method:
        return _DenseFinish(self.config) if step >= self.finish_step else self

    def options(self) -> dict[str, Any]:
        return {"sparsity": SPARSITY, "simulated": MvueProduct}

    def initial_masks(self, params: Tree, masks: Tree) -> Tree:
        return self._search(params)

    def update_masks(self, params: Tree, masks: Tree, step: jax.Array) -> Tree:
        due = step % self.config.mask_every == 0
        return jax.lax.cond(due, self._search, lambda _: masks, params)

    def variables(self, params: Tree, masks: Tree) -> dict[str, Tree]:
        kept = self._map_kernels(lambda path, w, mask: masked(w, mask), params, masks)
        return {"params": replace_leaves(params, kept), "masks": {}}

    def gradient(self, grads: Tree, params: Tree, masks: Tree) -> Tree:
        def add(path, g, w, mask):
            return g + self.decay * masked(w, ~mask).astype(g.dtype)

        return replace_leaves(grads, self._map_kernels(add, grads, params, masks))

    def finished(self, model: nn.Module, state: TrainState) -> tuple[nn.Module, dict[str, Tree]]:
        dense = rebuilt(model, simulated=False, sparsity=DENSE)
        used = {"params": self.variables(state.params, state.masks)["params"]}
        return dense, stack_layers(unstack_layers(used), dense.config) | {"masks": {}}

    def _search(self, params: Tree) -> Tree:
        found = self._map_kernels(lambda path, w: transposable_mask(w), params)
        return traverse_util.unflatten_dict(found)


class _DenseFinish(Fst):
    noisy = False

    def update_masks(self, params: Tree, masks: Tree, step: jax.Array) -> Tree:
        return jax.tree.map(jnp.ones_like, masks)
