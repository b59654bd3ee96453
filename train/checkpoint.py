"""Checkpoints of a run, by Orbax: everything needed to go on, bit for bit.

    RUN/checkpoints/STEP/state      params, masks, optimizer state, step, RNG key
    RUN/checkpoints/STEP/run        configuration, data position, results so far (JSON)
    RUN/checkpoints/STEP/tokenizer  the tokenizer (JSON)
    RUN/checkpoints/STEP/manifest.json  digests of all these files, see `train.integrity`

STEP counts completed steps. Orbax writes under a temporary name and renames, so a checkpoint is
whole or absent.
"""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from pallas_kernels.files import FULL, UNWRITABLE
from slope_jax import TrainState
from slope_jax.sharding import current_mesh, shardings
from train import integrity

ITEMS = ("state", "run", "tokenizer")


class OutOfSpace(OSError):
    """The disk cannot hold a checkpoint; the message says where, how much, and what to do."""


class Checkpoints:
    """Saves, lists and restores the checkpoints of one run.

    Args:
      run_dir: the run's folder.
      keep: latest checkpoints to keep; the best by held-out loss stays besides.
      read_only: changes nothing, so that a run which still trains can be read.
    """

    def __init__(self, run_dir: pathlib.Path, *, keep: int, read_only: bool = False):
        self.folder = run_dir.resolve() / "checkpoints"
        self._read_only = read_only
        self._saving: int | None = None
        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["eval_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=ITEMS,
            # Without Orbax's own read_only, which warns of all that it turns off, in every notebook.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps that a checkpoint is kept of, ascending."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def check(self, step: int, *, warn: Callable[[str], None]) -> None:
        """Refuses to read a damaged checkpoint; `warn` is told of one without a manifest.

        Raises:
          DamagedError: names what is damaged or missing, and what to do.
        """
        self._check_complete(step)
        integrity.check(self.path(step), self._remedy(step), warn=warn)

    def save(
        self,
        state: TrainState,
        key: jax.Array,
        run: dict[str, Any],
        tokenizer: dict[str, Any],
        eval_loss: float | None,
    ) -> pathlib.Path:
        """Save the state after `state.step` steps; does nothing if that step is saved already.

        Raises:
          OutOfSpace: the disk is full. Earlier checkpoints are untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return self.path(step)
        check_space(self.folder, state_bytes(state))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_saved(state, key)),
            run=ocp.args.JsonSave(run),
            tokenizer=ocp.args.JsonSave(tokenizer),
        )
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        try:
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=items, metrics=metrics)
            if _shares_memory():
                self._manager.wait_until_finished()
        except Exception as error:
            raise _explained(error, self.folder) from error
        return self.path(step)

    def wait(self) -> None:
        """Return when what was saved has reached the disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise _explained(error, self.folder) from error

    def read_run(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run's record and the tokenizer of a checkpoint, without its arrays."""
        arguments = ocp.args.Composite(run=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore())
        with self._reading(step):
            items = self._manager.restore(step, args=arguments)
        return items["run"], items["tokenizer"]

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, jax.Array]:
        """The state and the RNG key of a checkpoint; `shapes` is the abstract state it must have."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        target = placed(_saved(shapes, jax.eval_shape(jax.random.key_data, key)))
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        with self._reading(step):
            items = self._manager.restore(step, args=arguments)["state"]
        key = jax.random.wrap_key_data(items.pop("key"))
        return shapes.replace(**items), key

    def restore_weights(
        self, step: int, shapes: TrainState, *, on_host: bool = False
    ) -> tuple[Any, Any]:
        """Parameters and masks alone; `shapes` is the abstract state of the checkpoint.

        `on_host` gives NumPy arrays, and nothing reaches a device.
        """
        target = placed({"params": shapes.params, "masks": shapes.masks})
        if on_host:
            how = jax.tree.map(lambda x: ocp.RestoreArgs(np.ndarray, x.dtype), target)
        else:
            how = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
        with self._reading(step):
            items = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        return items["params"], items["masks"]

    def close(self) -> None:
        self._manager.close()

    def _remedy(self, step: int) -> str:
        """What to do where the checkpoint of a step cannot be read."""
        others = ", ".join(str(other) for other in self.steps() if other != step)
        if self._read_only:
            return f"Give another step; there are: {others or 'none'}"
        return (
            f"Move it out of {self.folder}, then run the same command to go on from another step;"
            f" there are: {others or 'none'}"
        )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says what a manifest would have shown, had there been one."""
        folder = self.path(step)
        self._check_complete(step)
        if integrity.has_manifest(folder):
            yield
        else:
            with integrity.explained(f"{folder} cannot be read", self._remedy(step)):
                yield

    def _check_complete(self, step: int) -> None:
        folder = self.path(step)
        if missing := [name for name in ITEMS if not (folder / name).is_dir()]:
            raise integrity.DamagedError(
                f"{folder} is incomplete: it has no {' and no '.join(missing)}. {self._remedy(step)}"
            )

    def _seal(self) -> None:
        """Add the manifest, while the checkpoint that is being saved has its temporary name."""
        if jax.process_index() == 0:
            (folder,) = self.folder.glob(f"{self._saving}.*")
            integrity.write_manifest(folder)


def check_space(folder: pathlib.Path, needed: int) -> None:
    """Raise `OutOfSpace` unless the disk of `folder` has room for `needed` bytes and some more."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed * 1.05:
        raise OutOfSpace(
            errno.ENOSPC,
            f"a checkpoint takes {needed / 2**20:,.0f} MiB but only {free / 2**20:,.0f} MiB are "
            f"free on the disk of {folder}. Free some space (or lower --keep-checkpoints), then "
            f"run the same command to go on from the last checkpoint",
        )


def state_bytes(state: TrainState) -> int:
    """Bytes of parameters, masks and optimizer state."""
    leaves = jax.tree.leaves((state.params, state.masks, state.opt_state))
    return sum(x.size * x.dtype.itemsize for x in leaves)


def placed(shapes: Any) -> Any:
    """Shapes as Orbax wants them, to be restored onto the mesh that is set, or the first device."""
    if (mesh := current_mesh()) is not None:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            shardings(shapes, mesh),
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


def to_device(path: tuple[str, ...], leaf: Any) -> jax.Array:
    """One leaf of variables, its path beginning with the collection, where `placed` has it."""
    (place,) = jax.tree.leaves(placed(traverse_util.unflatten_dict({path: leaf})))
    return jax.device_put(leaf, place.sharding)


def _shares_memory() -> bool:
    """Whether a saved array can share memory with the buffer that the next step reuses."""
    return jax.default_backend() == "cpu"


def _saved(state: TrainState, key: jax.Array) -> dict[str, Any]:
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    names = ("params", "masks", "opt_state", "step")
    return {name: getattr(state, name) for name in names} | {"key": key}


def _explained(error: Exception, folder: pathlib.Path) -> Exception:
    number, text = getattr(error, "errno", None), str(error)
    if number in UNWRITABLE or any(os.strerror(n) in text for n in UNWRITABLE):
        return OSError(
            number or errno.EACCES,
            f"the checkpoint was not written: {folder} cannot be written any more ({text}); earlier "
            f"checkpoints are intact. Make it writable, then run the same command to go on",
        )
    if number not in FULL and not any(os.strerror(n) in text for n in FULL):
        return error
    return OutOfSpace(
        errno.ENOSPC,
        f"the disk of {folder} is full, the checkpoint was not written; earlier ones are intact. "
        f"Free some space, then run the same command to go on from the last one",
    )
