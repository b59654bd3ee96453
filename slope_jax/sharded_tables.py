"""Token tables on a mesh: rows of one that `tensor` and `fsdp` cut, and products with all of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from slope_jax.sharded import check_batch, mapped, sharded_matmul, summed
from slope_jax.sharding import (
    BATCH,
    COLUMN,
    DATA,
    FSDP,
    TENSOR,
    active_mesh,
    batch_spec,
    size_of,
)

P = PartitionSpec


def sharded_take(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows (B, S, hidden) of a table (vocabulary, hidden) that is cut by `tensor` and `fsdp`."""
    mesh = active_mesh()
    check_batch(tokens.shape[0], size_of(mesh, BATCH))
    return _take(table, tokens, jnp.dtype(dtype), mesh.shape[FSDP], mesh.shape[TENSOR])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _take(table, tokens, dtype, fsdp, tensor):
    def local(table, tokens):
        table = table.astype(dtype)
        if fsdp > 1:
            table = lax.all_gather(table, FSDP, axis=1, tiled=True)
        if tensor == 1:
            return jnp.take(table, tokens, axis=0)
        rows, here = _own_rows(tokens, table.shape[0])
        found = jnp.where(here[..., None], jnp.take(table, rows, axis=0), jnp.zeros((), dtype))
        return summed(found, TENSOR)

    specs = (P(TENSOR, FSDP), batch_spec(tokens.ndim))
    return mapped(local, specs, batch_spec(tokens.ndim + 1))(table, tokens)


def _take_forward(table, tokens, dtype, fsdp, tensor):
    return _take(table, tokens, dtype, fsdp, tensor), (table, tokens)


def _take_backward(dtype, fsdp, tensor, residuals, dy):
    table, tokens = residuals

    def local(tokens, dy):
        rows, here = _own_rows(tokens, table.shape[0] // tensor)
        dy = jnp.where(here[..., None], dy.astype(table.dtype), jnp.zeros((), table.dtype))
        gradient = jnp.zeros((table.shape[0] // tensor, table.shape[1]), table.dtype)
        gradient = gradient.at[rows].add(dy)
        if fsdp > 1:
            gradient = lax.psum_scatter(gradient, FSDP, scatter_dimension=1, tiled=True)
        return summed(gradient, DATA)

    specs = (batch_spec(tokens.ndim), batch_spec(tokens.ndim + 1))
    return mapped(local, specs, P(TENSOR, FSDP))(tokens, dy), None


_take.defvjp(_take_forward, _take_backward)


def _own_rows(tokens: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    rows = tokens - lax.axis_index(TENSOR).astype(tokens.dtype) * count
    here = (rows >= 0) & (rows < count)
    return jnp.where(here, rows, 0), here


def sharded_head(x: jax.Array, table: jax.Array, dtype: Any) -> jax.Array:
    """Products (B, ..., vocabulary) of x (B, ..., hidden) with the rows of a token table."""
    return sharded_matmul(x.astype(dtype), table.T, COLUMN)
