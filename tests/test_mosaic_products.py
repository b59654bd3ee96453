"""The way from `nm_matmul` to the kernels, for any number of tokens: what each of them is given."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standins
from hopper import needs_jax

from pallas_kernels import compress, decompress, nm_matmul, tuning
from pallas_kernels.epilogue import Norm, moments

TOKENS = (1, 16, 17, 32, 33, 64, 65, 1600)
K, MANY, F = 136, 1544, 72  # inputs, and those for which x @ l has a kernel
RANKS = (
    20,
    40,
)  # one that is filled up, and that the product of few tokens makes itself; and one apart


def normal(seed, *shape):
    values = np.random.default_rng(seed).standard_normal(shape) / 8
    return jnp.asarray(values, jnp.bfloat16)


def exact(x, w, terms):
    """In float64 from the first product on."""
    x, w = np.float64(x), np.float64(decompress(w))
    if norm := terms.get("norm"):
        x = x - x.mean(-1, keepdims=True) if norm.centred else x
        x = (
            x
            / np.sqrt(np.square(x).mean(-1, keepdims=True) + norm.epsilon)
            * np.float64(norm.scale)
        )
        x = x if norm.shift is None else x + np.float64(norm.shift)
    y = x @ w
    if "adapter" in terms:
        left, right = map(np.float64, terms["adapter"])
        y += x @ left @ right
    if "low_rank" in terms:
        t, right = map(np.float64, terms["low_rank"])
        y += t @ right
    y += np.float64(terms.get("bias", 0))
    y = np.maximum(y, 0) if terms.get("activation") else y
    return y + np.float64(terms.get("residual", 0))


def all_terms(tokens, k):
    """Norms with and without a shift, an adapter or its second product, and what may join."""
    x = normal(0, tokens, k)
    scale = jnp.linspace(0.5, 1.5, k)
    norms = (None, Norm(scale), Norm(scale, scale - 1, centred=False))
    adapters = [(normal(3, k, rank), normal(4, rank, F)) for rank in RANKS]
    low_ranks = [{}, *({"adapter": adapter} for adapter in adapters)]
    low_ranks += [{"low_rank": (normal(5, tokens, RANKS[0]), adapters[0][1])}]
    joined = {"bias": normal(6, F), "activation": "relu", "residual": normal(7, tokens, F)}
    for norm, low_rank, joins in itertools.product(norms, low_ranks, ({}, joined)):
        yield x, ({} if norm is None else {"norm": norm}) | low_rank | joins


@needs_jax
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_kernel_is_given_what_makes_the_product(monkeypatch, tokens):
    k = MANY if tokens > 1500 else K
    w = compress(normal(1, k, F), "2:4")
    ran = standins.install(monkeypatch)
    for x, terms in all_terms(tokens, k):
        found = np.float64(nm_matmul(x, w, implementation="mosaic", **terms))
        want = exact(x, w, terms)
        # A norm, t and y are rounded to 8 binary digits; nothing cancels.
        assert np.abs(found - want).max() <= 2**-6 * np.abs(want).max(), terms.keys()
    assert ("few" if tokens <= 64 else "many") in ran
    assert ("many" in ran) == (tokens > 64)
    assert ("first" in ran) == (tokens <= 16)
    assert ("narrow" in ran) == (tokens >= 1536)


@needs_jax
@pytest.mark.parametrize("tokens", [33, 64])
def test_few_tokens_are_for_the_kernel_for_many_where_that_was_faster(monkeypatch, tokens):
    from pallas_kernels.mosaic import products

    def measured(op, tokens, *_):
        fast = tuning.Entry("nm_matmul", "16-bit", 64, (K, F), {"blocks": 2}, 1.0, 3.0)
        slow = tuning.Entry("few_tokens", "16-bit", 64, (K, F), {"split": 2}, 2.0, 3.0)
        return {"nm_matmul": fast, "few_tokens": slow}.get(op)

    ran = standins.install(monkeypatch)
    monkeypatch.setattr(products, "_measured", measured)
    monkeypatch.setattr(products, "kernel_of", lambda *_: "nm_matmul")
    w = compress(normal(1, K, F), "2:4")
    for x, terms in all_terms(tokens, K):
        found = np.float64(nm_matmul(x, w, implementation="mosaic", **terms))
        want = exact(x, w, terms)
        assert np.abs(found - want).max() <= 2**-6 * np.abs(want).max(), terms.keys()
    _, moments = nm_matmul(
        x, w, implementation="mosaic", residual=terms["residual"], save_moments=True
    )
    assert moments is None
    parts = nm_matmul(x, w, implementation="mosaic", sections=(64, 8))
    assert [part.shape for part in parts] == [(tokens, 64), (tokens, 8)]
    assert set(ran) == {"many"}


@needs_jax
def test_moments_are_there_under_vmap_whatever_makes_the_product(monkeypatch):
    """Of 2 x 20 rows, which are for the kernel for many here, and of none."""
    from pallas_kernels.mosaic import products

    def kernel(op, tokens, *_):
        return "nm_matmul" if tokens > 32 else "few_tokens"

    ran = standins.install(monkeypatch)
    monkeypatch.setattr(products, "kernel_of", kernel)
    w, x, residual = compress(normal(1, K, F), "2:4"), normal(2, 2, 20, K), normal(3, 2, 20, F)

    def product(x, residual):
        return nm_matmul(x, w, residual=residual, implementation="mosaic", save_moments=True)

    y, found = jax.vmap(product)(x, residual)
    assert set(ran) == {"few", "many"}
    np.testing.assert_array_equal(found, moments(y))
    assert product(x, residual)[1] is None  # who asks for moments of many rows gets none
    y, found = jax.vmap(product)(x[:0], residual[:0])
    assert (y.shape, found.shape) == ((0, 20, F), (0, 20, 2, 2))
