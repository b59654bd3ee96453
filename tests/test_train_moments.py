"""Moments in bfloat16: against float32, against the decay that rounding would stop, repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.moments import round_at_random, scale_by_adam
from train.optimizer import make_optimizer
from train.recipes import make_config
from train.state import is_stacked

SHAPE = (3, 40, 50)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_random_rounding_is_to_a_neighbour_and_right_in_the_mean():
    x = jnp.full(SHAPE, 1 + 0.3 * 2**-7)  # 30 % of the way from 1 to the next bfloat16
    found = np.asarray(round_at_random(x, jnp.int32(5), 0), np.float64)
    assert set(np.unique(found)) == {1.0, 1 + 2**-7}
    up = found > 1
    deviation = np.sqrt(0.3 * 0.7 / x.size)
    assert abs(up.mean() - 0.3) < 4 * deviation
    for axis in range(3):  # no pattern along any axis: neighbours agree as often as chance has it
        agree = np.diff(up.astype(int), axis=axis) == 0
        chance = 0.3**2 + 0.7**2
        assert abs(agree.mean() - chance) < 6 * np.sqrt(chance * (1 - chance) / agree.size)
    again = np.asarray(round_at_random(x, jnp.int32(5), 0), np.float64)
    np.testing.assert_array_equal(again, found)
    for step, leaf in ((6, 0), (5, 1)):
        other = np.asarray(round_at_random(x, jnp.int32(step), leaf), np.float64) > 1
        assert abs((other == up).mean() - 0.58) < 6 * np.sqrt(0.58 * 0.42 / x.size)


def test_numbers_of_bfloat16_stay_and_what_is_not_finite_is_seen():
    x = jnp.array([0.0, 1.0, 3e-39, 2.0**100, jnp.inf, jnp.nan])
    exact = x.astype(jnp.bfloat16).astype(jnp.float32)
    found = round_at_random(exact, jnp.int32(1), 0)
    np.testing.assert_array_equal(np.asarray(found, np.float32), exact)


def test_second_moments_decay_although_each_step_is_below_the_resolution():
    tx = scale_by_adam(0.9, 0.999, 1e-8, "bfloat16")
    params = {"w": jnp.zeros(SHAPE)}
    state = tx.init(params)
    state = state._replace(nu={"w": jnp.ones(SHAPE, jnp.bfloat16)})

    def step(state, _):
        return tx.update(params, state)[1], None  # gradients of zero

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=1000))(state)
    nu = np.asarray(state.nu["w"], np.float64)
    expected = 0.999**1000
    assert abs(nu.mean() / expected - 1) < 0.01  # to the nearest they would all be 1 still
    assert nu.std() < 0.3 * expected


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_follow_those_of_float32_moments(name):
    """Within what one rounding of each moment per step can do: 2^-8 and 2^-7, halved by the root."""
    config, narrow = (
        make_config("bert-tiny", optimizer=name, beta2=0.95, moments=moments)
        for moments in ("float32", "bfloat16")
    )
    params = {"up": {"kernel": normal(0, (40, 50)), "adapter_l": normal(1, (40, 4))}}

    results = []
    for one in (config, narrow):
        tx = make_optimizer(one, optax.constant_schedule(1e-2), is_stacked)

        def step(carry, seed, tx=tx):
            w, state = carry
            noise = {name: normal(seed, x.shape) for name, x in w["up"].items()}
            grads = jax.tree.map(jnp.add, w, {"up": noise})
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), None

        steps = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, jnp.arange(20))[0])
        results.append(steps((params, tx.init(params))))
    (exact, wide), (found, small) = results
    for name, before in params["up"].items():
        moved, error = (x["up"][name] - y for x, y in ((exact, before), (found, exact["up"][name])))
        assert 0 < np.linalg.norm(error) < 2**-6 * np.linalg.norm(moved)
    floats = [x for x in jax.tree.leaves(small) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.bfloat16)}
    assert sum(x.nbytes for x in floats) * 2 == sum(
        x.nbytes for x in jax.tree.leaves(wide) if jnp.issubdtype(x.dtype, jnp.floating)
    )
