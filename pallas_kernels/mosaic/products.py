"""The dispatcher's way in: logical arrays of any rank to kernels and back."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import batching, tuning
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.epilogue import Epilogue, Norm, finish, moments, padded_rank
from pallas_kernels.mosaic import few_tokens, first_product, matmul, normed, sddmm, transpose
from pallas_kernels.mosaic.two_four import as_two_four, values_of


def nm_matmul(x: jax.Array, w: CompressedMatrix, out_dtype, precision, epilogue: Epilogue):
    del precision  # products of 16-bit numbers are exact in float32
    run = batching.by_rows(functools.partial(_nm_matmul, out_dtype=out_dtype), _rows_of_matmul)
    return run(x, w, epilogue)


def nm_sddmm(
    x: jax.Array, dy: jax.Array, w: CompressedMatrix, out_dtype, precision, into=None
) -> jax.Array:
    del precision
    run = functools.partial(_nm_sddmm, out_dtype=out_dtype)
    return batching.one_by_one(run)(x, dy, w, into)


def nm_transpose(w: CompressedMatrix, dtype) -> CompressedMatrix:
    return batching.one_by_one(functools.partial(transpose.nm_transpose, dtype=dtype))(w)


def _nm_matmul(x, w, epilogue, *, out_dtype):
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    if tokens == 0:
        zeros = jnp.zeros((*x.shape[:-1], f), jnp.float32)
        x, epilogue = epilogue.normalised(x)
        return finish(zeros, epilogue.multiplied(x), out_dtype)
    leading = x.shape[:-1]
    w, rows, residual = as_two_four(w), x.reshape(tokens, k), epilogue.residual
    module = few_tokens if tokens <= few_tokens.FEW_TOKENS else matmul
    config = _config(module, tokens, k, f, x.dtype)
    joined = norm = _norm_options(rows, f, config, epilogue.norm)
    if not norm:
        rows, epilogue = epilogue.normalised(rows)
    if module is few_tokens:
        joined, residual = norm | {"save_moments": epilogue.save_moments}, None
        if epilogue.residual is not None:
            joined["residual"] = epilogue.residual.reshape(tokens, f)
    result = module.nm_matmul(
        rows,
        w.values,
        w.metadata,
        config,
        bias=epilogue.bias,
        activation=epilogue.activation,
        low_rank=_low_rank(rows, epilogue, **norm),
        save_preactivation=epilogue.save_preactivation,
        out_dtype=out_dtype,
        **joined,
    )
    y, *saved = (a.reshape(*leading, *a.shape[1:]) for a in jax.tree.leaves(result))
    # In a scan that stacks y, XLA lets the kernel write into the stack, and for y's other users
    # runs it a second time. The barrier makes it copy y instead.
    y = jax.lax.optimization_barrier(y)
    if residual is not None:
        y = (y.astype(jnp.float32) + residual.astype(jnp.float32)).astype(out_dtype)
    if epilogue.save_moments and module is not few_tokens:
        saved.append(None)
    return (y, *saved) if saved else y


def _config(module, tokens: int, k: int, f: int, dtype):
    """What was measured to be the best for this shape, or what the kernel's rule says."""
    name, make = {
        matmul: ("nm_matmul", matmul.Tile),
        few_tokens: ("few_tokens", few_tokens.Config),
    }[module]
    entry = _measured(name, tokens, k, f, dtype)
    return module.choose(tokens, k, f) if entry is None else make(**entry.config)


def _norm_options(x, f: int, config, norm: Norm | None) -> dict[str, Any]:
    """A norm as the kernels of few tokens take it; nothing if it is to be made apart."""
    if norm is None or x.shape[0] > few_tokens.MOST_NORMED:
        return {}
    scale, shift = (a if a is None else a.astype(jnp.float32) for a in (norm.scale, norm.shift))
    try:
        config.geometry(*x.shape, f, str(x.dtype), norms=1 if shift is None else 2)
    except ValueError:  # no room for the parameters
        return {}
    known = moments(x) if norm.moments is None else norm.moments
    known = known.reshape(len(x), *known.shape[-2:])
    return {"norm": (scale, shift, known), "form": normed.Form(norm.epsilon, norm.centred)}


def _measured(op: str, tokens: int, k: int, f: int, dtype) -> tuning.Entry | None:
    device = jax.devices()[0]
    return tuning.best(
        op, tokens, k, f, dtype, device.device_kind, getattr(device, "compute_capability", None)
    )


def _nm_sddmm(x, dy, w, into, *, out_dtype):
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    if tokens == 0:
        none = jnp.zeros((w.pattern.kept(k), f), out_dtype)
        return none if into is None else into.astype(out_dtype)
    entry = _measured("nm_sddmm", tokens, k, f, x.dtype)
    tile = sddmm.choose(tokens, k, f) if entry is None else sddmm.Tile(**entry.config)
    flat_x, flat_dy = x.reshape(tokens, k), dy.reshape(tokens, f)
    metadata = as_two_four(w).metadata
    if 2 * w.n == w.m:  # values are where those of 2:4 are
        return sddmm.nm_sddmm(flat_x, flat_dy, metadata, tile, out_dtype=out_dtype, into=into)
    exact = jnp.float32 if into is not None else out_dtype
    dw = values_of(sddmm.nm_sddmm(flat_x, flat_dy, metadata, tile, out_dtype=exact), w)
    return dw if into is None else (dw + into.astype(exact)).astype(out_dtype)


def _rows_of_matmul(x, w: CompressedMatrix, epilogue: Epilogue):
    low_rank = None if epilogue.low_rank is None else (True, False)
    adapter = None if epilogue.adapter is None else (False, False)
    bias = None if epilogue.bias is None else False
    norm = jax.tree.map(lambda _: False, epilogue.norm)
    if norm is not None and norm.moments is not None:
        norm = dataclasses.replace(norm, moments=True)
    residual = None if epilogue.residual is None else True
    return True, (False, False), (bias, low_rank, adapter, norm, residual)


def _low_rank(x, epilogue: Epilogue, **norm):
    """t and r as the kernel takes them, or None; t of the norm of x, where the kernels make that."""
    if epilogue.adapter is not None and x.shape[0] <= first_product.MOST_TOKENS:
        left, r = epilogue.adapter
        left, r = padded_rank(left, -1), padded_rank(r, -2)
        cut = first_product.choose(*left.shape)
        return first_product.first_product(x, left, cut, **norm), r
    low_rank = epilogue.multiplied(x).low_rank
    if low_rank is None:
        return None
    t, r = low_rank
    return padded_rank(t.reshape(x.shape[0], -1), -1), padded_rank(r, -2)
