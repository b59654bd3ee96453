"""Methods that SLoPe is compared with, each against its rule written in NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util

from slope_jax import SparseDense, TrainState
from slope_jax.models import variant_config
from train.methods import METHODS, products
from train.methods.mvue import estimate
from train.methods.transposable import transposable_mask
from train.optimizer import make_optimizer
from train.plan import make_plan
from train.pretrain import parse
from train.recipes import make_config
from train.state import abstract_state, init_state, is_stacked, make_setup, step_key
from train.step import make_train_step

EPS32 = float(jnp.finfo(jnp.float32).eps)
INPUTS, CLASSES, VOCAB, ROWS, LENGTH = 16, 8, 12, 4, 8
TABLE = np.random.default_rng(0).normal(size=(VOCAB, INPUTS)).astype(np.float32)
KERNEL = ("linear", "kernel")


@pytest.mark.parametrize("scan", [True, False])
def test_pruned_kernels_and_no_others_move_at_their_own_rate(scan):
    moved = []
    for scale in (1.0, 2.0):
        config = make_config("gpt2-nano", vocab_size=300, scan=scan, pruned_lr_scale=scale)
        setup = make_setup(config)
        shapes = abstract_state(setup, adapters=False)
        rng = np.random.default_rng(0)
        params, grads = (
            jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes.params)  # noqa: B023
            for _ in range(2)
        )
        updates, _ = setup.tx.update(grads, jax.jit(setup.tx.init)(params), params)
        moved.append(traverse_util.flatten_dict(updates))
    pruned = traverse_util.flatten_dict(shapes.masks).keys()
    assert len(pruned) == (7 if scan else 15)
    for path, slow in moved[0].items():
        np.testing.assert_array_equal(moved[1][path], slow * (2 if path in pruned else 1), path)


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("adamw", {"up": 2.0, "down": 4.0}), ("lamb", {"up": 1, "down": 1})]
)
def test_kernels_with_fewer_entries_move_faster_by_as_much_with_adamw(optimizer, expected):
    patterns = {"up": "2:4", "down": "2:8"}
    sparsity = ".*/up=2:4; .*/down=2:8; .*=dense"
    moved = []
    for scale in (1.0, None):
        config = make_config("gpt2-nano", optimizer=optimizer, sparsity=sparsity, scan=False)
        method = METHODS["slope"](dataclasses.replace(config, pruned_lr_scale=scale))
        updates = {"layers_3": {"mlp": {name: {"kernel": jnp.ones(8)} for name in expected}}}
        moved.append(method.after_update().update(updates, optax.EmptyState())[0])
    told = str(make_plan(dataclasses.replace(config, pruned_lr_scale=None)))
    rates = [f"{expected[name]:g} times that of others ({p})" for name, p in patterns.items()]
    assert f"learning rate of pruned kernels: {', '.join(rates)}" in told
    for name, factor in expected.items():
        slow, fast = (tree["layers_3"]["mlp"][name]["kernel"] for tree in moved)
        np.testing.assert_array_equal(fast, factor * slow)


@pytest.mark.parametrize("name", ["slope", "sr-ste", "fst"])
def test_methods_find_the_kernels_of_layers_without_a_scan(name):
    method = METHODS[name](make_config("gpt2-nano", method=name, scan=False))
    assert ("layers_3", "mlp", "up", "kernel") in method.kernels


# One linear, trained by the real step and by NumPy.


class OneLinear(nn.Module):
    """Logits are a linear map of fixed rows of a table."""

    simulated: object

    @nn.compact
    def __call__(self, input_ids, *, deterministic=True):
        return SparseDense(
            CLASSES,
            use_bias=False,
            simulated=True,
            dot_general_cls=self.simulated if isinstance(self.simulated, type) else None,
            name="linear",
        )(jnp.asarray(TABLE)[input_ids])


def one_linear(**fields):
    defaults = {"lr": 0.05, "warmup": 0.0, "steps": 12, "eps": 1e-2, "clip": 0.3}
    config = make_config("gpt2-nano", **{**defaults, "weight_decay": 0.1, **fields})
    method = METHODS[config.method](config)
    method.kernels = {KERNEL: "2:4"}
    return config, method


def batch():
    rng = np.random.default_rng(1)
    return {
        "input_ids": rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32),
        "labels": rng.integers(0, CLASSES, (ROWS, LENGTH), dtype=np.int32),
    }


def trained(config, method, steps, accumulation=1):
    """The kernel after each step of the real thing, ahead of them the initial one."""
    model = OneLinear(method.options()["simulated"])
    schedule = lambda step: config.lr[0]  # noqa: E731
    params = model.init(jax.random.key(0), batch()["input_ids"])["params"]
    tx = make_optimizer(config, schedule, is_stacked, method.after_update())
    masks = method.initial_masks(params, {})
    state = TrainState.create(apply_fn=model.apply, params=params, masks=masks, tx=tx)
    kernels = [np.asarray(params["linear"]["kernel"])]
    run = {}
    for step in range(steps):
        now = method.at(step)
        now.kernels = method.kernels
        if type(now) not in run:
            run[type(now)] = make_train_step(accumulation, schedule, now)
        state, _ = run[type(now)](state, batch(), jax.random.key(2))
        kernels.append(np.asarray(state.params["linear"]["kernel"]))
    return kernels


def two_of_four(a):
    """The two of largest magnitude of four consecutive entries along the first axis."""
    keep = np.zeros(a.shape, bool)
    for i, j in np.ndindex(a.shape[0] // 4, a.shape[1]):
        order = sorted(range(4), key=lambda k: (-abs(a[4 * i + k, j]), k))
        keep[[4 * i + k for k in order[:2]], j] = True
    return keep


def numpy_steps(config, w, steps, *, mask_of, dw_of=lambda x, dy: x.T @ dy, in_gradient, decay):
    """AdamW on the dense weight; mask_of(step, w) is used in the forward pass and the decay."""
    x, labels = TABLE.astype(np.float64)[batch()["input_ids"].ravel()], batch()["labels"].ravel()
    w = w.astype(np.float64)
    first, second, kernels, masks = np.zeros_like(w), np.zeros_like(w), [w], []
    for t in range(steps):
        mask = mask_of(t, w)
        z = x @ (w * mask)
        p = np.exp(z - z.max(1, keepdims=True))
        dy = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels]) / len(labels)
        decayed = decay * ~mask * w
        g = dw_of(x, dy) + (decayed if in_gradient else 0)
        g *= min(1, config.clip / np.linalg.norm(g))
        first = config.beta1 * first + (1 - config.beta1) * g
        second = config.beta2 * second + (1 - config.beta2) * g * g
        mean = first / (1 - config.beta1 ** (t + 1))
        square = second / (1 - config.beta2 ** (t + 1))
        update = mean / (np.sqrt(square) + config.eps) + config.weight_decay * w
        w = w - config.lr[0] * (update + (0 if in_gradient else decayed))
        kernels.append(w)
        masks.append(mask)
    return kernels, masks


def assert_same_kernels(got, wanted, config):
    """Rounding of the gradient by a few ulp, of a step by lr / eps times that, of each step anew."""
    bound = 64 * EPS32 * (1 + config.lr[0] / config.eps)
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert np.abs(a - b).max() <= max(step, 1) * bound, step


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("fields", "in_gradient", "prune"),
    [
        ({"method": "sr-ste", "mask_decay": 0.7}, False, False),
        ({"method": "extended-sr-ste", "mask_decay": 0.01}, True, False),
        ({"method": "extended-sr-ste", "mask_decay": 0.01, "prune_dy": True}, True, True),
    ],
)
def test_sr_ste_steps_are_those_of_numpy(fields, in_gradient, prune, accumulation):
    config, method = one_linear(**fields)
    got = trained(config, method, 5, accumulation)
    dw_of = (lambda x, dy: x.T @ (dy * two_of_four(dy))) if prune else (lambda x, dy: x.T @ dy)
    wanted, masks = numpy_steps(
        config,
        got[0],
        5,
        mask_of=lambda step, w: two_of_four(w),
        dw_of=dw_of,
        in_gradient=in_gradient,
        decay=config.mask_decay,
    )
    assert any((a != b).any() for a, b in itertools.pairwise(masks))  # and they do change
    assert_same_kernels(got, wanted, config)


# Transposable masks.


@functools.cache
def transposable():
    """Of all 2^16 masks those with two in each row and column, keeping ahead of pruning."""
    masks = (np.array(bits).reshape(4, 4) for bits in itertools.product((1, 0), repeat=16))
    return [mask for mask in masks if (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all()]


def brute_force(block):
    """Of equal ones the first, as `max` does."""
    return max(transposable(), key=lambda mask: (np.abs(block) * mask).sum()).astype(bool)


def test_transposable_masks_are_the_best_of_all(strict_dtypes):
    w = np.random.default_rng(0).integers(-3, 4, (2, 8, 4)).astype(np.float32)  # with many ties
    w[0, :4] = 1
    mask = np.asarray(transposable_mask(jnp.asarray(w)))
    for layer, i in np.ndindex(2, 2):
        rows = slice(4 * i, 4 * i + 4)
        np.testing.assert_array_equal(mask[layer, rows], brute_force(w[layer, rows]))


def test_blocks_lie_where_they_are_in_the_weight():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(8, 12)).astype(np.float32)
    mask = np.asarray(transposable_mask(jnp.asarray(w)))
    for i, j in np.ndindex(2, 3):
        block = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        np.testing.assert_array_equal(mask[block], transposable_mask(jnp.asarray(w[block])))


# The estimator.


def probabilities(a):
    """min(1, |a| / c) with the sum 2, c by bisection: where the variance is least (KKT)."""
    a = np.abs(np.asarray(a, np.float64))
    low, high = 0.0, a.sum()
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, a / c).sum() > 2 else (low, c)
    return np.minimum(1, a / high)


def numpy_estimate(a, u):
    """Systematic sampling of one group: the points u and u + 1 on intervals laid end to end."""
    p, start, result = probabilities(a), 0.0, np.zeros(4)
    for i in range(4):
        if any(start <= point < start + p[i] for point in (u, u + 1)):
            result[i] = a[i] / p[i]
        start += p[i]
    return result


GROUPS = np.array(
    [
        [1.0, -2.0, 3.0, -2.5],
        [0.25, 8.0, -0.5, 0.125],  # one stays for certain
        [0.0, 0.0, -7.0, 0.0],
        [1.0, 1.0, 0.0, 0.0],
        [-1.0, -1.0, -1.0, -1.0],
        [3.0, 2.0, 1.0, 0.0],  # the first with probability 1 exactly
        [0.0, 0.0, 0.0, 0.0],
        [1e-3, 1.0, 1e-3, 1.0],
    ],
    np.float32,
)


def moments(a):
    """Mean and variance of `estimate` over u, exactly: it is constant between breakpoints."""
    p = probabilities(a) if np.count_nonzero(a) > 2 else (a != 0).astype(float)
    ends = np.cumsum(p)
    cuts = np.unique(np.concatenate([[0.0, 1.0], ends % 1]))
    cuts = cuts[np.concatenate([[True], np.diff(cuts) > 1e-6])]
    cuts[-1] = 1.0
    middles, weights = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
    groups = jnp.broadcast_to(jnp.asarray(a)[:, None], (4, len(middles)))
    found = np.asarray(estimate(groups, jnp.asarray(middles, jnp.float32)), np.float64)
    mean = found @ weights
    return found, mean, ((found - mean[:, None]) ** 2 @ weights).sum()


@pytest.mark.parametrize("a", GROUPS, ids=str)
def test_estimate_is_unbiased_2_of_4_and_of_least_variance(a, strict_dtypes):
    found, mean, variance = moments(a)
    scale = np.abs(a).max()
    # Cuts are merged if closer than 1e-6, and p is rounded to float32.
    np.testing.assert_allclose(mean, a, atol=1e-5 * max(scale, EPS32), rtol=0)
    assert ((found != 0).sum(0) == min(2, np.count_nonzero(a))).all()
    if np.count_nonzero(a) > 2:
        least = (a.astype(np.float64) ** 2 * (1 / np.maximum(probabilities(a), 1e-30) - 1)).sum()
        np.testing.assert_allclose(variance, least, rtol=1e-4)
    else:
        assert variance == 0


def test_estimate_is_that_of_numpy():
    rng = np.random.default_rng(2)
    groups = rng.normal(size=(64, 4, 3)).astype(np.float32) ** 3
    u = rng.random((64, 3)).astype(np.float32)
    got = np.asarray(estimate(jnp.asarray(groups), jnp.asarray(u)))
    for i, j in np.ndindex(64, 3):
        np.testing.assert_allclose(
            got[i, :, j], numpy_estimate(groups[i, :, j], u[i, j]), rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_prune_dy_for_dw_alone(dtype, strict_dtypes):
    key = jax.random.key(0)
    x = jax.random.randint(key, (2, 4, 6), -4, 5).astype(dtype)
    w = jax.random.randint(jax.random.fold_in(key, 1), (6, 5), -4, 5).astype(dtype)
    dy = jax.random.randint(jax.random.fold_in(key, 2), (2, 4, 5), -8, 9).astype(dtype)
    product = products.PrunedProduct()

    def call(x, w):
        return product.apply({}, x, w, (((2,), (0,)), ((), ())))

    y, back = jax.vjp(call, x, w)
    dx, dw = back(dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    np.testing.assert_array_equal(np.asarray(y, np.float64), x @ w)
    np.testing.assert_array_equal(np.asarray(dx, np.float64), dy @ w.T)
    flat = dy.reshape(8, 5)
    np.testing.assert_array_equal(
        np.asarray(dw, np.float64), x.reshape(8, 6).T @ (flat * two_of_four(flat))
    )


# FST.


def test_fst_steps_are_those_of_numpy(monkeypatch):
    u = np.random.default_rng(3).random((ROWS * LENGTH // 4, CLASSES)).astype(np.float32)

    def drawn(key, dy):
        assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return estimate(dy.reshape(-1, 4, CLASSES), jnp.asarray(u)).reshape(dy.shape)

    monkeypatch.setattr(products, "mvue", drawn)
    fields = {"mask_decay": 0.01, "mask_every": 2, "dense_finish": 0.5}
    config, method = one_linear(method="fst", **fields)
    assert method.finish_step == 6
    got = trained(config, method, 8)
    kept = []

    def mask_of(step, w):
        if step >= 6:
            return np.ones(w.shape, bool)
        if step % 2 == 0:
            kept[:] = [search(w)]
        return kept[0]

    def search(w):
        mask = np.zeros(w.shape, bool)
        for i, j in np.ndindex(w.shape[0] // 4, w.shape[1] // 4):
            block = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            mask[block] = brute_force(w[block])
        return mask

    def dw_of(x, dy):
        steps.append(0)
        if len(steps) > 6:
            return x.T @ dy
        pruned = np.zeros_like(dy)
        for i, j in np.ndindex(u.shape):
            pruned[4 * i : 4 * i + 4, j] = numpy_estimate(dy[4 * i : 4 * i + 4, j], u[i, j])
        return x.T @ pruned

    steps = []
    wanted, masks = numpy_steps(
        config, got[0], 8, mask_of=mask_of, dw_of=dw_of, in_gradient=True, decay=0.01
    )
    assert (masks[0] == masks[1]).all()
    assert any((masks[0] != masks[t]).any() for t in (2, 4))
    assert_same_kernels(got, wanted, config)


def test_fst_draws_anew_for_every_linear_micro_batch_and_step(monkeypatch):
    draws = []

    def drawn(key, dy):
        jax.debug.callback(lambda x: draws.append(float(x)), jax.random.uniform(key))
        return dy

    monkeypatch.setattr(products, "mvue", drawn)
    config = make_config("gpt2-nano", method="fst", steps=4)
    setup = make_setup(config, vocab_size=64)
    ids = np.zeros((4, 8), np.int32)
    step = make_train_step(2, setup.schedule, setup.method)
    state = init_state(setup)
    for _ in range(2):
        state, _ = step(state, {"input_ids": ids, "labels": ids}, step_key(setup))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(set(draws)) == len(draws) == 2 * 2 * 4 * 2  # steps, micro-batches, layers, linears


# Configuration.


def test_half_has_half_of_the_blocks():
    half = make_setup(make_config("gpt2-small", method="half"), vocab_size=64).model.config
    whole = variant_config("gpt2-small")
    assert (half.num_layers, whole.num_layers) == (6, 12)
    assert half.hidden_size == whole.hidden_size
    assert set(half.patterns.values()) == {"dense"}
    plan = make_plan(make_config("gpt2-nano", method="half"))
    kernels = plan.amounts["dense kernels"]
    assert 2 * kernels.count == kernels.dense_count
    assert plan.amounts["pruned kernels: values"].dense_count == 0


@pytest.mark.parametrize("method", ["sr-ste", "extended-sr-ste", "fst"])
def test_the_plan_says_that_masks_are_simulated(method):
    plan = make_plan(make_config("bert-tiny", method=method))
    first = str(plan).split("\n\n")[0]
    count = 4 if method == "fst" else 7  # MLPs; all linears of the layers but the first
    assert f"sparse products of {count} linears: xla, 2:4 is simulated: a dense product" in first
    assert plan.parameters[0] == plan.parameters[1]


BAD = [
    ({"method": "dense", "adapter_rank": 8}, "adapter_rank 8 has no meaning for --method=dense"),
    ({"method": "half", "sparsity": "2:8"}, "sparsity '2:8' has no meaning .*only for slope"),
    ({"method": "fst", "sparsity": "1:2"}, "no meaning for --method=fst"),
    ({"method": "sr-ste", "prune_dy": True}, "prune_dy True .*only for extended-sr-ste"),
    ({"method": "sr-ste", "backward": "exact"}, "backward 'exact' .*slope, wanda"),
    ({"mask_decay": 1e-4}, "mask_decay 0.0001 .*slope.*sr-ste, extended-sr-ste, fst"),
    ({"mask_every": 7}, "mask_every 7 .*only for fst"),
    ({"init_from": "runs/a"}, "init_from 'runs/a' .*only for wanda"),
    ({"method": "wanda"}, "name the run folder of a dense one with --init-from"),
    ({"method": "wanda", "init_from": "a", "tokenizer": "b"}, "--tokenizer=b does not go with"),
    ({"method": "sr-ste", "sparsity": "dense"}, "prunes nothing"),
    ({"method": "sr-ste", "mask_decay": -1.0}, "mask_decay must not be negative"),
    ({"method": "fst", "dense_finish": 1.0}, r"dense_finish must lie in \[0, 1\)"),
    ({"method": "fst", "mask_every": 0}, "mask_every must be above 0"),
    ({"method": "fst", "seq_len": 13, "batch_size": 2}, "2 x 13 is no multiple of 4"),
    ({"method": "fst", "sparsity": "dense"}, "sparsity 'dense' has no meaning for --method=fst"),
    ({"method": "sr-ste", "adapter_start": 0.3}, r"adapter_start 0\.3 .*only for slope, wanda"),
    ({"method": "dense", "adapter_start": 0.5}, r"adapter_start 0\.5 .*only for slope, wanda"),
    ({"dense_finish": 0.0}, r"dense_finish 0\.0 has no meaning for --method=slope, only for fst"),
    ({"mask_decay": 0.0}, r"mask_decay 0\.0 has no meaning for --method=slope"),
    ({"sparsity": "dense", "adapter_rank": 0}, "prunes nothing, .*; give .* or --method=dense"),
    ({"sparsity": ".*=dense"}, "prunes nothing"),
    ({"method": "slope", "steps": 0}, "steps must be a positive integer, got 0"),
]


def test_what_is_not_given_is_as_published():
    """2e-4 is Zhou et al.'s, 6e-6 that of SLoPe's appendix; all of FST is Hu et al.'s."""
    for name, decay in (("sr-ste", 2e-4), ("extended-sr-ste", 6e-6), ("fst", 6e-5)):
        method = METHODS[name](make_config("gpt2-nano", method=name, steps=600))
        assert method.decay == decay
    assert method.config.mask_every == 40
    assert method.finish_step == 500  # the last sixth is dense


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda x: str(x)[:40])
def test_options_that_do_not_go_together_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{"model": "gpt2-nano", **fields})


