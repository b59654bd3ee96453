"""Attention of a decode step: its choice and lowering on any machine, its results on a GPU."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import fenced, lowered, needs_gpu, needs_jax
from jax.sharding import AxisType

from pallas_kernels.mosaic import support
from slope_jax import models
from slope_jax.sharding import AXES

obstacle = support.device_obstacle()
# Sequences, heads, queries that share one, slots, width.
SHAPES = [
    (1, 40, 1, 528, 128),
    (3, 2, 4, 300, 64),
    (2, 1, 8, 1100, 80),
    (1, 8, 4, 2080, 128),
    (16, 3, 2, 33, 96),
    (17, 8, 1, 160, 128),
]


def problem(shape, dtype=jnp.bfloat16):
    """Rows of queries, keys and values; a cache, NaN where nothing was written yet; positions.

    Such caches are compared in float64: to NumPy a bfloat16 NaN is not equal to another.
    """
    batch, heads, queries, slots, width = shape
    rng = np.random.default_rng(0)
    sizes = (batch, heads * (queries + 2) * width), *((batch, heads, slots, width),) * 2
    rows, *cache = (rng.standard_normal(size).astype(dtype) for size in sizes)
    positions = rng.integers(0, slots, batch)
    positions[0] = slots - 1
    if batch > 2:
        positions[1:3] = 0, min(31, slots - 1)
    for array, (row, position) in itertools.product(cache, enumerate(positions)):
        array[row, :, position:] = np.nan
    return *(jnp.asarray(array) for array in (rows, *cache)), jnp.asarray(positions, jnp.int32)


def run(rows, key, value, positions, *, queries, **options):
    from pallas_kernels.mosaic import decode_attention

    heads, width = key.shape[1], key.shape[3]
    columns = (0, heads * queries * width, heads * (queries + 1) * width)
    options |= {"queries": queries, "columns": columns}
    return jax.jit(functools.partial(decode_attention.attend, **options))(
        rows, rows, rows, key, value, positions
    )


def with_new(shape, rows, key, value, positions):
    """The cache with the tokens' own keys and values."""
    batch, heads, queries, _, width = shape
    first = heads * queries * width
    new = np.asarray(rows)[:, first:].reshape(batch, 2, heads, width)
    cache = [np.array(array) for array in (key, value)]
    for row, position in enumerate(positions):
        for number, array in enumerate(cache):
            array[row, :, position] = new[row, number]
    return cache


def exact(shape, rows, key, value, positions, window=None):
    """In float64."""
    batch, heads, queries, slots, width = shape
    key, value = with_new(shape, rows, key, value, positions)
    rows = np.float64(rows)[:, : heads * queries * width].reshape(batch, heads, queries, width)
    behind = np.asarray(positions)[:, None] - np.arange(slots)
    seen = (behind >= 0) & (behind < (window or slots))
    key, value = (np.where(seen[:, None, :, None], np.float64(a), 0) for a in (key, value))
    scores = np.einsum("bhqw,bhsw->bhqs", rows, key) / np.sqrt(width)
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqs,bhsw->bhqw", weights, value).reshape(batch, -1)


def plain(shape, rows, key, value, positions):
    """As XLA computes it: products of 16-bit numbers, weights in float32 that are rounded to them."""
    batch, heads, queries, slots, width = shape
    rows = rows[:, : heads * queries * width].reshape(batch, heads, queries, width)
    value = jnp.nan_to_num(value)  # of what is not seen
    float32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bhqw,bhsw->bhqs", rows, key, **float32) / math.sqrt(width)
    seen = (positions[:, None] >= jnp.arange(slots)[None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(rows.dtype)
    mixed = jnp.einsum("bhqs,bhsw->bhqw", weights, value, **float32)
    return mixed.astype(rows.dtype).reshape(batch, -1)


@needs_jax
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 100])
def test_it_lowers_for_cuda_without_a_gpu(shape, window, strict_dtypes):
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in problem(shape)]
    attend = functools.partial(run, queries=shape[2], window=window)
    assert "decode_attention" in lowered(attend, *arrays)


