"""What has the results' shape and joins a product: residuals, and the way back through an activation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_epilogue import ACTIVATIONS, close, formula, integers, problem

from pallas_kernels import compress, decompress, kept_mask, nm_matmul, nm_transpose
from pallas_kernels.epilogue import ACTIVATIONS as ACTIVATION
from pallas_kernels.epilogue import Norm
from pallas_kernels.mosaic import support
from slope_jax import SparseDense, Working, masks, slope_matmul
from slope_jax.matmul import Activated
from slope_jax.normed import Stream

strict = pytest.mark.usefixtures("strict_dtypes")
obstacle = support.device_obstacle()


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(obstacle is not None, reason=str(obstacle))(test))


needs_jax = pytest.mark.skipif(
    support.version_obstacle() is not None, reason=str(support.version_obstacle())
)


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
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
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


# The kernel: 64 outputs of what joins in a stage of the ring, for one warpgroup of the two.


def joined(shape, dtype, tile, **options):
    """A product with a bias, ranks of part of two stages, and what joins; its arguments, and its sum."""
    from pallas_kernels.mosaic import matmul

    tokens, k, f, processors = shape
    x, w = integers(0, (tokens, k), dtype), compress(integers(1, (k, f), dtype), "2:4")
    joining, bias = integers(2, (tokens, f), dtype), integers(3, (f,))
    low_rank = integers(4, (tokens, 40), dtype), integers(5, (40, f), dtype)
    run = jax.jit(
        lambda x, values, metadata, joining, bias, low_rank: matmul.nm_matmul(
            x,
            values,
            metadata,
            tile,
            bias=bias,
            low_rank=low_rank,
            joining=joining,
            processors=processors,
            **options,
        )
    )
    exact = np.float64(x) @ np.float64(decompress(w)) + np.float64(bias)
    exact = exact + np.float64(low_rank[0]) @ np.float64(low_rank[1])
    return run, (x, w.values, w.metadata, joining, bias, low_rank), exact


# Tokens, in, out, processors.
SMALL = (1000, 200, 1032, 132), (776, 1096, 520, 8), (1, 8, 8, 132), (2500, 320, 264, 4)


@needs_jax
@pytest.mark.parametrize("through", [None, *ACTIVATIONS])
def test_what_joins_lowers_for_cuda(through):
    from pallas_kernels.mosaic import matmul

    tile = dataclasses.replace(matmul.Tile(down=2), splits=8)
    options = {"through": through, "save_sums": through is not None}
    run, arguments, *_ = joined(SMALL[0], jnp.bfloat16, tile, **options)
    text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "nm_matmul" in text


@needs_jax
def test_tiles_that_cannot_join_are_named():
    from pallas_kernels.mosaic import matmul

    tile = matmul.Tile(tokens=208, slot_tokens=208, stages=3, slots=1)
    for options in ({}, {"save_sums": True}):
        run, arguments, *_ = joined(SMALL[0], jnp.bfloat16, tile, **options)
        message = "multiple of 32" if options else "takes 4 stages at a time"
        given = (*arguments[:3], None if options else arguments[3], *arguments[4:])
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, *given)
    for options, message in (
        ({"out_dtype": jnp.float32}, "results in x's bfloat16, not float32"),
        ({"through": "relu"}, "needs joining"),
    ):
        run, arguments, *_ = joined(SMALL[0], jnp.bfloat16, matmul.Tile(), **options)
        given = (*arguments[:3], None if "through" in options else arguments[3], *arguments[4:])
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, *given)


@needs_jax
@pytest.mark.parametrize("tokens", [48, 300])
def test_what_is_saved_comes_in_order_whatever_joins_apart(tokens):
    """y, what enters the activation, moments that nobody takes, and sums of what is multiplied."""
    from pallas_kernels.epilogue import Epilogue
    from pallas_kernels.mosaic import products

    arrays = [jax.ShapeDtypeStruct((tokens, n), jnp.bfloat16) for n in (136, 200)]
    w = jax.eval_shape(lambda: compress(integers(1, (136, 200), jnp.bfloat16), "2:4"))
    saved = {"save_preactivation": True, "save_moments": True, "save_sums": True}

    def run(x, source, w):
        epilogue = Epilogue(source=source, through="relu", activation="silu", **saved)
        return products.nm_matmul(x, w, jnp.dtype("bfloat16"), None, epilogue)

    y, z, moments, sums = jax.eval_shape(run, *arrays, w)
    assert moments is None
    assert (y.shape, y.dtype, z.shape, z.dtype) == 2 * ((tokens, 200), jnp.bfloat16)
    assert (sums.shape, sums.dtype) == ((136,), jnp.float32)


def tiles():
    if support.version_obstacle() is not None:
        return []
    from pallas_kernels.mosaic import matmul_tiles

    return matmul_tiles.TILES


@needs_gpu
@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_what_joins_is_exact_on_integers(tile):
    """With tiles that are shared or not, of clusters, in partial tiles; every sum is written, once."""
    for shape in SMALL:
        run, arguments, exact = joined(shape, jnp.bfloat16, tile)
        joining = np.float64(arguments[3])
        np.testing.assert_array_equal(
            run(*arguments), jnp.asarray(exact + joining, jnp.float32).astype(jnp.bfloat16)
        )
        run, *_ = joined(shape, jnp.bfloat16, tile, through="relu", save_sums=True)
        y, sums = run(*arguments)
        exact = np.where(joining > 0, exact, 0)
        np.testing.assert_array_equal(y, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
        np.testing.assert_array_equal(np.float64(sums).sum(0), np.float64(arguments[0]).sum(0))
        again = run(*arguments)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(again, (y, sums), strict=True))
        options = {"activation": "relu", "save_preactivation": True}
        run, _, exact = joined(shape, jnp.bfloat16, tile, **options)
        y, z = run(*arguments)
        np.testing.assert_array_equal(z, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
        exact = jnp.asarray(np.maximum(exact, 0) + joining, jnp.float32)
        np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_within_a_thousandth(name, dtype):
    """Of products with the identity, at -30 .. 30 and at NaN and the infinities."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan]
    source = np.concatenate([np.linspace(-30, 30, 8192 - len(special)), special])
    source = jnp.broadcast_to(jnp.asarray(source, dtype), (128, 8192))
    x, w = jnp.ones((128, 64), dtype), jnp.zeros((64, 8192), dtype).at[0].set(1)
    y = nm_matmul(x, compress(w, "2:4"), through=(name, source), implementation="mosaic")
    found, at = np.float64(y[5]), np.float64(source[5])
    with np.errstate(invalid="ignore"):
        exact = formula(name, np.clip(at, -20, 20))[1]  # flat beyond
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact) & (name != "relu"))
    there = ~np.isnan(exact)
    rounding = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(found - exact) <= 1e-3 + rounding)[there].all()


@needs_gpu
@pytest.mark.parametrize("tokens", [48, 300])
def test_gradients_of_a_chain_are_those_of_xla(tokens):
    """On integers they are exact; for few tokens the activation is differentiated apart."""
    x = integers(0, (tokens, 136), jnp.bfloat16)
    up, down = (
        compress(integers(i, size), "2:4") for i, size in ((1, (136, 200)), (2, (200, 136)))
    )
    biases, dy = (integers(3, (200,)), integers(4, (136,))), integers(5, x.shape, x.dtype)
    results = []
    for implementation in ("mosaic", "xla"):

        def call(x, up, down, biases, implementation=implementation):
            options = {"activated": True, "implementation": implementation}
            return chain(x, up, down, biases, x, "relu", **options)

        y, back = jax.vjp(jax.jit(call), x, up, down, biases)
        dx, dup, ddown, dbiases = jax.jit(back)(dy)
        results.append((y, dx, dup.values, ddown.values, *dbiases))
    for mosaic, xla in zip(*results, strict=True):
        np.testing.assert_array_equal(np.float32(mosaic), np.float32(xla))
