"""Parameters in the dtype that layers compute in, as they would cast them in each call."""

from collections.abc import Mapping
from typing import Any

import jax

from slope_jax.dense import ADAPTER_L, ADAPTER_R

_CAST = ("kernel", "embedding", ADAPTER_L, ADAPTER_R)


def is_cast(name: str) -> bool:
    """Whether a parameter of that name is one: kernels, tables and adapters; not norms and biases."""
    return name in _CAST


def cast_weights(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Parameters with kernels, tables and adapters in a dtype, which norms and biases do not get."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if is_cast(path[-1].key) else leaf, params
    )
