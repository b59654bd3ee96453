"""Models on meshes of CPU devices: the same numbers as on one, whatever is cut."""

import functools
import importlib
import math
import pathlib
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compress, decompress
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import CompressedMatrix, Pattern, compressed_shapes
from slope_jax import explain, find_layers, models, sharded, sharding, slope_matmul, working_copies
from slope_jax.matmul import Working
from slope_jax.sharding import AXES, COLUMN, FUSED, ROW, WHOLE, leaf_spec
from train.step import loss_sums

DEVICES = 8
MESHES = ((8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2))  # data, fsdp, tensor
SECTIONS = {"fused columns": (128, 64, 64)}


def make_mesh(sizes):
    if jax.device_count() < DEVICES:
        pytest.skip(f"{DEVICES} devices are needed, {jax.device_count()} are there")
    count = math.prod(sizes)
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count]
    )


def put(tree, specs, mesh):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def integers(rng, *shape, low=-3, high=4):
    return jnp.asarray(rng.integers(low, high, shape), jnp.float32)


# One linear, in integers, which float32 adds up exactly in any order


def linear(pattern, sections):
    rng = np.random.default_rng(0)
    inputs, outputs, rank = 256, 256, 8
    kernel = integers(rng, inputs, outputs)
    w = kernel if pattern is None else compress(kernel, pattern)
    arguments = {
        "x": integers(rng, 8, 3, inputs),
        "w": w,
        "bias": integers(rng, outputs),
        "adapter": (integers(rng, inputs, rank, low=-1, high=2), integers(rng, rank, outputs)),
    }
    return arguments, integers(rng, 8, 3, outputs), sections or (outputs,)


def pull(function, arguments, dy):
    """What `function` gives, and the gradients of its arguments."""
    y, back = jax.vjp(function, arguments)
    (gradients,) = back(dy)
    gradients = {
        k: v.values if k == "w" and not isinstance(v, jax.Array) else v
        for k, v in gradients.items()
    }
    return y, gradients


def on_one_device(arguments, dy, activation, backward):
    def dense(a):
        z = a["x"] @ a["w"] + (a["x"] @ a["adapter"][0]) @ a["adapter"][1] + a["bias"][None, None]
        return jax.nn.relu(z)

    def sparse(a):
        return slope_matmul(
            a["x"],
            a["w"],
            bias=a["bias"],
            adapter=a["adapter"],
            activation=activation,
            backward=backward,
        )

    is_sparse = isinstance(arguments["w"], CompressedMatrix)
    return jax.jit(functools.partial(pull, sparse if is_sparse else dense))(arguments, dy)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(2, 8), None], ids=str)
@pytest.mark.parametrize("cut", [WHOLE, COLUMN, FUSED, ROW], ids=lambda cut: cut.name)
@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_a_linear_and_its_gradients_are_exact_on_any_mesh(sizes, cut, pattern):
    sections = SECTIONS.get(cut.name)
    arguments, dy, sections = linear(pattern, sections)
    backward = "exact" if pattern == Pattern(2, 8) else "double-pruned"
    y, gradients = on_one_device(arguments, dy, "relu", backward)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):

        def function(a):
            y = sharded.sharded_matmul(
                a["x"],
                a["w"],
                cut,
                sections=sections,
                bias=a["bias"],
                adapter=a["adapter"],
                activation="relu",
                backward=backward,
            )
            return jnp.concatenate(sharded.split_sections(y, sections), axis=-1)

        ours = jax.jit(functools.partial(pull, function))(arguments, dy)
    np.testing.assert_array_equal(ours[0], y)
    jax.tree.map(np.testing.assert_array_equal, ours[1], gradients)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), None], ids=str)
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_sections_apart_are_exact_on_any_mesh(sizes, adapters, pattern):
    arguments, dy, sections = linear(pattern, SECTIONS[FUSED.name])
    assert len(sections) > 1
    if not adapters:
        arguments["adapter"] = tuple(jnp.zeros_like(a) for a in arguments["adapter"])
    if pattern is None:  # of `on_one_device`, whose result then is not negative
        arguments["bias"] = arguments["bias"] + 2.0**20
    y, gradients = on_one_device(arguments, dy, None, "double-pruned")
    with jax.set_mesh(make_mesh(sizes)):

        def function(a):
            given = {"adapter": a["adapter"]} if adapters else {}
            parts = sharded.sharded_matmul(
                a["x"], a["w"], FUSED, sections=sections, apart=True, bias=a["bias"], **given
            )
            assert [part.shape[-1] for part in parts] == list(sections)
            return jnp.concatenate(parts, axis=-1)

        ours = jax.jit(functools.partial(pull, function))(arguments, dy)
    np.testing.assert_array_equal(ours[0], y)
    for name in ("x", "w", "bias") + (("adapter",) if adapters else ()):
        jax.tree.map(np.testing.assert_array_equal, ours[1][name], gradients[name])


