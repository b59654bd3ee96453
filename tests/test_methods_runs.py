"""Runs by methods that SLoPe is compared with: what goes on, what is served, what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import optax
import pytest

from slope_jax import TrainState
from train import metrics, serving
from train.checkpoint import Checkpoints
from train.job import Exit, pretrain
from train.recipes import make_config
from train.state import abstract_state, make_setup
from train.step import eval_step

EPS32 = float(jnp.finfo(jnp.float32).eps)


def options(folder, **fields):
    given = {
        "batch_size": 4,
        "steps": 6,
        "eval_every": 3,
        "checkpoint_every": 0,
    }
    return jobs.on_small_text(folder, **given | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_text):
    path = tmp_path_factory.mktemp("methods")
    shutil.copytree(small_text, path / "text")
    return path


def run(folder, name, stop_at=None, **fields):
    config = make_config("gpt2-nano", **options(folder, run_dir=str(folder / name), **fields))
    code, said = jobs.run(config, stop_at)
    assert code == (Exit.DONE if stop_at is None else Exit.UNFINISHED)
    return config, said


def last_state(config, path):
    setup = make_setup(config, vocab_size=300)
    checkpoints = Checkpoints(path, keep=2)
    joined = config.adapter_step is not None
    state, _ = checkpoints.restore(config.total_steps, abstract_state(setup, adapters=joined))
    checkpoints.close()
    return state


def curve(path):
    timeless = ("step", "loss", "grad_norm", "eval_loss")
    return [
        {k: v for k, v in line.items() if k in timeless}
        for line in metrics.read(path / "metrics.jsonl")
    ]


def held_out_batches(folder, config):
    from train.inputs import make_datasets, open_corpus

    (data,) = make_datasets(config, open_corpus(config, folder, None))
    return [data.held_out[i] for i in range(config.eval_batches)]


@pytest.fixture(scope="module")
def dense(folder):
    run(folder, "dense", method="dense")
    return folder / "dense"


RUNS = {
    "sr-ste": ({}, ()),  # has no state of its own
    "fst": ({"mask_every": 2, "dense_finish": 0.35}, (3,)),
    # Of few linears, which compile faster.
    "wanda": ({"adapter_rank": 0, "sparsity": "layers/[1-3]/mlp/down=2:4; .*=dense"}, (3,)),
}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_resumes_bit_for_bit_and_is_served_as_it_was_evaluated(folder, dense, method):
    fields, stops = RUNS[method]
    fields = fields | {"method": method}
    if method == "wanda":
        fields["init_from"] = str(dense)
    whole, resumed = folder / f"{method}-whole", folder / f"{method}-resumed"
    config, text = run(folder, whole.name, **fields)
    assert f"method {method}: " in text
    assert ("step 4/6  masks are lifted" in text) == (method == "fst")
    for stop in stops:
        run(folder, resumed.name, stop_at=stop, **fields)
    if stops:
        again, _ = run(folder, resumed.name, **fields)
        state, other = last_state(config, whole), last_state(again, resumed)
        for (where, a), b in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(where))
        assert curve(whole) == curve(resumed)

    trained = serving.load_trained(whole)
    batches = held_out_batches(whole, config)
    served = TrainState.create(
        apply_fn=trained.model.apply,
        params=trained.variables["params"],
        masks=trained.variables["masks"],
        tx=optax.identity(),
    )
    found = [jax.device_get(eval_step(served, batch)) for batch in batches]
    loss = sum(float(x.nll) for x in found) / sum(float(x.tokens) for x in found)
    np.testing.assert_allclose(loss, curve(whole)[-1]["eval_loss"], rtol=64 * EPS32)
    patterns = {p for p in trained.model.config.patterns.values() if p != "dense"}
    assert patterns == (set() if method == "fst" else {"2:4"})
    again = serving.trained_shapes(trained.about, trained.vocabulary)
    assert jax.tree.map(jnp.shape, again.variables) == jax.tree.map(jnp.shape, trained.variables)


def test_fst_masks_are_in_the_state_and_of_the_mlps(folder):
    config, _ = run(folder, "fst-held", stop_at=3, method="fst", mask_every=2)
    setup = make_setup(config, vocab_size=300)
    checkpoints = Checkpoints(folder / "fst-held", keep=2)
    state, _ = checkpoints.restore(3, abstract_state(setup, adapters=False))
    checkpoints.close()
    mask = np.asarray(state.masks["layers_0_to_3"]["mlp"]["up"]["kernel"])
    assert mask.dtype == bool
    for axis in (1, 2):
        shape = list(mask.shape)
        shape[axis : axis + 1] = [shape[axis] // 4, 4]
        assert (mask.reshape(shape).sum(axis + 1) == 2).all()
    assert jax.tree.structure(state.masks) == jax.tree.structure(
        {"layers_0_to_3": {"mlp": {"up": {"kernel": 0}, "down": {"kernel": 0}}}}
    )


def test_wanda_without_steps_prunes_the_dense_run_and_leaves_what_it_keeps(folder, dense):
    fields = RUNS["wanda"][0] | {"method": "wanda", "init_from": str(dense), "steps": 0}
    fields["calibration_sequences"] = 6
    _, text = run(folder, "pruned", **fields)
    length = fields.get("seq_len", 16)
    assert f"after its step 6 by Wanda on 6 sequences of {length} tokens" in text
    (only,) = curve(folder / "pruned")
    assert only["step"] == 0
    found = serving.load_trained(folder / "pruned")
    source = serving.load_trained(dense)
    assert found.vocabulary.to_json() == source.vocabulary.to_json()
    pruned = found.variables["params"]["layers_1_to_3"]["mlp"]["down"]["kernel"]
    whole = np.asarray(source.variables["params"]["layers_0_to_3"]["mlp"]["down"]["kernel"])[1:]
    assert pruned.shape[1] == whole.shape[1] // 2
    for layer, column in ((0, 0), (2, 7)):
        kept = set(np.asarray(pruned[layer, :, column]).tolist())
        assert kept <= set(whole[layer, :, column].tolist())
    np.testing.assert_array_equal(
        found.variables["params"]["embeddings"]["token"]["embedding"],
        source.variables["params"]["embeddings"]["token"]["embedding"],
    )
    assert "is complete" in run(folder, "pruned", **fields)[1]
    summary = json.loads((folder / "pruned" / "summary.json").read_text())
    assert summary["held_out_last"]["eval_loss"] == only["eval_loss"]


def test_wanda_refuses_what_is_not_a_dense_run_of_the_model(folder, dense):
    fields = {"method": "wanda", "init_from": str(dense), "run_dir": str(folder / "no")}
    with pytest.raises(ValueError, match=r"run of --model=gpt2-nano; .* with --model=opt-nano"):
        pretrain(make_config("opt-nano", **options(folder, **fields)))
    with pytest.raises(ValueError, match="holds no checkpoints"):
        run(folder, "no", method="wanda", init_from=str(folder / "text"))
