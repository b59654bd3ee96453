"""Working copies: the same results and gradients, without a look at the masters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from pallas_kernels import CompressedMatrix, Pattern, compress, nm_transpose
from slope_jax import (
    WORKING,
    SparseDense,
    Working,
    find_layers,
    pieces,
    slope_matmul,
    working_copies,
)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def spoilt(tree):
    return jax.tree.map(lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def assert_equal(got, wanted):
    got, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, wanted))
    for (path, a), (_, b) in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path)
        )


def product_and_gradients(x, w, rest, dy, working=None):
    def call(x, values, rest):
        bias, adapter = rest
        return slope_matmul(
            x, w.with_values(values), bias=bias, adapter=adapter, activation="relu", working=working
        )

    y, back = jax.vjp(call, x, w.values, rest)
    return y, back(dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("which", ["both", "values", "transpose"])
def test_copies_stand_in_for_the_weight_and_the_gradient_is_the_masters(which, dtype):
    w = compress(normal(0, (32, 48)), "2:4")
    x, dy = normal(1, (2, 5, 32), dtype), normal(2, (2, 5, 48), dtype)
    rest = normal(3, (48,)), (normal(4, (32, 3)), normal(5, (3, 48)))
    working = Working(
        values=None if which == "transpose" else w.values.astype(dtype),
        transpose=None if which == "values" else nm_transpose(w, dtype=dtype),
    )
    expected = product_and_gradients(x, w, rest, dy)
    assert expected[1][1].dtype == jnp.float32
    masters = w.with_values(spoilt(w.values)) if which == "both" else w  # never read
    assert_equal(product_and_gradients(x, masters, rest, dy, working), expected)


def test_copies_are_what_is_multiplied():
    w = compress(normal(0, (32, 48)), "2:4")
    x, dy = normal(1, (5, 32)), normal(2, (5, 48))
    opposite = w.with_values(-w.values)

    def product(w, working):
        y, back = jax.vjp(lambda x: slope_matmul(x, w, working=working), x)
        return y, back(dy)[0]

    y, dx = product(w, None)
    assert_equal(product(w, Working(opposite.values, nm_transpose(w))), (-y, dx))
    assert_equal(product(w, Working(None, nm_transpose(opposite))), (y, -dx))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        up = SparseDense(32, activation="relu", adapter_rank=2, name="up")
        return x + SparseDense(16, adapter_rank=2, name="down")(up(x)), None


class Stack(nn.Module):
    """A dense layer, then scanned and rematerialised sparse ones with adapters, then a sparse one."""

    @nn.compact
    def __call__(self, x):
        x = SparseDense(16, sparsity=None, name="first")(x)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0, "masks": 0, WORKING: 0},
            split_rngs={"params": True},
            length=2,
        )
        return SparseDense(8, sparsity="1:4", name="last")(blocks(name="blocks")(x, None)[0])


@functools.cache
def parts():
    """Model, variables with adapters and biases that act, its layers."""
    model, x = Stack(), normal(7, (5, 16))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    variables["params"] = jax.tree.map(lambda p: jnp.where(p == 0, 0.01, p), variables["params"])
    return model, variables, find_layers(model.apply, variables, x)


def loss_and_gradients(model, variables):
    def loss(params):
        return (model.apply({**variables, "params": params}, normal(7, (5, 16))) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


def without_masters(variables, layers):
    """Variables in which the kernels of `layers` are NaN."""
    paths = {(*path, "kernel") for path in layers}

    def change(path, leaf):
        return spoilt(leaf) if tuple(part.key for part in path) in paths else leaf

    params = jax.tree_util.tree_map_with_path(change, variables["params"])
    return {**variables, "params": params}


def test_a_model_gives_the_same_loss_and_gradients_bit_for_bit():
    model, variables, layers = parts()
    expected = loss_and_gradients(model, variables)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    some = {path: layer for path, layer in layers.items() if path != ("blocks", "down")}
    assert len(some) == len(layers) - 1  # the one left out works as before
    blind = without_masters(variables, some)
    working = {WORKING: working_copies(variables, some)}
    assert_equal(loss_and_gradients(model, blind | working), expected)


def test_copies_of_a_stack_are_those_of_its_layers(monkeypatch):
    _, variables, layers = parts()
    calls = []

    def counted(w, **options):
        calls.append(w.values.shape)
        return nm_transpose(w, **options)

    monkeypatch.setattr(pieces, "nm_transpose", counted)
    bf16 = {path: layer._replace(dtype=jnp.dtype(jnp.bfloat16)) for path, layer in layers.items()}
    working = working_copies(variables, bf16)
    assert calls == [(8, 32), (16, 16), (4, 8)]  # up, down, last
    program = str(jax.make_jaxpr(lambda v: working_copies(v, bf16))(variables))
    assert "f32[16,32]" in program  # one decompressed layer of `up`, never all of them
    assert "f32[2,16,32]" not in program
    params, static, found = (
        tree["blocks"]["up"]["kernel"]
        for tree in (variables["params"], variables["masks"], working)
    )
    assert found.values.dtype == found.transpose.dtype == jnp.bfloat16
    for i in range(2):
        w = CompressedMatrix(params[i], static[i], Pattern(2, 4), 0, (16, 32))
        turned = jax.tree.map(lambda leaf, i=i: leaf[i], found.transpose)
        assert_equal(turned, nm_transpose(w, dtype=jnp.bfloat16))
        np.testing.assert_array_equal(found.values[i], params[i].astype(jnp.bfloat16))
    first = working["first"]["kernel"]
    assert first.transpose is None
    assert first.values.dtype == jnp.bfloat16


def test_only_the_cast_or_only_the_transpose():
    _, variables, layers = parts()
    layers = {("last",): layers["last",]}
    (full,), (cast,), (turned,) = (
        working_copies(variables, layers, **options)["last"].values()
        for options in ({}, {"transpose": False}, {"values": False})
    )
    assert cast.transpose is None
    assert turned.values is None
    assert_equal((cast.values, turned.transpose), tuple(full))


def test_a_dense_layers_copy_is_its_cast():
    layer = SparseDense(8, sparsity=None, dtype=jnp.bfloat16)
    x = normal(1, (5, 16))
    variables = layer.init(jax.random.key(0), x)
    working = working_copies(variables, find_layers(layer.apply, variables, x))

    def gradients(variables, **more):
        def loss(params):
            return layer.apply({"params": params, **more}, x).astype(jnp.float32).sum()

        return jax.value_and_grad(loss)(variables["params"])

    expected = gradients(variables)
    assert_equal(gradients(without_masters(variables, [()]), working=working), expected)


def test_vmap_and_shard_map():
    w = compress(normal(0, (3, 16, 8)), "2:4")
    working = Working(-w.values, nm_transpose(w))
    x = normal(1, (3, 5, 16))

    def product(x, w, working):
        return slope_matmul(x, w, working=working)

    y = jax.jit(jax.vmap(product))(x, w, working)
    np.testing.assert_array_equal(y, -jax.vmap(slope_matmul)(x, w))
    one, copies = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (w, working))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    shared = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(rows, whole, whole),
        out_specs=rows,
    )
    np.testing.assert_array_equal(jax.jit(shared)(x[0], one, copies), -slope_matmul(x[0], one))


W, X = compress(jnp.ones((8, 4)), "2:4"), jnp.ones((3, 8))


@pytest.mark.parametrize(
    ("working", "message"),
    [
        (Working(W.values.astype(jnp.bfloat16)), r"bfloat16\[4, 4\].*float32\[4, 4\]"),
        (Working(W.values[:2]), r"float32\[2, 4\].*working_copies"),
        (Working(None, W), r"\(8, 4\).*nm_transpose.*\(4, 8\)"),
        (Working(None, nm_transpose(W, dtype=jnp.bfloat16)), "bfloat16.*dtype=float32"),
    ],
)
def test_copies_of_something_else_are_named(working, message):
    with pytest.raises(ValueError, match=message):
        slope_matmul(X, W, working=working)


@pytest.mark.parametrize(
    ("working", "message"),
    [
        ({}, "working is a dict; it must be a Working, as slope_jax.working_copies makes"),
        (Working([1.0]), "working.values is a list; it must be an array"),
        (Working(None, jnp.ones((4, 8))), "working.transpose is a .*; it must be a CompressedMat"),
    ],
)
def test_what_are_no_copies_is_named(working, message):
    with pytest.raises(TypeError, match=message):
        slope_matmul(X, W, working=working)


def test_finding_no_layers_is_an_error():
    with pytest.raises(ValueError, match="not one that is jitted"):
        find_layers(lambda x: x, X)
