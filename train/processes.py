"""The processes of a run: how they find each other, agree, and fail together.

All of them run the same program on the same global arrays. The first one also holds the run's
folder, writes what a run records, and reports; the others write RUN/process-K.log.
"""

import contextlib
import json
import logging
import os
import pathlib
import secrets
import socket
import sys
import time
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

from pallas_kernels.files import write_atomically
from slope_jax.sharding import AXES, current_mesh
from train import environment
from train.config import Config, to_json

AUTOMATIC = "auto"
FAILED, BAD_INPUT = 1, 2  # what a process tells the others
MEETING_SECONDS, PARTING_SECONDS = 300, 60  # how long processes wait for each other
OWN = ("process_id", "coordinator", "cache_dir", "max_minutes", "grace_seconds", "dry_run")

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
    patience = {
        "initialization_timeout": MEETING_SECONDS,
        "heartbeat_timeout_seconds": config.heartbeat_seconds,
        "shutdown_timeout_seconds": PARTING_SECONDS,
    }
    if config.coordinator != AUTOMATIC:
        _reach(config)
        jax.distributed.initialize(
            config.coordinator,
            num_processes=config.processes,
            process_id=config.process_id,
            **patience,
        )
        return
    try:
        jax.distributed.initialize(**patience)
    except Exception as error:  # of the client of some scheduler, too
        raise ValueError(
            f"--coordinator={AUTOMATIC}: no SLURM, Open MPI, Kubernetes (which needs the package"
            f" kubernetes) or TPU pod says which processes there are ({error}); give"
            " --coordinator=HOST:PORT, --processes and --process-id"
        ) from error


def _reach(config: Config) -> None:
    """Raise a ValueError unless the first process can listen, or another one can speak to it.

    JAX would end the process, without a word of the address.
    """
    host, _, port = config.coordinator.rpartition(":")
    host = host.strip("[]")
    count, address = config.processes, config.coordinator
    print(
        f"process {config.process_id} of {count} meets the others at {address}, within"
        f" {MEETING_SECONDS} s",
        flush=True,
    )
    if config.process_id == 0:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", int(port)))
            except OSError as error:
                raise ValueError(
                    f"--coordinator={address}: port {port} of this host cannot be used"
                    f" ({error.strerror}); is another run's first process here? Give a free port"
                ) from error
        return
    deadline = time.monotonic() + MEETING_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--coordinator={address}: nothing answers there ({error}); start process 0 on"
                    " that host, and give a name and port that all hosts can reach"
                ) from error
        time.sleep(0.2)


def is_first() -> bool:
    """Whether this process holds the run's folder and reports."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Leave the block when all processes have; if it fails in one of them, it fails in all.

    What calls for all processes itself (`check_same`) may only come first in the block.

    Raises:
      BaseException: of this process; a ValueError or an OSError in the name of another one.
    """
    error = None
    try:
        yield
    except BaseException as caught:
        if jax.process_count() == 1 or _is_of_all(caught):
            raise
        error = caught
    if jax.process_count() > 1:
        bad = isinstance(error, (ValueError, NotImplementedError))
        kind = 0 if error is None else BAD_INPUT if bad else FAILED
        kinds = np.asarray(multihost_utils.process_allgather(np.int32(kind))).reshape(-1)
        if error is None and kinds.any():
            index = int(np.flatnonzero(kinds)[0])
            error = (OSError if kinds[index] == FAILED else ValueError)(
                f"process {index} of {jax.process_count()} could not {what}: see what it says"
            )
    if error is not None:
        raise _of_all(error)


def _of_all(error: BaseException) -> BaseException:
    """Marks an error that every process raises, so that none need wait for another."""
    error.in_all_processes = True
    return error


def _is_of_all(error: BaseException) -> bool:
    return getattr(error, "in_all_processes", False)


def first_then_others(what: str, function: Callable[[], T]) -> T:
    """What `function` gives in this process; the others begin when the first one has it."""
    with together(what):
        result = function() if is_first() else None
    with together(what):
        return function() if result is None else result


def check_same(text: str, what: str, remedy: str) -> None:
    """Raise a ValueError in all processes unless they have the same text."""
    if (other := _first_other([text])) is not None:
        raise _of_all(
            ValueError(f"{what} is not the same in process {other[0]} as in the first: {remedy}")
        )


def check_command(config: Config) -> None:
    """Raise a ValueError in all processes unless they were given the same command and packages."""
    versions = json.dumps(environment.versions(environment.JOB_PACKAGES))
    check_same(versions, "what is installed", f"this one has {versions}")
    fields = {n: v for n, v in to_json(config).items() if n not in OWN}
    if (other := _first_other([json.dumps(value) for value in fields.values()])) is not None:
        index, name = other[0], list(fields)[other[1]]
        option = f"--{name.replace('_', '-')}"
        raise _of_all(
            ValueError(
                f"process {index} has another {option} than the first (this one has"
                f" {fields[name]!r}): give all processes the same command but for --process-id"
            )
        )


def _first_other(texts: list[str]) -> tuple[int, int] | None:
    """The first process that differs from the first one, and the first text in which it does."""
    digests = np.asarray([zlib.crc32(text.encode()) >> 1 for text in texts], np.int32)
    found = np.asarray(multihost_utils.process_allgather(digests)).reshape(-1, len(texts))
    others = np.argwhere(found != found[0])
    return tuple(others[0].tolist()) if len(others) else None


def check_shared(folder: pathlib.Path) -> None:
    """Raise a ValueError in all processes unless `folder` is one and the same in all of them."""
    number = np.int32(secrets.randbits(30))
    number = int(multihost_utils.broadcast_one_to_all(number))
    mark = folder / f".shared-{number}"  # a name that no cache of a file system remembers
    with together("write to the run's folder"):
        if is_first():
            write_atomically(mark, "")
    try:
        with together("see the run's folder"):
            if not mark.exists():
                raise ValueError(
                    f"{folder} is not the folder of that name which the first process has: give a"
                    " --run-dir on a disk that all hosts share"
                )
    finally:
        if is_first():
            mark.unlink(missing_ok=True)


@contextlib.contextmanager
def lost_together(where: Callable[[], str]) -> Iterator[None]:
    """End this process at once if the block fails in it alone: the others cannot go on without it.

    An orderly end would wait for them, and they for it.
    """
    try:
        yield
    except BaseException as error:
        alike = isinstance(error, ArithmeticError) or _is_of_all(error)
        if jax.process_count() == 1 or alike:
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
    """`x`, which all processes have alike, as one array on the mesh, or on the first device."""
    mesh = current_mesh()
    if mesh is None:
        return jax.device_put(x, jax.devices()[0])
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
