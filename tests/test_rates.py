"""The rates of pruned kernels."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import freeze

from slope_jax import SparseDense, find_layers, rates, scale_pruned


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = SparseDense(16, sparsity="2:4", adapter_rank=2, name="half")(x)
        x = SparseDense(16, sparsity="2:8", name="quarter")(x)
        return SparseDense(8, sparsity=None, name="dense")(x)


def test_examples_of_the_docstrings():
    assert doctest.testmod(rates).failed == 0


def test_outputs_move_as_far_as_dense_ones_under_adam():
    """Adam's first step is the sign of the gradient: an output moves by as many as it has inputs."""
    model, x = Mixed(), jnp.ones((1, 16))
    variables = model.init(jax.random.key(0), x)
    layers = find_layers(model.apply, variables, x)
    tx = optax.chain(optax.scale_by_sign(), scale_pruned(layers))
    grads = jax.tree.map(jnp.ones_like, variables["params"])
    moved, _ = tx.update(grads, tx.init(grads))
    for name in ("half", "quarter", "dense"):
        np.testing.assert_array_equal(moved[name]["kernel"].sum(0), 16.0)
        np.testing.assert_array_equal(moved[name]["bias"], 1.0)
    for name in ("adapter_l", "adapter_r"):
        np.testing.assert_array_equal(moved["half"][name], 1.0)


def test_updates_keep_their_kind_and_what_is_masked_stays_out():
    layer, x = SparseDense(8), jnp.ones((2, 16))
    variables = layer.init(jax.random.key(0), x)
    faster = scale_pruned(find_layers(layer.apply, variables, x))
    params = variables["params"]
    for kind in (dict, freeze):
        updates, _ = faster.update(kind(params), faster.init(kind(params)))
        assert type(updates) is type(kind(params))
        np.testing.assert_array_equal(updates["kernel"], 2 * params["kernel"])
        np.testing.assert_array_equal(updates["bias"], params["bias"])
    for chosen, factor in ((True, 2), (False, 1)):
        some = optax.masked(faster, {"kernel": chosen, "bias": not chosen})
        updates, _ = some.update(params, some.init(params))
        np.testing.assert_array_equal(updates["kernel"], factor * params["kernel"])
