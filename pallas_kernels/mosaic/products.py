"""The dispatcher's way in: logical arrays of any rank to kernels and back."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import batching, tuning
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.device import current
from pallas_kernels.epilogue import (
    Epilogue,
    apart,
    finish,
    first_product,
    gated_apart,
    moments,
    padded_rank,
    sums_of,
)
from pallas_kernels.mosaic import (
    few_tokens,
    first_tiles,
    matmul,
    narrow,
    normed,
    sddmm,
    transpose,
)
from pallas_kernels.mosaic import first_product as few_first
from pallas_kernels.mosaic.frame import STEP
from pallas_kernels.mosaic.support import DTYPES, narrow_obstacle, processors
from pallas_kernels.mosaic.two_four import as_two_four, values_of
from pallas_kernels.samples import adapter_rank
from pallas_kernels.sections import Sections, fit, whole

# Of a time of both of an adapter's products in one kernel: to which share of its tokens it holds for others, and
# from how many on for any more.
NEAR, MANY = 1 / 16, 8192
GAIN = 1.01  # at least, of such a time


def nm_matmul(
    x: jax.Array | Sections, w: CompressedMatrix, out_dtype, precision, epilogue: Epilogue
):
    del precision  # products of 16-bit numbers are exact in float32
    if epilogue.save_moments and not _gives_moments(x, w, epilogue, out_dtype):
        without = dataclasses.replace(epilogue, save_moments=False)
        result = nm_matmul(x, w, out_dtype, None, without)
        y, *saved = result if isinstance(result, tuple) else (result,)
        place = len(saved) - epilogue.save_sums - epilogue.save_first
        return (y, *saved[:place], None, *saved[place:])
    run = functools.partial(_nm_matmul, out_dtype=out_dtype)
    if epilogue.save_sums:  # of every member's own rows
        return batching.one_by_one(run)(x, w, epilogue)
    return batching.by_rows(run, _rows_of_matmul)(x, w, epilogue)


def nm_sddmm(
    x: jax.Array, dy: jax.Array | Sections, w: CompressedMatrix, out_dtype, precision, into=None
) -> jax.Array:
    del precision
    run = functools.partial(_nm_sddmm, out_dtype=out_dtype)
    return batching.one_by_one(run)(x, dy, w, into)


def narrow_matmul(x: jax.Array, left: jax.Array, transposed: bool) -> jax.Array:
    run = functools.partial(_narrow_matmul, transposed=transposed)
    return batching.by_rows(run, lambda x, left: (True, False))(x, left)


def nm_transpose(w: CompressedMatrix, dtype) -> CompressedMatrix:
    return batching.one_by_one(functools.partial(transpose.nm_transpose, dtype=dtype))(w)


def _nm_matmul(x, w, epilogue, *, out_dtype):
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    few = kernel_of("nm_matmul", tokens, k, f, x.dtype) == "few_tokens"
    if few or not _reads_apart(x, epilogue):
        x = whole(x)
    if few and epilogue.left_transposed:
        left = (epilogue.left, epilogue.adapter[1])
        epilogue = dataclasses.replace(epilogue, adapter=left, left_transposed=False)
    gated = gated_tile(tokens, k, f, x.dtype) if epilogue.gated else None
    if epilogue.gated and gated is None:
        result = _nm_matmul(x, w, epilogue.ungated(), out_dtype=out_dtype)
        return gated_apart(result, epilogue.activation)
    inside = None
    if epilogue.adapter is not None:
        rank = epilogue.adapter[1].shape[0]
        inside = tile_with_first(tokens, k, f, rank, x.dtype, gated=gated is not None)
    if epilogue.save_first and inside is None:
        t = _first_product(x, epilogue)
        result = _nm_matmul(x, w, epilogue.with_first(t), out_dtype=out_dtype)
        return (*result, t) if epilogue.saves else (result, t)
    if tokens == 0:
        zeros = jnp.zeros((*x.shape[:-1], f), jnp.float32)
        x, epilogue = epilogue.normalised(x)
        result = finish(zeros, epilogue.multiplied(x), out_dtype, x=x)
        return _with_moments(result) if epilogue.save_moments else result
    joins = _joins(epilogue, few, x.dtype, out_dtype)
    writes_apart = joins and not few and _writes_apart(epilogue, x.dtype, out_dtype)
    if epilogue.sections is not None and not writes_apart:
        result = _nm_matmul(x, w, dataclasses.replace(epilogue, sections=None), out_dtype=out_dtype)
        y, *saved = result if epilogue.saves or epilogue.save_first else (result,)
        y = apart(y, epilogue.sections)
        return (y, *saved) if saved else y
    if not joins:
        return _joined_apart(x, w, epilogue, out_dtype)
    leading = x.shape[:-1]
    w, rows = as_two_four(w), _rows(x, tokens)
    module = few_tokens if few else matmul
    with_first = _with_first(rows, f, epilogue)
    config = with_first or inside or gated or configuration("nm_matmul", tokens, k, f, x.dtype)
    norm = _norm_options(rows, f, config, epilogue)
    if not norm:
        rows, epilogue = epilogue.normalised(rows)
    options = norm | _joining_options(module, tokens, f, epilogue) | _where(module)
    if with_first:
        options["adapter"] = _padded(epilogue.adapter)
    elif inside:
        transposed = epilogue.left_transposed
        options |= {"adapter": _padded(epilogue.adapter, transposed), "transposed": transposed}
    else:
        options["low_rank"] = _low_rank(rows, epilogue, **norm)
    result = module.nm_matmul(
        rows,
        w.values,
        w.metadata,
        config,
        bias=epilogue.bias,
        activation=epilogue.activation,
        save_preactivation=epilogue.save_preactivation,
        out_dtype=out_dtype,
        **options,
    )
    saved = jax.tree.leaves(result)
    sums, first = (), ()
    if inside:
        t = saved.pop()[:, : epilogue.adapter[1].shape[0]]
        first = (t.reshape(*leading, -1),) if epilogue.save_first else ()
    if epilogue.save_sums:
        sums = (sums_of(rows if module is few_tokens else saved.pop()),)
    y, *saved = (a.reshape(*leading, *a.shape[1:]) for a in saved)
    if epilogue.sections is not None:
        y, saved = (y, *saved), []
    # In a scan that stacks y, XLA lets the kernel write into the stack, and for y's other users
    # runs it a second time. The barrier makes it copy y instead.
    y, *first = jax.lax.optimization_barrier((y, *first))
    if epilogue.save_moments and module is not few_tokens:
        saved.append(moments(y))
    saved += [*sums, *first]
    return (y, *saved) if saved else y


def _gives_moments(x, w, epilogue: Epilogue, out_dtype) -> bool:
    """Whether the kernel saves them by the way. Where `jax.vmap` then makes more rows of these than that
    kernel takes, they are made apart: who asks for them was promised them."""
    tokens = math.prod(x.shape[:-1])
    few = kernel_of("nm_matmul", tokens, *w.shape, x.dtype) == "few_tokens"
    return few and tokens > 0 and _joins(epilogue, few, x.dtype, out_dtype)


def _with_moments(result: tuple) -> tuple:
    """With those of y, which comes first, in the place of None."""
    return tuple(moments(result[0]) if array is None else array for array in result)


def _joins(epilogue: Epilogue, few: bool, dtype, out_dtype) -> bool:
    """Whether the kernel takes what has y's shape, if anything has."""
    if few:
        return epilogue.source is None
    return out_dtype == dtype or all(array is None for array in epilogue.joining)


