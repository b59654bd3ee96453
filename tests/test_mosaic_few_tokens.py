"""The few-token kernel: its choices and lowering on any machine, its results on a GPU."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import needs_gpu, needs_jax

from pallas_kernels import compress, decompress, kept_mask
from pallas_kernels.epilogue import Norm, moments
from pallas_kernels.mosaic import support
from slope_jax import models

# Names of configurations: across, along, split, stages.
CONFIGS = [(4, 1, 1, 3), (1, 4, 2, 4), (2, 4, 4, 3), (8, 1, 8, 2), (1, 8, 1, 2), (1, 16, 2, 2)]
WIDE = {"across": 2, "along": 8, "split": 1, "stages": 2}  # too wide for 64 tokens
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def integers(seed, shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype))


def normal(seed, shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def sparse(w):
    return jax.jit(compress, static_argnums=1)(w, "2:4")


def dense(w):
    return jax.jit(decompress)(w)


def run(x, w, config=None, **options):
    from pallas_kernels.mosaic import few_tokens

    config = few_tokens.Config(*config) if config else few_tokens.choose(x.shape[0], *w.shape)
    return jax.jit(lambda x, w: few_tokens.nm_matmul(x, w.values, w.metadata, config, **options))(
        x, w
    )


def float64(x):
    return np.asarray(x, np.float64)


@needs_jax
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("epilogue", [False, True])
def test_it_lowers_for_cuda_without_a_gpu(config, epilogue, strict_dtypes):
    from pallas_kernels.mosaic import few_tokens

    tokens, k, f, rank = 12, 776, 1000, 24
    shapes = [(tokens, k), (k // 2, f), (f,), (tokens, rank), (rank, f)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def product(x, values, bias, t, r, metadata):
        options = {}
        if epilogue:
            options = {"bias": bias, "low_rank": (t, r), "activation": "gelu"}
            options |= {"save_preactivation": True, "out_dtype": jnp.float32}
        return few_tokens.nm_matmul(x, values, metadata, few_tokens.Config(*config), **options)

    metadata = jax.ShapeDtypeStruct((k // 8, f), jnp.uint8)
    lowered = jax.jit(product).trace(*arrays, metadata).lower(lowering_platforms=("cuda",))
    assert "nm_matmul" in lowered.as_text()


@needs_jax
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shift", [False, True])
def test_it_lowers_with_a_norm_and_a_residual(config, shift, strict_dtypes):
    from pallas_kernels.mosaic import few_tokens, normed

    def product(x, values, metadata, scale, residual):
        norm = scale, scale if shift else None, moments(x)
        options = {"norm": norm, "form": normed.Form(1e-5, shift), "residual": residual}
        options |= {"save_moments": True}
        return few_tokens.nm_matmul(x, values, metadata, few_tokens.Config(*config), **options)

    tokens = 8 if config[1] == 16 else 12  # what fits beside so many warps
    shapes = [((tokens, 776), "bfloat16"), ((388, 1000), "bfloat16"), ((97, 1000), "uint8")]
    shapes += [((776,), "float32"), ((tokens, 1000), "bfloat16")]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    lowered = jax.jit(product).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "nm_matmul" in lowered.as_text()


@needs_jax
@pytest.mark.parametrize(
    ("batch", "rank", "made_apart"),
    [(1, 0, 2), (16, 0, 2), (32, 0, 2), (33, 0, 5), (1, 4, 2), (16, 4, 2), (17, 4, 5), (32, 4, 5)],
)
def test_decode_of_few_tokens_leaves_norms_to_the_kernels(monkeypatch, batch, rank, made_apart):
    """But for those ahead of dense products, by l where tokens are more than 16 among them: of the first
    linear, and of the vocabulary."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    sizes = {"hidden_size": 32, "num_heads": 4, "mlp_size": 64, "num_layers": 2, "vocab_size": 61}
    options = {"implementation": "mosaic", "dtype": "bfloat16", "attention": "xla", "scan": False}
    model = models.build("gpt2-nano", **sizes, **options, adapter_rank=rank)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    shapes |= {"cache": jax.eval_shape(lambda: models.init_cache(model.config, batch, 8))}
    one = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def decode(variables, ids, positions):
        return model.apply(variables, ids, positions=positions, mutable=["cache"])

    with jax.numpy_dtype_promotion("standard"):  # JAX's 16-bit XLA attention promotes
        traced = jax.jit(decode).trace(shapes, one, one)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.rsqrt") == made_apart
    # The products ahead leave the moments: XLA takes none.
    assert not re.search(r"stablehlo.concatenate.*x2xf32>", text)
    # Up to 16 tokens, the products make those of such small adapters themselves; a layer has four, the
    # first one has no adapter, and XLA's attention two products.
    dots = 2 * 2 + 2
    assert text.count("stablehlo.dot_general") == dots + (7 if rank and batch > 16 else 0)
    assert "first_product" not in text


