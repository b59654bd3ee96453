"""Plain JAX in the place of the kernels, by what their docstrings say: the way to them runs on any machine."""

import jax.numpy as jnp

from pallas_kernels import compressed, epilogue
from pallas_kernels.pattern import Pattern


def install(monkeypatch) -> list[str]:
    """Puts them there; the list gets the name of each one that runs."""
    from pallas_kernels.mosaic import few_tokens, first_product, matmul, narrow, support

    ran: list[str] = []
    monkeypatch.setattr(support, "device_obstacle", lambda *_: None)
    for module, name, run in (
        (few_tokens, "nm_matmul", _few),
        (first_product, "first_product", _first),
        (matmul, "nm_matmul", _many),
        (narrow, "narrow_product", _narrow),
    ):
        monkeypatch.setattr(module, name, _noted(ran, run))
    return ran


def _noted(ran, run):
    def call(*args, **options):
        ran.append(run.__name__.removeprefix("_"))
        return run(*args, **options)

    return call


def _few(
    x,
    values,
    metadata,
    config,
    *,
    adapter=None,
    low_rank=None,
    norm=None,
    form=None,
    save_moments=False,
    **options,
):
    tokens, k = x.shape
    norms = 0 if norm is None else 1 if norm[1] is None else 2
    rank = 0 if adapter is None else adapter[0].shape[1]
    config.geometry(tokens, k, values.shape[1], str(x.dtype), norms, rank)  # there is room
    x = _normed(x, norm, form)
    if adapter is not None:
        low_rank = (_float32(x, adapter[0]).astype(x.dtype), adapter[1])
    elif low_rank is not None and low_rank[0].ndim == 3:
        low_rank = (low_rank[0].sum(0).astype(x.dtype), low_rank[1])
    result = _many(
        x, values, metadata, None, low_rank=low_rank, joining=options.pop("residual"), **options
    )
    if not save_moments:
        return result
    y, *saved = result if isinstance(result, tuple) else (result,)
    return (y, *saved, epilogue.moments(y))


def _many(
    x,
    values,
    metadata,
    tile,
    *,
    bias=None,
    activation=None,
    low_rank=None,
    adapter=None,
    transposed=False,
    joining=None,
    through=None,
    save_preactivation=False,
    save_sums=False,
    sections=None,
    gated=False,
    out_dtype=None,
    processors=132,
    **others,
):
    assert not any(others.values())
    first = ()
    if adapter is not None:
        left, right = adapter
        low_rank = (_narrow(x, left, None, transposed=transposed), right)
        first = low_rank[:1]
    shape = 2 * values.shape[0], values.shape[1]
    w = compressed.CompressedMatrix(values, metadata, Pattern(2, 4), 0, shape)
    z = _float32(x, compressed.decompress(w))
    if low_rank is not None:
        z += _float32(*low_rank)
    if bias is not None:
        z += bias.astype(jnp.float32)[None]
    y = z if activation is None else epilogue.ACTIVATIONS[activation](z)
    if gated:
        y = epilogue.gate(z, activation)
    if through is not None:
        y = epilogue.gradient_through(through, joining, y)
    elif joining is not None:
        y += joining.astype(jnp.float32)
    dtype = out_dtype or x.dtype
    saved = (z.astype(dtype),) if save_preactivation else ()
    saved += (x.astype(jnp.float32).sum(0, keepdims=True),) if save_sums else ()
    y = y.astype(dtype)
    y = (y,) if sections is None else epilogue.apart(y, sections)
    found = (*y, *saved, *first)
    return found if len(found) > 1 or sections is not None else y[0]


def _first(x, left, cut, *, norm=None, form=None):
    """In parts of which the first is all."""
    t = _float32(_normed(x, norm, form), left)
    return jnp.pad(t[None], ((0, cut.parts - 1), (0, 0), (0, 0)))


def _narrow(x, left, cut, *, transposed=False):
    return _float32(x, left.T if transposed else left).astype(x.dtype)


def _normed(x, norm, form):
    if norm is None:
        return x
    scale, shift, moments = norm
    assert moments.shape == epilogue.moments(x).shape
    return epilogue.Norm(scale, shift, form.epsilon, form.centred)(x)


def _float32(a, b):
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32))