def _reads_apart(x: jax.Array | Sections, epilogue: Epilogue) -> bool:
    """Whether the kernel for many tokens reads the sections of x where they are, if it has any."""
    return fit(x, STEP) and epilogue.adapter is None and epilogue.norm is None


def _rows(x: jax.Array | Sections, tokens: int) -> jax.Array | Sections:
    return x.reshape(tokens) if isinstance(x, Sections) else x.reshape(tokens, x.shape[-1])


def _writes_apart(epilogue: Epilogue, dtype, out_dtype) -> bool:
    """Whether the kernel for many tokens writes the sections apart, if there are any."""
    fitting = all(size % matmul.SECTION == 0 for size in epilogue.sections or ())
    return fitting and out_dtype == dtype


def _joined_apart(x, w, epilogue: Epilogue, out_dtype):
    """What has y's shape joins a float32 product in XLA."""
    names = ("residual", "source", "through")
    later = Epilogue(**{name: getattr(epilogue, name) for name in names})
    result = _nm_matmul(x, w, epilogue.without_joining(), out_dtype=jnp.float32)
    y, *saved = result if isinstance(result, tuple) else (result,)
    last = len(saved) - epilogue.save_sums - epilogue.save_first
    saved, others = saved[:last], saved[last:]
    y = finish(y, later, out_dtype)
    saved = [z.astype(out_dtype) for z in saved]
    saved += [moments(y)] * epilogue.save_moments + others
    return (y, *saved) if saved else y


