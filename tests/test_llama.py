"""LLaMA and Mistral: sizes, the function of Transformers, rotations, grouped heads, windows."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import close, logits, pruned_in_place, randomised, same_form

from slope_jax import TrainState, add_adapters, explain, lazy_adapters, models
from slope_jax.models import RopeScaling, hf, hf_names, layers, rope

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
}
SMALL = {
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_size": 48,
    "num_layers": 3,
    "vocab_size": 61,
    "max_positions": 16,
}
IDS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)
# 16 original positions: some frequencies are divided, some are not, some lie between.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}


def small(**overrides):
    return models.build("llama-nano", **(SMALL | overrides))


# Against Transformers


@pytest.mark.parametrize(
    ("name", "published"), [("llama-3-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096)]
)
def test_parameter_counts(name, published):
    assert models.count_parameters(models.build(name, sparsity="dense")) == published
    per_layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    pruned = 32 * per_layer - 4096 * 6144
    assert models.count_parameters(models.build(name)) == published - pruned // 2


def save(torch, model, folder):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    randomised(torch, model).save_pretrained(folder, safe_serialization=True)
    return model, folder


@pytest.mark.parametrize(
    ("name", "published"), [("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824)]
)
def test_parameter_counts_of_tied_models(name, published):
    assert models.count_parameters(models.build(name, sparsity="dense")) == published


def safetensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def llama(torch, transformers, tmp_path_factory):
    config = transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3)
    return save(torch, transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


def test_logits(torch, llama):
    theirs, folder = llama
    model, variables = models.from_hf(folder, sparsity="dense")
    assert model.config.rope_scaling == RopeScaling(8.0, 0.5, 2.0, 16)
    same_form(model, variables)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))
    assert (variables["params"]["lm_head"]["kernel"][:, 61:] == 0).all()


def test_compressed_by_magnitude(torch, transformers, llama):
    folder = llama[1]
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()

    def pattern(name):
        return (2, 4) if "_proj.weight" in name else None

    pruned_in_place(torch, theirs, pattern, axis=1)
    model, variables = models.from_hf(folder, sparsity="layers/.*=2:4; .*=dense")
    same_form(model, variables)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))


def test_mistral_with_a_window(torch, transformers, tmp_path):
    config = transformers.MistralConfig(**TINY, sliding_window=6)
    theirs, folder = save(torch, transformers.MistralForCausalLM(config), tmp_path)
    model, variables = models.from_hf(folder, sparsity="dense")
    assert model.config.window == 6
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling", "both"])
def test_all_frequencies_divided(torch, transformers, tmp_path, key):
    """As Transformers writes it since version 5, as older folders have it, and as added to the former."""
    rotary = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
    config = transformers.LlamaConfig(**TINY, rope_parameters=rotary)
    theirs, folder = save(torch, transformers.LlamaForCausalLM(config), tmp_path / "a")
    expected = logits(torch, theirs, IDS)
    if key != "rope_parameters":
        raw = json.loads((folder / "config.json").read_text())
        raw |= {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
        del raw["rope_parameters"]
        if key == "both":
            raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
        (folder / "config.json").write_text(json.dumps(raw))
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        close(logits(torch, again, IDS), expected)
    model, variables = models.from_hf(folder, sparsity="dense")
    assert model.config.rope_scaling == RopeScaling(4.0)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], expected)
    written = models.export_hf(tmp_path / "b", model, variables)
    again = transformers.AutoModelForCausalLM.from_pretrained(written)
    close(logits(torch, again, IDS), expected)


def test_the_original_positions_of_the_whole_are_before_those_of_its_rope(
    torch, transformers, tmp_path
):
    config = transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3)
    _, folder = save(torch, transformers.LlamaForCausalLM(config), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rope_parameters"]["original_max_position_embeddings"] == 16
    raw["original_max_position_embeddings"] = 4
    (folder / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model, variables = models.from_hf(folder, sparsity="dense")
    assert model.config.rope_scaling == RopeScaling(8.0, 0.5, 2.0, 4)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))


@pytest.mark.parametrize("width", [4, 16])
def test_heads_of_another_width(torch, transformers, tmp_path, width):
    """Narrower or wider together than the hidden states (Mistral-Nemo's); written back as they were."""
    config = transformers.MistralConfig(**TINY, head_dim=width, sliding_window=None)
    theirs, folder = save(torch, transformers.MistralForCausalLM(config), tmp_path / "a")
    model, variables = models.from_hf(folder, sparsity="dense")
    same_form(model, variables)
    assert model.config.head_width == width
    assert (
        variables["params"]["layers_0_to_1"]["attention"]["output"]["kernel"].shape[1] == 4 * width
    )
    expected = logits(torch, theirs, IDS)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], expected)
    written = models.export_hf(tmp_path / "b", model, variables)
    again = transformers.AutoModelForCausalLM.from_pretrained(written)
    close(logits(torch, again, IDS), expected)


