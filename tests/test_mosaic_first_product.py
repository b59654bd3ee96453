"""Adapters of few tokens: the kernel of their first product, and the way to it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered, needs_gpu, needs_jax

from pallas_kernels import compress, decompress, nm_matmul
from pallas_kernels.epilogue import Epilogue, Norm, moments
from pallas_kernels.mosaic import support
from slope_jax import slope_matmul

# along, split, parts
CONFIGS = [(1, 4, 2, 4), (2, 2, 4, 3), (4, 1, 1, 2), (8, 1, 2, 3), (1, 8, 8, 2)]  # of the product
CUTS = [(4, 1, 1), (8, 1, 3), (16, 2, 2), (8, 4, 2), (8, 8, 4)]
# tokens, in, rank: parts of units, of columns and of tokens; several batches; the largest
SHAPES = [
    (1, 8, 8),
    (3, 1000, 24),
    (8, 4096, 64),
    (16, 5120, 80),
    (17, 14336, 64),
    (64, 776, 400),
    (64, 20480, 80),
    (2, 4096, 1024),
]


def integers(seed, shape, dtype=jnp.bfloat16, most=4):
    values = np.random.default_rng(seed).integers(-most, most + 1, shape)
    return jnp.asarray(values.astype(dtype))


def float64(x):
    return np.asarray(x, np.float64)


def sparse(w):
    return jax.jit(compress, static_argnums=1)(w, "2:4")


def dense(w):
    return jax.jit(decompress)(w)


def first_product(x, left, cut=None):
    from pallas_kernels.mosaic import first_product

    found = first_product.choose(*left.shape)
    return first_product.first_product(x, left, first_product.Cut(*cut) if cut else found)


def problem(tokens, k, f, rank, dtype=jnp.bfloat16, most=1):
    make = functools.partial(integers, dtype=dtype, most=most)
    w = sparse(make(1, (k, f)))
    return make(0, (tokens, k)), w, (make(2, (k, rank)), make(3, (rank, f)))


def exact(x, w, adapter):
    """In float64, the first product rounded as a result is."""
    left, right = adapter
    t = jnp.asarray(float64(x) @ float64(left), jnp.float32).astype(x.dtype)
    return float64(x) @ float64(dense(w)) + float64(t) @ float64(right)


def shapes_of(*args):
    return jax.eval_shape(lambda: problem(*args))


@needs_jax
@pytest.mark.parametrize("cut", CUTS)
def test_it_lowers_for_cuda_without_a_gpu(cut, strict_dtypes):
    x, left = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((20, 776), (776, 88)))
    assert "first_product" in lowered(functools.partial(first_product, cut=cut), x, left)


@needs_jax
def test_every_choice_fits_the_machine():
    from pallas_kernels.mosaic import first_product, warps
    from pallas_kernels.mosaic.frame import SHARED_MEMORY

    ranks = (8, 64, 80, 400, 1024)
    for tokens, k, rank in itertools.product((1, 8, 9, 64), (8, 768, 4096, 20480), ranks):
        cut = first_product.choose(k, rank)
        assert cut.sharers * -(-rank // 64) <= 128
        g = warps.Geometry(tokens, k, rank, "bfloat16", 1, cut.along, cut.split, stages=0)
        assert g.shared_memory <= SHARED_MEMORY


@needs_jax
def test_bad_input_is_named():
    from pallas_kernels.mosaic import few_tokens, first_product

    for tokens, rank in ((17, 8), (16, 32)):
        x, w, adapter = problem(tokens, 64, 128, rank)
        with pytest.raises(ValueError, match=f"an adapter of rank {rank} and {tokens} tokens"):
            few_tokens.nm_matmul(x, w.values, w.metadata, few_tokens.Config(), adapter=adapter)

    for options, message in [
        ({"along": 2}, "4, 8 or 16 warps"),
        ({"split": 3}, "1, 2, 4 or 8"),
        ({"parts": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            first_product.Cut(**options)
    x, left = jnp.ones((65, 64), jnp.bfloat16), jnp.ones((64, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="1 to 64"):
        first_product.first_product(x, left, first_product.Cut())


@needs_jax
@pytest.mark.parametrize(
    ("tokens", "k", "rank", "made"),
    [
        (16, 4096, 24, "apart"),
        (4, 64, 72, "apart"),
        (16, 64, 16, "inside"),
        (4, 768, 20, "inside"),  # padded to 24
        (4, 768, 32, "apart"),
        (1, 4096, 16, "inside"),
        (17, 64, 16, "by XLA"),
        (65, 64, 16, "by XLA"),
    ],
)
def test_up_to_sixteen_tokens_have_a_kernel(tokens, k, rank, made):
    """Of its own, or the product's where l is small."""
    from pallas_kernels.mosaic import products

    def run(x, w, adapter):
        return products.nm_matmul(x, w, x.dtype, None, Epilogue(adapter=adapter))

    text = lowered(run, *shapes_of(tokens, k, 128, rank))
    assert "nm_matmul" in text
    assert ("first_product" in text) == (made == "apart")
    assert ("dot_general" in text) == (made == "by XLA")