@pytest.mark.parametrize("recipe", ["quickstart", "paper"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "wanda"])
def test_what_means_off_is_no_option(method, recipe):
    """And every recipe, which has options of slope, is one of each method."""
    off = {"adapter_rank": 0, "prune_dy": False, "init_from": "", "mask_decay": None}
    off |= {"sparsity": "dense"} if method in ("dense", "half") else {}
    config = make_config("gpt2-small", recipe, method=method, **off)
    assert dataclasses.replace(config, seed=1).method == method
    dense = dataclasses.replace(config, method="dense", sparsity="dense")
    assert dense.adapter_step is None


def test_patterns_by_depth_adapters_from_the_start_and_masks_by_the_command_line():
    args = ["--model=gpt2-nano", "--sparsity=2:4,2:8", "--adapter-start=0", "--adapter-rank=4"]
    args += ["--backward=exact", "--mask-init=random", "--adapter-init-scale=0.5"]
    config = parse([*args, "--adapter-lr-scale=3"])
    assert config.adapter_step == 0
    assert config.adapter_lr_scale == 3.0
    setup = make_setup(config, vocab_size=64)
    found = setup.adapted.config
    assert [found.patterns[f"layers/{i}/mlp/up"] for i in range(4)] == ["2:4"] * 2 + ["2:8"] * 2
    assert (found.backward, found.mask_init, found.adapter_scale) == ("exact", "random", 0.5)
    rules = parse(["--model=gpt2-nano", r"--sparsity=layers/[01]/mlp/.*=1:2; .*=dense"])
    patterns = make_setup(rules, vocab_size=64).model.config.patterns
    assert {path for path, pattern in patterns.items() if pattern != "dense"} == {
        f"layers/{i}/mlp/{name}" for i in (0, 1) for name in ("up", "down")
    }
    masked = parse(["--model=gpt2-nano", "--method=sr-ste", "--sparsity=1:2,2:8"])
    kernels = METHODS["sr-ste"](masked).kernels
    assert kernels["layers_0", "attention", "output", "kernel"] == "1:2"
    assert kernels["layers_2_to_3", "attention", "qkv", "kernel"] == "2:8"