@needs_jax
def test_decode_lowers_in_a_scan_over_layers(monkeypatch):
    """Of equal layers from the first on, whose moments nobody knows."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    options = {"implementation": "mosaic", "dtype": "bfloat16", "attention": "xla"}
    options["sparsity"] = "layers/.*=2:4; .*=dense"
    model = models.build("gpt2-nano", num_layers=3, vocab_size=61, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    shapes |= {"cache": jax.eval_shape(lambda: models.init_cache(model.config, 2, 8))}
    one = jax.ShapeDtypeStruct((2, 1), jnp.int32)

    def decode(variables, ids, positions):
        return model.apply(variables, ids, positions=positions, mutable=["cache"])

    with jax.numpy_dtype_promotion("standard"):
        traced = jax.jit(decode).trace(shapes, one, one)
    assert "nm_matmul" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_jax
def test_every_choice_and_candidate_fits_the_machine():
    from pallas_kernels.mosaic import few_tokens

    sizes = (8, 64, 768, 1000, 3072, 4096, 14336, 36864)
    for tokens, k, f in itertools.product((1, 8, 20, 64), sizes, sizes):
        few_tokens.choose(tokens, k, f).geometry(tokens, k, f)
        candidates = few_tokens.candidates(tokens, k, f)
        assert candidates, (tokens, k, f)
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            for more in (tokens, min(2 * tokens, few_tokens.FEW_TOKENS)):
                geometry = config.geometry(more, k, f)
                assert 2 <= geometry.stages <= config.stages


@needs_jax
def test_bad_input_is_named():
    from pallas_kernels.mosaic import few_tokens

    for options, message in [
        ({"across": 3}, "4, 8 or 16 warps"),
        ({"split": 3}, "1, 2, 4 or 8"),
        ({"stages": 1}, "at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            few_tokens.Config(**options)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        few_tokens.Config(1, 16, 2, 2).geometry(64, 4096, 4096)
    w = sparse(integers(0, (64, 64)))
    with pytest.raises(ValueError, match="1 to 64"):
        few_tokens.nm_matmul(integers(0, (65, 64)), w.values, w.metadata, few_tokens.Config())
    with pytest.raises(ValueError, match="one of relu, gelu"):
        few_tokens.nm_matmul(
            integers(0, (5, 64)), w.values, w.metadata, few_tokens.Config(), activation="tanh"
        )


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 23, 33, 48, 64])
def test_it_is_exact_on_integers_for_any_number_of_tokens(tokens):
    x, w = integers(0, (tokens, 776)), sparse(integers(1, (776, 1000)))
    exact = float64(x) @ float64(dense(w))
    y = run(x, w, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, exact)


@needs_gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(8, 8), (136, 72), (64, 1032), (3080, 520)])
def test_every_way_to_cut_is_exact_on_ragged_sizes(config, shape):
    tokens = 12 if config[1] == 16 else 20  # what fits beside so many warps
    x, w = integers(0, (tokens, shape[0])), sparse(integers(1, shape))
    exact = float64(x) @ float64(dense(w))
    np.testing.assert_array_equal(run(x, w, config, out_dtype=jnp.float32), exact)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1, 768, 768), (8, 4096, 4096), (40, 1024, 3080)])
def test_its_error_is_within_twice_that_of_the_dense_product(shape, dtype):
    tokens, k, f = shape
    x, w = normal(0, (tokens, k), dtype), sparse(normal(1, (k, f), dtype))
    exact = float64(x) @ float64(dense(w))
    allowed = 2 * np.abs(float64(x @ dense(w)) - exact).max()
    y = run(x, w)
    assert np.abs(float64(y) - exact).max() <= allowed
    for _ in range(5):
        np.testing.assert_array_equal(y, run(x, w))


@needs_gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 27])
@pytest.mark.parametrize("centred", [True, False])
def test_its_norm_is_as_close_as_one_made_apart(config, tokens, centred):
    """Against float64, on ragged sizes, of rows whose mean is far from zero."""
    from pallas_kernels.mosaic import normed

    tokens = min(tokens, 8) if config[1] == 16 else tokens  # what fits beside so many warps
    k, f = (776, 1000) if tokens != 3 else (72, 136)  # where some CTAs have nothing to do
    x = normal(0, (tokens, k)) * 2 + 30
    scale, shift = normal(2, (k,), jnp.float32), normal(3, (k,), jnp.float32)
    w, residual = sparse(normal(1, (k, f))), normal(4, (tokens, f))
    norm = Norm(scale, shift if centred else None, 1e-5, centred)
    options = {"norm": (scale, norm.shift, moments(x)), "form": normed.Form(1e-5, centred)}
    y = run(x, w, config, residual=residual, **options)
    apart = run(jax.jit(norm.__call__)(x), w, config, residual=residual)
    rows = float64(x) - (float64(x).mean(-1, keepdims=True) if centred else 0)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * float64(scale)
    exact = (rows + (float64(shift) if centred else 0)) @ float64(dense(w)) + float64(residual)
    errors = [np.abs(float64(a) - exact).max() for a in (y, apart)]
    assert errors[0] <= 2 * errors[1]
    np.testing.assert_array_equal(y, run(x, w, config, residual=residual, **options))


@needs_gpu
def test_a_row_of_nan_leaves_the_norms_of_others_alone():
    from pallas_kernels.mosaic import normed

    x = normal(0, (5, 776)).at[3, 7].set(jnp.nan)
    w, scale = sparse(normal(1, (776, 264))), jnp.ones(776)
    norm = scale, None, moments(x)
    y, left = run(x, w, norm=norm, form=normed.Form(1e-5, True), save_moments=True)
    for array in (y, left):
        assert np.isnan(float64(array)[3]).all()
        assert np.isfinite(np.delete(float64(array), 3, axis=0)).all()


@needs_gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(1, 776, 1000), (9, 136, 72), (16, 64, 1032), (20, 520, 8)])
def test_it_leaves_the_moments_of_its_result(config, shape, out_dtype):
    """Sums exactly, as of integers in float64; squares about the mean to a few float32 roundings."""
    tokens, k, f = shape if config[1] < 16 else (min(shape[0], 12), *shape[1:])
    x, w, residual = integers(0, (tokens, k)), sparse(integers(1, (k, f))), integers(2, (tokens, f))
    options = {"residual": residual + 100, "out_dtype": out_dtype, "save_moments": True}
    y, left = run(x, w, config, **options)
    blocks = [float64(y)[:, i : i + 64] for i in range(0, f, 64)]
    np.testing.assert_array_equal(left[..., 0], np.stack([b.sum(-1) for b in blocks], -1))
    spreads = np.stack([b.var(-1) * b.shape[-1] for b in blocks], -1)
    np.testing.assert_allclose(left[..., 1], spreads, rtol=64 * 2.0**-24, atol=0)
    np.testing.assert_array_equal(run(x, w, config, **options)[1], left)


@needs_gpu
@pytest.mark.parametrize("config", [(4, 1, 2, 3), (1, 4, 4, 3), (2, 4, 1, 3)])
@pytest.mark.parametrize("rank", [8, 16, 40, 136])
def test_bias_and_low_rank_are_exact_on_integers(config, rank):
    x, w = integers(0, (33, 264)), sparse(integers(1, (264, 328)))
    t, r, bias = integers(2, (33, rank)), integers(3, (rank, 328)), integers(4, (328,))
    exact = float64(x) @ float64(dense(w)) + float64(t) @ float64(r) + float64(bias)
    for kind in (jnp.bfloat16, jnp.float32):
        options = {"bias": bias.astype(kind), "low_rank": (t, r), "out_dtype": jnp.float32}
        np.testing.assert_array_equal(run(x, w, config, **options), exact)


@needs_gpu
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_are_within_twice_the_error_of_plain_jax(name):
    x, w = normal(0, (24, 512)) / 8, sparse(normal(1, (512, 640)))
    bias = normal(2, (640,))
    y, z = run(x, w, bias=bias, activation=name, save_preactivation=True)

    def formula(x, w, bias, dtype):
        z = jnp.matmul(x.astype(dtype), w.astype(dtype), precision="highest")
        z = z + bias[None].astype(dtype)
        return ACTIVATIONS[name](z), z

    exact = [float64(a) for a in formula(x, dense(w), bias, jnp.float32)]
    plain = [float64(a) for a in formula(x, dense(w), bias, jnp.bfloat16)]
    for got, want, other in zip((y, z), exact, plain, strict=True):
        assert np.abs(float64(got) - want).max() <= 2 * np.abs(other - want).max()


@needs_gpu
def test_nan_and_inf_reach_the_outputs_that_they_belong_to():
    x = integers(0, (20, 64)).at[7, 3].set(jnp.nan).at[12, 5].set(jnp.inf)
    w = sparse(integers(1, (64, 304)))
    y = float64(run(x, w, activation="gelu"))
    assert np.isfinite(np.delete(y, [7, 12], axis=0)).all()
    np.testing.assert_array_equal(np.isnan(y[7]), np.asarray(jax.jit(kept_mask)(w))[3])


@needs_jax
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_what_was_measured_with_some_tokens_runs_with_others(kind, monkeypatch):
    from pallas_kernels import tuning
    from pallas_kernels.mosaic import few_tokens, products

    entries = [e for e in tuning.load(kind).entries if e.op == "few_tokens"]
    assert len(entries) > 10
    for entry, tokens in itertools.product(entries, (1, 8, 9, 16, 17, 33, 64)):
        assert few_tokens.fits(few_tokens.Config(**entry.config), tokens, *entry.size), entry
    wide = tuning.Entry("few_tokens", "16-bit", 16, (8192, 8192), WIDE, 1.0, 2.0)
    monkeypatch.setattr(products, "_measured", lambda *_: wide)
    for tokens in (16, 64):
        few = products.configuration("nm_matmul", tokens, 8192, 8192, "bfloat16")
        assert few_tokens.fits(few, tokens, 8192, 8192)
    assert not few_tokens.fits(few_tokens.Config(**WIDE), 64, 8192, 8192)