@needs_jax
def test_a_product_that_makes_the_first_one_has_room_for_it():
    from pallas_kernels.mosaic import few_tokens

    made = 0
    for tokens, k, f, norms, rank in itertools.product(
        (1, 9, 16), (8, 200, 1280, 8192), (8, 1024, 5120), (0, 2), (8, 16, 24, 32)
    ):
        config = few_tokens.choose_with_first(tokens, k, f, "bfloat16", norms, rank)
        if config is None:
            continue
        made += 1
        assert rank <= 24
        assert k * rank <= 1 << 16
        needed = config.geometry(tokens, k, f, "bfloat16", norms, rank).shared_memory
        assert needed <= 227 * 1024
        assert config.along * config.split <= max(
            4, -(-2 * k // 64)
        )  # half of the warps have inputs
    assert made > 80
    assert few_tokens.choose_with_first(17, 1280, 1280, "bfloat16", 0, 16) is None


@needs_jax
@pytest.mark.parametrize(
    ("shape", "rank", "best"),
    [  # within 4 % of the fastest of eleven, on an H100
        ((1024, 3072), 16, [(2, 2, 4)]),
        ((1024, 1024), 16, [(1, 4, 4), (2, 2, 8)]),
        ((4096, 1024), 16, [(2, 2, 8)]),
        ((1280, 3840), 24, [(2, 2, 4), (4, 1, 8), (4, 1, 4)]),
        ((1280, 1280), 24, [(2, 2, 8), (1, 4, 4), (2, 2, 4), (4, 1, 8)]),
        ((1280, 5120), 24, [(4, 1, 4)]),
    ],
)
def test_it_is_cut_as_was_measured_to_be_fastest(shape, rank, best):
    from pallas_kernels.mosaic import few_tokens

    for tokens in (1, 16):
        config = few_tokens.choose_with_first(tokens, *shape, "bfloat16", 0, rank)
        assert (config.across, config.along, config.split) in best


@needs_jax
def test_the_kernel_runs_where_no_gradient_needs_the_first_product(monkeypatch):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)

    def layer(x, w, adapter):
        return slope_matmul(x, w, adapter=adapter, implementation="mosaic")

    def loss(x, w, adapter):
        return layer(x, w, adapter).astype(jnp.float32).sum()

    arguments = shapes_of(4, 64, 128, 72)
    assert "first_product" in lowered(layer, *arguments)
    assert "first_product" not in lowered(jax.grad(loss), *arguments)


