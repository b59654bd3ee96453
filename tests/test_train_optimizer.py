"""Schedules, AdamW and LAMB against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import Config
from train.optimizer import (
    adapter_rate,
    clip_by_global_norm,
    decayed,
    make_optimizer,
    make_schedule,
    scale_by_layer_trust_ratio,
)
from train.recipes import make_config
from train.state import is_stacked

EPS32 = float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize(("kind", "power"), [("linear", 1.0), ("polynomial", 0.5)])
def test_schedule_follows_the_formula_and_restarts_per_phase(kind, power):
    config = make_config(
        "bert-tiny", seq_len=(64, 128), steps=(20, 10), lr=(1.0, 0.5), warmup=(0.25, 0.0)
    )
    schedule = make_schedule(config.phases, kind)
    expected = []
    for steps, lr, warm in ((20, 1.0, 5), (10, 0.5, 0)):
        for t in range(steps):
            decay = (1 - (t - warm) / (steps - warm)) ** power if t >= warm else None
            expected.append(lr * (t + 1) / warm if t < warm else lr * decay)
    got = [float(schedule(t)) for t in range(30)]
    np.testing.assert_allclose(got, expected, rtol=8 * EPS32)
    assert max(got[:20]) == got[5] == 1.0


def test_warm_up_of_one_step_starts_at_the_peak():
    config = make_config("bert-tiny", steps=4, warmup=0.25, lr=1.0)
    schedule = make_schedule(config.phases, "linear")
    np.testing.assert_allclose(
        [float(schedule(t)) for t in range(4)], [1, 1, 2 / 3, 1 / 3], rtol=1e-6
    )


def params_like(rng: np.random.Generator) -> dict:
    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "layers_1_to_3": {"up": {"kernel": array(3, 4, 5), "bias": array(3, 5)}},
        "embeddings": {"token": {"embedding": array(6, 4)}},
        "norm": {"scale": array(4), "bias": array(4)},
    }


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): np.asarray(x, np.float64) for p, x in leaves}


def reference(params, grads_by_step, config: Config, lamb: bool) -> dict[str, np.ndarray]:
    """AdamW or LAMB in float64, written from the papers, layer by layer."""
    w = flat(params)
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    for t, grads in enumerate(grads_by_step, start=1):
        g = flat(grads)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in w:
            decays = k.endswith("['kernel']") or k.endswith("['embedding']")
            clipped = g[k] * min(1.0, config.clip / norm)
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * clipped
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * clipped**2
            m_hat, v_hat = m[k] / (1 - config.beta1**t), v[k] / (1 - config.beta2**t)
            u = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * decays * w[k]
            if lamb and decays:
                axes = (1, 2) if "layers_1_to_3" in k else (0, 1)
                ratio = np.linalg.norm(w[k], axis=axes, keepdims=True)
                u = u * ratio / np.linalg.norm(u, axis=axes, keepdims=True)
            w[k] = w[k] - 0.01 * u
    return w


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizer_follows_its_paper_per_layer(name):
    config = make_config("bert-tiny", optimizer=name, weight_decay=0.1, clip=1.0)
    rng = np.random.default_rng(0)
    params = params_like(rng)
    grads = [params_like(rng) for _ in range(5)]
    tx = make_optimizer(config, optax.constant_schedule(0.01), is_stacked)
    state, w = tx.init(params), params
    for g in grads:
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
    expected = reference(params, grads, config, lamb=name == "lamb")
    for path, value in flat(w).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=32 * EPS32, err_msg=path)


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_is_that_of_optax(limit):
    grads = params_like(np.random.default_rng(2))
    (found, _), (expected, _) = (
        tx(limit).update(grads, optax.EmptyState())
        for tx in (clip_by_global_norm, optax.clip_by_global_norm)
    )
    for path, value in flat(expected).items():
        np.testing.assert_allclose(flat(found)[path], value, rtol=4 * EPS32, err_msg=path)
    grads["norm"]["bias"] = grads["norm"]["bias"].at[0].set(jnp.nan)
    spoilt, _ = clip_by_global_norm(limit).update(grads, optax.EmptyState())
    assert all(np.isnan(value).all() for value in flat(spoilt).values())


def test_the_update_keeps_no_other_gradient():
    """What the compiled update needs besides its arguments, which it overwrites."""
    newer = jax.__version_info__ >= (0, 11)  # older XLA drops the barrier on CPU
    for moments in ("float32", "bfloat16") if newer else ("float32",):
        config = make_config("bert-tiny", moments=moments)
        tx = make_optimizer(config, optax.constant_schedule(0.01), is_stacked)
        w = {"up": {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}}

        def update(w, state, grads, tx=tx):
            updates, state = tx.update(grads, state, w)
            return optax.apply_updates(w, updates), state

        compiled = jax.jit(update, donate_argnums=(0, 1)).lower(w, jax.eval_shape(tx.init, w), w)
        memory = compiled.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 512 * 512
        assert memory.alias_size_in_bytes >= 512 * 512 * (12 if moments == "float32" else 8)


def test_trust_ratio_of_a_stack_equals_that_of_its_layers_apart():
    rng = np.random.default_rng(1)
    stack, update = (rng.normal(size=(3, 4, 5)).astype(np.float32) for _ in range(2))
    stack *= np.array([1.0, 10.0, 0.0], np.float32)[:, None, None]
    tx = scale_by_layer_trust_ratio(is_stacked)

    def scaled(name, w, u):
        return tx.update({name: u}, tx.init({name: w}), {name: w})[0][name]

    together = scaled("layers_0_to_2", stack, update)
    for i in range(3):
        np.testing.assert_array_equal(together[i], scaled("layers_0", stack[i], update[i]))
    np.testing.assert_array_equal(together[2], update[2])  # a layer at zero moves all the same


def test_decay_spares_biases_and_norms_only():
    tree = params_like(np.random.default_rng(0))
    tree["up"] = {"adapter_l": jnp.ones(1), "adapter_r": jnp.ones(1)}
    spared = {k for k, v in flat(decayed(tree)).items() if not v}
    assert spared == {
        "['layers_1_to_3']['up']['bias']",
        "['norm']['scale']",
        "['norm']['bias']",
    }


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_newborn_adapters_take_full_steps_at_a_rate_of_their_own(name):
    """At zero, Adam's first step is lr * sign(g); a trust ratio would hold the second one back."""
    config = make_config("bert-tiny", optimizer=name, weight_decay=0.0, clip=0.0, eps=1e-12)
    w = {"up": {"adapter_r": jnp.zeros((2, 3)), "kernel": jnp.ones((2, 3))}}
    g = jax.tree.map(lambda x: jnp.full_like(x, 0.5), w)
    schedule = optax.constant_schedule(0.01)
    tx = make_optimizer(config, schedule, is_stacked, adapter_rate=lambda step: 2.0 + step)
    state = tx.init(w)
    for expected in (-2.0 * 0.01, -(2.0 + 3.0) * 0.01):
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w["up"]["adapter_r"], expected, rtol=1e-5)