def _joining_options(module, tokens: int, f: int, epilogue: Epilogue) -> dict[str, Any]:
    """What has y's shape, and what is asked for of y, as the kernel takes them."""
    residual, source = (a if a is None else a.reshape(tokens, f) for a in epilogue.joining)
    if module is few_tokens:
        return {"residual": residual, "save_moments": epilogue.save_moments}
    return {
        "joining": residual if source is None else source,
        "through": epilogue.through,
        "save_sums": epilogue.save_sums,
        "sections": epilogue.sections,
        "gated": epilogue.gated,
    }


def kernel_of(op: str, tokens: int, k: int, f: int, dtype) -> str:
    """The kernel that runs `op` on this device, as of `tuning.kernel_of`."""
    return tuning.kernel_of(op, tokens, k, f, dtype, *_device())


def configuration(op: str, tokens: int, k: int, f: int, dtype):
    """What the kernel of an op runs by: what was measured to be the best for such a shape, or what its
    rule says.

    Args:
      op: "nm_matmul" or "nm_sddmm".
    """
    op = kernel_of(op, tokens, k, f, dtype)
    module, make = {
        "nm_matmul": (matmul, matmul.Tile),
        "few_tokens": (few_tokens, few_tokens.Config),
        "nm_sddmm": (sddmm, sddmm.Tile),
    }[op]
    entry = _measured(op, tokens, k, f, dtype)
    if entry is None:
        return module.choose(tokens, k, f, **_where(module))
    config = make(**entry.config)
    if module is matmul:
        return matmul.suited(config, entry.tokens, tokens, k, f, **_where(module))
    if module is few_tokens and not few_tokens.fits(config, tokens, k, f):
        return few_tokens.choose(tokens, k, f)
    return config


def gated_tile(tokens: int, k: int, f: int, dtype) -> matmul.Tile | None:
    """How the kernel for many tokens is cut that gates as well; None where that is done apart."""
    if not tokens or kernel_of("nm_matmul", tokens, k, f, dtype) == "few_tokens":
        return None
    tile = configuration("nm_matmul", tokens, k, f, dtype)
    return matmul.gating(tile, tokens, k, f, **_where(matmul))


def _where(module) -> dict[str, int]:
    """The device's processors, for kernels that are laid out for them."""
    return {} if module is few_tokens else {"processors": processors()}


def _norm_options(x, f: int, config, epilogue: Epilogue) -> dict[str, Any]:
    """A norm as the kernels of few tokens take it; nothing if it is to be made apart, as for XLA, which
    multiplies by l where tokens are more."""
    norm = epilogue.norm
    by_xla = epilogue.adapter is not None and x.shape[0] > few_tokens.MOST_FIRST
    if norm is None or by_xla or x.shape[0] > few_tokens.MOST_NORMED:
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
    return tuning.best(op, tokens, k, f, dtype, *_device())


def _device() -> tuple[str, str | None]:
    device = current()
    return device.device_kind, getattr(device, "compute_capability", None)


def _narrow_matmul(x, left, *, transposed: bool):
    rank = left.shape[0 if transposed else 1]
    left = padded_rank(left, 0 if transposed else 1)
    rows = x.reshape(-1, x.shape[-1])
    cut = narrow.choose(*rows.shape, left.shape[0 if transposed else 1], **_where(narrow))
    t = narrow.narrow_product(rows, left, cut, transposed=transposed)[:, :rank]
    return jax.lax.optimization_barrier(t.reshape(*x.shape[:-1], rank))  # as in `_nm_matmul`


def _nm_sddmm(x, dy, w, into, *, out_dtype):
    tokens, (k, f) = math.prod(x.shape[:-1]), w.shape
    if tokens == 0:
        none = jnp.zeros((w.pattern.kept(k), f), out_dtype)
        return none if into is None else into.astype(out_dtype)
    tile = configuration("nm_sddmm", tokens, k, f, x.dtype)
    flat_x = x.reshape(tokens, k)
    flat_dy = _rows(dy if fit(dy, STEP) else whole(dy), tokens)
    metadata = as_two_four(w).metadata
    run = functools.partial(sddmm.nm_sddmm, tile=tile, **_where(sddmm))
    if 2 * w.n == w.m:  # values are where those of 2:4 are
        return run(flat_x, flat_dy, metadata, out_dtype=out_dtype, into=into)
    exact = jnp.float32 if into is not None else out_dtype
    dw = values_of(run(flat_x, flat_dy, metadata, out_dtype=exact), w)
    return dw if into is None else (dw + into.astype(exact)).astype(out_dtype)


