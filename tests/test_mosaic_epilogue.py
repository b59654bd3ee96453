"""What joins `nm_matmul` on Hopper: exact on integers, close to the formulas otherwise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered, needs_gpu, needs_jax

from pallas_kernels import compress, decompress, nm_matmul
from pallas_kernels.epilogue import ACTIVATIONS, Epilogue
from pallas_kernels.mosaic import support
from slope_jax import sharding, slope_matmul
from slope_jax.sharded import sharded_matmul

# tokens, in, out, rank: partial tiles, ranks of part of a stage, of several, and not of 8
# The last one is for tiles that the CTAs of a cluster share.
SHAPES = [(300, 136, 200, 8), (1000, 776, 1000, 12), (700, 320, 1032, 72), (70, 2056, 264, 12)]


def integers(seed, shape, dtype=jnp.bfloat16):
    return jax.random.randint(jax.random.key(seed), shape, -4, 5).astype(dtype)


def problem(shape, dtype=jnp.bfloat16):
    tokens, k, f, rank = shape
    w = compress(integers(1, (k, f), dtype), "2:4")
    low_rank = (integers(2, (tokens, rank), dtype), integers(3, (rank, f), dtype))
    return integers(0, (tokens, k), dtype), w, integers(4, (f,), jnp.float32), low_rank


@needs_jax
def test_every_epilogue_lowers_for_cuda():
    x, w, bias, low_rank = jax.eval_shape(lambda: problem(SHAPES[1]))

    def program(out_dtype, **options):
        from pallas_kernels.mosaic import products

        def run(x, w, bias, low_rank):
            epilogue = Epilogue(bias, low_rank, **options)
            return products.nm_matmul(x, w, out_dtype, None, epilogue)

        return lowered(run, x, w, bias, low_rank)

    for activation, out_dtype in itertools.product(ACTIVATIONS, (jnp.bfloat16, jnp.float32)):
        text = program(out_dtype, activation=activation, save_preactivation=True)
        assert "nm_matmul" in text


@needs_jax
@pytest.mark.parametrize("tokens", [16, 2000])
def test_training_lowers_where_jax_has_64_bits(monkeypatch, tokens):
    monkeypatch.setattr(support, "device_obstacle", lambda *_: None)
    with jax.enable_x64(True):
        x, w, bias, low_rank = jax.eval_shape(lambda: problem((tokens, 1600, 256, 16)))
        left = jax.ShapeDtypeStruct((1600, 16), x.dtype)

        def loss(x, w, bias, left, r):
            options = {"activation": "gelu", "implementation": "mosaic"}
            y = slope_matmul(x, w, adapter=(left, r), bias=bias, **options)
            return y.astype(jnp.float32).sum()

        grad = jax.grad(loss, argnums=(0, 1, 2, 3, 4), allow_int=True)
        text = lowered(grad, x, w, bias, left, low_rank[1])
    for name in ("nm_matmul", "nm_sddmm", "nm_transpose"):
        assert name in text


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_and_low_rank_are_exact_on_integers(shape, dtype):
    x, w, bias, (t, r) = problem(shape, dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(decompress(w), np.float64)
    exact = exact + np.asarray(t, np.float64) @ np.asarray(r, np.float64) + np.asarray(bias)
    options = {"bias": bias, "low_rank": (t, r), "implementation": "mosaic"}
    for out_dtype in (dtype, jnp.float32):
        y = nm_matmul(x, w, out_dtype=out_dtype, **options)
        np.testing.assert_array_equal(y, jnp.asarray(exact, jnp.float32).astype(out_dtype))
    y, z = nm_matmul(x, w, activation="relu", save_preactivation=True, **options)
    np.testing.assert_array_equal(z, jnp.asarray(exact, jnp.float32).astype(dtype))
    np.testing.assert_array_equal(y, jnp.maximum(z, 0))
    again = nm_matmul(x, w, activation="relu", **options)
    np.testing.assert_array_equal(again, y)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tokens", [3, 70])  # the kernel for few, and that for many
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_as_precise_as_it_says(activation, tokens, dtype):
    """-30 .. 30 and the special numbers, as biases of a product that is 0."""
    special = [0.0, -0.0, jnp.inf, jnp.nan]
    z = jnp.concatenate([jnp.linspace(-30, 30, 4091), jnp.array(special)])
    bias = jnp.pad(z, (0, 1))  # 4096
    x = jnp.zeros((tokens, 64), dtype)
    w = compress(jnp.zeros((64, bias.size), dtype), "2:4")
    function = ACTIVATIONS[activation]
    exact = np.asarray(function(bias), np.float32)
    options = {"bias": bias, "activation": activation, "implementation": "mosaic"}
    precise = np.asarray(nm_matmul(x, w, out_dtype=jnp.float32, **options))[1]
    fast = np.asarray(nm_matmul(x, w, **options), np.float32)[1]
    np.testing.assert_array_equal(np.isnan(fast), np.isnan(exact))
    np.testing.assert_array_equal(np.isnan(precise), np.isnan(exact))
    finite = np.isfinite(exact)
    size, exact = np.abs(np.asarray(bias))[finite], exact[finite]
    off = 4 * np.finfo(np.float32).eps * np.maximum(1, size)
    assert (np.abs(precise[finite] - exact) <= off).all()
    if tokens == 70 and activation != "relu":
        off = off + 3e-4 * size
    rounding = jnp.finfo(dtype).eps / 2 * np.abs(exact) + jnp.finfo(dtype).smallest_subnormal
    assert (np.abs(fast[finite] - exact) <= off + rounding).all()
    assert fast[np.asarray(bias) == np.inf] == np.inf


@needs_gpu
@pytest.mark.parametrize("tokens", [40, 72])  # the kernel for few, and that for many
def test_vmap_scan_and_remat_reach_the_kernel(tokens):
    x, w = integers(0, (3, tokens, 64)), compress(integers(1, (3, 64, 128)), "2:4")
    bias = integers(2, (3, 128), jnp.float32)
    one = jax.tree.map(lambda leaf: leaf[0], w)

    def run(implementation):
        def call(x, w, bias):
            return slope_matmul(x, w, bias=bias, activation="relu", implementation=implementation)

        def scanned(x, w, bias):
            step = jax.checkpoint(lambda _, args: (None, call(*args)))
            return jax.lax.scan(step, None, (x, w, bias))[1].astype(jnp.float32).sum()

        return (
            jax.jit(jax.vmap(call))(x, w, bias),
            jax.jit(jax.vmap(call, in_axes=(0, None, None)))(x, one, bias[0]),
            *jax.tree.leaves(jax.jit(jax.grad(scanned, (0, 2)))(x, w, bias)),
        )

    for ours, theirs in zip(run("mosaic"), run("xla"), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@needs_gpu
def test_the_whole_gradient_is_that_of_xla():
    x, w, bias, _ = problem((250, 256, 384, 8))
    adapter = (integers(5, (256, 8), jnp.float32), integers(6, (8, 384), jnp.float32))
    dy = integers(7, (250, 384))
    results = []
    for implementation in ("mosaic", "xla"):

        def call(x, w, bias, adapter, implementation=implementation):
            return slope_matmul(x, w, bias=bias, adapter=adapter, implementation=implementation)

        y, back = jax.vjp(call, x, w, bias, adapter)
        dx, dw, dbias, dadapter = jax.jit(back)(dy)
        results.append((y, dx, dw.values, dbias, *dadapter))
    for mosaic, xla in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(mosaic, np.float32), np.asarray(xla, np.float32))


def sharded(call):
    """call(x, w, bias) with its tokens shared out over a mesh."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=auto, devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(spec("data"), spec(), spec()),
        out_specs=spec("data"),
    )


