"""Exported prefill and decode, through a file, against `generate`."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import export, models
from slope_jax.generate import generate, inference_variables
from slope_jax.models import attention

SMALL = {"hidden_size": 32, "num_heads": 4, "mlp_size": 64, "num_layers": 2, "vocab_size": 61}


@pytest.fixture(scope="module")
def made():
    model = models.build("llama-nano", **SMALL, num_kv_heads=2, max_positions=16, adapter_rank=2)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    variables |= {"params": jax.tree.map(lambda x: 6 * x + 0.01, variables["params"])}
    return inference_variables(model, variables)


def test_what_is_loaded_gives_the_tokens_of_generate(made, tmp_path):
    model, variables = made
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 6)), jnp.int32)
    lengths = np.array([6, 3])
    exported = export.export(model, variables, batch=2, prompt=6, max_new_tokens=7)
    export.save(exported, tmp_path / "made")
    loaded = export.load(tmp_path / "made")
    expected = generate(model, variables, prompts, lengths=lengths, max_new_tokens=7).tokens
    assert len(set(np.asarray(expected).ravel().tolist())) > 3
    padded = np.where(np.arange(6) < lengths[:, None], prompts, -1)
    np.testing.assert_array_equal(loaded.greedy(variables, padded, 7, lengths), expected)
    assert loaded.platforms == ("cpu",)
    with pytest.raises(ValueError, match=r"reads \[2, 6\]"):
        loaded.greedy(variables, prompts[:1], 7)
    with pytest.raises(ValueError, match="between 1 and 7"):
        loaded.greedy(variables, prompts, 8)
    with pytest.raises(ValueError, match=r"count=2\.0 must be an integer between 1 and 7"):
        loaded.greedy(variables, prompts, 2.0)
    with pytest.raises(ValueError, match=r"lengths=\[7, 3\]; .* 2 integers in 1 .. 6"):
        loaded.greedy(variables, prompts, 7, [7, 3])
    with pytest.raises(ValueError, match=r"prompts\[1, 3\]=-1 is no token: .* 0 and 60"):
        loaded.greedy(variables, padded, 7)
    with pytest.raises(ValueError, match="exists already"):
        export.save(exported, tmp_path / "made")
    program = (tmp_path / "made" / export.DECODE_FILE).read_bytes()
    for damaged in (program[:-100], b"", bytes([program[0] ^ 1]) + program[1:]):
        (tmp_path / "made" / export.DECODE_FILE).write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"decode\.jax is damaged: its {len(damaged):,} bytes"
        ):
            export.load(tmp_path / "made")
    (tmp_path / "made" / export.DECODE_FILE).unlink()
    with pytest.raises(ValueError, match=r"lacks decode\.jax"):
        export.load(tmp_path / "made")
    (tmp_path / "made" / export.DECODE_FILE).write_bytes(program)
    for damaged in ('{"batch": 2', "{}", "[]"):
        (tmp_path / "made" / export.ABOUT_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=r"exported\.json cannot be read .* Copy the folder"):
            export.load(tmp_path / "made")


def test_programs_take_the_variables_that_they_were_made_for(made):
    model, variables = made
    program = export.export(model, variables, batch=1, prompt=3, max_new_tokens=2)
    prompts = np.array([[3, 1, 4]])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    wider = models.build("llama-nano", **SMALL | {"mlp_size": 96}, num_kv_heads=2, scan=False)
    others = jax.jit(wider.init)(jax.random.key(0), **wider.example_inputs())
    for wrong, message in (
        ({}, r"masks/layers_1/.*: none here, uint8\[.*\] in the export"),
        (
            variables["params"],
            r"embeddings/token/embedding: float32\[64, 32\] here, none in the export",
        ),
        (variables | {"params": half}, r": bfloat16\[8, 32\] here, float32\[8, 32\] in the export"),
        (others, r"mlp/gate_up/kernel: float32\[16, 192\] here, float32\[16, 128\] in the export"),
    ):
        with pytest.raises(
            ValueError, match=rf"must be those of the export, .* differ .*{message}"
        ):
            program.greedy(wrong, prompts, 2)
    host = jax.tree.map(np.asarray, variables)
    np.testing.assert_array_equal(
        program.greedy(host, prompts, 2), program.greedy(variables, prompts, 2)
    )


def test_what_is_chosen_for_the_device_at_hand_is_refused_for_others(made):
    model, variables = made
    sizes = {"batch": 1, "prompt": 4, "max_new_tokens": 2}
    for fields, message in (
        ({}, r"\(sparse kernels\) would .* which is cpu; .* with implementation='xla', which"),
        (
            {"implementation": "xla", "attention": "cudnn"},
            "attention='cudnn' would .* attention=None, which",
        ),
        ({"attention": "cudnn"}, "implementation='xla' and attention=None, which runs on all"),
    ):
        chosen = type(model)(dataclasses.replace(model.config, **fields))
        with pytest.raises(NotImplementedError, match=message):
            export.export(chosen, variables, **sizes, platforms=["cpu", "cuda"])
    with pytest.raises(ValueError, match="platforms gpu, tpus: choose from cpu, cuda"):
        export.export(model, variables, **sizes, platforms=["gpu", "tpus"])
    with pytest.raises(ValueError, match="max_positions=16"):
        export.export(model, variables, batch=1, prompt=14, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"batch=1\.0, .*: each must be an integer of 1 or more"):
        export.export(model, variables, batch=1.0, prompt=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="Bert has no prefill and decode; export a decoder"):
        export.export(models.build("bert-tiny"), {}, **sizes)


@pytest.mark.parametrize(
    ("here", "platforms"),
    [("cpu", ("cuda",)), ("cpu", ("cpu", "cuda")), ("cuda", ("cpu", "cuda")), ("cuda", "cpu")],
)
def test_programs_for_other_platforms_hold_what_runs_there(
    made, tmp_path, monkeypatch, here, platforms
):
    """On a GPU, cuDNN would compute the attention of 16-bit numbers; no CPU does."""
    config = dataclasses.replace(made[0].config, dtype=jnp.bfloat16, implementation="xla")
    model, variables = inference_variables(type(made[0])(config), made[1])
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 6)), jnp.int32)
    lengths = np.full(2, 6, np.int32)
    exact, native = (
        np.asarray(m.apply(v, prompts)[:, -1, :61], np.float32)
        for m, v in (made, (model, variables))
    )
    if here == "cuda":
        gpu = types.SimpleNamespace(
            platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100"
        )
        monkeypatch.setattr(attention, "current", lambda: gpu)
        monkeypatch.setattr(export.jax_export, "default_export_platform", lambda: here)
    exported = export.export(
        model, variables, batch=2, prompt=6, max_new_tokens=4, platforms=platforms
    )
    assert exported.platforms == ((platforms,) if isinstance(platforms, str) else platforms)
    for program in (exported.prefill, exported.decode):
        calls = set(re.findall(r"custom_call @([\w$.]+)", program.mlir_module()))
        assert calls <= {"LayoutConstraint"}
    export.save(exported, tmp_path / "made")
    loaded = export.load(tmp_path / "made")
    if "cpu" in loaded.platforms:
        logits, _ = loaded.prefill.call(variables, prompts, lengths)
        assert exact.std() > 1
        error = np.abs(np.asarray(logits)[:, :61] - exact).max()
        assert 0 < error <= 2 * np.abs(native - exact).max()
        assert loaded.greedy(variables, prompts, 4).shape == (2, 4)
    else:
        with pytest.raises(ValueError, match="cuda"):
            loaded.greedy(variables, prompts, 4)


@pytest.mark.gpu
def test_what_is_exported_on_a_gpu_holds_its_kernels_and_gives_the_tokens_of_generate(tmp_path):
    """In bfloat16, with cuDNN's attention and, where they run, sparse kernels."""
    path = attention.attention_path("bfloat16", 64)
    if path.implementation != "cudnn":
        pytest.skip(path.reason)
    sizes = {"hidden_size": 128, "num_heads": 2, "mlp_size": 256, "num_layers": 2}
    model = models.build("llama-nano", **SMALL | sizes, max_positions=16, dtype="bfloat16")
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    model, variables = inference_variables(model, variables)
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 6)), jnp.int32)
    exported = export.export(model, variables, batch=2, prompt=6, max_new_tokens=7)
    assert "__cudnn$fmhaSoftmax" in exported.prefill.mlir_module()
    export.save(exported, tmp_path / "made")
    tokens = export.load(tmp_path / "made").greedy(variables, prompts, 7)
    expected = generate(model, variables, prompts, max_new_tokens=7).tokens
    np.testing.assert_array_equal(tokens, expected)
