"""The training and evaluation steps against NumPy, and what they must leave alone."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import slope_jax.matmul
import slope_jax.pieces
from pallas_kernels import nm_transpose
from pallas_kernels.mosaic import support
from pallas_kernels.samples import CUBLAS
from slope_jax import models
from train.recipes import make_config
from train.state import abstract_state, init_state, join_adapters, make_setup, step_key
from train.step import all_finite, eval_step, evaluate, make_train_step

VOCAB, LENGTH = 301, 16  # padded to 304 columns
EPS32 = float(jnp.finfo(jnp.float32).eps)


def tiny(model="bert-tiny", **fields):
    defaults = {"seq_len": LENGTH, "max_predictions": 4, "steps": 4, "dtype": "float32"}
    config = make_config(model, **{**defaults, **fields})
    return config, make_setup(config, vocab_size=VOCAB)


def bert_batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ints = {"dtype": np.int32}
    return {
        "input_ids": rng.integers(5, VOCAB, (rows, LENGTH), **ints),
        "token_type_ids": rng.integers(0, 2, (rows, LENGTH), **ints),
        "lengths": rng.integers(LENGTH // 2, LENGTH + 1, rows, **ints),
        "mlm_positions": rng.integers(0, LENGTH // 2, (rows, 4), **ints),
        "mlm_labels": rng.integers(5, VOCAB, (rows, 4), **ints),
        "mlm_weights": (rng.random((rows, 4)) < 0.7).astype(np.float32),
        "nsp_labels": rng.integers(0, 2, rows, **ints),
    }


def causal_batch(rows: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, VOCAB, (rows, LENGTH + 1), dtype=np.int32)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@pytest.fixture(scope="module")
def bert():
    config, setup = tiny(adapter_rank=0.0156)
    return config, setup, jax.device_get(init_state(setup))


def assert_close(got, wanted, scale: float):
    """Within the rounding of float32 sums, relative to each leaf's largest entry."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        bound = scale * EPS32 * max(np.abs(b).max(), EPS32)
        assert np.abs(a - b).max() <= bound, jax.tree_util.keystr(path)


