"""The folder of a run: one process at a time, and only ever a run of one configuration."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from pallas_kernels.files import write_atomically
from train.config import Config, free_fields, from_json, to_json
from train.config_checks import ADAPTER_OPTIONS
from train.metrics import METRICS_FILE

CONFIG_FILE, LOCK_FILE, TOKENIZER_FILE = "config.json", "lock", "tokenizer.json"
# What nothing depends on until the adapters join.
ADAPTER_FIELDS = frozenset(("adapter_rank", *ADAPTER_OPTIONS))
LEFTOVERS = (METRICS_FILE, TOKENIZER_FILE, "corpus*.json", "plan.txt", "tensorboard")


def run_folder(config: Config) -> pathlib.Path:
    """Where the run is kept."""
    return pathlib.Path(config.run_dir or config.default_run_dir()).expanduser()


@contextlib.contextmanager
def open_folder(config: Config) -> Iterator[pathlib.Path]:
    """Create the run's folder if need be and hold it against other processes.

    Raises:
      ValueError: it can't be written, holds something other than a run, or another process
        trains in it.
    """
    path = run_folder(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = {p.name for p in path.iterdir()} - {LOCK_FILE}
        if strangers and CONFIG_FILE not in strangers:
            raise ValueError(
                f"run folder {path} is not empty and holds no run (no {CONFIG_FILE}); name a new or "
                f"empty one with --run-dir"
            )
        lock = (path / LOCK_FILE).open("a+")
    except OSError as error:
        raise ValueError(
            f"run folder {path} cannot be written: {error.strerror}; name another with --run-dir"
        ) from error
    with lock:
        _take(lock, path)
        yield path


def start_anew(path: pathlib.Path, config: Config) -> None:
    """Remove what a run that never reached a checkpoint left, and note the configuration."""
    for target in [target for name in LEFTOVERS for target in path.glob(name)]:
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    note_config(path, config)


def note_config(path: pathlib.Path, config: Config) -> None:
    """Write down what the run goes on with."""
    write_atomically(path / CONFIG_FILE, json.dumps(to_json(config), indent=1) + "\n")


def check_config(saved: dict[str, Any], step: int, config: Config, folder: pathlib.Path) -> None:
    """Refuse to go on from a checkpoint of another configuration.

    Adapters may be other ones if neither those of the checkpoint nor these have joined by its step.

    Args:
      saved: the configuration of the checkpoint.
      step: that it was saved after.

    Raises:
      ValueError: lists the fields that differ, both values, and the remedy.
    """
    ours, free = to_json(config), free_fields()
    saved = to_json(Config()) | saved  # fields that a run is older than have their defaults there
    names = [n for n in {**saved, **ours} if n not in free and saved.get(n) != ours.get(n)]
    if not names or (ADAPTER_FIELDS.issuperset(names) and not _joined(saved, config, step)):
        return
    lines = "\n".join(f"  {n}: {saved.get(n)} there, {ours.get(n)} here" for n in names)
    early = ""
    if ADAPTER_FIELDS.intersection(names):
        early = f" (Adapters can be changed until they join; this checkpoint is of step {step}.)"
    raise ValueError(
        f"{folder} holds a run of another configuration:\n{lines}\n"
        f"Give the values it was started with to go on, or another --run-dir to start anew.{early}"
    )


def _joined(saved: dict[str, Any], config: Config, step: int) -> bool:
    starts = [known.adapter_step for known in (from_json(saved), config)]
    return any(start is not None and start < step for start in starts)


def _take(lock, path: pathlib.Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise ValueError(
            f"process {owner} trains in run folder {path} already; wait for it, stop it, or name "
            f"another folder with --run-dir"
        ) from None
    except OSError as error:
        raise ValueError(
            f"run folder {path} cannot be locked ({error.strerror}): its file system has no flock;"
            " mount it with locks (Lustre: -o flock), or name another folder with --run-dir"
        ) from error
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
