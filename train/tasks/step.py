"""The compiled functions of finetuning. The examples are on the device; a batch is their numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slope_jax import TrainState
from train.tasks.features import Features
from train.tasks.head import Batch, inputs, losses, predictions

PADDING = -1


def on_device(features: Features) -> Batch:
    """The arrays that steps read."""
    names = ("input_ids", "second", "lengths", "labels")
    return {name: jnp.asarray(getattr(features, name)) for name in names}


def batches(count: int, size: int, order: np.random.Generator | None = None) -> Iterator[Any]:
    """The numbers 0 .. count-1 in rows of `size`, shuffled with `order`; -1 fills the last row."""
    numbers = np.arange(count) if order is None else order.permutation(count)
    padded = np.full(-(-count // size) * size, PADDING, np.int32)
    padded[:count] = numbers
    yield from padded.reshape(-1, size)


def make_train_step(kind: str) -> Callable:
    """The jitted step `(state, data, rows, key) -> (state, loss)`; it takes over the state's buffers.

    The loss is the mean over the rows that are no padding.
    """

    def train_step(state: TrainState, data: Batch, rows: jax.Array, key: jax.Array):
        batch, weights = _take(data, rows)
        dropout = {"dropout": jax.random.fold_in(key, state.step)}

        def objective(params):
            variables = {"params": params, "masks": state.masks}
            logits = state.apply_fn(variables, **inputs(batch), deterministic=False, rngs=dropout)
            return (losses(kind, logits, batch) * weights).sum() / weights.sum()

        loss, grads = jax.value_and_grad(objective)(state.params)
        return state.apply_gradients(grads=grads), loss

    return jax.jit(train_step, donate_argnums=0)


def make_predict_step(kind: str, apply_fn: Callable) -> Callable:
    """The jitted step `(variables, data, rows) -> predictions`, without dropout."""

    @jax.jit
    def predict_step(variables: Any, data: Batch, rows: jax.Array):
        batch, _ = _take(data, rows)
        return predictions(kind, apply_fn(variables, **inputs(batch)), batch)

    return predict_step


def predict(predict_step: Callable, variables: Any, data: Batch, size: int) -> Any:
    """Predictions for all sequences of a split, as numpy arrays."""
    count = len(data["lengths"])
    parts = [predict_step(variables, data, rows) for rows in batches(count, size)]
    parts = jax.device_get(parts)
    return jax.tree.map(lambda *columns: np.concatenate(columns)[:count], *parts)


def _take(data: Batch, rows: jax.Array) -> tuple[Batch, jax.Array]:
    weights = (rows != PADDING).astype(jnp.float32)
    return jax.tree.map(lambda x: x[jnp.maximum(rows, 0)], data), weights