def _rows_of_matmul(x, w: CompressedMatrix, epilogue: Epilogue):
    low_rank = None if epilogue.low_rank is None else (True, False)
    adapter = None if epilogue.adapter is None else (False, False)
    bias = None if epilogue.bias is None else False
    norm = jax.tree.map(lambda _: False, epilogue.norm)
    if norm is not None and norm.moments is not None:
        norm = dataclasses.replace(norm, moments=True)
    joining = (None if array is None else True for array in epilogue.joining)
    return (
        jax.tree.map(lambda _: True, x),
        (False, False),
        (bias, low_rank, adapter, norm, *joining),
    )


def _with_first(x, f: int, epilogue: Epilogue) -> few_tokens.Config | None:
    """How the kernel of few tokens makes an adapter's first product as well, if it should."""
    if epilogue.adapter is None or x.shape[0] > few_tokens.MOST_FIRST:
        return None
    norm = epilogue.norm
    norms = 0 if norm is None else 1 if norm.shift is None else 2
    rank = _padded(epilogue.adapter)[1].shape[0]
    return few_tokens.choose_with_first(*x.shape, f, str(x.dtype), norms, rank)


def tile_with_first(
    tokens: int, k: int, f: int, rank: int, dtype, *, gated: bool = False
) -> matmul.Tile | None:
    """How the kernel for many tokens is cut that makes an adapter's first product as well; None where that
    was not measured to be faster than the first product apart, joins the kernel for few tokens, or takes a
    tile that cannot gate if it is to.

    Other tokens than were measured go by its times if they are near and take no wave of tiles more, or more than
    were measured and many: how tiles fill their waves changes with every one where waves are few.
    """
    if not tokens or not rank or str(dtype) not in DTYPES:
        return None
    few = kernel_of("nm_matmul", tokens, k, f, dtype) == "few_tokens"
    entry = None if few else _measured("with_first", tokens, k, f, dtype)
    if entry is None or entry.dense_us < GAIN * entry.sparse_us:
        return None
    tile = matmul.Tile(**entry.config)
    if gated and not tile.gates:
        return None
    plan, timed = (
        tile.schedule(n, k, f, processors(), first_rank=rank) for n in (tokens, entry.tokens)
    )
    waves = [each.waves + bool(each.left) for each in (plan, timed)]
    near = abs(tokens - entry.tokens) <= NEAR * entry.tokens and waves[0] <= waves[1]
    if not near and not tokens >= 2 * entry.tokens >= 2 * MANY:
        return None
    count = tile.firsts(tokens, k, rank)
    if count > tile.firsts(tokens, k, adapter_rank(min(k, f))):  # of the rank that was timed
        return None
    return None if first_tiles.obstacle(tile, plan, count) else tile


def _padded(adapter: tuple[jax.Array, jax.Array], transposed: bool = False):
    left, r = adapter
    return padded_rank(left, -2 if transposed else -1), padded_rank(r, -2)


def _first_product(x, epilogue: Epilogue) -> jax.Array:
    """An adapter's, by the kernel for it or XLA."""
    left, transposed = epilogue.adapter[0], epilogue.left_transposed
    shape = left.shape[::-1] if transposed else left.shape
    x = whole(x)
    if narrow_obstacle(shape, str(x.dtype), math.prod(x.shape[:-1])):
        return first_product(x, epilogue.left)
    return _narrow_matmul(x, left, transposed=transposed)


def _low_rank(x, epilogue: Epilogue, **norm):
    """t and r as the kernel takes them, or None; t of the norm of x, where the kernels make that."""
    if epilogue.adapter is not None and x.shape[0] <= few_tokens.MOST_FIRST:
        left, r = _padded(epilogue.adapter)
        cut = few_first.choose(*left.shape)
        return few_first.first_product(x, left, cut, **norm), r
    if epilogue.adapter is not None:
        t, r = _first_product(x, epilogue), epilogue.adapter[1]
    elif epilogue.low_rank is not None:
        t, r = epilogue.low_rank
    else:
        return None
    return padded_rank(t.reshape(x.shape[0], -1), -1), padded_rank(r, -2)