@needs_jax
@pytest.mark.parametrize("tokens", [64, 128])  # the kernel for few, and that for many
def test_kernels_lower_under_shard_map(tokens):
    from pallas_kernels.mosaic import products

    def call(x, w, bias):
        return products.nm_matmul(x, w, x.dtype, None, Epilogue(bias, activation="gelu"))

    x, w, bias, _ = jax.eval_shape(lambda: problem((tokens, 128, 256, 8)))
    text = lowered(sharded(call), x, w, bias)
    assert ("nm_matmul_few" in text) == (tokens == 64)
    assert "nm_matmul" in text


@needs_jax
def test_a_result_varies_over_the_mesh_as_any_operand_does():
    from pallas_kernels.mosaic import products

    def call(x, w, bias):
        y = products.nm_matmul(x, w, x.dtype, None, Epilogue(bias))
        assert jax.typeof(y).mat.varying == {"data"}
        return y

    x, w, bias, _ = jax.eval_shape(lambda: problem((128, 128, 256, 8)))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=auto, devices=jax.devices()[:1])
    whole, cut = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    for number in range(3):
        specs = [cut if number == i else whole for i in range(3)]
        mapped = jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=cut)
        assert "nm_matmul" in lowered(mapped, x, w, bias)


@needs_jax
def test_gradients_of_what_the_devices_share_are_sums_over_them(monkeypatch):
    """In `jax.shard_map` as it is by default."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)

    def gradients(x, w, bias):
        def loss(values, bias):
            shared = w.with_values(values)
            y = slope_matmul(x, shared, bias=bias, activation="relu", implementation="mosaic")
            return jax.lax.psum(y.astype(jnp.float32).sum(), "data")

        return jax.grad(loss, argnums=(0, 1))(w.values, bias)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    call = jax.shard_map(
        gradients, mesh=mesh, in_specs=(spec("data"), spec(), spec()), out_specs=spec()
    )
    x, w, bias, _ = jax.eval_shape(lambda: problem((256, 128, 256, 8)))
    text = lowered(call, x, w, bias)
    assert "nm_sddmm" in text
    assert text.count("stablehlo.all_reduce") == 2  # of values and of bias


@needs_jax
@pytest.mark.parametrize("cut", [sharding.WHOLE, sharding.COLUMN, sharding.FUSED, sharding.ROW])
def test_kernels_lower_inside_of_a_model_on_a_mesh(cut, monkeypatch):
    """y, dx, dw and the transpose, with bias and adapters, each device on its piece."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)

    def loss(x, w, bias, adapter):
        y = sharded_matmul(x, w, cut, bias=bias, adapter=adapter, implementation="mosaic")
        return (y.astype(jnp.float32) ** 2).sum()

    shape = jax.ShapeDtypeStruct
    x, bias = shape((8, 32, 512), jnp.bfloat16), shape((512,), jnp.float32)
    w = jax.eval_shape(lambda w: compress(w, "2:4"), shape((512, 512), jnp.float32))
    adapter = (shape((512, 8), jnp.float32), shape((8, 512), jnp.float32))
    auto = (jax.sharding.AxisType.Auto,) * 3
    with jax.set_mesh(jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=auto)):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True))
        text = step.trace(x, w, bias, adapter).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("nm_matmul", "nm_sddmm", "nm_transpose"):
        assert kernel in text


@needs_gpu
@pytest.mark.parametrize("tokens", [64, 128])
def test_kernels_run_under_shard_map(tokens):
    def call(x, w, bias):
        return nm_matmul(x, w, bias=bias, activation="gelu", implementation="mosaic")

    x, w, bias, _ = problem((tokens, 128, 256, 8))
    np.testing.assert_array_equal(jax.jit(sharded(call))(x, w, bias), call(x, w, bias))