@pytest.mark.parametrize("cut", [WHOLE, FUSED, ROW], ids=lambda cut: cut.name)
def test_working_copies_change_nothing(cut):
    arguments, dy, sections = linear(Pattern(2, 4), SECTIONS.get(cut.name))
    with jax.set_mesh(make_mesh((2, 2, 2))):

        def function(a, copied):
            working = None
            if copied:
                turned = sharded.transposed(a["w"], cut, jnp.float32, None)
                working = Working(a["w"].values, turned)
            return sharded.sharded_matmul(
                a["x"],
                a["w"],
                cut,
                sections=sections,
                working=working,
                bias=a["bias"],
                adapter=a["adapter"],
            )

        with_copies, without = (
            jax.jit(lambda a, dy, c=c: pull(lambda a: function(a, c), a, dy))(arguments, dy)
            for c in (True, False)
        )
    jax.tree.map(np.testing.assert_array_equal, with_copies, without)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    arguments, _, _ = linear(Pattern(2, 4), None)
    with (
        jax.set_mesh(make_mesh((2, 2, 2))),
        pytest.raises(ValueError, match="batch of 6 sequences cannot be shared by the 4 devices"),
    ):
        sharded.sharded_matmul(arguments["x"][:6], arguments["w"], COLUMN)
    narrow = jnp.zeros((64, 64))
    with (
        jax.set_mesh(make_mesh((1, 8, 1))),
        pytest.raises(ValueError, match=r"the input axis has 64, .* in multiples of 32: use fewer"),
    ):
        sharded.sharded_matmul(jnp.zeros((8, 64)), compress(narrow, "2:8"), WHOLE)
    with (
        jax.set_mesh(make_mesh((1, 8, 1))),
        pytest.raises(ValueError, match="sections and activation='relu' are both given"),
    ):
        sharded.sharded_matmul(arguments["x"], arguments["w"], WHOLE, apart=True, activation="relu")
    with pytest.raises(ValueError, match="no mesh with the axes data, fsdp and tensor"):
        sharded.sharded_matmul(arguments["x"], arguments["w"], COLUMN)


# Whole models


SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_layers": 3,
    "max_positions": 32,
    "mlp_size": 128,
}
MODELS = {
    "gpt2-nano": SIZES | {"num_heads": 4, "adapter_rank": 8},
    "llama-nano": SIZES | {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16},
    "bert-tiny": SIZES | {"num_heads": 4, "remat": True},
}


def batch_of(name):
    rng = np.random.default_rng(1)
    draw = lambda high, *shape: rng.integers(0, high, shape).astype(np.int32)  # noqa: E731
    batch = {"input_ids": draw(100, 8, 16)}
    if not name.startswith("bert"):
        return batch | {"labels": draw(100, 8, 16)}
    return batch | {
        "token_type_ids": draw(2, 8, 16),
        "lengths": 8 + draw(9, 8),
        "nsp_labels": draw(2, 8),
        "mlm_positions": draw(8, 8, 4),
        "mlm_labels": draw(100, 8, 4),
        "mlm_weights": draw(2, 8, 4).astype(np.float32),
    }


def loss_and_gradients(model, variables, batch, copies):
    def objective(params):
        used = {**variables, "params": params}
        if copies:
            layers = find_layers(functools.partial(loss_sums, model.apply), used, batch, None)
            used |= {"working": working_copies(used, layers)}
        sums = loss_sums(model.apply, used, batch, None)
        return sums.nll / sums.tokens + sums.nsp_nll

    return jax.value_and_grad(objective)(variables["params"])


@functools.cache
def expected(name):
    model = models.build(name, **MODELS[name])
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    noise = lambda path, x: jax.random.normal(jax.random.key(len(path)), x.shape) / 9  # noqa: E731
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: noise(path, x) if path[-1].key == "adapter_r" else x, variables["params"]
    )
    variables = {"params": params, "masks": variables["masks"]}
    return variables, *jax.jit(lambda v: loss_and_gradients(model, v, batch_of(name), False))(
        variables
    )


