"""Minimum-variance unbiased 2:4 estimates of a gradient (Chmiel et al., arXiv 2203.10991)."""

import jax
import jax.numpy as jnp

GROUP = 4  # consecutive tokens, of which two stay


def mvue(key: jax.Array, dy: jax.Array) -> jax.Array:
    """An unbiased estimate of `dy` that is 2:4 along its first axis.

    Args:
      key: a PRNG key.
      dy: (tokens, out), a multiple of four tokens.

    Returns:
      float32, shape of `dy`.
    """
    tokens, out = dy.shape
    groups = dy.astype(jnp.float32).reshape(tokens // GROUP, GROUP, out)
    u = jax.random.uniform(key, (tokens // GROUP, out))
    return estimate(groups, u).reshape(tokens, out)


def estimate(groups: jax.Array, u: jax.Array) -> jax.Array:
    """Two of every four entries, each divided by the probability with which it is chosen.

    An estimate that is a_i / p_i with probability p_i and else 0 is unbiased, and has the variance
    sum a_i^2 (1 / p_i - 1). Under sum p_i = 2 and p_i <= 1 the least is at p_i = min(1, |a_i| / c):
    here c is half of sum |a_i|, unless one entry exceeds that; it stays for certain, and the others
    share the second place. Systematic sampling draws exactly two with these probabilities: the
    numbers u and u + 1 fall into two of the intervals of lengths p_1 .. p_4, laid end to end.

    Args:
      groups: (..., 4, out) float32.
      u: (..., out), uniform in [0, 1).
    """
    magnitude = jnp.abs(groups)
    total, largest = magnitude.sum(-2, keepdims=True), magnitude.max(-2, keepdims=True)
    certain = 2 * largest > total
    shared = _ratio(magnitude, jnp.where(certain, total - largest, total / 2))
    p = jnp.where(certain & (magnitude == largest), 1.0, jnp.minimum(shared, 1.0))
    ends = jnp.minimum(jnp.cumsum(p, axis=-2), 2.0)  # no third one by rounding
    hits = jnp.ceil(ends - u[..., None, :])
    before = jnp.concatenate([jnp.zeros_like(hits[..., :1, :]), hits[..., :-1, :]], axis=-2)
    return jnp.where((hits > before) & (p > 0), _ratio(groups, p), 0.0)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
