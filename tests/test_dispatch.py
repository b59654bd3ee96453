"""What is chosen and traced on a Hopper GPU by default, on a machine that has none."""

import dataclasses
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered, needs_jax

from benchmarks.record import RESULTS
from pallas_kernels import (
    Pattern,
    Query,
    choose,
    compress,
    nm_matmul,
    nm_sddmm,
    nm_transpose,
    tuning,
)
from pallas_kernels.dispatch import NarrowQuery, choose_narrow
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.mosaic import support
from pallas_kernels.triton import support as triton_support
from slope_jax import SparseDense, slope_matmul

H100 = "NVIDIA H100 80GB HBM3"
CACHE_RATE = 8.3e6  # bytes a microsecond, of an H100's second cache
NOISE = 0.03  # of one timing, see pallas_kernels/NOTES.md


class Device:
    platform, device_kind, compute_capability = "gpu", H100, "9.0"


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    monkeypatch.setattr(support, "version_obstacle", lambda *_: None)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query("nm_matmul", (4096, 4096), Pattern(2, 4), "bfloat16", 0), "there are no tokens"),
        (
            Query("nm_sddmm", (1600, 1600), Pattern(2, 4), "bfloat16", 64, axis=1),
            "compressed along axis 0",
        ),
        (
            Query("nm_matmul", (64, 64), Pattern(2, 4), "bfloat16", 8, out_dtype="float16"),
            "writes bfloat16, as x is, or float32, not float16",
        ),
    ],
)
def test_what_no_kernel_takes_goes_to_xla_with_the_reason(hopper, query, message):
    choice = choose(query)
    assert choice.implementation == "xla"
    assert message in choice.reason


def test_a_query_reads_patterns_and_dtypes(hopper):
    query = Query("nm_matmul", (4096, 4096), "2:4", jnp.bfloat16, 8192)
    assert query == Query("nm_matmul", (4096, 4096), Pattern(2, 4), "bfloat16", 8192)
    assert choose(query).implementation == "mosaic"
    given = Query("nm_matmul", [4096, 4096], "2:4", "bfloat16", 8192, 0, jnp.bfloat16)
    assert hash(given) == hash(dataclasses.replace(query, out_dtype="bfloat16"))
    assert choose(given).implementation == "mosaic"
    narrow = NarrowQuery([5120, 80], jnp.bfloat16, 2048)
    assert narrow == NarrowQuery((5120, 80), "bfloat16", 2048)
    assert choose_narrow(narrow).implementation == "mosaic"
    with pytest.raises(ValueError, match="pattern 9:4"):
        Query("nm_matmul", (64, 64), "9:4", "bfloat16")
    for dtype in ("bf16", None):
        with pytest.raises(ValueError, match=f"dtype is {dtype!r}; it must be one of JAX's"):
            Query("nm_matmul", (64, 64), "2:4", dtype)
        with pytest.raises(ValueError, match=f"dtype is {dtype!r}; it must be one of JAX's"):
            NarrowQuery((64, 64), dtype, 8)
    with pytest.raises(ValueError, match="the query has dtype int8; it must be float32, bfloat16"):
        Query("nm_matmul", (64, 64), "2:4", "int8")
    with pytest.raises(ValueError, match=r"shape is \(64,\); it must be that of a matrix"):
        Query("nm_matmul", (64,), "2:4", "bfloat16")


def test_what_no_kernel_takes_is_refused_if_it_is_asked_for(hopper):
    query = Query("nm_sddmm", (64, 64), Pattern(2, 4), "bfloat16", 64, axis=1)
    with pytest.raises(NotImplementedError, match="not axis 1"):
        choose(query, "mosaic")