@pytest.mark.parametrize(
    ("name", "sizes", "copies"),
    [
        # Cut by fsdp alone, linears are exact above; models are cut by it below.
        *[("gpt2-nano", sizes, sizes == (2, 2, 2)) for sizes in MESHES if sizes != (1, 8, 1)],
        ("llama-nano", (2, 2, 2), True),
        ("bert-tiny", (2, 2, 2), False),
    ],
)
def test_a_model_is_the_same_on_any_mesh(name, sizes, copies):
    model, batch = models.build(name, **MODELS[name]), batch_of(name)
    variables, loss, gradients = expected(name)
    mesh = make_mesh(sizes)
    sharding.check_model(model.config, dict(zip(AXES, sizes, strict=True)))
    with jax.set_mesh(mesh):
        placed = put(variables, sharding.state_specs(variables), mesh)
        placed_batch = {
            k: jax.device_put(x, NamedSharding(mesh, sharding.batch_spec(x.ndim)))
            for k, x in batch.items()
        }
        compiled = jax.jit(lambda v, b: loss_and_gradients(model, v, b, copies))
        our_loss, ours = compiled(placed, placed_batch)
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    flat = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, a), b in zip(flat, jax.tree.leaves(ours), strict=True):
        scale = float(jnp.abs(a).max())
        where = jax.tree_util.keystr(path)
        assert float(jnp.abs(np.asarray(a) - np.asarray(b)).max()) <= 1e-5 * scale, where


