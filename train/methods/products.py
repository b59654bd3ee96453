"""Dense products whose weight gradient reads a pruned dy: `dot_general_cls` of simulated linears.

y = x @ w,  dx = dy @ w.T,  dw = x.T @ pruned(dy)         dy pruned 2:4 along the tokens
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from slope_jax import masks
from slope_jax.models.stack import GRADIENT
from train.methods.base import masked
from train.methods.mvue import GROUP, mvue

PATTERN = "2:4"


class MvueProduct(nn.Module):
    """dy is estimated without bias, see `mvue`, where there is an rng named "gradient"."""

    @nn.compact
    def __call__(self, x, w, dimension_numbers, precision=None, **options):
        if not self.has_rng(GRADIENT):
            return jax.lax.dot_general(x, w, dimension_numbers, precision, **options)
        return _product(mvue, precision, x, w, self.make_rng(GRADIENT))


class PrunedProduct(nn.Module):
    """Of four consecutive tokens' dy the two of largest magnitude stay."""

    @nn.compact
    def __call__(self, x, w, dimension_numbers, precision=None, **options):
        return _product(_largest, precision, x, w, None)


def _largest(key: None, dy: jax.Array) -> jax.Array:
    return masked(dy, masks.magnitude_mask(dy, PATTERN))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(prune: Callable, precision, x, w, key):
    return jnp.matmul(x, w, precision=precision)


def _forward(prune, precision, x, w, key):
    return _product(prune, precision, x, w, key), (x, w, key)


def _backward(prune, precision, residuals, dy):
    x, w, key = residuals
    tokens = dy.size // dy.shape[-1]
    if tokens % GROUP:
        raise ValueError(
            f"{tokens} tokens reach a linear whose output gradient is pruned {PATTERN} along the"
            f" tokens; micro-batch x sequence must be a multiple of {GROUP}"
        )
    pruned = prune(key, dy.reshape(tokens, -1)).astype(x.dtype)
    dw = jnp.matmul(
        x.reshape(tokens, -1).T, pruned, precision=precision, preferred_element_type=jnp.float32
    )
    dx = jnp.matmul(dy, w.T, precision=precision)
    return dx, dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)


def check_tokens(config) -> None:
    """Raises a ValueError unless a phase's micro-batches are whole groups of tokens."""
    for phase in config.phases:
        micro = phase.batch_size // phase.accumulation
        if micro * phase.seq_len % GROUP:
            raise ValueError(
                f"--method={config.method} prunes the output gradient {PATTERN} along the tokens,"
                f" but a micro-batch of {micro} x {phase.seq_len} is no multiple of {GROUP}; change"
                " batch_size, accumulation or seq_len"
            )
