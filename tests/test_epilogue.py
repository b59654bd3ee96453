"""Bias, activation and low-rank term of `nm_matmul` and `slope_matmul`, against plain formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compress, decompress, kept_mask, nm_matmul, nm_transpose
from pallas_kernels.epilogue import Norm, moments
from slope_jax import SparseDense, masks, slope_matmul

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu"]


def integers(seed, shape, dtype=jnp.float32):
    return jax.random.randint(jax.random.key(seed), shape, -4, 5).astype(dtype)


def formula(name, z):
    """Values and derivatives by the definitions, in float64."""
    z = np.asarray(z, np.float64)
    if name is None:
        return z, np.ones_like(z)
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if name == "silu":
        s = 1 / (1 + np.exp(-z))
        return z * s, s * (1 + z * (1 - s))
    if name == "gelu":
        phi = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
        return z * phi, phi + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)


def close(value, exact):
    """Within the rounding of float32 sums of up to 64 terms of the largest size."""
    atol = 64 * np.finfo(np.float32).eps * np.abs(exact).max()
    np.testing.assert_allclose(value, exact, rtol=0, atol=atol)


def problem(dtype=jnp.float32):
    x, w = integers(0, (2, 3, 32), dtype), compress(integers(1, (32, 48), dtype) / 8, "2:4")
    bias, left, right = integers(2, (48,)), integers(3, (32, 4)) / 8, integers(4, (4, 48)) / 8
    return x, w, bias, left, right


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_matmul_is_the_formula(activation):
    x, w, bias, left, right = problem()
    exact = np.asarray(x @ decompress(w) + x @ left @ right) + np.asarray(
        bias
    )  # exact: eighths, integers
    for low_rank in ({"low_rank": (x @ left, right)}, {"adapter": (left, right)}):
        y = nm_matmul(x, w, bias=bias, activation=activation, **low_rank)
        close(y, formula(activation, exact)[0])


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_a_gate_is_the_formula_and_its_gradient_that_of_the_method(activation):
    x, w, bias, left, right = problem()
    z = np.asarray(x @ decompress(w) + x @ left @ right) + np.asarray(bias)
    gate, up = np.split(z, 2, axis=-1)
    value, slope = formula(activation, gate)
    for low_rank in ({"low_rank": (x @ left, right)}, {"adapter": (left, right)}):
        close(nm_matmul(x, w, bias=bias, activation=activation, gated=True, **low_rank), value * up)
    weights = integers(9, up.shape)

    def loss(x, bias, adapter):
        y = slope_matmul(x, w, bias=bias, adapter=adapter, activation=activation, gated=True)
        return (y * weights).sum()

    dz = np.concatenate([weights * up * slope, weights * value], axis=-1)
    dx, dbias, (_, dright) = jax.grad(loss, argnums=(0, 1, 2))(x, bias, (left, right))
    close(dbias, dz.sum((0, 1)))
    close(dright, np.einsum("bsr,bso->ro", x @ left, dz))
    again = nm_transpose(w)
    close(dx, dz @ np.asarray(decompress(again)) + dz @ np.asarray(right).T @ np.asarray(left).T)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_first_product_of_an_adapter_comes_last(transposed):
    x, w, bias, left, right = problem()
    t, y = x @ left, nm_matmul(x, w, bias=bias, low_rank=(x @ left, right))
    given = {"adapter": (left.T if transposed else left, right), "left_transposed": transposed}
    call = functools.partial(nm_matmul, x, w, bias=bias, **given)
    for found, expected in [
        (call(save_first=True), (y, t)),
        (call(save_first=True, save_sums=True), (y, x.sum((0, 1)), t)),
        (
            call(save_first=True, activation="relu", save_preactivation=True),
            (jnp.maximum(y, 0), y, t),
        ),
        (call(save_first=True, sections=(32, 16)), ((y[..., :32], y[..., 32:]), t)),
        (call(), y),
        (nm_matmul(x, w, adapter=(left[:, :0], right[:0]), save_first=True)[1], t[..., :0]),
    ]:
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_comes_first_and_a_residual_last(centred):
    """By the formula in float64, of rows whose mean is far from zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(100, 1, (2, 3, 32)).astype(np.float32)
    scale, shift, residual = rng.normal(size=32), rng.normal(size=32), rng.normal(size=(2, 3, 48))
    _, w, bias, *_ = problem()
    norm = Norm(jnp.float32(scale), jnp.float32(shift) if centred else None, 1e-2, centred)
    options = {"bias": bias, "activation": "relu", "norm": norm, "residual": jnp.float32(residual)}
    y = nm_matmul(jnp.asarray(x), w, **options)
    rows = np.float64(x) - (np.float64(x).mean(-1, keepdims=True) if centred else 0)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-2) * scale
    rows = rows + (shift if centred else 0)
    z = rows @ np.asarray(decompress(w), np.float64) + np.asarray(bias)
    close(y, np.maximum(z, 0) + residual)