def test_nothing_that_was_measured_loses_to_what_would_run_instead(hopper):
    """By the records: where the kernels run, they were faster than the dense product, but for noise.

    Or than that and the way from compressed to dense, which is what else could run: as it was timed, or
    else as long as its bytes take at the least.
    """
    looked = 0
    for path in RESULTS.glob("kernels-*.json"):
        record = json.loads(path.read_text())
        for row in record["results"]:
            if record["device"] != H100 or row["kind"] not in ("matmul", "few"):
                continue
            looked += 1
            size = (row["in"], row["out"])
            query = Query("nm_matmul", size, Pattern(2, 4), row["dtype"], row["tokens"])
            if choose(query).implementation == "mosaic" and row["speedup"] < 1 - NOISE:
                problem = row["tokens"], *size, row["dtype"], H100, "9.0"
                entry = tuning.best(tuning.kernel_of("nm_matmul", *problem), *problem)
                least = row["dense_us"] + 2 * math.prod(size) * (1 + 9 / 16) / CACHE_RATE
                assert row["sparse_us"] < (getattr(entry, "xla_us", None) or least), row
    assert looked > 50


@needs_jax
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 8), (65,), (4, 2048)], ids=math.prod)
def test_the_products_of_any_number_of_tokens_are_traced(hopper, tokens, pattern):
    shape = jax.ShapeDtypeStruct
    w = jax.eval_shape(lambda w: compress(w, pattern), shape((64, 128), jnp.bfloat16))
    x, dy = shape((*tokens, 64), jnp.bfloat16), shape((*tokens, 128), jnp.bfloat16)
    for out_dtype in (None, jnp.float32, jnp.float16):
        y = jax.eval_shape(lambda x, w, d=out_dtype: nm_matmul(x, w, out_dtype=d), x, w)
        assert (y.shape, y.dtype) == (dy.shape, out_dtype or x.dtype)
        dw = jax.eval_shape(lambda x, dy, w, d=out_dtype: nm_sddmm(x, dy, w, out_dtype=d), x, dy, w)
        assert (dw.shape, dw.dtype) == (w.values.shape, out_dtype or x.dtype)
    turned = jax.eval_shape(nm_transpose, w)
    assert turned.shape == (128, 64)
    along = jax.eval_shape(lambda w: compress(w, pattern, axis=1), shape((64, 128), jnp.bfloat16))
    assert jax.eval_shape(nm_sddmm, x, dy, along).shape == along.values.shape


@needs_jax
@pytest.mark.parametrize("tokens", [0, 16, 8192])
def test_a_layer_is_differentiated(hopper, tokens):
    layer = SparseDense(128, dtype=jnp.bfloat16, adapter_rank=8, activation="gelu")
    x = jax.ShapeDtypeStruct((tokens, 64), jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def loss(params, masks, x):
        y = layer.apply({"params": params, "masks": masks}, x)
        return y.astype(jnp.float32).sum()

    grads = jax.eval_shape(jax.grad(loss), variables["params"], variables["masks"], x)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, variables["params"])


@needs_jax
@pytest.mark.parametrize("processors", [78, 132])
def test_kernels_are_laid_out_for_the_devices_processors(hopper, processors, monkeypatch):
    from pallas_kernels.mosaic import products

    monkeypatch.setattr(Device, "core_count", processors, raising=False)
    seen = []
    for module in (products.matmul, products.sddmm):
        name = f"nm_{module.__name__.rpartition('.')[2]}"
        whole = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, whole=whole, **kw: (seen.append(kw), whole(*args, **kw))[1]
        )
    w = jax.eval_shape(lambda w: compress(w, "2:4"), jnp.ones((520, 776), jnp.bfloat16))
    x, dy = (jax.ShapeDtypeStruct((3000, n), jnp.bfloat16) for n in (520, 776))

    def both(x, dy, w):
        y = products.nm_matmul(x, w, x.dtype, None, Epilogue())
        return y, products.nm_sddmm(x, dy, w, jnp.dtype("float32"), None)

    jaxpr = str(jax.make_jaxpr(both)(x, dy, w))
    assert [kw["processors"] for kw in seen] == [processors, processors]
    assert products.configuration("nm_matmul", 3000, 520, 776, x.dtype).cluster <= processors
    assert "nm_matmul" in jaxpr


