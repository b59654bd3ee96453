"""OPT: sizes of the paper, the function of Transformers, initialisation."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import close, logits, pruned_in_place, randomised, same_form

from slope_jax import models
from slope_jax.models import hf_names

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 24,
    "word_embed_proj_dim": 32,
}
IDS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)

# Counted by Transformers for OPTForCausalLM of these sizes.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    config = models.build(name).config
    assert models.count_parameters(models.build(name, sparsity="dense")) == PUBLISHED[name]
    pruned = (12 * config.num_layers - 3) * config.hidden_size**2
    assert models.count_parameters(models.build(name)) == PUBLISHED[name] - pruned // 2


@pytest.fixture(scope="module")
def opt(torch, transformers, tmp_path_factory):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = randomised(torch, transformers.OPTForCausalLM(transformers.OPTConfig(**TINY)))
    folder = tmp_path_factory.mktemp("opt")
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


def test_logits(torch, opt):
    theirs, folder = opt
    model, variables = models.from_hf(folder, sparsity="dense")
    assert (model.config.mlp_size, model.config.dropout) == (64, 0.1)
    same_form(model, variables)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))


def test_compressed_by_magnitude(torch, transformers, opt):
    folder = opt[1]
    theirs = transformers.OPTForCausalLM.from_pretrained(folder).eval()

    def pattern(name):
        in_layer = ".layers." in name and name.endswith("weight") and "norm" not in name
        return (2, 4) if in_layer else None

    pruned_in_place(torch, theirs, pattern, axis=1)
    model, variables = models.from_hf(
        folder, sparsity="layers/.*=2:4; .*=dense", mask_init="random"
    )
    same_form(model, variables)
    close(jax.jit(model.apply)(variables, IDS)[..., :61], logits(torch, theirs, IDS))


def test_defaults_are_those_of_transformers(transformers):
    raw = transformers.OPTConfig().to_dict()
    expected = hf_names.read_config(raw, "opt", pathlib.Path("config.json")) | {
        "dropout": hf_names.dropout(raw, "opt")
    }
    config = models.build("opt-125m").config
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_layer_norm_before": False}, r"our opt does not have do_layer_norm_before=False"),
        (
            {"word_embed_proj_dim": 16},
            "word_embed_proj_dim=16 .* as OPT-350m alone does: give another",
        ),
        ({"activation_function": "gelu"}, r"activation_function='gelu' \(ours: 'relu'\)"),
    ],
)
def test_variations_that_we_do_not_have(tmp_path, change, message):
    raw = {"model_type": "opt", **TINY} | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        models.load_hf(tmp_path, models.build("opt-nano"))


def test_causality(opt):
    """Another token at s changes the logits at s and behind it, and only there."""
    model, variables = models.from_hf(opt[1], sparsity="dense")
    changes = np.concatenate([np.zeros((1, 12), int), 13 * np.eye(12, dtype=int)])
    ids = jnp.asarray((np.arange(12) + changes) % 61, jnp.int32)
    out = jax.jit(model.apply)(variables, ids)[..., :61]
    reaches = np.asarray(jnp.abs(out[1:] - out[:1]).max(axis=-1) > 0).T
    np.testing.assert_array_equal(reaches, np.tri(12, dtype=bool))


def test_initialisation_is_the_papers():
    model = models.build("opt-nano", num_layers=2, sparsity="dense", vocab_size=512)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    layers = params["layers_0_to_1"]
    for kernel, std in (
        (params["embeddings"]["token"]["embedding"], 0.006),
        (layers["attention"]["qkv"]["kernel"], 0.006),
        (layers["mlp"]["up"]["kernel"], 0.006),
        (layers["attention"]["output"]["kernel"], 0.003),  # 0.006 / sqrt(2 layers * 2 branches)
        (layers["mlp"]["down"]["kernel"], 0.003),
    ):
        assert kernel.std() == pytest.approx(std, rel=0.03)