def test_bert_loss_is_that_of_numpy_over_the_real_vocabulary(bert):
    _, setup, state = bert
    batch = bert_batch(6)
    sums = eval_step(state, batch)
    out = setup.model.apply(
        {"params": state.params, "masks": state.masks},
        *(batch[k] for k in ("input_ids", "token_type_ids", "lengths")),
        mlm_positions=batch["mlm_positions"],
    )
    logs = log_softmax(np.asarray(out.mlm_logits, np.float64)[..., :VOCAB], axis=-1)
    nll = -np.take_along_axis(logs, batch["mlm_labels"][..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.nll, (nll * batch["mlm_weights"]).sum(), rtol=64 * EPS32)
    hits = (logs.argmax(-1) == batch["mlm_labels"]) * batch["mlm_weights"]
    assert float(sums.correct) == hits.sum()
    assert float(sums.tokens) == batch["mlm_weights"].sum()
    nsp = log_softmax(np.asarray(out.nsp_logits, np.float64), axis=-1)
    nll = -np.take_along_axis(nsp, batch["nsp_labels"][:, None], -1)
    np.testing.assert_allclose(sums.nsp_nll, nll.sum(), rtol=64 * EPS32)
    assert float(sums.sequences) == 6


def test_uniform_predictions_cost_the_log_of_the_real_vocabulary():
    _, setup = tiny("gpt2-nano")
    state = init_state(setup)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    metrics = evaluate(state.replace(params=zeros), [causal_batch(2)])
    np.testing.assert_allclose(metrics["eval_loss"], np.log(VOCAB), rtol=8 * EPS32)
    np.testing.assert_allclose(metrics["eval_perplexity"], VOCAB, rtol=64 * EPS32)


def test_evaluation_weighs_every_prediction_alike(bert):
    _, _, state = bert
    first, second = bert_batch(2, seed=1), bert_batch(2, seed=2)
    second["mlm_weights"][:] = 0
    second["mlm_weights"][0, 0] = 1
    both = {k: np.concatenate([first[k], second[k]]) for k in first}
    apart, together = evaluate(state, [first, second]), evaluate(state, [both])
    assert apart.keys() == together.keys()
    for name, value in together.items():
        np.testing.assert_allclose(apart[name], value, rtol=64 * EPS32, err_msg=name)


def test_accumulation_changes_memory_and_nothing_else(bert):
    _, setup, state = bert
    batch, key = bert_batch(6), step_key(setup)
    batch["mlm_weights"][:2] = 0  # micro-batches of unequal weight
    whole, metrics = make_train_step(1, setup.schedule)(state, batch, key)
    split, split_metrics = make_train_step(3, setup.schedule)(state, batch, key)
    for name in metrics:
        np.testing.assert_allclose(
            split_metrics[name], metrics[name], rtol=256 * EPS32, err_msg=name
        )
    # First moments are the clipped gradients times 1 - beta1.
    assert_close(first_moments(split), first_moments(whole), scale=512)


def first_moments(state):
    return state.opt_state[1].inner_states["base"].inner_state[0].mu


def traced(accumulation: int, hold_copies: bool | None = None, **fields):
    """The traced step of a GPT-2 in bfloat16, its state and its setup; nothing is computed."""
    fields = {"dtype": "bfloat16", "remat": True} | fields
    if fields.get("method") != "dense":
        fields["adapter_rank"] = 2
    config, setup = tiny("gpt2-nano", **fields)
    state = abstract_state(setup, adapters=config.method != "dense")
    ids = jax.ShapeDtypeStruct((16 * accumulation, LENGTH), jnp.int32)
    step = make_train_step(accumulation, setup.schedule, hold_copies=hold_copies)
    return step.trace(state, {"input_ids": ids, "labels": ids}, setup.key), state


@pytest.mark.parametrize(
    ("scan", "names"),
    [(True, {"layers_0", "layers_1_to_3"}), (False, {f"layers_{i}" for i in range(4)})],
)
def test_without_a_scan_every_layer_has_parameters_of_its_own(scan, names):
    _, setup = tiny("gpt2-nano", scan=scan)
    state = abstract_state(setup, adapters=False)
    assert {name for name in state.params if name.startswith("layers")} == names


def equations(jaxpr, loops=0):
    """All equations with the number of scans around them."""
    for equation in jaxpr.eqns:
        yield equation, loops
        inner = loops + (equation.primitive.name == "scan")
        for leaf in jax.tree.leaves(
            tuple(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
                yield from equations(getattr(leaf, "jaxpr", leaf), inner)


def kernels_by_loops(jaxpr) -> dict[str, Counter]:
    """Calls of our kernels by name, and by the number of scans around them."""
    found = {}
    for equation, loops in equations(jaxpr):
        name = equation.params.get("name")
        if equation.primitive.name == "jit" and name in ("nm_matmul", "nm_sddmm", "nm_transpose"):
            found.setdefault(name, Counter())[loops] += 1
    return found


def casts_of_kernels(jaxpr, state) -> Counter:
    """Casts of kernels, or inside loops of one layer of a stack, by the number of scans around."""
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if path[-1].key == "kernel"
    ]
    shapes = {shape for k in kernels for shape in (k.shape, k.shape[-2:])}
    return Counter(
        loops
        for equation, loops in equations(jaxpr)
        if equation.primitive.name == "convert_element_type"
        and equation.params["new_dtype"] == jnp.bfloat16
        and equation.invars[0].aval.shape in shapes
    )


@pytest.mark.parametrize("method", ["slope", "dense"])
def test_micro_batches_share_one_cast_and_one_transpose_of_each_kernel(method, monkeypatch):
    made: list[str] = []
    for module in (slope_jax.pieces, slope_jax.matmul):

        def counted(w, module=module, dtype=None, **options):
            made.append(module.__name__)
            turned = nm_transpose(w, **options)  # casts nothing, for casts are counted as well
            return turned.with_values(jnp.zeros(turned.values.shape, dtype))

        monkeypatch.setattr(module, "nm_transpose", counted)
    sparse = 7 if method == "slope" else 0  # 4 of the stack, 3 of the first layer
    step, state = traced(2, method=method)
    assert made == ["slope_jax.pieces"] * sparse
    # The dense control scans over all its layers alike: 4 stacks. Here the first layer is apart.
    assert casts_of_kernels(step.jaxpr, state) == {0: 8 if sparse else 4}
    made.clear()
    step, _ = traced(1, method=method)
    assert made == ["slope_jax.matmul"] * sparse
    assert casts_of_kernels(step.jaxpr, state)[1] >= 4  # by the scanned layers themselves
    made.clear()
    traced(1, hold_copies=True, method=method)
    assert made == ["slope_jax.pieces"] * sparse


def test_gradients_are_added_where_they_arise():
    """The loop over micro-batches carries the sums of the loss and no gradients."""
    step, _ = traced(2)
    scans = [e for e, loops in equations(step.jaxpr) if e.primitive.name == "scan" and not loops]
    (loop,) = (e for e in scans if e.params["length"] == 2)  # the others transpose 3 layers
    assert [v.aval.shape for v in loop.outvars] == [()] * 6


@pytest.mark.skipif(support.version_obstacle() is not None, reason=str(support.version_obstacle()))
def test_nothing_dense_is_in_the_step_of_the_kernels(monkeypatch):
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    step, state = traced(2, implementation="mosaic")
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    shapes = Counter(
        tuple(map(int, shape.split("x")))[-2:]
        for shape in re.findall(r"tensor<([0-9x]+x[0-9]+)x[a-z]+[0-9]+>", text)
    )
    assert state.params["layers_1_to_3"]["mlp"]["up"]["kernel"].shape == (3, 64, 512)
    for k, f in ((128, 512), (512, 128)):  # up and down, nowhere dense
        assert not shapes[k, f]
        assert shapes[k // 2, f] > 0  # values
        assert shapes[k // 8, f] > 0  # metadata
    assert kernels_by_loops(step.jaxpr)["nm_transpose"] == Counter({0: 7})


@pytest.mark.skipif(support.version_obstacle() is not None, reason=str(support.version_obstacle()))
def test_kernels_that_are_alike_are_one_program(monkeypatch):
    """The GPU's compiler works anew on each that it does not know, in every process."""
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    steps = [traced(count, implementation="mosaic")[0] for count in (1, 2)]
    one, two = (
        re.findall(
            r'custom_call @mosaic_gpu.*kernel_hash = "([^"]*)"',
            step.lower(lowering_platforms=("cuda",)).as_text(),
        )
        for step in steps
    )
    called = kernels_by_loops(steps[1].jaxpr)
    assert sum(map(Counter.total, called.values())) == 33
    # out, up and down: of the first layer and of the stack of the others.
    assert len(two) == len(set(two)) < 33 - 3 * 3
    assert len(set(one) & set(two)) >= 8


@pytest.mark.gpu
@pytest.mark.skipif(support.device_obstacle() is not None, reason=str(support.device_obstacle()))
@pytest.mark.parametrize("model", ["gpt2-nano", "opt-nano", "llama-nano"])
def test_xla_runs_each_product_once(model):
    """It likes to run one again for a second user, where a scan stacks its result."""
    sizes = {"num_layers": 4, "hidden_size": 256, "mlp_size": 1024, "vocab_size": 512}
    built = models.build(model, **sizes, adapter_rank=16, dtype="bfloat16", implementation="mosaic")
    ids = jnp.zeros((4, 128), jnp.int32)
    variables = jax.eval_shape(built.init, jax.random.key(0), ids)

    def loss(params, masks):
        return built.apply({"params": params, "masks": masks}, ids).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], variables["masks"])
    products = lowered.as_text().count("dot_general")
    compiled = lowered.compile(compiler_options=CUBLAS).as_text()
    # Of all linears of two layers but the first: y, dx, dw, the transpose.
    assert compiled.count('custom_call_target="mosaic_gpu') == 4 * 7
    assert compiled.count('custom_call_target="__cublas') <= products


def test_step_moves_parameters_and_leaves_masks_alone(bert):
    _, setup, state = bert
    step = make_train_step(1, setup.schedule)
    after, _ = step(state, bert_batch(4), step_key(setup))
    for a, b in zip(jax.tree.leaves(after.masks), jax.tree.leaves(state.masks), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == jnp.uint8
    moved = [
        bool((np.asarray(a) != b).any())
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
    ]
    assert all(moved)
    assert int(after.step) == 1


def test_dropout_draws_anew_for_every_step_and_micro_batch():
    _, setup = tiny(dropout=0.5, lr=1e-30, method="dense")
    state = jax.device_get(init_state(setup))
    row = bert_batch(1)
    row["mlm_weights"][:] = 1
    batch = {k: np.repeat(v, 2, axis=0) for k, v in row.items()}
    step, key = make_train_step(2, setup.schedule), step_key(setup)
    losses = [
        float(step(state.replace(step=jnp.int32(t)), batch, key)[1]["loss"]) for t in (0, 1, 0)
    ]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]
    one = make_train_step(1, setup.schedule)(state, row, key)[1]["loss"]
    assert losses[0] != float(one)  # the second micro-batch isn't the first one's copy


def test_adapters_join_with_the_function_and_the_optimizer_unchanged(bert):
    _, setup, state = bert
    step, key = make_train_step(1, setup.schedule), step_key(setup)
    state = jax.device_get(step(state, bert_batch(4), key)[0])
    before = eval_step(state, bert_batch(4))
    joined, count = join_adapters(setup, state)
    assert count == 7  # 2 layers of 4 linears, less the first
    after = eval_step(joined, bert_batch(4))
    for name in before._fields:
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name)
    old = dict(jax.tree_util.tree_leaves_with_path(state.params))
    kept = dict(jax.tree_util.tree_leaves_with_path(joined.params))
    for path, leaf in old.items():
        np.testing.assert_array_equal(kept[path], leaf)
    np.testing.assert_array_equal(joined.step, state.step)
    moments, kept = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (state.opt_state, joined.opt_state)
    )
    ours = {path for path in moments if "adapter" not in path}
    assert [sum(f".{name}" in path for path in ours) for name in ("mu", "nu")] == [len(old)] * 2
    assert any(path.endswith("count") for path in ours)
    for path in ours:
        assert np.asarray(moments[path]).any(), path
        np.testing.assert_array_equal(kept[path], moments[path], err_msg=path)
    for path in kept.keys() - ours:  # those of the adapters begin, with a count of their own
        assert not np.asarray(kept[path]).any(), path


def test_all_finite_finds_one_bad_number_anywhere(bert):
    _, _, state = bert
    assert bool(all_finite(state))
    leaves, treedef = jax.tree.flatten(state.opt_state)
    i = max(i for i, x in enumerate(leaves) if np.asarray(x).dtype == np.float32)
    leaves[i] = np.full_like(leaves[i], np.inf)
    assert not bool(all_finite(state.replace(opt_state=treedef.unflatten(leaves))))