def test_the_steps_left_to_adapters_warm_up_and_decay_from_their_own_peak():
    config = make_config(
        "bert-tiny",
        seq_len=(64, 128),
        steps=(20, 100),
        lr=(1.0, 0.5),
        warmup=(0.25, 0.2),
        schedule="linear",
        adapter_rank=4,
        adapter_start=0.9,
        adapter_lr_scale=0.1,
    )
    schedule = make_schedule(config.phases, config.schedule)
    rate = adapter_rate(config, schedule)
    peak, joined = 0.5 * 0.1, 20 + 90  # 10 steps, 2 of them to warm up
    expected = [peak / 2, peak, *(peak * (1 - t / 8) for t in range(8))]
    got = [float(rate(t) * schedule(joined + t)) for t in range(10)]
    np.testing.assert_allclose(got, expected, rtol=16 * EPS32)


def test_by_default_adapters_peak_at_the_share_of_the_steps_that_is_left_to_them():
    config = make_config(
        "bert-tiny", steps=100, lr=2.0, warmup=0.0, adapter_rank=4, adapter_start=0.75
    )
    schedule = make_schedule(config.phases, config.schedule)
    rate = adapter_rate(config, schedule)
    expected = [2.0 * 0.25 * (1 - t / 25) for t in range(25)]
    got = [float(rate(t) * schedule(75 + t)) for t in range(25)]
    np.testing.assert_allclose(got, expected, rtol=32 * EPS32)


def test_adapters_that_are_there_from_the_start_have_the_rate_of_the_others_times_the_scale():
    config = make_config("bert-tiny", steps=40, warmup=0.25, adapter_rank=4, adapter_lr_scale=3.0)
    rate = adapter_rate(config, make_schedule(config.phases, config.schedule))
    np.testing.assert_allclose([float(rate(t)) for t in range(40)], 3.0, rtol=16 * EPS32)
