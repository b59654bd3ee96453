"""Calibration: a dense model run layer by layer on text, and how large the inputs of its linears are."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from slope_jax.dense import SparseDense
from slope_jax.matmul import Activated
from slope_jax.models.bert import Bert
from slope_jax.models.decoder import Decoder
from slope_jax.models.hf_files import listed
from slope_jax.policy import DENSE

Path = tuple[str, ...]
Sums = dict[Path, jax.Array]  # path of a linear -> (in,) sums of squares of its inputs, float32

_FIRST = ("layers_0",)  # the path of the layer that stands for all


def dense_twin(model: Bert | Decoder, **fields) -> Bert | Decoder:
    """The model with nothing pruned, no adapters, and parameters layer by layer."""
    config = dataclasses.replace(model.config, sparsity=DENSE, scan=False, adapter_rank=0, **fields)
    return type(model)(config)


class Runner:
    """Runs parts of a dense model, one compilation for all layers.

    Args:
      model: any of our models; its sparsity does not matter.
      outside: parameters outside the layers.
      layer: parameters of some layer, for their shapes.
      batch: one from `checked_batch`, for its shapes.
    """

    def __init__(self, model: Bert | Decoder, outside: dict, layer: dict, batch: dict):
        # Embeddings and heads around one layer, whose arguments are taken and results given.
        self._shell = dense_twin(model, num_layers=1, remat=False)
        self._ends = outside | {_FIRST[0]: layer}
        self._layer = _first_layer(self._shell, self._ends, batch)

    def enter(self, batch: dict) -> tuple[jax.Array, Any]:
        """What the first layer is called with: hidden states and what all layers get beside them."""
        return _enter(self._shell, self._ends, batch)

    def layer(
        self, params: dict, x: jax.Array, context: Any, batch: dict
    ) -> tuple[jax.Array, Sums]:
        """The next hidden states, and the sums of the layer's linears by path inside the layer."""
        return _run_layer(self._layer, params, x, context, batch)

    def heads(self, x: jax.Array, batch: dict) -> Sums:
        """The sums of the linears outside the layers, `x` being the last layer's output."""
        return _run_heads(self._shell, self._ends, x, batch)


# Flax calls an interceptor in place of a module's method.


@functools.partial(jax.jit, static_argnums=0)
def _enter(shell: Bert | Decoder, params: dict, batch: dict) -> tuple[jax.Array, Any]:
    taken = []

    def take(call, args, kwargs, context):
        if not _is_first(context):
            return call(*args, **kwargs)
        taken.append(args)
        return args[0], None

    with nn.intercept_methods(take):
        _call(shell, params, batch)
    return taken[0]


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(layer: nn.Module, params: dict, x: jax.Array, context: Any, batch: dict):
    sums: Sums = {}
    with nn.intercept_methods(_recorder(sums, batch)):
        y, _ = layer.apply({"params": params}, x, context)
    return y, sums


@functools.partial(jax.jit, static_argnums=0)
def _run_heads(shell: Bert | Decoder, params: dict, x: jax.Array, batch: dict) -> Sums:
    sums: Sums = {}
    record = _recorder(sums, batch)

    def replace(call, args, kwargs, context):
        return (x, None) if _is_first(context) else record(call, args, kwargs, context)

    with nn.intercept_methods(replace):
        _call(shell, params, batch)
    return sums


def _first_layer(shell: Bert | Decoder, params: dict, batch: dict) -> nn.Module:
    """The module of one layer, by itself."""
    found = []

    def take(call, args, kwargs, context):
        if _is_first(context):
            module = context.module
            fields = (module.config, module.patterns, module.deterministic)
            found.append(type(module)(*fields, parent=None))
        return call(*args, **kwargs)

    with nn.intercept_methods(take):
        jax.eval_shape(lambda: _call(shell, params, batch))
    return found[0]


def _call(model: Bert | Decoder, params: dict, batch: dict) -> None:
    taken = batch if isinstance(model, Bert) else {"input_ids": batch["input_ids"]}
    model.apply({"params": params}, **taken)


def _is_first(context: nn.module.InterceptorContext) -> bool:
    return context.module.path == _FIRST and context.method_name == "__call__"


def _recorder(sums: Sums, batch: dict) -> Callable:
    def record(call, args, kwargs, context):
        module = context.module
        # The first call has the inputs: the layer's own methods and nn.Dense's are intercepted too.
        if isinstance(module, SparseDense) and module.path not in sums:
            x = args[0].y if isinstance(args[0], Activated) else args[0]
            sums[module.path] = _squares(x, batch.get("lengths"))
        return call(*args, **kwargs)

    return record


def _squares(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """(..., in) to (in,), float32; of (B, S, in) the first `lengths` tokens of each row."""
    squares = jnp.square(x.astype(jnp.float32))
    if lengths is not None and x.ndim == 3:
        valid = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        squares = jnp.where(valid[:, :, None], squares, 0.0)
    return squares.sum(range(x.ndim - 1))


def checked_batch(model: Bert | Decoder, batch: Any) -> dict[str, jax.Array]:
    """What the model takes of a calibration batch, and "lengths", which an "attention_mask" gives as well.

    Raises:
      ValueError: no input_ids, something else that the model does not take, or shapes, dtypes or
        values that do not fit it.
    """
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if "input_ids" not in given:
        raise ValueError(f"a calibration batch holds {listed(sorted(given))}, but no input_ids")
    names = ["input_ids", "lengths", "attention_mask"]
    names += ["token_type_ids"] * isinstance(model, Bert)
    if unknown := sorted(given.keys() - set(names)):
        raise ValueError(
            f"a calibration batch holds {listed(unknown)}; a {type(model).__name__} takes"
            f" {listed(names)}"
        )
    given = {name: np.asarray(given[name]) for name in names if name in given}
    ids, vocabulary = given["input_ids"], model.config.vocab_size
    if ids.size == 0 or not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 2:
        raise ValueError(
            f"a calibration batch has input_ids {ids.dtype}{list(ids.shape)}; they must be integers"
            " (batch, sequence), at least one"
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"a calibration batch has input_ids from {ids.min()} to {ids.max()}, but the model's"
            f" vocab_size is {vocabulary}; use the tokenizer that the weights were trained with"
        )
    if (mask := given.pop("attention_mask", None)) is not None:
        given.setdefault("lengths", _lengths_of(mask, ids.shape))
    lengths = given.get("lengths")
    if lengths is not None and (
        lengths.shape != ids.shape[:1] or lengths.min() < 1 or lengths.max() > ids.shape[1]
    ):
        raise ValueError(
            f"a calibration batch has lengths {lengths.tolist()}; for input_ids of"
            f" {list(ids.shape)} they must be {len(ids)} integers from 1 to {ids.shape[1]}"
        )
    return {name: jnp.asarray(array) for name, array in given.items()}


def _lengths_of(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Valid tokens of each row, of a mask of ones ahead of zeros."""
    lengths = mask.astype(np.int32).sum(-1)
    if mask.shape != shape or not np.array_equal(mask, np.arange(shape[1]) < lengths[:, None]):
        raise ValueError(
            f"a calibration batch has an attention_mask {list(mask.shape)} for input_ids of"
            f" {list(shape)}; it must be as large, with ones for all tokens and zeros behind them:"
            ' let the tokenizer pad with padding_side="right"'
        )
    return lengths
