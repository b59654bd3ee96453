"""The device that a product is chosen for."""

import jax


def current() -> jax.Device:
    """The one that JAX computes on by default: that of `jax.default_device`, or the first.

    >>> with jax.default_device("cpu"):
    ...     current().platform
    'cpu'
    """
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen or jax.devices()[0]
