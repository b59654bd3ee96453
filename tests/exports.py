"""Models for tests of exports, and what both sides compute with them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from slope_jax import models

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_size": 64,
    "max_positions": 24,
    "sparsity": "2:4",
}
SCALED = models.RopeScaling(8.0, 1.0, 4.0, 16)
FAMILIES = {
    "bert": ("bert-tiny", {}),
    "gpt2": ("gpt2-nano", {}),
    "opt": ("opt-nano", {}),
    "llama": ("llama-nano", {"num_kv_heads": 2, "rope_scaling": SCALED, "tied_head": True}),
    "mistral": ("llama-nano", {"num_kv_heads": 2, "window": 5, "head_dim": 16}),
}
IDS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)


@functools.cache
def made(family, rank):
    """A model whose every parameter is random, as zeros and ones would hide a wrong name."""
    name, fields = FAMILIES[family]
    model = models.build(name, **SMALL, **fields, adapter_rank=rank)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    rng = np.random.default_rng(1)
    pairs = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], np.uint8)  # 2 of 4

    def metadata(leaf):
        low, high = rng.choice(pairs, (2, *leaf.shape))
        return jnp.asarray(low | high << 4)

    def parameter(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + np.float32(path[-1].key == "scale"))

    masks = jax.tree.map(metadata, shapes["masks"])
    params = jax.tree_util.tree_map_with_path(parameter, shapes["params"])
    table = params["embeddings"]["token"]
    table["embedding"] = table["embedding"].at[61:].set(0)
    if "lm_head" in params:
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, 61:].set(0)
    if "mlm" in params:
        params["mlm"]["bias"] = params["mlm"]["bias"].at[61:].set(0)
    return model, {"params": params, "masks": masks}


def logits_of_ours(model, variables):
    found = jax.jit(model.apply)(variables, jnp.asarray(IDS))
    return np.asarray(getattr(found, "mlm_logits", found))[..., :61]


def load_theirs(transformers, folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits_of_theirs(torch, model):
    with torch.no_grad():
        output = model(input_ids=torch.tensor(IDS))
    return getattr(output, "logits", getattr(output, "prediction_logits", None)).numpy()
