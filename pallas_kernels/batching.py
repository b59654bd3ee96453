"""`jax.vmap` of the kernels, which have no batching rule of their own."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def one_by_one(function: Callable) -> Callable:
    """`function` of arrays and pytrees; under vmap it runs for one member after the other."""

    def rule(size, batched, *args):
        leaves, tree = jax.tree.flatten(args)
        flags = jax.tree.leaves(batched)
        moving = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

        def one(slices):
            slices = iter(slices)
            own = [next(slices) if f else x for x, f in zip(leaves, flags, strict=True)]
            return mapped(*jax.tree.unflatten(tree, own))

        result = jax.lax.map(one, moving)
        return result, jax.tree.map(lambda _: True, result)

    mapped = jax.custom_batching.custom_vmap(function)
    mapped.def_vmap(rule)
    return functools.wraps(function)(mapped)


def by_rows(function: Callable, has_rows: Callable[..., tuple]) -> Callable:
    """`function` whose first axes of some operands are all rows: under vmap one more such axis.

    Args:
      function: of pytrees; leading axes of its row operands come back in its results.
      has_rows: arguments -> a tuple of their structure, True for leaves that have rows. Where any
        other leaf is batched, the members run one after the other.
    """
    single = one_by_one(function)

    def rule(size, batched, *args):
        leaves, tree = jax.tree.flatten(args)
        rows, flags = jax.tree.leaves(has_rows(*args)), jax.tree.leaves(batched)
        if any(flag and not row for flag, row in zip(flags, rows, strict=True)):
            in_axes = jax.tree.unflatten(tree, [0 if flag else None for flag in flags])
            result = jax.vmap(single, in_axes=in_axes)(*args)
        else:
            whole = [
                jnp.broadcast_to(leaf, (size, *leaf.shape)) if row and not flag else leaf
                for leaf, row, flag in zip(leaves, rows, flags, strict=True)
            ]
            result = mapped(*jax.tree.unflatten(tree, whole))
        return result, jax.tree.map(lambda _: True, result)

    mapped = jax.custom_batching.custom_vmap(function)
    mapped.def_vmap(rule)
    return functools.wraps(function)(mapped)
