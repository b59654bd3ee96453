"""Wanda, against NumPy selections on norms that hooks in Transformers' models measured."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import randomised, same_form

from pallas_kernels import compress
from slope_jax import models

RNG = np.random.default_rng(0)
BATCHES = [RNG.integers(0, 61, (4, 12)).astype(np.int32) for _ in range(2)]
LENGTHS = [np.array([12, 5, 1, 9], np.int32), np.array([3, 12, 12, 7], np.int32)]

FAMILIES = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12},
        {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "bert": (
        "BertForPreTraining",
        {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"intermediate_size": 32, "max_position_embeddings": 12},
    ),
    "llama": (
        "LlamaForCausalLM",
        {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 12},
    ),
}
POLICY = {
    "gpt2": "layers/0/attention/qkv=dense; layers/1/.*=2:8; layers/.*=2:4; .*=dense",
    "bert": r"layers/.*=2:4; pooler=1:2; mlm/transform=2:4; .*=dense",
    "llama": "2:4",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, torch, transformers, tmp_path_factory):
    """(name, their model, its folder)."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    architecture, sizes, more = FAMILIES[request.param]
    config = {"gpt2": "GPT2Config", "bert": "BertConfig", "llama": "LlamaConfig"}[request.param]
    config = getattr(transformers, config)(**sizes, **more)
    theirs = randomised(torch, getattr(transformers, architecture)(config))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder, safe_serialization=True)
    return request.param, theirs, folder


def norms(torch, theirs, modules, lengths):
    """||x_i||_2 of the inputs of each module, by running the whole model on all batches."""
    sums = {name: 0.0 for name in modules}

    def hook(name, valid):
        def record(module, args):
            x = args[0].numpy().astype(np.float64)
            rows = x[valid] if x.ndim == 3 else x
            sums[name] = sums[name] + (rows**2).sum(0)

        return record

    for ids, length in zip(BATCHES, lengths, strict=True):
        valid = np.arange(12)[None, :] < length[:, None]
        handles = [
            module.register_forward_pre_hook(hook(name, valid)) for name, module in modules.items()
        ]
        with torch.no_grad():
            theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid))
        for handle in handles:
            handle.remove()
    return {name: np.sqrt(total) for name, total in sums.items()}


def select(weight, norm, n, m):
    """(out, in) with the n largest |w_ij| * ||x_j|| of every m inputs."""
    scores = (np.abs(weight.astype(np.float64)) * norm).reshape(len(weight), -1, m)
    drop = np.argsort(scores, axis=-1)[..., : m - n]
    kept = weight.reshape(scores.shape).copy()
    np.put_along_axis(kept, drop, 0, axis=-1)
    return kept.reshape(weight.shape)


# Modules by stage, with their patterns; layers in order, as each changes what the next one gets.
STAGES = {
    "gpt2": [
        {r"h\.0\.(attn\.c_proj|mlp\..*)": (2, 4)},
        {r"h\.1\.(attn|mlp)\..*": (2, 8)},
    ],
    "bert": [
        {r"encoder\.layer\.0\..*": (2, 4)},
        {r"encoder\.layer\.1\..*": (2, 4)},
        {r"pooler\..*": (1, 2), r"cls\.predictions\.transform\..*": (2, 4)},
    ],
    "llama": [
        {r"layers\.0\.(self_attn\.o_proj|mlp\..*)": (2, 4)},
        {r"layers\.1\..*": (2, 4)},
    ],
}


def prune_theirs(torch, theirs, name, lengths):
    """Prunes their model in place; the names of what it pruned."""
    done = []
    for stage in STAGES[name]:
        found = {
            path: (module, *pattern)
            for path, module in theirs.named_modules()
            for regex, pattern in stage.items()
            if type(module).__name__ in ("Linear", "Conv1D")
            and re.fullmatch(rf"(\w+\.)?{regex}", path)
        }
        norm = norms(torch, theirs, {path: module for path, (module, *_) in found.items()}, lengths)
        for path, (module, n, m) in found.items():
            weight = module.weight.detach().numpy()
            transposed = type(module).__name__ == "Conv1D"  # (in, out)
            pruned = select(weight.T if transposed else weight, norm[path], n, m)
            with torch.no_grad():
                module.weight.copy_(torch.tensor(pruned.T if transposed else pruned))
            done.append(path)
    return done


def tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_what_stays_is_what_numpy_keeps(torch, transformers, family, tmp_path):
    name, theirs, folder = family
    dense, variables = models.from_hf(folder, sparsity="dense")
    model = type(dense)(dataclasses.replace(dense.config, sparsity=POLICY[name]))
    batches = [{"input_ids": i, "lengths": n} for i, n in zip(BATCHES, LENGTHS, strict=True)]
    steps = []
    found = models.prune_wanda(model, variables, batches, progress=lambda *at: steps.append(at))
    assert steps == [(1, 2), (2, 2)]
    loaded = models.load_hf(folder, model, calibration=batches)
    jax.tree.map(np.testing.assert_array_equal, loaded, found)
    same_form(model, found)
    ours = tensors(models.export_hf(tmp_path / "ours", model, found))
    pruned = prune_theirs(torch, theirs, name, LENGTHS)
    assert len(pruned) == {"gpt2": 7, "bert": 14, "llama": 11}[name]
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    expected = tensors(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], expected[key], err_msg=key)


# What follows needs neither torch nor transformers.

SIZES = {"vocab_size": 61, "num_layers": 2, "hidden_size": 16, "num_heads": 2, "mlp_size": 32}