@needs_jax
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("rank", [16, 72])
def test_it_lowers_under_vmap_scan_and_shard_map(monkeypatch, joined, rank):
    """With a norm and a residual as well; inside the product's kernel and apart."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)

    def layer(x, w, adapter):
        scale = adapter[0][:, 0].astype(jnp.float32)
        residual = jnp.tile(x, (1, 2)) if x.ndim == 2 else None
        norm = Norm(scale, scale, moments=moments(x))
        options = {"norm": norm, "residual": residual} if joined else {}
        return nm_matmul(x, w, adapter=adapter, implementation="mosaic", **options)

    x, w, adapter = shapes_of(4, 64, 128, rank)
    stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), (x, w, adapter))

    def scanned(*stack):
        return jax.lax.scan(lambda _, each: (None, layer(*each)), None, stack)[1]

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    specs = (spec("data"), spec(), spec())
    mapped = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=spec("data"))
    for function, arguments in [
        (jax.vmap(layer), stack),
        (jax.vmap(layer, in_axes=(0, None, None)), (stack[0], w, adapter)),
        (scanned, stack),
        (mapped, (x, w, adapter)),
    ]:
        text = lowered(function, *arguments)
        assert "dot_general" not in text
        assert ("first_product" in text) == (rank == 72)
    more_rows = jax.vmap(layer, in_axes=(0, None, None))
    assert "stablehlo.while" not in lowered(more_rows, stack[0], w, adapter)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_parts_add_up_to_the_exact_product_of_integers(shape, dtype):
    tokens, k, rank = shape
    x, left = integers(0, (tokens, k), dtype), integers(1, (k, rank), dtype)
    parts = first_product(x, left)
    np.testing.assert_array_equal(float64(parts).sum(0), float64(x) @ float64(left))


@needs_gpu
@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_is_exact_on_ragged_sizes(cut, tokens):
    for k, rank in [(8, 8), (136, 72), (3080, 136)]:
        x, left = integers(0, (tokens, k)), integers(1, (k, rank))
        parts = first_product(x, left, cut)
        assert parts.shape == (cut[2], tokens, rank)
        np.testing.assert_array_equal(float64(parts).sum(0), float64(x) @ float64(left))


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 4096, 64), (16, 5120, 80), (64, 14336, 64)])
def test_repeats_are_equal_and_the_error_within_twice_that_of_xla(shape):
    tokens, k, rank = shape
    keys = jax.random.split(jax.random.key(0), 2)
    x, left = (
        jax.random.normal(key, s, jnp.bfloat16)
        for key, s in zip(keys, ((tokens, k), (k, rank)), strict=True)
    )
    parts = first_product(x, left)
    for _ in range(5):
        np.testing.assert_array_equal(parts, first_product(x, left))
    product = float64(x) @ float64(left)
    plain = float64(jnp.matmul(x, left, preferred_element_type=jnp.float32))
    allowed = 2 * np.abs(plain - product).max()
    assert np.abs(float64(parts).sum(0) - product).max() <= allowed


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4096, 1024, 64),
        (3, 1000, 520, 24),
        (8, 768, 72, 8),
        (16, 5120, 1032, 80),
        (16, 1024, 264, 24),
        (9, 776, 328, 16),
        (1, 136, 72, 20),
        (17, 264, 328, 20),
        (40, 512, 520, 144),
        (64, 4096, 520, 400),
    ],
)
def test_the_product_with_an_adapter_is_exact_on_integers(shape, dtype):
    tokens, k, f, rank = shape
    x, w, adapter = problem(tokens, k, f, rank, dtype)
    run = jax.jit(functools.partial(nm_matmul, out_dtype=jnp.float32, implementation="mosaic"))
    y = run(x, w, adapter=adapter)
    np.testing.assert_array_equal(y, exact(x, w, adapter))
    for _ in range(3):
        np.testing.assert_array_equal(run(x, w, adapter=adapter), y)


@needs_gpu
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 4096, 1024, 64), (3, 1000, 520, 24), (16, 776, 328, 80), (16, 776, 328, 16)]
)
def test_a_norm_and_an_adapter_are_as_close_as_a_norm_made_apart(shape, centred):
    """Against float64, of rows whose mean is far from zero."""
    tokens, k, f, rank = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(30, 2, (tokens, k)), jnp.bfloat16)
    left, right = (
        jnp.asarray(rng.normal(0, 0.1, size), jnp.bfloat16) for size in ((k, rank), (rank, f))
    )
    w, residual = (jnp.asarray(rng.normal(size=size), "bfloat16") for size in ((k, f), (tokens, f)))
    w = sparse(w)
    scale, shift = (jnp.asarray(rng.normal(size=k), jnp.float32) for _ in range(2))
    norm = Norm(scale, shift if centred else None, 1e-5, centred)
    run = jax.jit(functools.partial(nm_matmul, implementation="mosaic"))
    options = {"adapter": (left, right), "residual": residual}
    y = run(x, w, norm=norm, **options)
    apart = run(jax.jit(norm.__call__)(x), w, **options)
    rows = float64(x) - (float64(x).mean(-1, keepdims=True) if centred else 0)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * float64(scale)
    rows = rows + (float64(shift) if centred else 0)
    product = rows @ float64(dense(w)) + rows @ float64(left) @ float64(right) + float64(residual)
    errors = [np.abs(float64(a) - product).max() for a in (y, apart)]
    assert errors[0] <= 2 * errors[1]
    np.testing.assert_array_equal(run(x, w, norm=norm, **options), y)


@needs_gpu
@pytest.mark.parametrize("config", [(4, 1, 2, 3), (1, 4, 4, 3), (2, 4, 1, 3)])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_are_added_up_and_rounded(config, parts):
    """Integers that the sum of the parts makes too long for 8 bits."""
    from pallas_kernels.mosaic import few_tokens

    tokens, k, f, rank = 33, 264, 328, 136
    x, w, (_, right) = problem(tokens, k, f, rank)
    t = integers(5, (parts, tokens, rank), jnp.float32, most=300)
    rounded = t.sum(0).astype(x.dtype)
    y = jax.jit(
        lambda x, w, t, r: few_tokens.nm_matmul(
            x,
            w.values,
            w.metadata,
            few_tokens.Config(*config),
            low_rank=(t, r),
            out_dtype=jnp.float32,
        )
    )(x, w, t, right)
    product = float64(x) @ float64(dense(w)) + float64(rounded) @ float64(right)
    np.testing.assert_array_equal(y, product)


@needs_gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [3, 16])
def test_every_config_makes_the_first_product_inside(config, tokens):
    """Ranks of part of a unit and of several, the last inputs and outputs of part of a step."""
    from pallas_kernels.mosaic import few_tokens

    for k, f, rank in [(8, 8, 8), (136, 72, 24), (1000, 520, 16), (2056, 264, 24)]:
        x, w, adapter = problem(tokens, k, f, rank)
        run = jax.jit(
            functools.partial(
                few_tokens.nm_matmul, config=few_tokens.Config(*config), out_dtype=jnp.float32
            )
        )
        y = run(x, w.values, w.metadata, adapter=adapter)
        np.testing.assert_array_equal(y, exact(x, w, adapter), err_msg=str((k, f, rank)))


@needs_gpu
def test_inside_nan_and_inf_stay_with_their_tokens_as_well():
    x, w, (left, right) = problem(15, 1000, 304, 24)
    left, right = jnp.abs(left) + 1, jnp.abs(right) + 1
    x = jnp.abs(x).at[7, 3].set(jnp.nan).at[12, 999].set(jnp.inf)
    y = float64(nm_matmul(x, w, adapter=(left, right), implementation="mosaic"))
    assert np.isfinite(np.delete(y, [7, 12], axis=0)).all()
    assert np.isnan(y[7]).all()
    assert not np.isfinite(y[12]).any()


@needs_gpu
def test_nan_and_inf_stay_with_their_tokens():
    x, w, (left, right) = problem(20, 4096, 304, 64)
    left, right = jnp.abs(left) + 1, jnp.abs(right) + 1
    x = jnp.abs(x).at[7, 3].set(jnp.nan).at[12, 5].set(jnp.inf)
    parts = float64(first_product(x, left)).sum(0)
    y = float64(nm_matmul(x, w, adapter=(left, right), implementation="mosaic"))
    for result in (parts, y):
        assert np.isfinite(np.delete(result, [7, 12], axis=0)).all()
        assert np.isnan(result[7]).all()
    assert (parts[12] == np.inf).all()
    assert not np.isfinite(y[12]).any()


@needs_gpu
def test_vmap_and_scan_reach_the_kernel():
    stack = [problem(4, 64, 128, 16) for _ in range(3)]
    x, w, adapter = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    one = stack[0]

    def run(implementation):
        def layer(x, w, adapter):
            return nm_matmul(x, w, adapter=adapter, implementation=implementation)

        def scanned(*stack):
            return jax.lax.scan(lambda _, each: (None, layer(*each)), None, stack)[1]

        return (
            jax.jit(jax.vmap(layer))(x, w, adapter),
            jax.jit(jax.vmap(layer, in_axes=(0, None, None)))(x, *one[1:]),
            jax.jit(scanned)(x, w, adapter),
        )

    for ours, theirs in zip(run("mosaic"), run("xla"), strict=True):
        np.testing.assert_array_equal(float64(ours), float64(theirs))


@needs_gpu
@pytest.mark.parametrize(("tokens", "k", "rank"), [(8, 2560, 24), (16, 768, 16), (1, 4096, 16)])
def test_what_cancels_in_the_first_product_is_not_rounded_apart(tokens, k, rank):
    """Rows with a mean that l's columns, which add up to 0, take out: each warp's part of t is far larger."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(1 + 0.01 * rng.normal(size=(tokens, k)), jnp.bfloat16)
    half = rng.normal(size=(k // 2, rank))
    left = jnp.asarray(np.concatenate([half, -half]), jnp.bfloat16)
    right = jnp.asarray(rng.normal(size=(rank, 520)), jnp.bfloat16)
    w = sparse(jnp.zeros((k, 520), jnp.bfloat16))
    t = float64(x) @ float64(left)
    product = t @ float64(right)
    rounded = float64(jnp.asarray(t, jnp.bfloat16)) @ float64(right)
    y = nm_matmul(x, w, adapter=(left, right), out_dtype=jnp.float32, implementation="mosaic")
    assert np.abs(float64(y) - product).max() <= 2 * np.abs(rounded - product).max()
