"""Working copies: what kernels are multiplied as, made once for many products."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from pallas_kernels import CompressedMatrix, Pattern
from slope_jax.dense import MASKS, SparseDense
from slope_jax.inputs import eval_shape, unboxed
from slope_jax.matmul import Working
from slope_jax.operands import DOUBLE_PRUNED
from slope_jax.pieces import transposes
from slope_jax.sharded import transposed
from slope_jax.sharding import active_mesh, cut_of


class Layer(NamedTuple):
    """What a `SparseDense` multiplies by: an (in, out) kernel in a compute dtype."""

    pattern: Pattern | None  # None is dense
    shape: tuple[int, int]
    dtype: Any
    implementation: str | None
    backward: str = DOUBLE_PRUNED


def find_layers(function: Callable, *args, **kwargs) -> dict[tuple[str, ...], Layer]:
    """The `SparseDense` layers that `function(*args, **kwargs)` calls, by path. Computes nothing.

    Args:
      function: calls a bound or an unbound model, such as `model.apply`; not jitted.
      *args, **kwargs: arrays, shapes, or Python values, as the function takes them.

    Raises:
      ValueError: it calls none.
    """
    found: dict[tuple[str, ...], Layer] = {}

    def record(call, call_args, call_kwargs, context):
        module = context.module
        if isinstance(module, SparseDense) and context.method_name == "__call__":
            found.setdefault(module.path, _describe(module, call_args[0]))
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        eval_shape(function, *args, **kwargs)
    if not found:
        raise ValueError(
            "no SparseDense was called; pass the function itself, not one that is jitted already"
        )
    return found


def working_copies(
    variables: Mapping[str, Any],
    layers: Mapping[tuple[str, ...], Layer],
    *,
    values: bool = True,
    transpose: bool = True,
) -> dict[str, Any]:
    """The collection `working`: kernels in their compute dtype, and double-pruned transposes.

    Without it every product casts its kernel, once more where it is rematerialised, and every
    backward pass transposes it. With it the products of many micro-batches share the copies, at the
    cost of keeping them: for 2:4 in 16 bits, 1 byte per entry of the dense kernel for the values and
    1.125 for the transpose. Results are bit for bit the same, and so are the gradients, which remain
    those of `params`; but without copies, `sharded_matmul` transposes what it has cast, and dx can differ.

    The copies are stale once the parameters have changed: make them anew in each optimizer step.

    Args:
      variables: {"params": ..., "masks": ...}; layers of a scanned stack have a leading axis.
      layers: of `find_layers`. Those left out work as without the collection.
      values: whether to cast values (of dense layers too); transpose: whether to transpose.

    >>> import slope_jax
    >>> model, x = slope_jax.SparseDense(8, dtype=jnp.bfloat16), jnp.ones((1, 16))
    >>> variables = model.init(jax.random.key(0), x)
    >>> layers = slope_jax.find_layers(model.apply, variables, x)
    >>> working = slope_jax.working_copies(variables, layers)
    >>> working["kernel"].values.dtype.name, working["kernel"].transpose.shape
    ('bfloat16', (8, 16))
    >>> model.apply({**variables, "working": working}, x).shape
    (1, 8)
    """
    variables, copies = unboxed(variables), {}
    for path, layer in layers.items():
        kernel = _at(variables["params"], path)["kernel"]
        cast = kernel.astype(layer.dtype) if values else None
        if layer.pattern is not None:
            metadata = _at(variables[MASKS], path)["kernel"]
            w = CompressedMatrix(kernel, metadata, layer.pattern, 0, layer.shape)
            pruned = transpose and layer.backward == DOUBLE_PRUNED
            copies[*path, "kernel"] = Working(cast, _transposed(w, layer, path) if pruned else None)
        elif values:
            copies[*path, "kernel"] = Working(cast)
    return traverse_util.unflatten_dict(copies)


def _transposed(w: CompressedMatrix, layer: Layer, path: tuple[str, ...]) -> CompressedMatrix:
    if active_mesh() is not None:
        return transposed(w, cut_of(path), layer.dtype, layer.implementation)
    return transposes(w, layer.dtype, layer.implementation)


def _describe(module: SparseDense, x: jax.Array) -> Layer:
    params = [unboxed(module.get_variable("params", name)) for name in ("kernel", "bias")]
    dtype = module.dtype or jnp.result_type(x.dtype, *(p for p in params if p is not None))
    shape = (x.shape[-1], module.features)
    dtype = jnp.dtype(dtype)
    return Layer(module.pattern, shape, dtype, module.implementation, module.backward)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
