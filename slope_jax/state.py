"""The training state: Flax's, with the collection of masks beside the parameters."""

from typing import Any

from flax.training import train_state


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` plus `masks`, which no optimizer ever sees.

    >>> import jax, jax.numpy as jnp, optax
    >>> from slope_jax import SparseDense, TrainState
    >>> model = SparseDense(8)
    >>> state = TrainState.create(
    ...     apply_fn=model.apply, tx=optax.adam(1e-3), **model.init(jax.random.key(0), jnp.ones((1, 8)))
    ... )
    >>> state.apply_fn(state.variables, jnp.ones((1, 8))).shape
    (1, 8)
    """

    masks: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes: parameters and masks."""
        return {"params": self.params, "masks": self.masks}