@needs_jax
@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_decode_of_one_token_uses_it_and_of_more_does_not(monkeypatch, name):
    monkeypatch.setattr(support, "device_obstacle", lambda *_: None)
    options = {"sparsity": "dense", "dtype": "bfloat16", "scan": False}
    model = models.build(name, num_layers=2, vocab_size=61, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    shapes |= {"cache": jax.eval_shape(lambda: models.init_cache(model.config, 3, 8))}

    def decode(variables, ids, positions):
        return model.apply(variables, ids, positions=positions, mutable=["cache"])

    for tokens, wanted in [(1, True), (2, False)]:
        ids = jax.ShapeDtypeStruct((3, tokens), jnp.int32)
        with jax.numpy_dtype_promotion("standard"):  # JAX's 16-bit XLA attention promotes
            traced = jax.jit(decode).trace(shapes, ids, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert ("decode_attention" in text) == wanted


def stand_in(query, new_key, new_value, key, value, positions, *, columns, queries, window=None):
    """What the kernel promises, in plain JAX."""
    batch, heads, slots, width = key.shape
    rows = query[:, columns[0] :][:, : heads * queries * width]
    rows = rows.reshape(batch, heads, queries, width)
    cache = []
    for array, new, first in ((key, new_key, columns[1]), (value, new_value, columns[2])):
        new = new[:, first : first + heads * width].reshape(batch, heads, width)
        cache.append(array.at[jnp.arange(batch), :, positions].set(new))
    scores = jnp.einsum("bhqw,bhsw->bhqs", rows, cache[0]) / math.sqrt(width)
    behind = positions[:, None] - jnp.arange(slots)[None]
    seen = (behind >= 0) & (behind < (window or slots))
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhqs,bhsw->bhqw", weights, cache[1])
    return mixed.reshape(batch, -1), *cache


@needs_jax
@pytest.mark.parametrize(
    ("name", "options"), [("gpt2-nano", {}), ("llama-nano", {}), ("llama-nano", {"window": 4})]
)
def test_a_model_asks_it_for_what_xla_computes(monkeypatch, name, options):
    """Heads, columns, window, rotated keys and the cache: the same logits, and the same next ones."""
    from pallas_kernels.mosaic import decode_attention
    from slope_jax.models import attention

    few = {"num_layers": 2, "vocab_size": 61, "scan": False, "sparsity": ".*=dense"}
    model = models.build(name, **few, **options)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    ids = jax.random.randint(jax.random.key(1), (3, 9), 0, 61)

    def logits():
        run = jax.jit(functools.partial(model.apply, mutable=["cache"]))
        cache, found = models.init_cache(model.config, 3, 12), []
        places = jnp.array([[9], [5], [7]])
        for step in range(3):
            given = {"positions": places + step - 1} if step else {}
            tokens = ids[:, step : step + 1] if step else ids
            y, updated = run({**variables, "cache": cache}, tokens, **given)
            cache = updated["cache"]
            found.append(y)
        return found

    expected = logits()
    monkeypatch.setattr(attention, "decode_path", lambda _: attention.AttentionPath("mosaic", ""))
    monkeypatch.setattr(decode_attention, "attend", stand_in)
    for ours, theirs in zip(logits(), expected, strict=True):
        np.testing.assert_allclose(ours[..., :61], theirs[..., :61], rtol=1e-4, atol=1e-5)


@needs_jax
def test_the_path_says_why(monkeypatch):
    config = models.build("llama-nano", dtype="bfloat16").config
    assert models.decode_path(config).implementation == ("xla" if obstacle else "mosaic")
    monkeypatch.setattr(support, "device_obstacle", lambda *_: None)
    assert models.decode_path(config) == (
        "mosaic",
        f"one kernel: bfloat16, heads of {config.head_width}",
    )
    with jax.set_mesh(
        jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    ):
        assert "without a mesh" in models.decode_path(config).reason
    for options, reason in [
        ({"attention": "xla"}, "attention='xla'"),
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"num_kv_heads": 1, "num_heads": 16, "hidden_size": 256}, "up to 8 queries.*not 16"),
        (
            {"num_kv_heads": 1, "num_heads": 1, "hidden_size": 256},
            "multiple of 8 up to 128, not 256",
        ),
    ]:
        path = models.decode_path(
            models.build("llama-nano", **{"dtype": "bfloat16"} | options).config
        )
        assert path.implementation == "xla"
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(path.reason)


@needs_jax
def test_bad_input_is_named():
    with pytest.raises(NotImplementedError, match="up to 128, not 136"):
        run(*problem((1, 2, 1, 64, 136)), queries=1)
    for cut in ((3, 8), (1, 16)):
        with pytest.raises(
            ValueError, match=r"cut=\(\d, \d+\) must be 1, 2, 4 or 8 CTAs.* 4 or 8 w"
        ):
            run(*problem((1, 2, 1, 64, 128)), queries=1, cut=cut)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_its_error_is_within_twice_that_of_plain_jax(shape, dtype):
    rows, key, value, positions = problem(shape, dtype)
    wanted = exact(shape, rows, key, value, positions)
    cache = [jnp.asarray(a) for a in with_new(shape, rows, key, value, positions)]
    apart = jax.jit(functools.partial(plain, shape))(rows, *cache, positions)
    y, *found = run(rows, key, value, positions, queries=shape[2])
    errors = [np.abs(np.float64(a) - wanted).max() for a in (y, apart)]
    assert errors[0] <= 2 * errors[1]
    for array, placed in zip(found, cache, strict=True):
        np.testing.assert_array_equal(np.float64(array), np.float64(placed))
    for _ in range(3):
        np.testing.assert_array_equal(run(rows, key, value, positions, queries=shape[2])[0], y)


