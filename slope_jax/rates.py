"""The learning rate of pruned kernels, relative to that of the other parameters."""

from collections.abc import Mapping

import jax
import optax

from pallas_kernels import Pattern
from slope_jax.working import Layer

Path = tuple[str, ...]


def pruned_rate(pattern: str | Pattern) -> float:
    """M / N, by which a pruned kernel should move faster than the other parameters with Adam.

    Adam moves each entry about as far as any other, so an output of N:M entries moves N / M as far
    as a dense one.

    >>> pruned_rate("2:4"), pruned_rate("2:8")
    (2.0, 4.0)
    """
    return 1 / Pattern.parse(str(pattern)).density


def scale_pruned(layers: Mapping[Path, Layer]) -> optax.GradientTransformation:
    """Updates of every pruned kernel times `pruned_rate`, all others as they are.

    With it, between Adam and the learning rate, a sparse model learns at the rate that suits the dense
    one (docs/accuracy.md has what that is worth). LAMB has no use for it: its steps are in proportion
    to a kernel's norm.

    Args:
      layers: from `find_layers`.

    >>> import jax, jax.numpy as jnp
    >>> from slope_jax import SparseDense, find_layers
    >>> model, x = SparseDense(8, sparsity="2:4"), jnp.ones((1, 16))
    >>> variables = model.init(jax.random.key(0), x)
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     scale_pruned(find_layers(model.apply, variables, x)),
    ...     optax.scale_by_learning_rate(1e-3),
    ... )
    """
    pruned = {path: layer.pattern for path, layer in layers.items() if layer.pattern is not None}
    return scale_leaves({(*path, "kernel"): pruned_rate(p) for path, p in pruned.items()})


def scale_leaves(factors: Mapping[Path, float]) -> optax.GradientTransformation:
    """Updates of some parameters, by their paths, times their factors."""

    def update_fn(updates, state, params=None):
        def scaled(path, update):
            factor = factors.get(tuple(getattr(key, "key", None) for key in path))
            return update if factor is None else factor * update

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
