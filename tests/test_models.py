"""What the models share: configuration, names, stacks, counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pallas_kernels import CompressedMatrix, Pattern, decompress
from slope_jax import models
from slope_jax.models import layers
from slope_jax.policy import SparsityPolicy

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SMALL = {
    "hidden_size": 32,
    "num_heads": 4,
    "mlp_size": 64,
    "num_layers": 4,
    "vocab_size": 61,
    "max_positions": 16,
}
# One scanned stack of sparse layers and nothing else: what compiles fastest.
ONE_STACK = {"num_layers": 2, "sparsity": "layers/.*=2:4; .*=dense"}
FAMILIES = ("bert-tiny", "gpt2-nano")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)


def small(name, **overrides):
    return models.build(name, **(SMALL | overrides))


def init(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), **model.example_inputs())


def zeros(model):
    """Variables in the right shapes, without compiling anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def logits(output):
    return output.mlm_logits if isinstance(output, models.BertOutput) else output


def apply(model, variables, **kwargs):
    return logits(jax.jit(lambda v: model.apply(v, IDS, **kwargs))(variables))


def relative(a, b):
    return np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))


def densified(variables, config):
    """The same weights as a model without sparsity holds them."""
    flat = traverse_util.flatten_dict(models.unstack_layers(variables)["params"])
    masks = traverse_util.flatten_dict(models.unstack_layers(variables)["masks"])
    for path, metadata in masks.items():
        pattern = Pattern.parse(config.patterns["/".join(path[:-1]).replace("_", "/", 1)])
        rows = flat[path].shape[0] * pattern.m // pattern.n
        shape = (rows, flat[path].shape[1])
        flat[path] = decompress(CompressedMatrix(flat[path], metadata, pattern, 0, shape))
    dense = dataclasses.replace(config, sparsity="dense")
    return models.stack_layers({"params": traverse_util.unflatten_dict(flat)}, dense)


# Names, counts, configuration


def test_every_linear_is_accounted_for():
    """The table of paths against the kernels that a model really creates."""
    for name in FAMILIES:
        model = small(name, scan=False, sparsity="dense")
        shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
        kernels = {
            "/".join(path[:-1]).replace("layers_", "layers/"): leaf.shape
            for path, leaf in traverse_util.flatten_dict(shapes["params"]).items()
            if path[-1] == "kernel"
        }
        untied = [linear for linear in model.config.linears if not linear.tied]
        assert kernels == {x.path: (x.in_features, x.out_features) for x in untied}
        assert list(model.config.patterns) == [x.path for x in model.config.linears]


def closed_formula(config, bert):
    """Parameters of the dense models, with the true vocabulary."""
    h, layers, positions = config.hidden_size, config.num_layers, config.max_positions
    total = config.vocab_size * h + positions * h + layers * (12 * h * h + 13 * h)
    if not bert:
        return total + 2 * h
    heads = (h * h + h) + (h * h + h + 2 * h + config.vocab_size) + (2 * h + 2)
    return total + 2 * h + 2 * h + heads


