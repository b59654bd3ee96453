"""GPT-2: a token sees those before it, and the residual stream adds up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import models

pytestmark = pytest.mark.usefixtures("strict_dtypes")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)


def test_causality_by_gradient():
    """d logits[t] / d position[s] is zero for s > t, and only there."""
    model = models.build(
        "gpt2-nano",
        hidden_size=32,
        mlp_size=64,
        num_layers=2,
        vocab_size=61,
        max_positions=12,
        sparsity="layers/.*=1:2; .*=dense",
    )
    variables = jax.jit(model.init)(jax.random.key(0), IDS)

    def total(table, t):
        params = variables["params"]
        embeddings = params["embeddings"] | {"position": {"embedding": table}}
        out = model.apply(variables | {"params": params | {"embeddings": embeddings}}, IDS)
        return jnp.square(out[:, t, :61]).sum()

    table = variables["params"]["embeddings"]["position"]["embedding"]
    grads = jax.jit(jax.vmap(jax.grad(total), (None, 0)))(table, jnp.arange(12))
    reaches = np.asarray(jnp.abs(grads).max(axis=-1) > 0)
    np.testing.assert_array_equal(reaches, np.tri(12, dtype=bool))


def test_layers_add_to_the_residual_stream():
    """With zero output projections every layer is the identity, so logits are norm(x) @ table.T."""
    model = models.build(
        "gpt2-nano", num_layers=3, vocab_size=64, max_positions=12, sparsity="dense"
    )
    variables = jax.jit(model.init)(jax.random.key(0), IDS)

    def zero(path, leaf):
        names = [key.key for key in path]
        return 0 * leaf if names[-2] in ("output", "down") else leaf

    params = jax.tree_util.tree_map_with_path(zero, variables["params"])
    table = np.float64(params["embeddings"]["token"]["embedding"])
    x = table[np.asarray(IDS)] + np.float64(params["embeddings"]["position"]["embedding"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        model.apply({"params": params}, IDS), x @ table.T, rtol=1e-4, atol=1e-5
    )


def test_example_inputs_fit_short_models():
    model = models.build("gpt2-nano", max_positions=4)
    assert model.example_inputs()["input_ids"].shape == (1, 4)