def test_the_masks_of_a_mesh_are_those_of_one_device():
    model = models.build("gpt2-nano", **MODELS["gpt2-nano"])
    variables, *_ = expected("gpt2-nano")
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        init = functools.partial(model.init, **model.example_inputs())
        shapes = jax.eval_shape(init, jax.random.key(0))
        made = jax.jit(init, out_shardings=sharding.state_specs(shapes))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, made["masks"], variables["masks"])
    kernel = made["params"]["layers_1_to_2"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")


# The table of rules


@pytest.mark.parametrize("name", ["bert-base", "gpt2-small", "opt-125m", "llama-3-8b"])
def test_every_matrix_of_a_state_is_cut(name):
    model = models.build(name, adapter_rank=16)
    variables = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    for path, leaf in leaves:
        names = tuple(key.key for key in path)
        spec = leaf_spec(names, len(leaf.shape))
        matrix = names[-1] in ("kernel", "embedding", "adapter_l", "adapter_r")
        assert any(axis is not None and "fsdp" in axis for axis in spec) == matrix, (names, spec)


@st.composite
def kernels(draw):
    pattern = draw(st.sampled_from([Pattern(1, 2), Pattern(2, 4), Pattern(1, 4), Pattern(2, 8)]))
    cut = draw(st.sampled_from([WHOLE, COLUMN, FUSED, ROW]))
    sizes = {axis: draw(st.sampled_from([1, 2, 4])) for axis in AXES}
    unit = sharding.granule(pattern)
    shape = []
    for axes in (cut.inputs, cut.outputs):
        devices = math.prod(sizes[axis] for axis in axes)
        shape.append(devices * unit * draw(st.integers(1, 2)))
    return pattern, cut, sizes, tuple(shape), draw(st.integers(0, 99))


@hypothesis.given(kernels())
@hypothesis.settings(max_examples=6)
def test_the_piece_of_a_device_is_a_compressed_matrix_itself(drawn):
    pattern, cut, sizes, shape, seed = drawn
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    w = compress(jnp.asarray(kernel), pattern)
    whole = np.asarray(decompress(w))
    rows, columns = (math.prod(sizes[axis] for axis in axes) for axes in (cut.inputs, cut.outputs))
    own = (shape[0] // rows, shape[1] // columns)
    for i in {0, rows - 1}:
        for j in {0, columns - 1}:
            values, metadata = (
                np.split(np.split(np.asarray(x), rows, 0)[i], columns, 1)[j]
                for x in (w.values, w.metadata)
            )
            assert (values.shape, metadata.shape) == tuple(compressed_shapes(own, pattern))
            piece = CompressedMatrix(jnp.asarray(values), jnp.asarray(metadata), pattern, 0, own)
            here = whole[i * own[0] : (i + 1) * own[0], j * own[1] : (j + 1) * own[1]]
            np.testing.assert_array_equal(decompress(piece), here)


@pytest.mark.parametrize(
    ("overrides", "sizes", "message"),
    [
        ({"num_heads": 4}, {"tensor": 8}, "num_heads has 4, which tensor 8 = 8 devices cannot cut"),
        ({"num_heads": 4}, {"fsdp": 3}, "the input axis has 64, which fsdp 3 = 3 devices"),
        ({"num_heads": 4, "sparsity": "2:8"}, {"fsdp": 8}, "in multiples of 32"),
        ({"num_heads": 4, "adapter_rank": 4}, {"fsdp": 3}, "adapter_l the input axis has 64"),
    ],
)
def test_a_mesh_that_does_not_divide_a_model_is_refused(overrides, sizes, message):
    config = models.variant_config("gpt2-nano", **(SIZES | overrides))
    with pytest.raises(ValueError, match="does not divide this model") as caught:
        sharding.check_model(config, sizes)
    assert message in str(caught.value)
    assert "Use fewer devices along these axes" in str(caught.value)


def test_explain_says_what_a_device_multiplies(monkeypatch):
    model = models.build("gpt2-nano", **MODELS["gpt2-nano"])
    variables = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    module = importlib.import_module("slope_jax.explain")
    choose, seen = module.choose, set()

    def noting(query, implementation):
        seen.add((query.op, query.shape, query.tokens))
        return choose(query, implementation)

    monkeypatch.setattr(module, "choose", noting)
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        explain(model, variables, **model.example_inputs(8, 16))
    assert {tokens for _, _, tokens in seen} == {8 * 16 // 4}
    assert ("nm_matmul", (64, 128 // 2), 32) in seen  # up: half the columns
    assert ("nm_matmul", (128 // 2, 64), 32) in seen  # down: half the rows, and the dx of up
    assert all(128 not in shape for _, shape, _ in seen)


def test_the_snippet_of_the_page_makes_a_model_on_a_mesh():
    page = pathlib.Path(__file__).resolve().parents[1] / "docs" / "devices.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["variables"]["params"]["norm"]["scale"].sharding.mesh == names["mesh"]
    kernel = names["variables"]["params"]["layers_0"]["mlp"]["up"]["kernel"]
    rows, columns = kernel.shape
    assert kernel.sharding.shard_shape(kernel.shape) == (rows // DEVICES, columns)


def test_a_batch_is_needed_and_axes_of_no_types():
    layer, x = models.layers.SparseDense(8), jnp.ones((4, 16))
    variables = layer.init(jax.random.key(0), x)
    devices = jax.devices()[:1]
    auto, explicit = (
        jax.make_mesh((1, 1, 1), AXES, axis_types=(kind,) * 3, devices=devices)
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    with (
        jax.set_mesh(auto),
        pytest.raises(ValueError, match=r"shape \(16,\); on a mesh .* x\[None\]"),
    ):
        layer.apply(variables, x[0])
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="are Explicit; make it with"):
        layer.apply(variables, x)


@pytest.mark.parametrize("masked", [False, True])
def test_compress_has_a_gradient_where_the_weight_differs_by_device(masked):
    """Of a weight that each device gathers, and selects from by itself: that on one device."""
    mesh = make_mesh((8, 1, 1))
    rng = np.random.default_rng(0)
    w, x = integers(rng, 32, 8, low=1, high=60), integers(rng, 16, 32)
    mask = jnp.arange(32)[:, None] % 4 < jnp.array([[1, 2] * 4]) if masked else None

    def loss(w, mask, x):
        return (x @ decompress(compress(w, "2:4", mask=mask))).sum()

    def shared(piece, mask, x):
        whole = jax.lax.all_gather(piece, "data", axis=0, tiled=True)
        some = None if mask is None else jax.lax.all_gather(mask, "data", axis=0, tiled=True)
        return jax.lax.psum(loss(whole, some, x), "data")

    cut = PartitionSpec("data")
    spread = jax.shard_map(
        shared, mesh=mesh, in_specs=(cut, cut if masked else None, cut), out_specs=PartitionSpec()
    )
    found = jax.jit(jax.grad(spread))(w, mask, x)
    np.testing.assert_array_equal(found, jax.jit(jax.grad(loss))(w, mask, x))


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_dense_products_are_of_any_dtype(dtype):
    with jax.set_mesh(make_mesh((8, 1, 1))), jax.enable_x64(True):
        x, w = jnp.ones((8, 16), dtype), jnp.ones((16, 8), dtype)
        y = sharded.sharded_matmul(x, w, COLUMN)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, np.full((8, 8), 16))
        with pytest.raises(TypeError, match="x is a list; it must be an array"):
            sharded.sharded_matmul([[1.0] * 16], w, COLUMN)
