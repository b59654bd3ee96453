"""Cross-entropy that keeps no array of the logits' size but the logits."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each label, and the index of each highest logit.

    Logits of a large vocabulary are the largest array of a training step. They stay in their dtype:
    two passes read them, the arithmetic in float32 inside, and one writes their gradient. Automatic
    differentiation would keep a float32 copy and scatter into another.

    Args:
      logits: (..., V), any float.
      labels: (...) integers in [0, V).

    Returns:
      nats (...), float32, and indices (...), int32; of equal logits the first one's.

    >>> nats, best = cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
    >>> bool(abs(nats[0] - jnp.log(4)) < 1e-6), best.tolist()
    (True, [0])
    """
    return _forward(logits, labels)[0]


def _forward(logits, labels):
    best = logits.argmax(-1)
    top = _pick(logits, best)
    total = jnp.exp(logits.astype(jnp.float32) - top[..., None]).sum(-1)
    normalizer = top + jnp.log(total)
    return (normalizer - _pick(logits, labels), best), (logits, labels, normalizer)


def _backward(residuals, gradients):
    logits, labels, normalizer = residuals
    probability = jnp.exp(logits.astype(jnp.float32) - normalizer[..., None])
    index = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    error = probability - (index == labels[..., None])
    result = (error * gradients[0][..., None]).astype(logits.dtype)
    # Two products read it: without a barrier, compilers split it up to repeat its parts in both.
    return jax.lax.optimization_barrier(result), None


def _pick(logits: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0].astype(jnp.float32)


cross_entropy.defvjp(_forward, _backward)
