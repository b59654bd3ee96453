"""Checkpoints, the run's folder, and what a run writes beside them."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slope_jax import TrainState
from train import checkpoint, integrity, metrics
from train.checkpoint import Checkpoints, OutOfSpace
from train.folder import open_folder, start_anew
from train.processes import replicated
from train.recipes import make_config
from train.state import abstract_state, init_state, make_setup, step_key


def state_at(step: int) -> TrainState:
    params = {"up": {"kernel": jnp.full((2, 3), step / 3, jnp.float32)}}
    state = TrainState.create(
        apply_fn=None,
        params=params,
        masks={"up": {"kernel": jnp.arange(6, dtype=jnp.uint8)}},
        tx=optax.adam(0.1),
    )
    return state.replace(step=jnp.int32(step))


def save(checkpoints, step, loss=None):
    key = jax.random.key(step)
    return checkpoints.save(state_at(step), key, {"step": step}, {"model": "text ä"}, loss)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path, keep=2)
    yield made
    made.close()


def test_round_trip_is_exact(checkpoints):
    path = save(checkpoints, 7)
    checkpoints.wait()
    assert path.is_dir()
    state, key = checkpoints.restore(7, jax.eval_shape(lambda: state_at(7)))
    wanted = state_at(7)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(wanted.opt_state)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(7)))
    assert checkpoints.read_run(7) == ({"step": 7}, {"model": "text ä"})


def test_a_run_that_goes_on_has_its_arrays_where_a_new_one_has_them(checkpoints):
    """Else its programs would be others, and all of them compiled anew."""
    setup = make_setup(make_config("bert-tiny", vocab_size=300))
    state, key = init_state(setup), replicated(step_key(setup))
    checkpoints.save(state, key, {}, {}, None)
    checkpoints.wait()
    again = checkpoints.restore(0, abstract_state(setup, adapters=False))
    for new, restored in zip(*map(jax.tree.leaves, ((state, key), again)), strict=True):
        assert new.committed
        assert restored.committed
        assert new.sharding == restored.sharding


def test_the_latest_and_the_best_are_kept(checkpoints):
    for step, loss in ((1, 5.0), (2, 1.5), (3, 4.0), (4, None), (5, 2.0), (6, None)):
        save(checkpoints, step, loss)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.latest() == 6


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    first = Checkpoints(tmp_path, keep=2)
    save(first, 1)
    first.close()
    shutil.copytree(
        tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    )
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 1
    again.close()


def test_a_half_copied_checkpoint_is_named_with_what_to_do(checkpoints, tmp_path):
    save(checkpoints, 1)
    checkpoints.wait()
    (tmp_path / "checkpoints" / "2").mkdir()
    again = Checkpoints(tmp_path, keep=2)
    remedy = r"Move it out of .*checkpoints, then run the same command .* there are: 1$"
    for read in (
        lambda: again.read_run(2),
        lambda: again.restore(2, jax.eval_shape(lambda: state_at(2))),
    ):
        with pytest.raises(integrity.DamagedError, match=f"incomplete: it has no state.*{remedy}"):
            read()
    assert again.read_run(1)[0] == {"step": 1}
    again.close()


def test_a_full_disk_is_seen_ahead_and_costs_nothing(checkpoints, monkeypatch):
    save(checkpoints, 1)
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutOfSpace, match=r"free on the disk of .*Free some space"):
        save(checkpoints, 2)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ValueError("... No space left on device ...")]
)
def test_a_disk_that_fills_up_while_saving_is_explained(checkpoints, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(OutOfSpace, match=r"is full.*earlier ones are intact"):
        save(checkpoints, 2)


def test_other_errors_of_saving_stay_what_they_are(checkpoints, monkeypatch):
    def fail(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(KeyError, match="bug"):
        save(checkpoints, 2)


def config_in(folder, **fields):
    return make_config("bert-tiny", run_dir=str(folder), **fields)


def test_a_folder_is_held_by_one_process(tmp_path):
    with (
        open_folder(config_in(tmp_path / "run")),
        pytest.raises(ValueError, match=r"process \d+ trains in run folder"),
        open_folder(config_in(tmp_path / "run")),
    ):
        pass
    with open_folder(config_in(tmp_path / "run")):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ValueError, match="is not empty and holds no run"),
        open_folder(config_in(tmp_path)),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot be written.*--run-dir"),
        open_folder(config_in(tmp_path / "file" / "run")),
    ):
        pass


def test_starting_anew_clears_what_a_run_without_checkpoints_left(tmp_path):
    config = config_in(tmp_path)
    (tmp_path / "tokenizer.json").write_text("of another vocabulary")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    start_anew(tmp_path, config)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "bert-tiny"


def test_metrics_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    writer = metrics.MetricsWriter(tmp_path, step=1, tensorboard=False)
    writer.write(2, {"loss": 1.5, "grad_norm": float("inf")})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5, "grad_norm": None},
    ]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = metrics.MetricsWriter(tmp_path, step=0, tensorboard=True)
    for step in (1, 2, 3):
        first.write(step, {"loss": 10.0 + step, "eval_loss": 1.0})
    first.close()
    second = metrics.MetricsWriter(tmp_path, step=1, tensorboard=True)
    second.write(2, {"loss": 20.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(x.step, x.value) for x in events.Scalars("train/loss")] == [(1, 11.0), (2, 20.0)]
    assert [x.step for x in events.Scalars("eval/loss")] == [1]