# Counted by Transformers for BertForPreTraining and GPT2LMHeadModel of these sizes.
PUBLISHED = {
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize(
    "name", [name for name in models.VARIANTS if name.startswith(("bert", "gpt2"))]
)
def test_parameter_counts(name):
    bert = name.startswith("bert")
    config = models.build(name).config
    expected = closed_formula(config, bert)
    assert PUBLISHED.get(name, expected) == expected
    padded = (config.padded_vocab_size - config.vocab_size) * (config.hidden_size + bert)
    assert models.count_parameters(models.build(name, sparsity="dense")) == expected + padded
    pruned = 12 * config.hidden_size**2 * config.num_layers - 3 * config.hidden_size**2
    assert models.count_parameters(models.build(name)) == expected + padded - pruned // 2
    if name in ("bert-large", "gpt2-xl"):
        rank, h = round(0.0156 * config.hidden_size), config.hidden_size
        sides = config.num_layers * (4 * h + 2 * h + 5 * h + 5 * h) - 4 * h
        with_adapters = models.count_parameters(models.build(name, adapter_rank=0.0156))
        assert with_adapters == expected + padded - pruned // 2 + rank * sides


def test_mixed_policy_shapes():
    for name in FAMILIES:
        model = small(name, sparsity="2:4,2:8", adapter_rank=0.1)
        assert model.config.rank == 3  # 0.1 of 32, to the nearest integer
        shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
        params = jax.tree.map(lambda leaf: leaf.shape, shapes["params"])
        stacks = [s.name for s in model.config.segments]
        assert stacks == ["layers_0", "layers_1", "layers_2_to_3"]
        assert params["layers_0"]["attention"]["qkv"] == {"kernel": (32, 96), "bias": (96,)}
        assert params["layers_1"]["attention"]["qkv"] == {
            "kernel": (16, 96),
            "bias": (96,),
            "adapter_l": (32, 3),
            "adapter_r": (3, 96),
        }
        assert params["layers_2_to_3"]["attention"]["qkv"]["kernel"] == (2, 8, 96)
        assert params["layers_2_to_3"]["mlp"]["down"]["kernel"] == (2, 16, 32)
        # Positions in groups of 8 take 3 bits: 8 survivors are 3 bytes.
        metadata = shapes["masks"]["layers_2_to_3"]["attention"]["qkv"]["kernel"]
        assert (metadata.shape, metadata.dtype) == ((2, 3, 96), jnp.uint8)
        assert "qkv" not in shapes["masks"]["layers_0"]["attention"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "hidden_size=32 is not a multiple of num_heads=5"),
        ({"num_layers": 0}, "num_layers=0 must be a positive integer"),
        ({"vocab_size": 61.0}, "vocab_size=61.0 must be a positive integer"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"remat": "dots"}, "remat='dots'; choose"),
        ({"dtype": "int8"}, "dtype='int8'; choose one of float32"),
        ({"param_dtype": "half"}, None),
        ({"attention": "flash"}, "attention='flash'; choose"),
        ({"adapter_rank": -1}, "adapter_rank=-1 must"),
        ({"adapter_rank": 2.5}, "adapter_rank=2.5 must"),
        ({"adapter_rank": 33}, "33 columns, more than layers/0/attention/output of 32 x 32"),
        ({"adapter_rank": 4, "sparsity": "dense"}, "nothing is pruned"),
        ({"sparsity": "2:5"}, "the input of layers/0/attention/output has 32 entries.*5"),
        ({"sparsity": r".*=2:4"}, "is tied to the token embedding"),
        ({"sparsity": r"layers/0/.*=2:4"}, "no sparsity rule matches layers/1/attention/qkv"),
        ({"hidden": 32}, "no field 'hidden'.*did you mean 'hidden_size'"),
    ],
)
def test_bad_configuration(overrides, message):
    if message is None:
        assert small("gpt2-nano", **overrides).config.param_dtype == jnp.float16
        return
    with pytest.raises(ValueError, match=message):
        small("gpt2-nano", **overrides)


def test_output_size_must_divide_too():
    with pytest.raises(ValueError, match="the output of nsp has 2 entries"):
        small("bert-tiny", sparsity="nsp=2:4; .*=dense")


def test_unknown_model_lists_the_choices():
    with pytest.raises(ValueError, match=r"did you mean 'bert-base'.*gpt2-xl"):
        models.build("bert_base")


def test_a_resolved_configuration_can_be_changed():
    config = small("gpt2-nano").config
    assert dataclasses.replace(config, num_layers=6).segments[-1].stop == 6
    assert hash(config) == hash(small("gpt2-nano").config)
    assert config.sparsity == SparsityPolicy.uniform("2:4")


def test_each_variant_builds_a_model_of_its_family():
    """A name that two families give stands for one model only: it appears twice here."""
    families = {
        "bert": models.Bert,
        "gpt2": models.GPT2,
        "opt": models.OPT,
        "llama": models.Llama,
        "mistral": models.Llama,
    }
    assert len(set(models.VARIANTS)) == len(models.VARIANTS)
    assert {name.partition("-")[0] for name in models.VARIANTS} == set(families)
    for name in models.VARIANTS:
        model = models.build(name)
        assert type(model) is families[name.partition("-")[0]], name
        assert model.config.head_width % 8 == 0, name


# Stacks


@pytest.mark.parametrize("name", FAMILIES)
def test_scan_is_the_unrolled_model(name):
    options = {"num_layers": 3, "sparsity": "1:2", "adapter_rank": 2}
    model, unrolled = (small(name, scan=scan, **options) for scan in (True, False))
    variables = init(model)
    # Adapters are born without effect; here they must have one.
    variables = jax.tree.map(lambda a: a + 0.01 if a.dtype == jnp.float32 else a, variables)
    single = models.unstack_layers(variables)
    assert "layers_2" in single["masks"]
    shapes = jax.eval_shape(unrolled.init, jax.random.key(0), **model.example_inputs())
    assert jax.tree.map(jnp.shape, single) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(
        apply(model, variables), apply(unrolled, single), rtol=1e-5, atol=1e-5
    )
    again = models.stack_layers(single, model.config)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_stack_layers_of_another_depth():
    single = models.unstack_layers(zeros(small("gpt2-nano")))
    with pytest.raises(ValueError, match=r"hold layers_3, but the model has 3 layers"):
        models.stack_layers(single, small("gpt2-nano", num_layers=3).config)
    with pytest.raises(ValueError, match=r"only some of layers_1 .. layers_5"):
        models.stack_layers(single, small("gpt2-nano", num_layers=6).config)