@needs_gpu
@pytest.mark.parametrize("cut", [(1, 4), (1, 8), (2, 4), (2, 8), (4, 8), (8, 8)])
@pytest.mark.parametrize("window", [None, 1, 100, 700])
def test_any_cut_and_any_window_are_the_formula(cut, window):
    """To a few roundings of bfloat16 of the values, which are weighted means."""
    shape = (3, 2, 4, 1500, 128)
    arrays = problem(shape)
    y, *_ = run(*arrays, queries=4, cut=cut, window=window)
    wanted = exact(shape, *arrays, window=window)
    np.testing.assert_allclose(
        np.float64(y), wanted, rtol=0, atol=3 * 2.0**-9 * np.abs(wanted).max()
    )


@needs_gpu
def test_a_sequence_of_nan_leaves_others_alone():
    shape = (3, 2, 4, 300, 64)
    rows, key, value, positions = problem(shape)
    y, *_ = run(rows, key, value, positions, queries=4)
    bad = [array.at[1].set(jnp.nan) for array in (rows, key, value)]
    found, *_ = run(*bad, positions, queries=4)
    np.testing.assert_array_equal(found[::2], y[::2])
    assert np.isnan(np.float64(found)[1]).all()


@needs_gpu
def test_positions_beyond_the_cache_are_its_ends():
    """As of `dynamic_update_slice`: nothing else is written to."""
    shape = (3, 2, 4, 300, 64)
    rows, key, value, _ = problem(shape)
    key, value = (jnp.nan_to_num(array) for array in (key, value))
    found = run(rows, key, value, jnp.array([-7, 300, 2**30], jnp.int32), queries=4)
    ends = run(rows, key, value, jnp.array([0, 299, 299], jnp.int32), queries=4)
    jax.tree.map(np.testing.assert_array_equal, found, ends)


@needs_jax
def test_it_lowers_under_vmap():
    arrays = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in problem((2, 2, 4, 300, 64))]
    shared = functools.partial(run, queries=4)
    text = lowered(jax.vmap(shared), *arrays)
    assert "decode_attention" in text
    assert fenced(text)
    one_cache = jax.vmap(shared, in_axes=(0, None, None, 0))
    rows, key, value, positions = arrays
    key, value = (jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in (key, value))
    assert "decode_attention" in lowered(one_cache, rows, key, value, positions)


@needs_gpu
def test_under_vmap_members_have_caches_of_their_own():
    shape = (3, 2, 4, 300, 64)
    arrays = problem(shape)
    y = run(*arrays, queries=4)
    members = [array.reshape(3, 1, *array.shape[1:]) for array in arrays]
    found = jax.vmap(functools.partial(run, queries=4))(*members)
    for a, b in zip(found, y, strict=True):
        np.testing.assert_array_equal(np.float64(a).reshape(b.shape), np.float64(b))


@needs_gpu
def test_in_a_scan_that_stacks_caches_each_layer_has_its_own():
    """A kernel that writes in place must not be let write into another stack."""
    shape = (3, 2, 4, 300, 64)
    rows, key, value, positions = problem(shape)
    keys, values = (jnp.stack([array, 2 * array]) for array in (key, value))

    @jax.jit
    def layers(rows, keys, values):
        def layer(carry, cache):
            y, *cache = run(rows, *cache, positions, queries=4)
            return carry, (y, *cache)

        return jax.lax.scan(layer, 0, (keys, values))[1]

    found = layers(rows, keys, values)
    for number in range(2):
        alone = run(rows, keys[number], values[number], positions, queries=4)
        for stack, one in zip(found, alone, strict=True):
            np.testing.assert_array_equal(np.float64(stack[number]), np.float64(one))


@needs_gpu
@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_a_model_decodes_as_with_attention_by_xla(name):
    """Logits of a step, as close to those in float32 as with XLA's attention, or twice as far."""
    logits = {}
    for kind, options in {
        "exact": {"dtype": "float32"},
        "xla": {"dtype": "bfloat16", "attention": "xla"},
        "kernel": {"dtype": "bfloat16"},
    }.items():
        model = models.build(name, num_layers=2, vocab_size=61, scan=False, **options)
        variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
        cache = models.init_cache(model.config, 3, 24)
        ids = jax.random.randint(jax.random.key(1), (3, 20), 0, 61)

        def step(cache, ids, model=model, variables=variables, **places):
            apply = functools.partial(model.apply, mutable=["cache"], **places)
            y, updated = apply({**variables, "cache": cache}, ids)
            return y, updated["cache"]

        _, cache = jax.jit(step)(cache, ids)
        positions = jnp.array([[20], [7], [13]])
        logits[kind], _ = jax.jit(lambda c, i, p, step=step: step(c, i, positions=p))(
            cache, ids[:, :1], positions
        )
    found = {kind: np.float64(array)[..., :61] for kind, array in logits.items()}
    errors = [np.abs(found[kind] - found["exact"]).max() for kind in ("kernel", "xla")]
    assert errors[0] <= 2 * errors[1]
