"""Attention: which program computes it, and that it is the one asked for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import models
from slope_jax.models import attention

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SMALL = {
    "hidden_size": 32,
    "num_heads": 4,
    "mlp_size": 64,
    "num_layers": 2,
    "vocab_size": 61,
    "max_positions": 16,
}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)


def small(name, **overrides):
    return models.build(name, **(SMALL | overrides))


def logits(output):
    return output.mlm_logits if isinstance(output, models.BertOutput) else output


def relative(a, b):
    return np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))


def device(platform="gpu", capability="9.0"):
    return SimpleNamespace(platform=platform, compute_capability=capability, device_kind="H100")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "where", "implementation", "reason"),
    [
        ("bfloat16", 64, device(), "cudnn", "fused attention: bfloat16, heads of 64"),
        ("float16", 256, device(), "cudnn", "fused"),
        ("float16", 256, device(capability="8.0"), "xla", "up to 128, not 256"),
        ("bfloat16", 128, device(capability="8.0"), "cudnn", "fused"),
        ("bfloat16", 64, device(capability="7.5"), "xla", "needs compute capability 8.0"),
        ("bfloat16", 64, device(capability="gfx90a"), "xla", "NVIDIA"),
        ("float32", 64, device(), "xla", "bfloat16 or float16, not float32"),
        ("bfloat16", 12, device(), "xla", "multiple of 8 up to 256, not 12"),
        ("bfloat16", 64, SimpleNamespace(platform="cpu"), "xla", "this is cpu"),
    ],
)
def test_attention_path(dtype, head_dim, where, implementation, reason):
    path = models.attention_path(dtype, head_dim, device=where)
    assert path.implementation == implementation
    assert reason in path.reason


def test_attention_asks_jax_for_what_the_path_says(monkeypatch):
    asked = []

    def record(query, *_, implementation, **__):
        asked.append((implementation, query.dtype.name))
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)

    def trace(**overrides):
        model = small("gpt2-nano", num_layers=1, **overrides)
        jax.eval_shape(model.init, jax.random.key(0), IDS)
        return asked[-1]

    assert trace(dtype="bfloat16") == ("xla", "float32")
    monkeypatch.setattr(attention, "current", device)
    assert trace(dtype="bfloat16") == ("cudnn", "bfloat16")
    assert trace(dtype="bfloat16", attention="xla") == ("xla", "bfloat16")
    assert trace(dtype="float32") == ("xla", "float32")
    with pytest.raises(NotImplementedError, match="not float32; use attention=None"):
        trace(dtype="float32", attention="cudnn")


def scores_seen(causal, window, lengths, tokens):
    """(B, S, S): which keys each query sees."""
    query, key = np.mgrid[:tokens, :tokens]
    seen = np.ones((len(lengths), tokens, tokens), bool) & (key < np.array(lengths)[:, None, None])
    seen &= (key <= query) | (not causal)
    return seen & (query - key < (window or tokens))


@pytest.mark.parametrize(
    ("kv_heads", "causal", "window", "lengths"),
    [(1, True, None, None), (2, True, 5, None), (4, False, None, (12, 7)), (2, True, 1, None)],
)
def test_attention_is_the_formula(kv_heads, causal, window, lengths):
    """Grouped heads, causality, window and padding, against softmax(q k / sqrt(d)) v in float64."""
    config = small("llama-nano", num_kv_heads=kv_heads, window=window).config
    rng = np.random.default_rng(1)
    query = rng.normal(size=(2, 12, 4, 8))
    key, value = rng.normal(size=(2, 2, 12, kv_heads, 8))
    per_query = np.arange(4) // (4 // kv_heads)  # neighbours share a key
    scores = np.einsum("bqhd,bkhd->bhqk", query, key[:, :, per_query]) / np.sqrt(8)
    seen = scores_seen(causal, window, lengths or (12, 12), 12)
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value[:, :, per_query])

    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    context = attention.Context(None if lengths is None else jnp.asarray(lengths, jnp.int32))
    got = attention._attend(config, *arrays, causal, context)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_window_as_long_as_the_sequence_is_not_asked_for(monkeypatch):
    """Fused attention without a window runs in more places, and faster."""
    asked = []

    def record(query, *_, local_window_size, **__):
        asked.append(local_window_size)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    for window in (None, 12, 11):
        model = small("llama-nano", num_kv_heads=2, num_layers=1, window=window)
        jax.eval_shape(model.init, jax.random.key(0), IDS)
    assert asked == [None, None, (10, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("bert-tiny", {}),
        ("gpt2-nano", {}),
        ("llama-nano", {"num_kv_heads": 1}),
        ("llama-nano", {"num_kv_heads": 1, "window": 4}),
    ],
    ids=["bert", "gpt2", "llama", "window"],
)
def test_fused_attention_is_as_close_as_xla(name, overrides):
    """Padding, causality, grouped heads and window included: at most twice XLA's error in the same dtype, gradients 3x."""
    path = models.attention_path("bfloat16", 64)
    if path.implementation != "cudnn":
        pytest.skip(path.reason)
    options = {"num_layers": 2, "sparsity": "dense", "hidden_size": 128, "num_heads": 2}
    options |= overrides
    model = small(name, **options)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    lengths = np.array([12, 5 if name == "bert-tiny" else 12])
    inputs = (IDS, None, jnp.asarray(lengths, jnp.int32)) if name == "bert-tiny" else (IDS,)
    valid = jnp.asarray(np.arange(12)[None, :] < lengths[:, None], jnp.float32)

    def run(**overrides):
        model = small(name, **options, **overrides)

        def loss(params):
            out = logits(model.apply({"params": params}, *inputs))[..., :61].astype(jnp.float32)
            out = out * valid[:, :, None]
            return jnp.square(out).sum(), out

        with jax.numpy_dtype_promotion("standard"):  # JAX's 16-bit XLA attention promotes
            (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        return out, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grad)])

    exact = run(dtype="float32")
    fused, plain = run(dtype="bfloat16"), run(dtype="bfloat16", attention="xla")
    for factor, got, xla, want in zip((2, 3), fused, plain, exact, strict=True):
        assert np.isfinite(got).all()
        assert relative(got, want) <= factor * relative(xla, want)