def test_heads_that_do_not_divide_the_hidden_size_are_a_mistrals(torch, transformers, tmp_path):
    """Of which Transformers' LLaMA has none."""
    sizes = {"hidden_size": 60, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8}
    model = models.build("llama-nano", **sizes, num_layers=2, sparsity="dense")
    variables = model.init(jax.random.key(0), IDS)
    folder = models.export_hf(tmp_path / "a", model, variables)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = jax.jit(model.apply)(variables, IDS)
    close(logits(torch, theirs, IDS), expected)
    again, variables = models.from_hf(folder, sparsity="dense")
    close(jax.jit(again.apply)(variables, IDS), expected)


def test_a_mistral_without_a_window_stays_one(torch, transformers, tmp_path):
    config = transformers.MistralConfig(**TINY, sliding_window=None)
    theirs, folder = save(torch, transformers.MistralForCausalLM(config), tmp_path / "a")
    model, variables = models.from_hf(folder, sparsity="dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        models.export_hf(tmp_path / "b", model, variables)
    )
    assert type(again) is type(theirs)
    assert again.config.sliding_window is None
    close(logits(torch, again, IDS), logits(torch, theirs, IDS))
    assert models.variant_config("mistral-7b", window=None).family == "mistral"
    with pytest.raises(ValueError, match="family='opt'; choose one of llama, mistral"):
        models.build("llama-nano", family="opt")


@pytest.fixture(scope="module")
def tied(torch, transformers, tmp_path_factory):
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    return save(torch, transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("tied"))


def test_tied_tables(torch, transformers, tied, tmp_path):
    """Read, and written back as one table."""
    theirs, folder = tied
    model, variables = models.from_hf(folder, sparsity="dense")
    same_form(model, variables)
    assert "lm_head" not in variables["params"]
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))
    written = models.export_hf(tmp_path / "a", model, variables)
    again = transformers.AutoModelForCausalLM.from_pretrained(written)
    assert again.config.tie_word_embeddings
    assert again.lm_head.weight is again.model.embed_tokens.weight
    close(logits(torch, again, IDS), logits(torch, theirs, IDS))
    assert safetensors_of(written).keys() == safetensors_of(folder).keys()


