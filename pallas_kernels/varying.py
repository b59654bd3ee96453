"""Arrays inside `jax.shard_map`, which tells those that differ along an axis of the mesh from the others."""

from typing import Any

import jax


def alike(tree: Any) -> Any:
    """The arrays of a pytree as ones that all vary over the same axes of a mesh, those of any of them.

    Functions with rules of their own need it where `check_vma` is on. The gradient of one that did not
    vary is then summed over these axes, as that of any operand is.
    """
    leaves, treedef = jax.tree.flatten(tree)
    varying = [jax.typeof(leaf).mat.varying for leaf in leaves]
    union = frozenset().union(*varying)
    leaves = [
        jax.lax.pcast(leaf, tuple(sorted(union - own)), to="varying") if union - own else leaf
        for leaf, own in zip(leaves, varying, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)