def small(**fields):
    return models.build("gpt2-nano", **{**SIZES, "max_positions": 12, **fields})


@functools.cache
def trained():
    model = small(sparsity="dense")
    return jax.jit(model.init)(jax.random.key(0), **model.example_inputs())


def test_equal_norms_keep_the_magnitudes():
    """With every norm one, inputs of `up` are the norm's bias: Wanda is magnitude there."""
    model = small(sparsity="layers/1/mlp/up=2:4; .*=dense")
    params = models.unstack_layers(trained())["params"]
    scale = jnp.zeros_like(params["layers_1"]["mlp_norm"]["scale"])
    params["layers_1"]["mlp_norm"] = {"scale": scale, "bias": jnp.full_like(scale, -0.5)}
    found = models.prune_wanda(model, {"params": params}, BATCHES)
    expected = compress(params["layers_1"]["mlp"]["up"]["kernel"], "2:4")
    np.testing.assert_array_equal(
        found["masks"]["layers_1"]["mlp"]["up"]["kernel"], expected.metadata
    )
    np.testing.assert_array_equal(
        found["params"]["layers_1"]["mlp"]["up"]["kernel"], expected.values
    )


def test_parameters_in_host_memory_in_stacks_or_in_halves():
    model = small(sparsity="2:4")
    once = models.prune_wanda(model, trained(), BATCHES)
    host = jax.tree.map(np.asarray, models.unstack_layers(trained()))
    again = models.prune_wanda(model, host, (batch for batch in BATCHES))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    model = small(sparsity="2:4", dtype="bfloat16", param_dtype="bfloat16")
    dense = small(sparsity="dense", dtype="bfloat16", param_dtype="bfloat16")
    want = jax.eval_shape(dense.init, jax.random.key(0), **dense.example_inputs())
    half = jax.tree.map(lambda x, like: x.astype(like.dtype), trained(), want)
    found = models.prune_wanda(model, half, BATCHES[:1])
    same_form(model, found)


def test_an_attention_mask_leaves_padding_out():
    model = small(sparsity="2:4")
    ids, lengths = np.asarray(BATCHES[0]), np.array([2, 3, 5, 12])
    mask = (np.arange(12) < lengths[:, None]).astype(int)
    by_mask, by_lengths, whole = (
        models.prune_wanda(model, trained(), [{"input_ids": ids} | more])
        for more in ({"attention_mask": mask}, {"lengths": lengths}, {})
    )
    jax.tree.map(np.testing.assert_array_equal, by_mask, by_lengths)
    kept = (jax.tree.leaves(found["masks"]) for found in (by_mask, whole))
    assert any((a != b).any() for a, b in zip(*kept, strict=True))


def broken(params):
    params = models.unstack_layers({"params": params})["params"]
    params["layers_0"]["attention_norm"]["scale"] *= jnp.inf
    return params


@pytest.mark.parametrize(
    ("fields", "change", "batches", "message"),
    [
        ({"sparsity": "dense"}, None, BATCHES, "the model prunes nothing .*such as '2:4'"),
        ({"adapter_rank": 2}, None, BATCHES, r"adapter_rank=2: prune into .*add_adapters"),
        ({}, None, [], "no calibration batches; give at least one"),
        ({}, None, [{"labels": BATCHES[0]}], "holds labels, but no input_ids"),
        ({}, None, 5, "calibration batches are 5; give a list"),
        (
            {},
            None,
            [{"input_ids": BATCHES[0], "labels": BATCHES[0]}],
            "holds labels; a GPT2 takes input_ids, lengths, attention_mask",
        ),
        (
            {},
            None,
            [{"input_ids": BATCHES[0], "attention_mask": np.eye(4, 12, dtype=int)}],
            r"attention_mask \[4, 12\] for input_ids of \[4, 12\]; .* padding_side=\"right\"",
        ),
        ({}, None, [BATCHES[0][0]], r"input_ids int32\[12\]; they must be integers \(batch,"),
        ({}, None, [BATCHES[0] * 0.5], r"input_ids float64\[4, 12\]"),
        ({}, None, [BATCHES[0][:0]], r"input_ids int32\[0, 12\]"),
        (
            {},
            None,
            [BATCHES[0] + 9],
            "from 9 to 68, but the model's vocab_size is 61; use the tokenizer",
        ),
        ({}, None, [np.zeros((1, 13), int)], "sequence of 13 tokens is longer than max_positions"),
        (
            {},
            None,
            [{"input_ids": BATCHES[0], "lengths": np.array([1, 2, 3, 13])}],
            r"lengths \[1, 2, 3, 13\]; for input_ids of \[4, 12\] they must be 4 integers",
        ),
        ({}, broken, BATCHES, "layers_0/.*: its inputs are not finite"),
        (
            {"num_layers": 3},
            None,
            BATCHES,
            "not those of the model with .* layers_2/attention/output/bias: None, not",
        ),
    ],
)
def test_bad_input(fields, change, batches, message):
    params = trained()["params"]
    params = change(params) if change else params
    model = small(**{"sparsity": "2:4", **fields})
    with pytest.raises(ValueError, match=message):
        models.prune_wanda(model, {"params": params}, batches)


def test_variables_that_are_not_dense():
    model = small(sparsity="2:4")
    sparse = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    with pytest.raises(ValueError, match=r"qkv/kernel: \(8, 48\), not \(16, 48\)"):
        models.prune_wanda(model, sparse, BATCHES)
    with pytest.raises(ValueError, match="variables hold masks; they must be"):
        models.prune_wanda(model, {"masks": sparse["masks"]}, BATCHES)
