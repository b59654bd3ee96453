"""Adam whose moments are kept in 16 bits."""

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(
    b1: float, b2: float, eps: float, dtype: jnp.dtype | str = jnp.float32
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with both moments kept in `dtype`; the arithmetic is in float32.

    A second moment changes by a factor of b2 or so per step. 0.999 is less than half a unit in
    the last place of bfloat16, so that rounding to nearest would leave it where it is for ever. It is
    rounded up or down at random instead, the closer number the likelier, so that its mean is right.
    The random bits are a function of step, leaf and position: runs repeat bit for bit.

    Args:
      b1, b2, eps: as in `optax.scale_by_adam`.
      dtype: float32 (then this is `optax.scale_by_adam`) or bfloat16.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return adam

    def cast(tree, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params):
        state = adam.init(params)
        return state._replace(mu=cast(state.mu, dtype), nu=cast(state.nu, dtype))

    def update(grads, state, params=None):
        wide = state._replace(mu=cast(state.mu, jnp.float32), nu=cast(state.nu, jnp.float32))
        updates, wide = adam.update(grads, wide, params)
        leaves, tree = jax.tree.flatten(wide.nu)
        nu = [round_at_random(x, wide.count, number) for number, x in enumerate(leaves)]
        return updates, wide._replace(mu=cast(wide.mu, dtype), nu=tree.unflatten(nu))

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, step: jax.Array, leaf: int) -> jax.Array:
    """float32 to one of the two neighbours in bfloat16, with x as the mean of the choice.

    Args:
      x: finite numbers; others are rounded to nearest.
      step: integer, leaf: index of the array; other bits for each.
    """
    seed = _mixed(_mixed(step.astype(jnp.uint32)) + jnp.uint32(leaf))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32: below it, a carry comes with the right probability.
    bits = bits + (_mixed(_position(x.shape) + seed) >> 16)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _position(shape: tuple[int, ...]) -> jax.Array:
    """Index of every entry in row-major order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby, public domain): every bit depends on all."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