def test_a_copy_of_a_tied_table_must_be_one(tied, tmp_path):
    from safetensors.numpy import save_file

    tensors = safetensors_of(tied[1])
    (tmp_path / "config.json").write_text((tied[1] / "config.json").read_text())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = [models.from_hf(folder, sparsity="dense")[1] for folder in (tied[1], tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        models.from_hf(tmp_path, sparsity="dense")


# As published with the weights, the fields that matter.
LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
MISTRAL_7B = LLAMA_3_8B | {
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}


LLAMA_3_2_1B = LLAMA_3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "max_position_embeddings": 131072,
    "head_dim": 64,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("name", "raw"),
    [("llama-3-8b", LLAMA_3_8B), ("llama-3.2-1b", LLAMA_3_2_1B), ("mistral-7b", MISTRAL_7B)],
)
def test_published_configurations_are_the_variants(name, raw):
    config = models.build(name).config
    expected = hf_names.read_config(raw, raw["model_type"], pathlib.Path("config.json"))
    assert expected["max_positions"] == raw["max_position_embeddings"]
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": None}, r"tie_word_embeddings=None \(ours: False or True\)"),
        ({"tie_word_embeddings": True}, r"tied_head: folder True, model False\. Build"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 64}, r"head_dim: folder 64, model None\. Build"),
        ({"num_attention_heads": 48}, "=4096 is not a multiple of num_attention_heads=48, and th"),
        ({"rope_scaling": {"type": "yarn"}}, "the rotary embedding 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' .*'linear' or 'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, "the rotary embedding 'linear' lacks factor"),
        ({"rope_scaling": {"type": ["a"]}}, r"the rotary embedding \['a'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high"),
        ({"rope_theta": 1e4}, r"rope_theta: folder 10000.0, model 500000.0\. Build"),
        ({"model_type": "opt"}, "model_type is 'opt', but the model is a llama or mistral"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B | change))
    with pytest.raises(ValueError, match=message):
        models.load_hf(tmp_path, models.build("llama-3-8b"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=32 is not a multiple of num_key_value_heads=3",
        ),
        (
            {"head_dim": 7},
            "heads of 7 .* choose head_dim, or hidden_size / num_attention_heads, even",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor=0.5, low_freq_factor=None, .* 0 < low_freq_factor < high_freq_factor and"
            " original_max_position_embeddings",
        ),
        (
            {"sliding_window": 0, "model_type": "mistral"},
            "sliding_window=0 must be None or a positive",
        ),
    ],
)
def test_what_no_model_can_have_is_told_in_the_names_of_the_file(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B | change))
    file = re.escape(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=f"^{file}: .*{message}.* Correct it, or copy or download"):
        hf.described(tmp_path)


# Configuration


def test_heads_follow_the_sizes_where_they_have_no_width_of_their_own():
    config = models.build("llama-nano").config
    assert dataclasses.replace(config, hidden_size=256).head_width == 64
    assert dataclasses.replace(config, num_heads=8).head_width == 16
    own = models.build("llama-nano", head_dim=16).config
    assert dataclasses.replace(own, hidden_size=256).head_width == 16
    assert models.build("llama-nano", head_dim=32).config == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 0}, "head_dim=0 must be None or a positive integer"),
        ({"head_dim": 7}, "heads of 7 cannot be rotated in pairs; choose head_dim, or"),
        ({"hidden_size": 36, "num_heads": 8}, "36 is not a multiple of num_heads=8"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be a positive integer"),
        ({"num_heads": 32, "num_kv_heads": 32}, "heads of 1 cannot be rotated in pairs"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 1"),
        ({"rope_scaling": 8.0}, "rope_scaling=8.0 must be None or a RopeScaling"),
        ({"rope_scaling": RopeScaling("2")}, "factor='2', .*must be finite numbers"),
        ({"rope_scaling": RopeScaling(float("inf"))}, "factor=inf, .*must be finite numbers"),
        ({"rope_scaling": RopeScaling(None)}, "it must have factor >= 1"),
        ({"tied_head": "no"}, "tied_head='no' must be True or False"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 1.0, 16)}, "low_frequency < high_frequency"),
        ({"rope_scaling": RopeScaling(0.5)}, "it must have factor >= 1"),
        ({"rope_scaling": RopeScaling(8.0, 1.0)}, "or none of these three"),
        ({"window": 0}, "window=0 must be None or a positive integer"),
        ({"mlp_size": 42}, "the input of layers/0/mlp/down has 42 entries"),
    ],
)
def test_bad_configuration(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


def test_gpt2_has_no_window():
    with pytest.raises(ValueError, match="gpt2-nano has no field 'window'"):
        models.build("gpt2-nano", window=4)


def test_paths_patterns_and_adapters():
    model = small(sparsity="2:4,2:8", num_layers=2, mlp_size=64)
    shapes = {linear.path: linear[1:3] for linear in model.config.linears[:4]}
    assert shapes == {
        "layers/0/attention/qkv": (32, 64),
        "layers/0/attention/output": (32, 32),
        "layers/0/mlp/gate_up": (32, 128),
        "layers/0/mlp/down": (64, 32),
    }
    variables = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    rows = {row.path: row.pattern for row in explain(model, variables).rows}
    assert len(rows) == 9
    assert rows["layers_0/attention/qkv"] == rows["lm_head"] == "dense"
    assert (rows["layers_0/mlp/gate_up"], rows["layers_1/mlp/gate_up"]) == ("2:4", "2:8")

    adapted = small(sparsity="2:4,2:8", num_layers=2, mlp_size=64, adapter_rank=2)
    counts = []

    def join(variables):
        tx = lazy_adapters(optax.scale_by_adam())
        state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
        state, count = add_adapters(state, adapted, jax.random.key(1))
        counts.append(count)
        return state

    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(join, variables)
    assert counts == [7]
    assert state.params["layers_1"]["mlp"]["gate_up"]["adapter_r"].shape == (2, 128)


def test_the_head_may_be_pruned():
    model = small(sparsity=r"layers/.*=dense; lm_head=2:4")
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    assert shapes["params"]["lm_head"]["kernel"].shape == (16, 64)
    assert set(shapes["masks"]) == {"lm_head"}


# Function


def test_rotation_is_multiplication_by_a_complex_number():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 1, 0, 900]])
    speed = rope.frequencies(8, 10_000.0)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * speed)
    tables = rope.rotary_tables(jnp.asarray(positions), speed)
    got = rope.rotate(jnp.asarray(x, jnp.float32), tables)
    # Angles up to 900 have 24 bits of mantissa.
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got, expected, atol=4 * 900 * 2**-24)
    assert rope.rotate(jnp.asarray(x, jnp.bfloat16), tables).dtype == jnp.bfloat16


