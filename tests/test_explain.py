import importlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from pallas_kernels import Choice
from pallas_kernels.mosaic import support
from slope_jax import SparseDense, explain

pytestmark = pytest.mark.usefixtures("strict_dtypes")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return SparseDense(16, sparsity="2:8", adapter_rank=2, name="linear")(x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, 8, name="embed")
        x = nn.Dense(16, name="first")(embed(tokens))
        x = SparseDense(16, name="up")(x)
        scan = nn.scan(
            Block, variable_axes={"params": 0, "masks": 0}, split_rngs={"params": True}, length=3
        )
        x = scan(name="layers")(x, None)[0]
        x = SparseDense(8, sparsity=None, name="head")(x)
        return embed.attend(x)


TOKENS = jnp.zeros((2, 3), jnp.int32)


def table():
    model = Model()
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return explain(model, variables, TOKENS)


def test_every_linear_has_its_row():
    rows = {row.path: row for row in table().rows}
    assert list(rows) == ["first", "up", "layers/linear", "head", "embed"]
    assert [row.pattern for row in rows.values()] == ["dense", "2:4", "2:8", "dense", "dense"]
    assert rows["layers/linear"].layers == 3
    assert rows["up"].shape == (16, 16)
    assert rows["head"].reason == "sparsity is dense"
    assert rows["embed"].reason == "tied embedding"
    assert rows["up"].implementation == "xla"
    assert rows["up"].first_product is None
    assert rows["layers/linear"].first_product is None  # nor has the product a kernel here


@pytest.mark.skipif(support.version_obstacle() is not None, reason=str(support.version_obstacle()))
@pytest.mark.parametrize(
    ("tokens", "rank", "expected"),
    [
        (16, 16, "mosaic: a kernel for up to 16 tokens"),
        (17, 16, "xla: x @ l of 17 tokens is no slower in XLA"),
        (2048, 16, "mosaic: measured to be the faster one"),
        (2048, 136, "xla: x @ l has a kernel for ranks from 1 to 128, not 136"),
    ],
)
def test_it_says_what_makes_the_first_product_of_an_adapter(monkeypatch, tokens, rank, expected):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    layer = SparseDense(1536, adapter_rank=rank, dtype=jnp.bfloat16, implementation="mosaic")
    x = jax.ShapeDtypeStruct((tokens, 1536), jnp.bfloat16)
    row = explain(layer, jax.eval_shape(layer.init, jax.random.key(0), x), x).rows[0]
    assert row.implementation == "mosaic"
    assert row.reason == f"asked for; x @ l {expected}"


def test_bytes_are_counted_exactly():
    rows = {row.path: row for row in table().rows}
    assert rows["up"].dense_bytes == 16 * 16 * 4
    assert rows["up"].stored_bytes == 8 * 16 * 4 + 16 * 16 // 8
    # 2:8: a quarter of the values, 4 positions of 3 bits a column and layer (2 bytes), adapters
    values, metadata, adapters = 4 * 16 * 4, 2 * 16, (16 * 2 + 2 * 16) * 4
    assert rows["layers/linear"].stored_bytes == 3 * (values + metadata + adapters)
    assert rows["layers/linear"].dense_bytes == 3 * 16 * 16 * 4


def test_prints_as_a_table_with_a_total():
    lines = str(table()).splitlines()
    assert lines[0].split()[:3] == ["path", "layers", "shape"]
    assert len(lines) == 7
    assert lines[-1].startswith("all")
    assert f"{table().stored_bytes:,}" in lines[-1]


def test_strict_refuses_a_silent_dense_product():
    model = SparseDense(8)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="dense product"):
        explain(model, variables, jnp.ones((1, 8)), strict=True)


def test_a_simulated_layer_of_no_sparsity_prints():
    layer, x = SparseDense(16, sparsity=None, simulated=True), jnp.ones((4, 16))
    found = explain(layer, layer.init(jax.random.key(0), x), x)
    assert "dense is simulated" in str(found)


def test_needs_example_inputs():
    with pytest.raises(ValueError, match="example inputs"):
        explain(Model(), {})


def test_reasons_that_differ_are_told_with_their_products(monkeypatch):
    def chosen(query, implementation):
        return Choice("mosaic", "slow" if query.op == "nm_sddmm" else f"{query.shape}")

    monkeypatch.setattr(importlib.import_module("slope_jax.explain"), "choose", chosen)
    for outputs, reason in (
        (16, "y, dx: (16, 16); dw: slow"),
        (8, "y: (16, 8); dx: (8, 16); dw: slow"),
    ):
        layer, x = SparseDense(outputs), jnp.ones((4, 16))
        (row,) = explain(layer, jax.eval_shape(layer.init, jax.random.key(0), x), x).rows
        assert row.reason == reason
