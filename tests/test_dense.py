"""SparseDense against flax.linen.Dense and against the formulas."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from pallas_kernels import CompressedMatrix, Pattern, decompress
from pallas_kernels.epilogue import Norm
from slope_jax import SparseDense, explain, find_layers, masks, working_copies
from slope_jax.models import build
from slope_jax.normed import Normed, Stream

X = jax.random.normal(jax.random.key(9), (2, 5, 16))


def dense_kernel(layer, variables, in_features=16):
    values, metadata = variables["params"]["kernel"], variables["masks"]["kernel"]
    shape = (in_features, layer.features)
    return decompress(CompressedMatrix(values, metadata, layer.pattern, 0, shape))


@pytest.mark.parametrize("sparsity", [None, "4:4", "1:1"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16, "precision": "highest"},
        {"bias_init": nn.initializers.normal(1.0), "kernel_init": nn.initializers.orthogonal()},
    ],
)
def test_dense_when_nothing_is_pruned(sparsity, options):
    layer, reference = SparseDense(12, sparsity=sparsity, **options), nn.Dense(12, **options)
    key = jax.random.key(0)
    variables, expected = layer.init(key, X), reference.init(key, X)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    y, y_reference = layer.apply(variables, X), reference.apply(expected, X)
    assert y.dtype == y_reference.dtype
    np.testing.assert_array_equal(y, y_reference)


@pytest.mark.parametrize("sparsity", ["2:4", "1:2", "2:8"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_is_dense_with_the_pruned_kernel(sparsity, dtype):
    options = {"dtype": dtype, "bias_init": nn.initializers.normal(1.0)}
    layer, reference = SparseDense(24, sparsity=sparsity, **options), nn.Dense(24, **options)
    key = jax.random.key(0)
    variables = layer.init(key, X)
    whole = reference.init(key, X)["params"]
    pruned = whole["kernel"] * masks.magnitude_mask(whole["kernel"], sparsity)
    np.testing.assert_array_equal(dense_kernel(layer, variables), pruned)
    y = layer.apply(variables, X)
    expected = reference.apply({"params": {**whole, "kernel": pruned}}, X)
    assert y.dtype == expected.dtype
    if dtype is None:
        np.testing.assert_array_equal(y, expected)
    else:  # one rounding, where nn.Dense rounds the product and the sum
        exact = np.asarray(X, np.float64) @ np.asarray(pruned, np.float64)
        exact += np.asarray(whole["bias"])
        errors = [np.abs(np.asarray(a, np.float64) - exact).max() for a in (y, expected)]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("sparsity", [None, "2:4"])
def test_an_activation_is_applied_after_everything_else(sparsity):
    options = {"sparsity": sparsity, "adapter_rank": 2}
    options |= {name: nn.initializers.normal(1.0) for name in ("adapter_r_init", "bias_init")}
    plain, active = SparseDense(24, **options), SparseDense(24, activation="relu", **options)
    variables = plain.init(jax.random.key(0), X)
    y = active.apply(variables, X)
    np.testing.assert_array_equal(y, np.maximum(plain.apply(variables, X), 0))
    assert (np.asarray(y) == 0).any()


def test_kernel_and_everything_an_optimizer_keeps_is_half_size():
    variables = SparseDense(64, use_bias=False).init(jax.random.key(0), jnp.ones((1, 128)))
    assert variables["params"]["kernel"].shape == (64, 64)
    tx = optax.chain(optax.ema(0.9), optax.adamw(1e-3))
    sizes = {leaf.size for leaf in jax.tree.leaves(tx.init(variables["params"])) if leaf.ndim}
    assert sizes == {128 * 64 // 2}
    assert variables["masks"]["kernel"].nbytes == 128 * 64 // 8


@pytest.mark.parametrize("mask_init", ["random", lambda key, kernel: -jnp.abs(kernel)])
def test_mask_init_chooses_which_survive(mask_init):
    layer = SparseDense(32, mask_init=mask_init, use_bias=False)
    variables = layer.init(jax.random.key(0), X)
    whole = nn.Dense(32, use_bias=False).init(jax.random.key(0), X)["params"]["kernel"]
    kept = np.asarray(dense_kernel(layer, variables) != 0)
    assert masks.is_nm(kept, "2:4")
    magnitude = np.asarray(masks.magnitude_mask(whole, "2:4"))
    if callable(mask_init):
        np.testing.assert_array_equal(kept, ~magnitude)
    else:
        assert 0.3 < (kept == magnitude).mean() < 0.7
    np.testing.assert_array_equal(dense_kernel(layer, variables), np.where(kept, whole, 0))


def test_pruned_positions_stay_zero_through_50_steps_of_adamw_with_decay():
    layer = SparseDense(32)
    variables = layer.init(jax.random.key(0), X)
    params, static = variables["params"], variables["masks"]
    target = jax.random.normal(jax.random.key(1), (2, 5, 32))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        def loss(p):
            return ((layer.apply({"params": p, "masks": static}, X) - target) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    first = None
    for _ in range(50):
        params, opt_state, value = step(params, opt_state)
        first = value if first is None else first
    before = dense_kernel(layer, variables)
    after = dense_kernel(layer, {"params": params, "masks": static})
    assert value < 0.7 * first
    assert bool((after[before == 0] == 0).all())
    assert bool((after != before)[before != 0].all())


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.remat(SparseDense) if self.remat else SparseDense
        scanned = nn.scan(
            _Block,
            variable_axes={"params": 0, "masks": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(body, name="layers")(x, None)[0]


class _Block(nn.Module):
    body: type

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(self.body(16, name="linear")(x)), None


@pytest.mark.usefixtures("optimized")
def test_scan_over_layers_and_remat():
    model = Stack()
    variables = model.init(jax.random.key(0), X)
    assert variables["params"]["layers"]["linear"]["kernel"].shape == (3, 8, 16)
    assert variables["masks"]["layers"]["linear"]["kernel"].shape == (3, 2, 16)
    y = X
    for i in range(3):
        one = jax.tree.map(lambda leaf: leaf[i], variables)  # noqa: B023
        one = {name: tree["layers"]["linear"] for name, tree in one.items()}
        y = nn.tanh(SparseDense(16).apply(one, y))
    np.testing.assert_allclose(model.apply(variables, X), y, rtol=1e-6)

    def loss(params, model):
        return model.apply({**variables, "params": params}, X).sum()

    plain, remat = (jax.grad(loss)(variables["params"], Stack(remat)) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, remat)


def test_vmap_jit_and_eval_shape():
    layer = SparseDense(8)
    variables = layer.init(jax.random.key(0), X)
    y = jax.jit(jax.vmap(lambda x: layer.apply(variables, x)))(X)
    np.testing.assert_allclose(y, layer.apply(variables, X), rtol=1e-6)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X)
    same = jax.tree.map(lambda s, v: (s.shape, s.dtype) == (v.shape, v.dtype), shapes, variables)
    assert all(jax.tree.leaves(same))


def test_adapters_add_their_product():
    layer = SparseDense(8, adapter_rank=3, adapter_r_init=nn.initializers.normal(1.0))
    variables = layer.init(jax.random.key(0), X)
    params = variables["params"]
    assert params["adapter_l"].shape == (16, 3)
    assert params["adapter_r"].shape == (3, 8)
    without = SparseDense(8).apply(variables, X)
    expected = without + (X @ params["adapter_l"]) @ params["adapter_r"]
    np.testing.assert_array_equal(layer.apply(variables, X), expected)


def test_adapter_gradient_keeps_the_sparse_part_double_pruned():
    layer = SparseDense(8, adapter_rank=3, adapter_r_init=nn.initializers.normal(1.0))
    variables = layer.init(jax.random.key(0), X)
    params = variables["params"]
    _, back = jax.vjp(lambda x: layer.apply(variables, x), X)
    dy = jax.random.normal(jax.random.key(5), (2, 5, 8))
    w_r = dense_kernel(layer, variables)
    w_rc = w_r * masks.double_prune(w_r, "2:4")
    expected = dy @ w_rc.T + (dy @ params["adapter_r"].T) @ params["adapter_l"].T
    np.testing.assert_allclose(back(dy)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("sparsity", ["2:4", None])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_norm_to_be_made_and_a_residual_are_those_made_apart(sparsity, rank):
    layer = SparseDense(
        8, sparsity=sparsity, adapter_rank=rank, adapter_r_init=nn.initializers.ones
    )
    x, residual = jax.random.normal(jax.random.key(0), (2, 3, 24)).reshape(3, 6, 8)[:2]
    x = jnp.tile(x, (1, 2))
    norm = Norm(jnp.arange(16.0), jnp.ones(16))
    variables = layer.init(jax.random.key(1), x)
    apart = residual + layer.apply(variables, norm(x))
    together = layer.apply(variables, Normed(x, norm), Stream(residual))
    np.testing.assert_allclose(together.x, apart, rtol=1e-5, atol=1e-5 * np.abs(apart).max())


def test_default_adapters_change_nothing_at_birth():
    layer = SparseDense(8, adapter_rank=3)
    variables = layer.init(jax.random.key(0), X)
    np.testing.assert_array_equal(layer.apply(variables, X), SparseDense(8).apply(variables, X))


def test_pattern_is_parsed():
    assert SparseDense(8, sparsity="1:4").pattern == Pattern(1, 4)
    assert SparseDense(8, sparsity="4:4").pattern is None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SparseDense(8, sparsity="5:4"), "5:4"),
        (SparseDense(8, sparsity="sparse"), "'sparse'.*2:4"),
        (SparseDense(6), "SparseDense: output axis has 6 entries"),
        (SparseDense(18, sparsity="3:9"), "input axis has 16 entries"),
        (SparseDense(8, adapter_rank=9), "adapter_rank 9.*between 0 and 8"),
        (SparseDense(8, adapter_rank=-1), "adapter_rank -1"),
        (SparseDense(8, mask_init="largest"), "'largest'.*magnitude"),
        (SparseDense(8, dot_general=jax.lax.dot_general), "dot_general"),
        (SparseDense(8, implementation="cuda"), "'cuda'"),
        (SparseDense(8, activation="tanh"), "'tanh'.*'gelu_tanh'"),
        (SparseDense(8, sparsity=None, activation="tanh"), "'tanh'"),
    ],
)
def test_bad_options_name_themselves(layer, message):
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), X)


def test_missing_masks_are_named():
    layer = SparseDense(8, name="up")
    params = layer.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match="'masks' is missing"):
        layer.apply({"params": params}, X)


def test_an_exact_layer_differentiates_and_keeps_no_pruned_transpose():
    layer = SparseDense(24, backward="exact", bias_init=nn.initializers.normal(1.0))
    variables = layer.init(jax.random.key(0), X)
    kernel = dense_kernel(layer, variables)
    dx = jax.grad(lambda x: layer.apply(variables, x).sum())(X)
    np.testing.assert_array_equal(dx, jax.grad(lambda x: (x @ kernel).sum())(X))
    copies = working_copies(variables, find_layers(layer.apply, variables, X))
    assert copies["kernel"].transpose is None
    row = explain(layer, variables, X).rows[0]
    assert "backward is exact" in row.choices["dx"].reason


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_adapters_are_born_normal_with_the_scale_over_the_rank(scale):
    inputs, rank = 256, 64
    model = build(
        "gpt2-nano",
        hidden_size=inputs,
        num_layers=1,
        sparsity="layers/0/mlp/up=2:4; .*=dense",
        adapter_rank=rank,
        adapter_scale=scale,
        vocab_size=8,
    )

    def born(key):  # of all else nothing is compiled
        return model.init(key, **model.example_inputs())["params"]["layers_0"]["mlp"]["up"]

    up = jax.jit(lambda key: {k: v for k, v in born(key).items() if "adapter" in k})(
        jax.random.key(0)
    )
    left = np.asarray(up["adapter_l"], np.float64) * rank / scale
    assert left.shape == (inputs, rank)
    # Mean and variance of N(0, 1) numbers, within 5 standard errors of theirs.
    assert abs(left.mean()) < 5 / np.sqrt(left.size)
    assert abs(left.var() - 1) < 5 * np.sqrt(2 / left.size)
    assert not np.asarray(up["adapter_r"]).any()


def test_a_simulated_layer_keeps_its_kernel_dense_and_multiplies_it_as_it_is():
    layer, reference = SparseDense(24, simulated=True), nn.Dense(24)
    variables = layer.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, variables, reference.init(jax.random.key(0), X))
    np.testing.assert_array_equal(layer.apply(variables, X), reference.apply(variables, X))
    row = explain(layer, variables, X).rows[0]
    assert (row.pattern, row.implementation) == ("2:4", "xla")
    assert "simulated" in row.reason
    with pytest.raises(ValueError, match="would run a dense product"):
        explain(layer, variables, X, strict=True)


def test_simulated_linears_of_a_model_have_no_adapters():
    with pytest.raises(ValueError, match="adapter_rank=2: simulated linears have no adapters"):
        build("gpt2-nano", simulated=True, adapter_rank=2)


@pytest.mark.parametrize("sparsity", ["2:4", None])
def test_sections_that_are_not_the_outputs_are_named(sparsity):
    layer = SparseDense(8, sparsity=sparsity)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 16)))
    for sections in ((2, 4), ("a",), (10, -2), (8.0,)):
        for options in ({}, {"apart": True}):
            with pytest.raises(
                ValueError, match="must be positive integers that add up to the 8 out"
            ):
                layer.clone(sections=sections).apply(variables, jnp.ones((2, 16)), **options)


@pytest.mark.parametrize("rank", [0.5, True, "2"])
def test_the_rank_of_a_layer_is_an_integer(rank):
    layer = SparseDense(8, adapter_rank=rank)
    with pytest.raises(ValueError, match=f"adapter_rank {rank!r} must be an integer; fractions of"):
        layer.init(jax.random.key(0), jnp.ones((2, 16)))


def test_a_rank_of_numpys_changes_no_dtype():
    layer = SparseDense(8, adapter_rank=np.int64(2), param_dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), jnp.ones((2, 16)))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_dense_is_a_sparsity():
    layer, x = SparseDense(8, sparsity="dense"), jax.random.normal(jax.random.key(0), (2, 16))
    variables = layer.init(jax.random.key(1), x)
    np.testing.assert_array_equal(layer.apply(variables, x), nn.Dense(8).apply(variables, x))


def test_a_norm_joins_beside_copies_of_transposes_alone():
    layer, x = SparseDense(8), jax.random.normal(jax.random.key(0), (2, 16))
    variables = layer.init(jax.random.key(1), x)
    layers = find_layers(layer.apply, variables, x)
    copies = working_copies(variables, layers, values=False)
    normed = Normed(x, Norm(jnp.ones(16)))
    np.testing.assert_array_equal(
        layer.apply(variables | {"working": copies}, normed), layer.apply(variables, normed)
    )


def test_it_is_exported_for_any_batch():
    layer = SparseDense(8)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 16)))
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, 16), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: layer.apply(variables, x)))(shape)
    x = jax.random.normal(jax.random.key(1), (5, 16))
    np.testing.assert_allclose(exported.call(x), layer.apply(variables, x), rtol=1e-6, atol=1e-6)
