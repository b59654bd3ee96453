"""What is chosen and traced on a Hopper GPU by default, on a machine that has none."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.record import RESULTS
from pallas_kernels import Pattern, Query, choose, compress, nm_matmul, nm_sddmm, nm_transpose
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.mosaic import support
from slope_jax import SparseDense

H100 = "NVIDIA H100 80GB HBM3"
NOISE = 0.03  # of one timing, see pallas_kernels/NOTES.md
needs_jax = pytest.mark.skipif(
    support.version_obstacle() is not None, reason=str(support.version_obstacle())
)


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


def test_what_no_kernel_takes_is_refused_if_it_is_asked_for(hopper):
    query = Query("nm_sddmm", (64, 64), Pattern(2, 4), "bfloat16", 64, axis=1)
    with pytest.raises(NotImplementedError, match="not axis 1"):
        choose(query, "mosaic")


def test_nothing_that_was_measured_loses_to_dense(hopper):
    """By the records: where the kernels run, they were faster than the dense product, but for noise."""
    looked = 0
    for path in RESULTS.glob("kernels-*.json"):
        record = json.loads(path.read_text())
        for row in record["results"]:
            if record["device"] != H100 or row["kind"] not in ("matmul", "few"):
                continue
            looked += 1
            size = (row["in"], row["out"])
            query = Query("nm_matmul", size, Pattern(2, 4), row["dtype"], row["tokens"])
            if choose(query).implementation == "mosaic":
                assert row["speedup"] >= 1 - NOISE, row
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