def test_gate_and_norm_are_the_formulas():
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    gate, up = np.split(np.float64(x), 2, axis=-1)
    np.testing.assert_allclose(
        layers.gated(x, "silu"), gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6
    )
    norm = layers.norm(small().config, None)
    got = norm.apply({"params": {"scale": jnp.arange(8.0)}}, x)
    expected = x / np.sqrt((np.float64(x) ** 2).mean(-1, keepdims=True) + 1e-5) * np.arange(8.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


ONE_STACK = {"num_layers": 2, "sparsity": "layers/.*=2:4; .*=dense"}
# A sequence, and the same with another token at each of its places.
CHANGED = (
    np.arange(12) + np.concatenate([np.zeros((1, 12), int), 13 * np.eye(12, dtype=int)])
) % 61
CHANGED = jnp.asarray(CHANGED, jnp.int32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(small(**ONE_STACK).init)(jax.random.key(0), CHANGED)


@pytest.fixture(scope="module")
def exact(variables):
    return apply(variables)


def apply(variables, **overrides):
    return jax.jit(small(**ONE_STACK, **overrides).apply)(variables, CHANGED)[..., :61]


def test_causality(exact):
    reaches = np.asarray(jnp.abs(exact[1:] - exact[:1]).max(axis=-1) > 0).T
    np.testing.assert_array_equal(reaches, np.tri(12, dtype=bool))


def test_a_window_bounds_what_two_layers_see(variables):
    """A layer with a window of 3 sees 2 tokens behind its own, two layers see 4."""
    seen = apply(variables, window=3)
    reaches = np.asarray(jnp.abs(seen[1:] - seen[:1]).max(axis=-1) > 0).T
    np.testing.assert_array_equal(reaches, np.tri(12, dtype=bool) & ~np.tri(12, k=-5, dtype=bool))


def test_scan_is_the_unrolled_model(variables, exact):
    single = models.unstack_layers(variables)
    assert "layers_1" in single["masks"]
    np.testing.assert_allclose(apply(single, scan=False), exact, rtol=1e-5, atol=1e-5)


def test_half_precision_is_close(variables, exact):
    """8 bits of mantissa over two layers: within 2^-8 times a dozen roundings."""
    half = apply(variables, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float64(half) - np.float64(exact)) / np.linalg.norm(exact)
    assert 0 < error < 12 * 2**-8
