"""The account of memory against formulas, and against what XLA says of a compiled step."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from slope_jax import Memory, SparseDense, TrainState, lazy_adapters, memory, models
from slope_jax.generate import inference_variables

VOCAB, POSITIONS, LAYERS, HIDDEN = 64, 32, 4, 128
ALL = 12 * HIDDEN**2 * LAYERS  # entries of the layers' kernels
PRUNED = ALL - 3 * HIDDEN**2  # the first qkv stays dense
BIASES = LAYERS * 9 * HIDDEN
NORMS = (2 * LAYERS + 1) * 2 * HIDDEN
TABLES = (VOCAB + POSITIONS) * HIDDEN


def gpt2(**overrides):
    return models.build("gpt2-nano", vocab_size=VOCAB, max_positions=POSITIONS, **overrides)


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())


def account(model, tx=None, activations=False, **options) -> Memory:
    return memory(model, shapes_of(model), tx, activations=activations, **options)


def test_every_item_is_its_bytes_per_weight():
    found = account(gpt2(), optax.adamw(1e-3))
    for kind in ("parameters", "gradients", "mu", "nu"):  # float32, half of the pruned entries
        assert found.total(kind, "pruned kernels") == 2 * PRUNED
        assert found.dense_total(kind, "pruned kernels") == 4 * PRUNED
        for part, count in (
            ("dense kernels", ALL - PRUNED),
            ("embeddings", TABLES),
            ("biases", BIASES),
            ("norms", NORMS),
        ):
            assert found.total(kind, part) == found.dense_total(kind, part) == 4 * count
    assert found.total("metadata") == PRUNED // 8
    assert found.dense_total("metadata") == 0
    assert found.total("optimizer counters") == 4
    assert found.total("transposed copies") == 12 * HIDDEN**2 // 8 * (16 + 1)  # of one layer


@pytest.mark.parametrize("rank", [0, 8])
def test_copies_of_all_layers_are_held_for_many_micro_batches(rank):
    model = gpt2(dtype=jnp.bfloat16, adapter_rank=rank)
    found = account(model, optax.adamw(1e-3), accumulation=2)
    assert found.total("cast copies") == PRUNED + 2 * (ALL - PRUNED)
    assert found.dense_total("cast copies") == 2 * ALL
    assert found.total("transposed copies") == PRUNED + PRUNED // 8
    sizes = ((1, 3), (1, 1), (1, 4), (4, 1))  # of the linears, in hidden sizes
    per_layer = sum(HIDDEN * (i + o) * rank for i, o in sizes)
    assert found.total("mu", "adapters") == 4 * (LAYERS * per_layer - 4 * HIDDEN * rank)
    assert found.dense_total("mu", "adapters") == 0


def test_one_micro_batch_holds_the_copies_of_one_layer():
    found = account(gpt2(dtype=jnp.bfloat16), optax.adamw(1e-3))
    assert found.total("cast copies") == 12 * HIDDEN**2
    assert found.total("transposed copies") == 12 * HIDDEN**2 * 9 // 8
    assert found.dense_total("cast copies") == 2 * 12 * HIDDEN**2


class Two(nn.Module):
    sparsity: str | None = "2:4"

    @nn.compact
    def __call__(self, x):
        return SparseDense(16, sparsity=self.sparsity)(SparseDense(32, sparsity=self.sparsity)(x))


def test_xla_says_the_same_of_the_arguments_of_a_step():
    model, x = Two(), jax.ShapeDtypeStruct((10, 8), jnp.float32)
    tx = optax.chain(lazy_adapters(optax.scale_by_adam()), optax.scale(-1e-3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    state = jax.eval_shape(lambda v: TrainState.create(apply_fn=model.apply, tx=tx, **v), variables)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x):
        def loss(params):
            return jnp.mean(state.apply_fn({"params": params, "masks": state.masks}, x) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    analysis = step.lower(state, x).compile().memory_analysis()
    found = memory(model, variables, tx, x)
    kinds = ("parameters", "metadata", "mu", "nu", "optimizer counters")
    given = sum(found.total(kind) for kind in kinds)
    assert analysis.argument_size_in_bytes == given + 4 + 10 * 8 * 4  # step counter and x


def test_activations_are_what_a_forward_pass_saves():
    model, x = Two(), jax.ShapeDtypeStruct((10, 8), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = memory(model, variables, optax.sgd(1.0), x, dense=Two(None))
    saved = 4 * 10 * (32 + 16)  # what enters the second layer, and the output
    assert found.total("activations") == found.dense_total("activations") == saved
    assert found.dense_total("parameters") == 4 * (8 * 32 + 32 * 16 + 32 + 16)
    alone = memory(model, variables, optax.sgd(1.0), x)
    assert alone.ratio is None
    assert alone.total() == found.total()
    assert memory(model, variables, optax.sgd(1.0), x, activations=False).rows == alone.state
    assert "-" in str(alone)


def test_rematerialised_layers_save_their_inputs_alone():
    ids = jax.ShapeDtypeStruct((2, POSITIONS), jnp.int32)
    four, three = (
        account(gpt2(remat=True, num_layers=depth), optax.sgd(1.0), True, input_ids=ids)
        for depth in (4, 3)
    )
    inputs = 4 * 2 * POSITIONS * HIDDEN
    assert four.total("activations") - three.total("activations") == inputs


def test_any_optimizer_is_itemised_by_its_own_names():
    found = account(gpt2(num_layers=2), optax.adam(1e-3, mu_dtype=jnp.bfloat16))
    assert 2 * found.total("mu") == found.total("nu") == found.total("parameters")
    found = account(gpt2(num_layers=2), optax.sgd(1e-3, momentum=0.9))
    assert found.total("trace") == found.total("parameters")
    assert found.total("mu") == 0


def test_state_of_the_largest_model_is_worked_out_from_shapes():
    model = models.build("opt-66b", remat=True, dtype=jnp.bfloat16)
    found = account(model, optax.adamw(1e-3))
    count = models.count_parameters(models.build("opt-66b", sparsity="dense"))
    copies = 2 * 12 * 9216**2  # of one layer
    assert found.dense_state_bytes == 16 * count + 4 + copies
    assert found.ratio == pytest.approx(8.125 / 16, abs=0.01)


def test_heads_are_those_outside_of_the_layers():
    found = account(models.build("bert-tiny", vocab_size=64), optax.adamw(1e-3))
    assert found.total("parameters", "heads") == 4 * (2 * 128**2 + 128 * 2)
    for row in found.rows:
        if row.part == "heads":
            assert row.nbytes == row.dense_nbytes


def test_without_an_optimizer_only_the_variables_count():
    found = account(gpt2())
    assert {row.kind for row in found.rows} == {"parameters", "metadata"}
    assert found.ratio == found.state_bytes / found.dense_state_bytes < 0.6


@pytest.mark.parametrize("variant", ["gpt2-nano", "llama-nano"])
def test_a_served_model_is_compared_with_dense_in_its_own_precisions(variant):
    """Kernels and tables in 16 bits, norms and biases in 32."""

    def served(sparsity):
        model = models.build(variant, vocab_size=VOCAB, sparsity=sparsity, dtype=jnp.bfloat16)
        made = []

        def convert(variables):
            apart, variables = inference_variables(model, variables)
            made.append(apart)
            return variables

        shapes = jax.eval_shape(convert, shapes_of(model))
        return made[0], shapes

    def nbytes(shapes):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    (sparse, ours), (dense, theirs) = served("2:4"), served("dense")
    found = memory(sparse, ours)
    assert found.state_bytes == nbytes(ours)
    assert found.dense_state_bytes == nbytes(theirs)
    assert memory(dense, theirs).ratio == 1.0
    # The stacks of the dense model are others where the first layer is sparse only in part.
    model = models.build(variant, vocab_size=VOCAB)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes_of(model))
    found = memory(model, {**shapes_of(model), "params": stacked["params"]})
    whole = models.build(variant, vocab_size=VOCAB, sparsity="dense")
    assert found.dense_state_bytes == nbytes(shapes_of(whole)) // 2


def test_keys_and_values_are_counted_for_the_sequences_asked_for():
    model = models.build("llama-nano", vocab_size=VOCAB, dtype=jnp.bfloat16)
    config = model.config
    found, bare = account(model, cache=(3, 200)), account(model)
    kept = 2 * 2 * 3 * 256 * config.num_layers * config.num_kv_heads * config.head_width
    assert found.total("keys and values") == found.dense_total("keys and values") == kept
    assert found.state_bytes - bare.state_bytes == kept
    assert "keys and values" in str(found)
    for wrong in (3, (3,), (0, 20), (3, 2.5), ("3", 20)):
        with pytest.raises(ValueError, match=r"cache=.* must be two positive integers"):
            account(model, cache=wrong)
    most = config.max_positions
    assert account(model, cache=(1, most)).total("keys and values") > 0
    with pytest.raises(ValueError, match=f"of {most + 1} tokens are longer than max_pos.*={most};"):
        account(model, cache=(1, most + 1))
    with pytest.raises(ValueError, match="a Bert keeps no keys and values"):
        account(models.build("bert-tiny", vocab_size=64), cache=(1, 8))


def test_the_table_has_every_kind_and_the_ratio():
    found = account(gpt2(adapter_rank=8), optax.adamw(1e-3), True)
    lines = str(found).splitlines()
    assert lines[0].split()[-5:] == ["all", "share", "dense", "of", "dense"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "parameters",
        "metadata",
        "gradients",
        "optimizer counters",
        "mu",
        "nu",
        "transposed copies",
        "state",
        "activations",
    ]
    (state,) = (line for line in lines if line.startswith("state"))
    assert state.endswith(f"{found.ratio:.3f}")


def test_bad_input_is_named():
    model = gpt2()
    with pytest.raises(ValueError, match="accumulation=0"):
        account(model, optax.sgd(1.0), accumulation=0)
    with pytest.raises(ValueError, match="variables hold kernel"):
        memory(model, {"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match="masks"):
        memory(model, {"params": shapes_of(model)["params"]}, optax.sgd(1.0))
    with pytest.raises(ValueError, match="same model without sparsity"):
        account(model, dense=gpt2(sparsity="dense", num_layers=1, hidden_size=64, mlp_size=8))
