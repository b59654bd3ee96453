"""What has the results' shape and joins a product: residuals, and the way back through an activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_epilogue import ACTIVATIONS, close, formula, integers, problem

from pallas_kernels import compress, decompress, kept_mask, nm_matmul, nm_transpose
from pallas_kernels.epilogue import ACTIVATIONS as ACTIVATION
from pallas_kernels.epilogue import Norm
from slope_jax import SparseDense, Working, masks, slope_matmul
from slope_jax.matmul import Activated
from slope_jax.normed import Stream
from slope_jax.sharding import AXES

strict = pytest.mark.usefixtures("strict_dtypes")


@strict
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_product_goes_back_through_an_activation(name):
    """By the formula in float64; the sums are those of what is multiplied."""
    x, w, bias, *_ = problem()
    source = jnp.float32(np.random.default_rng(0).normal(0, 2, (2, 3, 48)))
    y, sums = nm_matmul(x, w, bias=bias, through=(name, source), save_sums=True)
    exact = np.float64(x @ decompress(w)) + np.float64(bias)
    exact = exact * formula(name, source)[1]
    close(y, exact)
    np.testing.assert_array_equal(sums, np.float64(x).sum((0, 1)))


@strict
def test_sums_are_in_float32():
    """In bfloat16 256 + 1 is 256."""
    x, w = jnp.ones((257, 8), jnp.bfloat16), compress(jnp.ones((8, 8), jnp.bfloat16), "2:4")
    _, sums = nm_matmul(x, w, save_sums=True)
    np.testing.assert_array_equal(sums, jnp.full(8, 257, jnp.float32))
    assert sums.dtype == jnp.float32


def chain(x, up, down, biases, residual, activation, *, activated, **options):
    """Two products around an activation, which is handed on, or JAX's own."""
    if activated:
        given = {"activation": activation, "activated": True}
        h = slope_matmul(x, up, bias=biases[0], **given, **options)
    else:
        h = ACTIVATION[activation](slope_matmul(x, up, bias=biases[0], **options))
    return slope_matmul(h, down, bias=biases[1], residual=residual, **options)


def two_products():
    x, up, bias, *_ = problem()
    down = compress(integers(6, (48, 32)) / 8, "2:4")
    return x, up, down, (bias, integers(7, (32,))), integers(8, (2, 3, 32))


@strict
@pytest.mark.parametrize("backward", ["double-pruned", "exact"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_two_products_around_an_activation(activation, backward):
    arguments = two_products()
    dy = integers(9, (2, 3, 32))

    def call(*arguments):
        return chain(*arguments, activation, activated=True, backward=backward)

    y, back = jax.vjp(call, *arguments)
    dx, dup, ddown, (dbias_up, dbias_down), dresidual = back(dy)
    x, up, down, biases, residual = arguments
    flat, dy = (np.float64(a).reshape(6, 32) for a in (x, dy))
    dense = [np.float64(decompress(w)) for w in (up, down)]
    turned = dense
    if backward == "double-pruned":
        turned = [
            d * np.asarray(masks.double_prune(decompress(w), "2:4"))
            for d, w in zip(dense, (up, down), strict=True)
        ]
    h, slope = formula(activation, flat @ dense[0] + np.float64(biases[0]))
    dz = dy @ turned[1].T * slope
    exact = h @ dense[1] + np.float64(biases[1]) + np.float64(residual).reshape(6, 32)
    close(np.reshape(y, (6, 32)), exact)
    close(np.reshape(dx, (6, 32)), dz @ turned[0].T)
    close(decompress(up.with_values(dup.values)), flat.T @ dz * np.asarray(kept_mask(up)))
    close(decompress(down.with_values(ddown.values)), h.T @ dy * np.asarray(kept_mask(down)))
    close(dbias_up, dz.sum(0))
    close(dbias_down, dy.sum(0))
    np.testing.assert_array_equal(dresidual, dy.reshape(2, 3, 32))


@strict
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_activation_handed_on_changes_no_result(activation):
    """With and without gradients."""
    arguments = two_products()

    def call(activated):
        return lambda x: chain(x, *arguments[1:], activation, activated=activated)

    apart = call(False)(arguments[0])
    np.testing.assert_array_equal(call(True)(arguments[0]), apart)
    np.testing.assert_array_equal(jax.vjp(call(True), arguments[0])[0], apart)


@strict
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_scan_remat_and_vmap_of_what_is_handed_on(activation):
    """Gradients are those of the same products with the activation left to JAX."""
    _, up, down, biases, residual = two_products()
    layers = jax.tree.map(lambda a: jnp.stack([a, -a]), (up.values, down.values, biases))

    def loss(activated, x, layers):
        def layer(x, layer):
            up_values, down_values, biases = layer
            weights = up.with_values(up_values), down.with_values(down_values)
            x = chain(x, *weights, biases, residual, activation, activated=activated) / 64
            return x, None

        def one(x):
            return jax.lax.scan(jax.checkpoint(layer), x, layers)[0].sum()

        return jax.vmap(one)(x).sum()

    x = integers(0, (2, 2, 3, 32))
    found, expected = (
        jax.jit(jax.grad(lambda *a, kind=kind: loss(kind, *a), (0, 1)))(x, layers)
        for kind in (True, False)
    )
    jax.tree.map(lambda a, b: close(a, np.float64(b)), found, expected)


@strict
def test_adapters_and_working_copies_with_what_is_handed_on():
    """Gradients are those with the activation left to JAX, of every operand."""
    x, up, down, biases, residual = two_products()
    adapters = [
        (integers(i, (size, 4)) / 8, integers(i + 1, (4, other)) / 8)
        for i, (size, other) in ((10, (32, 48)), (12, (48, 32)))
    ]
    copies = [Working(w.values, nm_transpose(w)) for w in (up, down)]

    def loss(activated, x, values, biases, adapters, residual):
        weights = up.with_values(values[0]), down.with_values(values[1])
        given = [{"bias": b, "adapter": a} for b, a in zip(biases, adapters, strict=True)]
        first = {"working": copies[0], **given[0]}
        if activated:
            h = slope_matmul(x, weights[0], activation="gelu", activated=True, **first)
        else:
            h = ACTIVATION["gelu"](slope_matmul(x, weights[0], **first))
        second = {"working": copies[1], **given[1], "residual": residual}
        return jnp.square(slope_matmul(h, weights[1], **second)).sum()

    arguments = (x, (up.values, down.values), biases, adapters, residual)
    found, expected = (
        jax.jit(jax.grad(lambda *a, kind=kind: loss(kind, *a), range(5)))(*arguments)
        for kind in (True, False)
    )
    jax.tree.map(lambda a, b: close(a, np.float64(b)), found, expected)


@strict
@pytest.mark.parametrize("sparsity", ["2:4", None])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers_hand_on_an_activation_if_they_can(sparsity, activation):
    up = SparseDense(48, sparsity=sparsity, activation=activation)
    down = SparseDense(32, sparsity=sparsity)
    x = integers(0, (2, 3, 32))
    variables = [up.init(jax.random.key(0), x), down.init(jax.random.key(1), jnp.ones((1, 48)))]
    assert down.joins == (sparsity is not None)

    def loss(activated, params, x):
        first, second = ({**v, "params": p} for v, p in zip(variables, params, strict=True))
        h = up.apply(first, x, activated=activated)
        assert isinstance(h, Activated) == (activated and down.joins)
        return jnp.square(down.apply(second, h, x)).sum()

    params = [v["params"] for v in variables]
    found, expected = (
        jax.grad(lambda *a, kind=kind: loss(kind, *a), (0, 1))(params, x) for kind in (True, False)
    )
    jax.tree.map(lambda a, b: close(a, np.float64(b)), found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"through": ("tanh", jnp.ones((2, 3, 48)))}, "'tanh'.*'gelu_tanh'"),
        ({"through": ("relu", jnp.ones((6, 48)))}, r"through is float32\[6, 48\].*\[2, 3, 48\]"),
        ({"through": ("relu", None)}, "through needs both"),
        ({"save_sums": True, "norm": Norm(jnp.ones(32))}, "save_sums=True and a norm"),
        (
            {"through": ("relu", jnp.ones((2, 3, 48))), "residual": jnp.ones((2, 3, 48))},
            "residual and through are both given",
        ),
    ],
)
def test_bad_joinings_are_named(options, message):
    x, w, *_ = problem()
    with pytest.raises(ValueError, match=message):
        nm_matmul(x, w, **options)