def test_stacked_layers_are_born_different():
    variables = init(small("gpt2-nano", mask_init="random"))

    def up(tree):
        return np.asarray(tree["layers_1_to_3"]["mlp"]["up"]["kernel"])

    for kernel in (up(variables["params"]), up(variables["masks"])):
        assert kernel.shape[0] == 3
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (kernel[a] != kernel[b]).mean() > 0.5


def test_remat_does_not_change_gradients():
    """Dropout is on: the recomputed layers must draw the same numbers."""
    variables = init(small("gpt2-nano", **ONE_STACK))

    def gradients(remat):
        model = small("gpt2-nano", remat=remat, **ONE_STACK)

        def loss(params):
            out = model.apply(
                variables | {"params": params},
                IDS,
                deterministic=False,
                rngs={"dropout": jax.random.key(1)},
            )
            return jnp.square(out[..., :61]).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    expected = gradients(False)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3
    for remat in (True, "dots_with_no_batch_dims_saveable"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8),
            gradients(remat),
            expected,
        )


@pytest.mark.parametrize(
    ("name", "mlp"), [("gpt2-nano", [64, 64]), ("llama-nano", [64, 128])], ids=["gpt2", "llama"]
)
@pytest.mark.parametrize("deterministic", [True, False], ids=["evaluated", "trained"])
def test_what_the_backward_pass_keeps(name, mlp, deterministic):
    """Widths of what a layer keeps for every token, all in the compute dtype.

    Of norms two moments of a row in float32 are kept, of LLaMA's one.
    """

    def widths(remat):
        overrides = ONE_STACK | ({"num_kv_heads": 2} if name.startswith("llama") else {})
        model = small(name, dtype="bfloat16", remat=remat, dropout=0.0, **overrides)
        variables = dict(zeros(model))

        def residuals(params):
            call = functools.partial(model.apply, deterministic=deterministic)
            return jax.vjp(lambda p: call(variables | {"params": p}, IDS), params)[1]

        kept = jax.tree.leaves(jax.eval_shape(residuals, variables["params"]))
        shapes = [(tuple(n for n in leaf.shape if n > 1), leaf.dtype.name) for leaf in kept]
        of_tokens = [
            (shape[3], dtype)
            for shape, dtype in shapes
            if shape[:3] == (2, *IDS.shape) and len(shape) == 4
        ]
        assert {dtype for _, dtype in of_tokens} == {"bfloat16"}
        moments = [shape for shape in shapes if shape == ((2, *IDS.shape), "float32")]
        each = 1 if name.startswith("llama") else 2
        assert len(moments) == (0 if remat else 2 * each)
        return sorted(width for width, _ in of_tokens)

    qkv = [32, 16, 16] if name.startswith("llama") else [32] * 3
    assert widths(True) == [32]
    # In GPT-2 the first product of the MLP contains its activation.
    up = [128] if name.startswith("llama") else []
    assert widths("linears_saveable") == sorted([32, 32, *qkv, *up])
    # Queries, keys and values are kept by heads; twice the residual, twice its norm, the mixture.
    assert widths(False) == sorted([*[32] * 5, *mlp])


# Sparsity and precision


@pytest.mark.parametrize("name", FAMILIES)
def test_sparse_equals_dense_of_the_same_weights(name):
    """In float32 to rounding; in bfloat16 at most twice as far from float32 as the dense model."""
    mixed = ONE_STACK if name.startswith("bert") else {"num_layers": 2, "sparsity": "2:4,2:8"}
    model = small(name, **mixed)
    variables = init(model)
    dense = small(name, num_layers=2, sparsity="dense")
    dense_variables = densified(variables, model.config)
    expected = apply(dense, dense_variables)[..., :61]
    np.testing.assert_allclose(apply(model, variables)[..., :61], expected, rtol=1e-4, atol=1e-5)

    half = apply(small(name, dtype="bfloat16", **mixed), variables)[..., :61]
    dense = small(name, num_layers=2, sparsity="dense", dtype="bfloat16")
    dense_half = apply(dense, dense_variables)[..., :61]
    assert half.dtype == jnp.bfloat16
    assert np.isfinite(np.float32(half)).all()
    assert 0 < relative(half, expected) <= 2 * relative(dense_half, expected)