@needs_jax
def test_a_buffer_reaches_the_kernel(monkeypatch):
    from pallas_kernels.mosaic import products

    def stub(x, dy, metadata, tile, *, out_dtype, processors, into=None):
        return jnp.zeros((x.shape[1] // 2, dy.shape[1]), out_dtype) + (0 if into is None else into)

    monkeypatch.setattr(products.sddmm, "nm_sddmm", stub)
    w = compress(jnp.ones((32, 8)), "2:4")
    x, dy = jnp.ones((4, 32), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    into = jnp.arange(128.0).reshape(16, 8)
    found = products.nm_sddmm(x, dy, w, jnp.dtype(jnp.float32), None, into)
    np.testing.assert_array_equal(found, into)
    assert not products.nm_sddmm(x, dy, w, jnp.dtype(jnp.float32), None).any()


@needs_jax
@pytest.mark.parametrize(
    ("out_dtype", "runs"), [("bfloat16", True), ("float32", True), ("float16", False)]
)
def test_the_kernel_writes_what_it_can_and_xla_the_rest(hopper, out_dtype, runs):
    w = jax.eval_shape(lambda w: compress(w, "2:4"), jnp.ones((64, 128), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((65, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x, w: nm_matmul(x, w, out_dtype=out_dtype))(x, w)
    assert ("dot_general" in str(jaxpr)) != runs


@needs_jax
@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:8", "1:16"])
def test_kernels_asked_for_run_backward_too_whatever_the_pattern(hopper, pattern):
    """`nm_transpose` has one for 2:4 alone, and the products of its result have theirs."""
    w = jax.eval_shape(lambda w: compress(w, pattern), jnp.ones((64, 128), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((128, 64), jnp.bfloat16)

    def loss(x, w):
        return slope_matmul(x, w, implementation="mosaic").astype(jnp.float32).sum()

    text = lowered(jax.value_and_grad(loss, argnums=(0, 1), allow_int=True), x, w)
    assert text.count("call @nm_matmul") == 2
    assert "nm_sddmm" in text


@needs_jax
@pytest.mark.parametrize("tokens", [4, 2048])
@pytest.mark.parametrize("term", ["adapter", "low_rank"])
def test_adapters_of_rank_0_are_none(hopper, tokens, term):
    shape = jax.ShapeDtypeStruct
    w = jax.eval_shape(lambda w: compress(w, "2:4"), shape((1536, 128), jnp.bfloat16))
    x, r = shape((tokens, 1536), jnp.bfloat16), shape((0, 128), jnp.bfloat16)
    first = {"adapter": shape((1536, 0), x.dtype), "low_rank": shape((tokens, 0), x.dtype)}[term]

    def program(**terms):
        def run(x, w, first, r):
            return nm_matmul(x, w, **({term: (first, r)} if terms else {}))

        return lowered(run, x, w, first, r)

    assert program(given=True) == program()
    assert "nm_matmul" in program()
    assert choose_narrow(NarrowQuery((1536, 0), "bfloat16", 2048)).reason.endswith("128, not 0")


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
def test_matrices_without_entries_are_left_to_xla(hopper, size):
    w = compress(jnp.ones(size, jnp.bfloat16), "2:4")
    x, dy = jnp.ones((70, size[0]), w.dtype), jnp.ones((70, size[1]), w.dtype)
    np.testing.assert_array_equal(nm_matmul(x, w), jnp.zeros(dy.shape))
    assert nm_sddmm(x, dy, w).shape == w.values.shape
    query = Query("nm_matmul", size, Pattern(2, 4), "bfloat16", 70)
    assert choose(query) == ("xla", "there are no entries")
    with pytest.raises(NotImplementedError, match="multiples of 8, not"):
        choose(query, "mosaic")


def test_the_default_device_is_the_one_that_is_chosen_for(monkeypatch):
    cpu, gpu = jax.devices()[0], Device()
    monkeypatch.setattr(jax, "devices", lambda platform=None: [cpu if platform == "cpu" else gpu])
    monkeypatch.setattr(support, "version_obstacle", lambda *_: None)
    query = Query("nm_matmul", (4096, 4096), Pattern(2, 4), "bfloat16", 8192)
    assert choose(query).implementation == "mosaic"
    for here in ("cpu", cpu):
        with jax.default_device(here):
            assert "this is cpu" in choose(query).reason


@needs_jax
def test_a_kernel_says_where_it_cannot_run(hopper):
    """On a machine with a GPU: arrays of the CPU, derivatives, and arrays spread over a mesh."""
    w = compress(jnp.ones((64, 128), jnp.bfloat16), "2:4")
    x = jnp.ones((72, 64), jnp.bfloat16)
    run = jax.jit(nm_matmul)
    with pytest.raises(ValueError, match="this program is for cpu; pass implementation='xla'"):
        run.trace(x, w).lower(lowering_platforms=("cpu",))
    with pytest.raises(NotImplementedError, match="slope_matmul and SparseDense have"):
        jax.eval_shape(jax.grad(lambda x: nm_matmul(x, w).sum()), x)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        rows = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16, sharding=cut)
        with pytest.raises(ValueError, match=r"call it in jax\.shard_map"):
            jax.eval_shape(nm_matmul, rows, w)


@needs_jax
def test_a_kernel_that_every_device_runs_in_whole_says_so(hopper):
    w = jax.eval_shape(lambda w: compress(w, "2:4"), jnp.ones((64, 128), jnp.bfloat16))
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    cut = jax.sharding.NamedSharding(mesh, spec("data"))
    x = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16, sharding=cut)
    with pytest.warns(UserWarning, match="each of 2 devices will compute all of it"):
        lowered(nm_matmul, x, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(
            jax.shard_map(
                nm_matmul, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec("data")
            ),
            x,
            w,
        )


@needs_jax
def test_kernels_are_made_where_nothing_else_is_compiled(monkeypatch):
    """In `jax.disable_jit`, and where JAX looks for a NaN; a stand-in, for they run on GPUs alone."""
    from jax.interpreters import mlir

    from pallas_kernels.mosaic import launch

    rules = mlir._platform_specific_lowerings["cpu"]
    monkeypatch.setitem(rules, launch.kernel_p, None)  # for the one of this test not to stay
    mlir.register_lowering(launch.kernel_p, launch._lower, platform="cpu")

    @launch.once("factor")
    def scaled(x, *, factor):
        return x * factor

    with jax.disable_jit():
        np.testing.assert_array_equal(scaled(jnp.ones(3), factor=2), 2)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        scaled(jnp.full(3, jnp.inf), factor=0)


def test_other_patterns_go_by_the_times_of_two_four(hopper):
    for pattern in (Pattern(1, 2), Pattern(1, 4)):
        query = Query("nm_matmul", (4096, 4096), pattern, "bfloat16", 8192)
        expected = f"by the times of 2:4, which {pattern} is first written as"
        assert choose(query).reason.startswith(expected)


def test_a_gpu_that_lacks_a_package_alone_says_which(monkeypatch):
    monkeypatch.setattr(Device, "compute_capability", "8.0")
    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    monkeypatch.setattr(triton_support, "package_obstacle", lambda: "it needs the extra 'triton'")
    query = Query("nm_matmul", (4096, 4096), Pattern(2, 4), "bfloat16", 8)
    assert choose(query).reason.endswith("; it needs the extra 'triton'")


def test_operands_of_other_kinds_are_named():
    w, x = compress(jnp.ones((8, 8)), "2:4"), jnp.ones((4, 8))
    for call, error, message in [
        (lambda: nm_matmul(x, jnp.ones((8, 8))), TypeError, "must be a CompressedMatrix"),
        (lambda: nm_transpose(jnp.ones((8, 8))), TypeError, "must be a CompressedMatrix"),
        (lambda: nm_matmul([[1.0] * 8], w), TypeError, "x is a list; it must be an array"),
        (lambda: nm_matmul(x, w, out_dtype="int32"), ValueError, "out_dtype is int32"),
        (lambda: nm_sddmm(x, x, w, out_dtype="int32"), ValueError, "out_dtype is int32"),
        (lambda: nm_transpose(w, dtype="int8"), ValueError, "dtype is int8"),
        (
            lambda: nm_matmul(x, dataclasses.replace(w, pattern="2:4")),
            ValueError,
            "pattern is '2:4'",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