@pytest.mark.parametrize("size", [8, 64, 200])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments_are_those_of_every_64_entries(size, dtype):
    """By NumPy in float64, of numbers far from zero."""
    x = jnp.asarray(np.random.default_rng(0).normal(1000, 1, (2, 3, size)), dtype)
    blocks = [np.float64(x)[..., i : i + 64] for i in range(0, size, 64)]
    expected = [np.stack([b.sum(-1), b.var(-1) * b.shape[-1]], -1) for b in blocks]
    np.testing.assert_allclose(moments(x), np.stack(expected, -2), rtol=1e-5)


def test_moments_that_no_kernel_takes_are_none():
    x, w, bias, *_ = problem()
    y, z, none = nm_matmul(
        x, w, bias=bias, activation="relu", save_preactivation=True, save_moments=True
    )
    assert none is None
    np.testing.assert_array_equal(y, np.maximum(z, 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_preactivation_is_what_enters_the_activation(activation):
    x, w, bias, *_ = problem()
    y, z = nm_matmul(x, w, bias=bias, activation=activation, save_preactivation=True)
    np.testing.assert_array_equal(z, np.asarray(x @ decompress(w)) + np.asarray(bias))
    close(y, formula(activation, z)[0])


def test_the_epilogue_is_in_float32_and_cast_once():
    """In bfloat16 1 + 2^-8 is a tie that rounds to 1, so two roundings would lose the bias."""
    x = jnp.ones((1, 8), jnp.bfloat16)
    w = compress(jnp.zeros((8, 8), jnp.bfloat16).at[0].set(1).at[4].set(2.0**-8), "2:4")
    y = nm_matmul(x, w, bias=jnp.full(8, 2.0**-8))
    np.testing.assert_array_equal(y.astype(jnp.float32), jnp.full((1, 8), 1 + 2.0**-7))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradients_are_those_of_the_method(activation):
    x, w, bias, left, right = problem()
    dy = integers(5, (2, 3, 48))

    def call(x, w, bias, adapter):
        return slope_matmul(x, w, bias=bias, activation=activation, adapter=adapter)

    y, back = jax.vjp(call, x, w, bias, (left, right))
    dx, dw, dbias, (dleft, dright) = back(dy)
    flat = np.asarray(x, np.float64).reshape(6, 32)
    w_r, left, right = (np.asarray(a, np.float64) for a in (decompress(w), left, right))
    z = flat @ w_r + flat @ left @ right + np.asarray(bias)
    value, slope = formula(activation, z)
    dz = np.asarray(dy, np.float64).reshape(6, 48) * slope
    w_rc = w_r * np.asarray(masks.double_prune(decompress(w), "2:4"))
    close(np.asarray(y).reshape(6, 48), value)
    close(dx.reshape(6, 32), dz @ w_rc.T + dz @ right.T @ left.T)
    sparse = decompress(w.with_values(dw.values))
    close(sparse, flat.T @ dz * np.asarray(kept_mask(w)))
    close(dbias, dz.sum(0))
    close(dleft, flat.T @ (dz @ right.T))
    close(dright, (flat @ left).T @ dz)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_results_are_the_same_with_and_without_gradients(activation):
    """Where no gradient is wanted, nobody keeps the adapter's first product."""
    x, w, bias, left, right = problem()

    def call(adapter):
        return slope_matmul(x, w, bias=bias, activation=activation, adapter=adapter)

    y, _ = jax.vjp(call, (left, right))
    np.testing.assert_array_equal(y, call((left, right)))


def test_gradients_have_the_dtypes_of_their_operands():
    x, w, bias, left, right = problem()
    adapter = (left, right.astype(jnp.bfloat16))
    x = x.astype(jnp.bfloat16)

    def call(x, w, bias, adapter):
        return slope_matmul(x, w, bias=bias, activation="gelu", adapter=adapter)

    y, back = jax.vjp(call, x, w, bias, adapter)
    dx, dw, dbias, (dleft, dright) = back(y)
    got = [a.dtype for a in (y, dx, dw.values, dbias, dleft, dright)]
    assert got == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16]


def test_vmap_and_scan_over_layers_of_everything():
    stack = [integers(i, shape) for i, shape in enumerate([(3, 6, 16), (3, 16), (3, 16, 4)])]
    x, bias, left = stack
    right, w = integers(3, (3, 4, 16)), compress(integers(4, (3, 16, 16)), "2:4")

    def call(x, w, bias, left, right):
        return slope_matmul(x, w, bias=bias, activation="relu", adapter=(left, right))

    expected = jnp.stack(
        [call(*jax.tree.map(lambda a, i=i: a[i], (x, w, bias, left, right))) for i in range(3)]
    )
    np.testing.assert_array_equal(jax.vmap(call)(x, w, bias, left, right), expected)
    _, scanned = jax.lax.scan(lambda _, a: (None, call(*a)), None, (x, w, bias, left, right))
    np.testing.assert_array_equal(scanned, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": jnp.ones(4)}, r"bias has shape \(4,\).*\(48,\)"),
        ({"activation": "tanh"}, "'tanh'.*'gelu_tanh'"),
        ({"low_rank": (jnp.ones((2, 3, 4)), jnp.ones((5, 48)))}, "low_rank has shapes"),
        (
            {"low_rank": (jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 48)))},
            "low_rank is bfloat16 and float32; both must be x's float32",
        ),
        (
            {"adapter": (jnp.ones((16, 4)), jnp.ones((4, 48)))},
            r"adapter has shapes.*\(32, 'rank'\)",
        ),
        ({"adapter": (jnp.ones((32, 4)), jnp.ones((5, 48)))}, "adapter has shapes"),
        (
            {"adapter": (jnp.ones((32, 4)), jnp.ones((4, 48), jnp.bfloat16))},
            "adapter is float32 and bfloat16; both must be x's float32",
        ),
        (
            {
                "low_rank": (jnp.ones((2, 3, 4)), jnp.ones((4, 48))),
                "adapter": (jnp.ones((32, 4)), jnp.ones((4, 48))),
            },
            "low_rank and adapter are both given",
        ),
        ({"save_preactivation": True}, "needs an activation"),
        (
            {"adapter": (jnp.ones((32, 4)), jnp.ones((4, 48))), "left_transposed": True},
            r"adapter has shapes \(32, 4\).*\('rank', 32\)",
        ),
        ({"save_first": True}, r"save_first=True needs an adapter, \(l, r\)"),
        ({"left_transposed": True}, "left_transposed=True needs an adapter"),
        (
            {
                "adapter": (jnp.ones((32, 4)), jnp.ones((4, 48))),
                "norm": Norm(jnp.ones(32)),
                "save_first": True,
            },
            "save_first=True and a norm are both given; make the norm first",
        ),
        ({"norm": Norm(jnp.ones(16))}, r"norm's scale has shape \(16,\).*\(32,\)"),
        ({"norm": Norm(jnp.ones(32), jnp.ones(48))}, r"norm's shift has shape \(48,\)"),
        (
            {"norm": Norm(jnp.ones(32), moments=jnp.ones((2, 3, 2)))},
            r"moments are float32\[2, 3, 2\]; of x \(2, 3, 32\) .* float32\[2, 3, 1, 2\]",
        ),
        ({"residual": jnp.ones((6, 48))}, r"residual is float32\[6, 48\].*float32\[2, 3, 48\]"),
        ({"residual": jnp.ones((2, 3, 48), "bfloat16")}, "residual is bfloat16"),
        ({"gated": True, "residual": jnp.ones((2, 3, 48))}, "gated=True goes with a bias"),
        ({"gated": True, "sections": (24, 24)}, "gated=True goes with a bias"),
        ({"gated": "silu"}, "gated is 'silu'; it must be True or False"),
        ({"gated": True, "activation": "silu", "save_preactivation": True}, "gated=True goes with"),
    ],
)
def test_bad_epilogues_are_named(options, message):
    x, w, *_ = problem()
    with pytest.raises(ValueError, match=message):
        nm_matmul(x, w, **options)