def test_half_precision_gradients_are_float32_and_close():
    name = "gpt2-nano"
    variables = init(small(name, **ONE_STACK))

    def gradients(dtype):
        model = small(name, dtype=dtype, **ONE_STACK)

        def loss(params):
            out = logits(model.apply(variables | {"params": params}, IDS))[..., :61]
            return jnp.square(out.astype(jnp.float32)).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    expected, got = gradients("float32"), gradients("bfloat16")
    flat = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (got, expected)]
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    # 8 bits of mantissa over two layers of products: within 2^-8 times a dozen roundings.
    assert relative(*flat) < 12 * 2**-8


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_vocabulary_takes_no_probability_and_no_gradient(name):
    model = small(name, num_layers=1, sparsity="dense")
    variables = init(model)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        probabilities = jax.nn.softmax(logits(model.apply({"params": params}, IDS)))
        leak = probabilities[..., 61:].sum()
        return jnp.where(leak > 0, jnp.inf, -jnp.log(probabilities[..., 3]).mean())

    value, grad = loss(variables["params"])
    grad = np.asarray(grad["embeddings"]["token"]["embedding"])
    assert model.config.padded_vocab_size == grad.shape[0] == 64
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert (grad[61:] == 0).all()
    assert (np.abs(grad[:61]).max(axis=1) > 0).all()


def test_gradients_of_a_frequent_token_add_up():
    """In bfloat16, 256 + 1 is 256."""
    config = small("gpt2-nano", dtype="bfloat16").config
    table = layers.embedding(config, 8, None)
    ids = jnp.zeros((2, 500), jnp.int32)
    params = table.init(jax.random.key(0), ids)
    grad = jax.grad(lambda p: table.apply(p, ids).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(grad["params"]["embedding"][:2, 0], [1000, 0])


def test_norm_is_float32_in_any_dtype():
    config = small("gpt2-nano", dtype="bfloat16").config
    x = jnp.asarray(np.random.default_rng(0).normal(300, 2, (4, 32)), jnp.bfloat16)
    norm = layers.norm(config, None)
    got = norm.apply(norm.init(jax.random.key(0), x), x)
    exact = np.float64(x)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(
        exact.var(-1, keepdims=True) + config.norm_epsilon
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(got), np.float32(jnp.asarray(exact, jnp.bfloat16)))


@pytest.mark.parametrize("name", FAMILIES)
def test_initialisation(name):
    model = small(name, hidden_size=128, mlp_size=512, num_layers=2, sparsity="dense", scan=False)
    params = init(model)["params"]
    residual = 0.02 / np.sqrt(2 * 2) if name.startswith("gpt2") else 0.02
    for layer in ("layers_0", "layers_1"):
        std = {
            f"{a}/{b}": leaf["kernel"].std()
            for a in ("attention", "mlp")
            for b, leaf in params[layer][a].items()
        }
        expected = {
            "attention/qkv": 0.02,
            "attention/output": residual,
            "mlp/up": 0.02,
            "mlp/down": residual,
        }
        for path, value in expected.items():
            assert std[path] == pytest.approx(value, rel=0.03), path
    for table in ("token", "position"):
        assert params["embeddings"][table]["embedding"].std() == pytest.approx(0.02, rel=0.06)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout(name):
    dense = {"num_layers": 2, "sparsity": "dense"}
    model = small(name, dropout=0.5, **dense)
    variables = init(model)
    run = jax.jit(
        lambda key: logits(model.apply(variables, IDS, deterministic=False, rngs={"dropout": key}))
    )
    a, b, again = (run(jax.random.key(k)) for k in (1, 2, 1))
    np.testing.assert_array_equal(a, again)
    assert relative(a[..., :61], b[..., :61]) > 0.1
    plain = small(name, dropout=0.0, **dense)
    np.testing.assert_array_equal(
        apply(plain, variables, deterministic=False), apply(plain, variables)
    )


# Inputs


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            jnp.zeros((1, 17), jnp.int32),
            r"17 tokens is longer than max_positions=16.*max_positions=17",
        ),
        (jnp.zeros((4,), jnp.int32), r"input_ids are int32\[4\]"),
        (jnp.zeros((1, 4)), r"input_ids are float32\[1, 4\]"),
    ],
)
def test_bad_input(ids, message):
    for name in FAMILIES:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(small(name).init, jax.random.key(0), ids)
