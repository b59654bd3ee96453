"""Extended SR-STE: SR-STE for AdamW as SLoPe compares with it (arXiv 2405.16325, appendix)."""

from typing import Any

import optax

from train.config import Config
from train.methods.base import Tree
from train.methods.products import PrunedProduct, check_tokens
from train.methods.sr_ste import SrSte


class ExtendedSrSte(SrSte):
    """The decay of pruned weights joins the gradient, ahead of clipping and moments:

        g = d loss / d (w * m) + decay (1 - m) w

    With `prune_dy` the gradient of a product's output is pruned 2:4 by magnitude along the tokens for
    dw, as in the paper's listing.
    """

    fields = frozenset(("sparsity", "mask_decay", "prune_dy"))
    about = "masks by magnitude in each step, pruned weights decay by their gradient"
    default_decay = 6e-6

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.prune_dy:
            check_tokens(config)

    def options(self) -> dict[str, Any]:
        return super().options() | ({"simulated": PrunedProduct} if self.config.prune_dy else {})

    def after_update(self) -> optax.GradientTransformation:
        return optax.identity()

    def gradient(self, grads: Tree, params: Tree, masks: Tree) -> Tree:
        return self._decayed(grads, params)
