"""Models that are called with more than arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from slope_jax import SparseDense, TrainState, add_adapters, explain, lazy_adapters, memory
from slope_jax.inputs import eval_shape
from slope_jax.sharding import AXES
from slope_jax.working import find_layers, working_copies


class Choosy(nn.Module):
    """Decides in Python by what it is called with."""

    adapter_rank: int = 0

    @nn.compact
    def __call__(self, x, width, *, deterministic, name=None):
        if not deterministic:
            x = nn.Dropout(0.5, deterministic=deterministic)(x)
        for i in range(width):
            x = SparseDense(16, adapter_rank=self.adapter_rank, name=f"{name or 'layer'}_{i}")(x)
        return x


@pytest.fixture
def variables():
    return Choosy().init(jax.random.key(0), jnp.ones((2, 16)), 3, deterministic=True)


def test_python_values_decide(variables):
    x = jnp.ones((2, 16))
    rows = explain(Choosy(), variables, x, 3, deterministic=True).rows
    assert [row.path for row in rows] == ["layer_0", "layer_1", "layer_2"]
    assert len(explain(Choosy(), variables, x, 2, deterministic=True).rows) == 2
    layers = find_layers(Choosy().apply, variables, x, 3, deterministic=True)
    assert set(layers) == {("layer_0",), ("layer_1",), ("layer_2",)}
    assert set(working_copies(variables, layers)) == {"layer_0", "layer_1", "layer_2"}


def test_memory_counts_what_is_called(variables):
    x = jnp.ones((2, 16))
    count = memory(Choosy(), variables, optax.sgd(1.0), x, 3, activations=True, deterministic=True)
    values, metadata, biases = 3 * 16 * 8 * 4, 3 * 16 * 2, 3 * 16 * 4
    assert count.total("parameters") + count.total("metadata") == values + metadata + biases
    assert count.total("activations")


def test_adapters_join_such_models(variables):
    state = TrainState.create(
        apply_fn=Choosy().apply, tx=lazy_adapters(optax.sgd(1.0)), **variables
    )
    new = Choosy(adapter_rank=4)
    _, count = add_adapters(
        state, new, jax.random.key(1), jnp.ones((2, 16)), 3, deterministic=True, name="layer"
    )
    assert count == 3


def test_arrays_alone_are_traced():
    seen = []

    def function(x, flag, *, rate):
        seen.append((isinstance(x, jax.core.Tracer), flag, rate))
        return x[:, :2]

    for _ in range(2):
        assert eval_shape(function, jnp.ones((3, 4)), True, rate=0.5).shape == (3, 2)
    assert eval_shape(function, jax.ShapeDtypeStruct((3, 4), "float32"), None, rate="a").shape == (
        3,
        2,
    )
    assert seen == [(True, True, 0.5), (True, True, 0.5), (True, None, "a")]


@pytest.mark.parametrize("given", [np.float32, np.int64(2), np.True_, np.dtype("float32")])
def test_what_numpy_names_and_counts_by_is_no_array(given):
    seen = []
    eval_shape(
        lambda x, **kwargs: seen.append(kwargs["function"]) or x, jnp.ones(3), function=given
    )
    assert seen[0] is given


class Stack(nn.Module):
    """Layers whose kernels have names for their axes, scanned."""

    adapter_rank: int = 0

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))

        def body(module, x, _):
            layer = SparseDense(16, kernel_init=init, adapter_rank=self.adapter_rank, name="up")
            return layer(x), None

        axes = {"params": 0, "masks": 0}
        named = {nn.PARTITION_NAME: "layers"}
        split = {"params": True}
        scan = nn.scan(body, variable_axes=axes, split_rngs=split, length=3, metadata_params=named)
        return scan(self, x, None)[0]


def test_names_of_axes_are_those_of_values_and_metadata():
    x = jnp.ones((2, 16))
    variables = Stack().init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)
    for collection in ("params", "masks"):
        assert specs[collection]["up"]["kernel"] == PartitionSpec("layers", "embed", "mlp")
    plain = nn.unbox(variables)
    assert jax.tree.map(jnp.shape, plain["masks"]) == {"up": {"kernel": (3, 2, 16)}}
    assert jnp.array_equal(Stack().apply(variables, x), Stack().apply(plain, x))

    def loss(params, masks):
        return Stack().apply({"params": params, "masks": masks}, x).sum()

    named, bare = (jax.grad(loss)(v["params"], v["masks"]) for v in (variables, plain))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nn.unbox(named), bare))


def test_boxes_are_opened_or_named():
    x, model, tx = jnp.ones((2, 16)), Stack(), lazy_adapters(optax.adam(1e-3))
    boxed = model.init(jax.random.key(0), x)
    plain = nn.unbox(boxed)
    assert explain(model, boxed, x) == explain(model, plain, x)
    assert memory(model, boxed, tx, x) == memory(model, plain, tx, x)
    layers = find_layers(model.apply, boxed, x)
    assert layers == find_layers(model.apply, plain, x)
    copies = (working_copies(variables, layers) for variables in (boxed, plain))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *copies))
    new = Stack(adapter_rank=4)
    state = TrainState.create(apply_fn=model.apply, tx=tx, **plain)
    assert add_adapters(state, new, jax.random.key(1), x)[1] == 3
    state = TrainState.create(apply_fn=model.apply, tx=tx, **boxed)
    with pytest.raises(ValueError, match=r"flax\.linen\.unbox"):
        add_adapters(state, new, jax.random.key(1), x)


@pytest.mark.parametrize("logical", [False, True])
def test_names_of_axes_may_be_those_of_the_mesh(logical):
    x, tx = jnp.ones((4, 64)), lazy_adapters(optax.adam(1e-3))
    named = nn.with_logical_partitioning if logical else nn.with_partitioning
    names = ("embed", "mlp") if logical else ("fsdp", "tensor")
    layer = SparseDense(32, kernel_init=named(nn.initializers.lecun_normal(), names))
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    rules = (("embed", "fsdp"), ("mlp", "tensor"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        made = jax.jit(layer.init)(jax.random.key(0), x)
        plain = jax.eval_shape(SparseDense(32).init, jax.random.key(0), x)
        for variables in (shapes, made):
            assert explain(layer, variables, x) == explain(SparseDense(32), plain, x)
            assert memory(layer, variables, tx, x) == memory(SparseDense(32), plain, tx, x)
        layers = find_layers(layer.apply, made, x)
        assert working_copies(made, layers)["kernel"].transpose.shape == (32, 64)