def test_a_gate_that_goes_with_nothing_is_named():
    x, w, *_ = problem()
    odd = compress(jnp.ones((32, 5)), "2:4")
    with pytest.raises(ValueError, match="halves the outputs of w, which has 5"):
        nm_matmul(x, odd, gated=True)
    for options, other in (
        ({"residual": jnp.ones((2, 3, 48))}, "a residual"),
        ({"activation": "relu", "activated": True}, "activated=True"),
        ({"sections": (24, 24)}, "sections"),
    ):
        with pytest.raises(ValueError, match=f"gated=True and {other} are both given"):
            slope_matmul(x, w, gated=True, **options)
    with pytest.raises(ValueError, match="gated is 'silu'; it must be True or False"):
        slope_matmul(x, w, gated="silu")
    layer = SparseDense(48)
    variables = layer.init(jax.random.key(0), x)
    for options, message in (
        ({"gate": "tan"}, "'tan'"),
        ({"gate": "silu", "residual": x}, "goes with no"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.apply(variables, x, **options)
    for sections, fits in (((24, 24), True), ((20, 28), False), ((16, 16, 16), False)):
        halves = layer.clone(sections=sections)
        if fits:
            halves.apply(variables, x, gate="silu")
        else:
            with pytest.raises(ValueError, match="two halves, not"):
                halves.apply(variables, x, gate="silu")
    with pytest.raises(ValueError, match="gate='silu' needs a layer whose `joins` is true"):
        layer.clone(sparsity=None).apply({"params": {}}, x, gate="silu")


def test_a_bad_adapter_is_named():
    x, w, *_ = problem()
    with pytest.raises(ValueError, match=r"adapter has shapes.*\(32, rank\) and \(rank, 48\)"):
        slope_matmul(x, w, adapter=(jnp.ones((32, 4)), jnp.ones((5, 48))))
