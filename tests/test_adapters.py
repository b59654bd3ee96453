import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.tree_util import keystr, tree_leaves_with_path

from slope_jax import SparseDense, TrainState, adapter_labels, add_adapters, lazy_adapters

X = jax.random.normal(jax.random.key(9), (6, 8))


class Model(nn.Module):
    rank: int = 0
    width: int = 16
    skip: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="first")(x)
        x = nn.relu(SparseDense(16, adapter_rank=self.rank, name="up")(x))
        stack = nn.scan(
            Block,
            variable_axes={"params": 0, "masks": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(0 if self.skip else self.rank, name="layers")(x, None)[0]


class Block(nn.Module):
    rank: int

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(SparseDense(16, adapter_rank=self.rank, name="linear")(x)), None


def optimizer(moments=None, adapter_tx=None):
    moments = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        lazy_adapters(moments, adapter_tx),
        optax.scale_by_learning_rate(optax.linear_schedule(1e-2, 0.0, 100)),
    )


@functools.cache  # steps of each optimizer are compiled anew
def new_state(tx=None, steps=3):
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, tx=tx or optimizer(), **variables)
    for _ in range(steps):
        state = step(state)
    return state


@jax.jit
def step(state):
    def loss(params):
        return (state.apply_fn({**state.variables, "params": params}, X) ** 2).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def by_path(tree):
    return {keystr(path): leaf for path, leaf in tree_leaves_with_path(tree)}


def test_everything_old_is_carried_and_the_function_is_unchanged():
    state = new_state()
    joined, count = add_adapters(state, Model(rank=2), jax.random.key(1), X)
    assert count == 4  # "up" and a stack of three
    np.testing.assert_array_equal(
        joined.apply_fn(joined.variables, X), state.apply_fn(state.variables, X)
    )
    for tree in ("params", "masks", "step"):
        old, new = by_path(getattr(state, tree)), by_path(getattr(joined, tree))
        assert set(new) - set(old) == {p for p in new if "adapter" in p}
        for path, leaf in old.items():
            np.testing.assert_array_equal(leaf, new[path])
    old, new = by_path(state.opt_state), by_path(joined.opt_state)
    for path, leaf in old.items():
        if "['adapter']" not in path:
            np.testing.assert_array_equal(leaf, new[path])


def test_newborns_have_their_own_bias_correction():
    """At its first step Adam moves every parameter by the learning rate; 3 steps late it must too."""
    state = new_state()
    joined, _ = add_adapters(state, Model(rank=2), jax.random.key(1), X)
    after = step(joined)
    moved = after.params["up"]["adapter_r"] - joined.params["up"]["adapter_r"]
    rate = 1e-2 * (1 - 3 / 100)
    np.testing.assert_allclose(jnp.abs(moved), rate, rtol=1e-3)


def test_the_old_parameters_go_on_as_if_nothing_had_happened():
    """With a zero learning rate for adapters the two runs are the same, up to the clip norm."""
    tx = optax.chain(
        lazy_adapters(optax.scale_by_adam(), optax.set_to_zero()),
        optax.scale_by_learning_rate(1e-2),
    )
    alone = new_state(tx)
    joined, _ = add_adapters(alone, Model(rank=2), jax.random.key(1), X)
    for _ in range(3):
        alone, joined = step(alone), step(joined)
    for path, leaf in by_path(alone.params).items():
        np.testing.assert_array_equal(leaf, by_path(joined.params)[path])


def test_works_with_any_transform_that_keeps_state_per_parameter():
    tx = optax.chain(lazy_adapters(optax.lamb(1e-3)), optax.ema(0.9))
    joined, count = add_adapters(new_state(tx), Model(rank=2), jax.random.key(1), X)
    assert count == 4
    step(joined)


def test_labels():
    variables = Model(rank=2).init(jax.random.key(0), X)
    labels = adapter_labels(variables["params"])
    assert labels["up"] == {
        "kernel": "base",
        "bias": "base",
        "adapter_l": "adapter",
        "adapter_r": "adapter",
    }


@pytest.mark.parametrize(
    ("model", "tx", "message"),
    [
        (Model(), None, "adapter_rank > 0"),
        (Model(rank=2, width=32), None, "differs.*first/bias, first/kernel"),
        (Model(rank=2, skip=True), None, "no adapters: layers/linear"),
        (Model(rank=2), optax.adam(1e-3), "lazy_adapters"),
    ],
)
def test_bad_input_is_named(model, tx, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(new_state(tx, steps=0), model, jax.random.key(1), X)


def test_adapters_join_once():
    model = Model(rank=2)
    joined, _ = add_adapters(new_state(), model, jax.random.key(1), X)
    with pytest.raises(ValueError, match="already"):
        add_adapters(joined, model, jax.random.key(1), X)


def test_example_inputs_are_needed():
    with pytest.raises(ValueError, match="Model has no example_inputs"):
        add_adapters(new_state(), Model(rank=2), jax.random.key(1))
