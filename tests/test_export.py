"""Exported prefill and decode, through a file, against `generate`."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import export, models
from slope_jax.generate import generate, inference_variables

SMALL = {"hidden_size": 32, "num_heads": 4, "mlp_size": 64, "num_layers": 2, "vocab_size": 61}


@pytest.fixture(scope="module")
def made():
    model = models.build("llama-nano", **SMALL, num_kv_heads=2, max_positions=16, adapter_rank=2)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    variables |= {"params": jax.tree.map(lambda x: 6 * x + 0.01, variables["params"])}
    return inference_variables(model, variables)


def test_examples_of_the_docstrings():
    assert doctest.testmod(export).failed == 0


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


def test_kernels_are_not_exported_for_a_device_that_is_not_there(made):
    model, variables = made
    sizes = {"batch": 1, "prompt": 4, "max_new_tokens": 2}
    with pytest.raises(NotImplementedError, match="chosen for the device at hand, which is cpu"):
        export.export(model, variables, **sizes, platforms=["cuda"])
    with pytest.raises(ValueError, match="max_positions=16"):
        export.export(model, variables, batch=1, prompt=14, max_new_tokens=4)
