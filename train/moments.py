"""Adam that can skip a step, and whose moments can be kept in 16 bits."""

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(
    b1: float, b2: float, eps: float, dtype: jnp.dtype | str = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with both moments kept in `dtype`; the arithmetic is in float32.

    `update(..., good=)`, a boolean scalar: where it is False, the moments stay as they were. The
    step is computed from what is kept, so that no compiler has to hold both.

    A second moment changes by a factor of b2 or so per step. 0.999 is less than half a unit in
    the last place of bfloat16, so that rounding to nearest would leave it where it is for ever. Both
    are rounded up or down at random instead, the closer number the likelier, so that their means are
    right. The random bits are a function of step, leaf and position: runs repeat bit for bit.

    Updates come from the moments as they are kept, so that the old ones are overwritten in place.

    Args:
      b1, b2, eps: as in `optax.scale_by_adam`.
      dtype: float32 (then this is `optax.scale_by_adam`) or bfloat16.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return _in_float32(adam, b1, b2, eps)

    def init(params):
        state = adam.init(params)
        mu, nu = (jax.tree.map(lambda x: x.astype(dtype), m) for m in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(grads, state, params=None, good=None):
        leaves, tree = jax.tree.flatten(grads)
        count = optax.safe_increment(state.count)

        def decayed(moments, decay, power, first_leaf):
            return [
                _kept(
                    good,
                    round_at_random(
                        decay * m.astype(jnp.float32) + (1 - decay) * g**power,
                        count,
                        first_leaf + i,
                    ),
                    m,
                )
                for i, (m, g) in enumerate(zip(jax.tree.leaves(moments), leaves, strict=True))
            ]

        # The barrier: or compilers compute the step from the old moments, which must be copied then.
        mu, nu = jax.lax.optimization_barrier(
            (decayed(state.mu, b1, 1, 0), decayed(state.nu, b2, 2, len(leaves)))
        )
        updates = [
            _step(m, v, 1 - b1**count, 1 - b2**count, eps) for m, v in zip(mu, nu, strict=True)
        ]
        state = state._replace(count=count, mu=tree.unflatten(mu), nu=tree.unflatten(nu))
        return tree.unflatten(updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _in_float32(
    adam: optax.GradientTransformation, b1: float, b2: float, eps: float
) -> optax.GradientTransformationExtraArgs:
    def update(grads, state, params=None, good=None):
        if good is None:
            return adam.update(grads, state, params)
        decayed = optax.tree.update_moment, optax.tree.update_moment_per_elem_norm
        mu, nu = (
            jax.tree.map(
                lambda new, old: _kept(good, new, old),
                update(grads, moments, decay, power),
                moments,
            )
            for update, moments, decay, power in zip(
                decayed, (state.mu, state.nu), (b1, b2), (1, 2), strict=True
            )
        )
        count = optax.safe_increment(state.count)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return updates, state._replace(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _kept(good: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if good is None else jnp.where(good, new, old)


def _step(mu, nu, mu_share, nu_share, eps) -> jax.Array:
    """Adam's step from moments that started at zero, by the shares that they have grown to."""
    mu, nu = mu.astype(jnp.float32), nu.astype(jnp.float32)
    return mu / mu_share / (jnp.sqrt(nu / nu_share) + eps)


def round_at_random(x: jax.Array, step: jax.Array, leaf: int) -> jax.Array:
    """float32 to one of the two neighbours in bfloat16, with x as the mean of the choice.

    Args:
      x: any shape; infinities and NaN stay what they are.
      step: integer, leaf: index of the array; other bits for each.
    """
    seed = _mixed(_mixed(step.astype(jnp.uint32)) + jnp.uint32(leaf))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32: below it, a carry comes with the right probability.
    exponent = jnp.uint32(0x7F800000)
    low = jnp.where(bits & exponent != exponent, _mixed(_position(x.shape) + seed) >> 16, 0)
    return jax.lax.bitcast_convert_type(((bits + low) >> 16).astype(jnp.uint16), jnp.bfloat16)


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