H = Activated(jnp.ones((2, 3, 32)), None, "relu")


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        ({"sparsity": None}, (H,), r"needs a layer whose `joins` is true.*=down\.joins"),
        ({}, (H, Stream(jnp.ones((2, 3, 8)))), "a stream is added without gradients"),
        ({}, (H.y, None, True), "activated=True needs an activation"),
        ({"activation": "relu"}, (H.y, jnp.ones((2, 3, 8)), True), "hands on no sum"),
    ],
)
def test_what_cannot_be_handed_on_is_named(layer, arguments, message):
    inputs, residual, activated = (*arguments, None, None)[:3]
    with pytest.raises(ValueError, match=message):
        SparseDense(8, **layer).init(jax.random.key(0), inputs, residual, activated=bool(activated))


@pytest.mark.parametrize("sparsity", ["2:4", None])
def test_a_residual_of_another_dtype_takes_the_layers(sparsity):
    layer = SparseDense(8, sparsity=sparsity, dtype=jnp.bfloat16)
    x, residual = integers(0, (3, 32)), integers(1, (3, 8))
    variables = layer.init(jax.random.key(0), x)
    y, gradient = jax.value_and_grad(
        lambda residual: layer.apply(variables, x, residual).astype(jnp.float32).sum()
    )(residual)
    assert layer.apply(variables, x, residual).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, jnp.ones((3, 8)))
    assert np.isfinite(y)


def test_a_layer_on_a_mesh_does_not_join():
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=types, devices=jax.devices()[:1])
    assert SparseDense(8).joins
    with jax.set_mesh(mesh):
        assert not SparseDense(8).joins


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activated": True}, "activated=True needs an activation"),
        ({"activation": "relu", "residual": jnp.ones((2, 3, 48))}, "activation='relu' and a resid"),
        ({"residual": jnp.ones((2, 3, 48), "bfloat16")}, r"residual is bfloat16.*float32"),
    ],
)
def test_bad_terms_are_named(options, message):
    x, w, *_ = problem()
    with pytest.raises(ValueError, match=message):
        slope_matmul(x, w, **options)


@pytest.mark.parametrize(
    ("activation", "z", "message"),
    [
        ("gelu", None, "of 'gelu' has no z"),
        ("relu", jnp.ones((2, 3, 32)), "of 'relu' has a z; relu's has none"),
        ("silu", jnp.ones((6, 32)), r"z float32\[6, 32\]; it must be as y is, float32\[2, 3, 32\]"),
    ],
)
def test_a_wrong_activated_is_named(activation, z, message):
    x, w, *_ = problem()
    with pytest.raises(ValueError, match=message):
        slope_matmul(Activated(x, z, activation), w)
    with pytest.raises(TypeError, match="the z of an Activated is a list; it must be an array"):
        slope_matmul(Activated(x, [1.0], "gelu"), w)
