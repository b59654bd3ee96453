"""The processes of a run: how they find each other, agree, and fail together.

All of them run the same program on the same global arrays. The first one also holds the run's
folder, writes what a run records, and reports; the others write RUN/process-K.log.
"""

import contextlib
import logging
import os
import pathlib
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from slope_jax.sharding import AXES, current_mesh
from train.config import Config

AUTOMATIC = "auto"
FAILED, BAD_INPUT = 1, 2  # what a process tells the others

T = TypeVar("T")


def connect(config: Config) -> None:
    """Join the other processes of the run, if it has any; before JAX is used otherwise.

    Raises:
      ValueError: they cannot be found.
    """
    if not config.coordinator or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is noted by `signals`
    patience = {"heartbeat_timeout_seconds": config.heartbeat_seconds}
    if config.coordinator != AUTOMATIC:
        jax.distributed.initialize(
            config.coordinator,
            num_processes=config.processes,
            process_id=config.process_id,
            **patience,
        )
        return
    try:
        jax.distributed.initialize(**patience)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--coordinator={AUTOMATIC}: no SLURM, Open MPI, Kubernetes or TPU pod says which"
            f" processes there are ({error}); give --coordinator=HOST:PORT, --processes and"
            " --process-id"
        ) from error


def is_first() -> bool:
    """Whether this process holds the run's folder and reports."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Leave the block when all processes have; if it fails in one of them, it fails in all.

    Raises:
      ValueError, OSError: of this process, or in the name of another one.
    """
    error = None
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as caught:
        error = caught
    if jax.process_count() > 1:
        kind = 0 if error is None else FAILED if isinstance(error, OSError) else BAD_INPUT
        kinds = np.asarray(multihost_utils.process_allgather(np.int32(kind))).reshape(-1)
        if error is None and kinds.any():
            index = int(np.flatnonzero(kinds)[0])
            error = (OSError if kinds[index] == FAILED else ValueError)(
                f"process {index} of {jax.process_count()} could not {what}: see what it says"
            )
    if error is not None:
        raise error


def first_then_others(what: str, function: Callable[[], T]) -> T:
    """What `function` gives in this process; the others begin when the first one has it."""
    with together(what):
        result = function() if is_first() else None
    with together(what):
        return function() if result is None else result


def check_same(text: str, what: str) -> None:
    """Raise a ValueError unless all processes have the same text."""
    digest = np.int32(zlib.crc32(text.encode()) >> 1)
    digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1)
    if others := np.flatnonzero(digests != digests[0]).tolist():
        raise ValueError(
            f"{what} is not the same in process {others[0]} as in the first: give every process the"
            " same files and packages"
        )


@contextlib.contextmanager
def lost_together(where: Callable[[], str]) -> Iterator[None]:
    """End this process at once if the block fails in it alone: the others cannot go on without it.

    An orderly end would wait for them, and they for it.
    """
    try:
        yield
    except ArithmeticError:  # which all have alike
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        name = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, jax.errors.JaxRuntimeError):
            what = f"lost another process, or a device ({str(error).splitlines()[0]})"
        else:
            what = f"failed: {error or type(error).__name__}"
            traceback.print_exception(error)
        print(
            f"error: {name} {what} {where()}. The same command, given to all processes again, goes"
            " on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else FAILED)


def replicated(x: jax.Array) -> jax.Array:
    """`x`, which all processes have alike, as one array on the mesh; as it is without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(x)


@contextlib.contextmanager
def own_log(folder: pathlib.Path) -> Iterator[Console]:
    """Where a process that is not the first reports: RUN/process-K.log, its log messages too."""
    path = folder / f"process-{jax.process_index()}.log"
    print(f"process {jax.process_index()} of {jax.process_count()} reports in {path}", flush=True)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        root = logging.getLogger()
        before, root.handlers = root.handlers, [handler]
        try:
            yield Console(file=file, width=200)
        finally:
            root.handlers = before


class Agreement:
    """What one process wants, told to all at the same step, without waiting for the devices.

    `agree(number)` gives the largest number that any process gave in the call before; alone, a
    process agrees with itself at once.
    """

    def __init__(self):
        self._before: jax.Array | None = None
        self._largest = jax.jit(jnp.max)

    def agree(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        spread = NamedSharding(current_mesh(), PartitionSpec(AXES))
        own = np.full(jax.local_device_count(), number, np.int32)
        votes = jax.make_array_from_process_local_data(spread, own, (jax.device_count(),))
        before, self._before = self._before, self._largest(votes)
        return 0 if before is None else int(before)
