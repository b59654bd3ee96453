"""Runs of the training job that compare methods, and their record:

    python -m experiments --groups=gpt2-lr,gpt2-methods --data='text:books/train.txt.xz' \
        --valid books=books/valid.txt.xz

Each group of `experiments.runs` becomes ``benchmarks/results/accuracy-<group>-<device>.json``,
written after every run; runs that are in it with the fields they have now are not run again, unless
another begins from a folder that is gone. The status is 1 if a run failed or waits for one that did.

Small models leave a GPU idle while they are compiled, so several run at a time (``--parallel``),
spread over ``--gpus``; where speed counts (gpt2-small), a GPU has one at a time, also of other groups
in the same command.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Sequence
from concurrent import futures

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.console import Console

from benchmarks.record import RESULTS
from experiments import work
from experiments.group import Group
from experiments.runs import ALONE, GROUPS, family_of


def main() -> None:
    arguments = _arguments()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    console = Console(width=120)
    parallel = arguments.gpus if ALONE.intersection(arguments.groups) else arguments.parallel
    with _pool(parallel, arguments.gpus) as pool:
        families = sorted(set(map(family_of, arguments.groups)))
        device, tokenizers = pool.submit(
            work.prepare_data, arguments.data, arguments.folder, families
        ).result()
        groups = [
            Group(name, arguments, device, tokenizers[family_of(name)], console)
            for name in arguments.groups
        ]
        if not _run_all(groups, pool, parallel, stop):
            raise SystemExit(1)


def _pool(parallel: int, gpus: int) -> futures.Executor:
    """Processes for the runs, which see one of the GPUs each, in turn."""
    context = multiprocessing.get_context("spawn")
    if gpus == 1:
        return futures.ProcessPoolExecutor(parallel, mp_context=context)
    queue = context.SimpleQueue()
    for name in gpus_in_turn(parallel, gpus, os.environ.get("CUDA_VISIBLE_DEVICES")):
        queue.put(name)
    return futures.ProcessPoolExecutor(parallel, context, work.take_gpu, (queue,))


def gpus_in_turn(parallel: int, gpus: int, visible: str | None) -> list[str]:
    """The GPU of each process, as ``CUDA_VISIBLE_DEVICES`` names it.

    >>> gpus_in_turn(5, 2, None), gpus_in_turn(3, 2, "4,6,7")
    (['0', '1', '0', '1', '0'], ['4', '6', '4'])
    """
    names = visible.split(",") if visible else list(map(str, range(gpus)))
    return [names[number % gpus] for number in range(parallel)]


def _run_all(groups: Sequence[Group], pool: futures.Executor, parallel: int, stop: float) -> bool:
    """Runs one group after another; False if a run failed, or waits for one that did.

    Raises:
      ValueError: a learning rate is missing; nothing was run.
    """
    for i, group in enumerate(groups):
        if group.rates not in [earlier.name for earlier in groups[:i]]:
            group.check_rates()
    needed = {before for group in groups for before in group.needed_elsewhere()}
    # A list: all of them run, whatever the first ones come to.
    fine = [g.run(pool, parallel, stop, needed) for g in groups]
    return all(fine)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--groups", type=_groups, default=["gpt2-lr", "gpt2-methods"])
    parser.add_argument("--variants", type=lambda text: text.split(";"), help="of them: A;B;...")
    parser.add_argument("--data", required=True, help="to train on, as of train.pretrain")
    parser.add_argument(
        "--valid", type=_named_file, action="append", required=True, help="NAME=FILE to score"
    )
    parser.add_argument(
        "--glue", default="", help="folder of its tasks for bert-glue; TensorFlow Datasets if empty"
    )
    parser.add_argument("--parallel", type=int, default=4, help="runs at a time")
    parser.add_argument("--gpus", type=int, default=1, help="that the runs are spread over")
    parser.add_argument("--minutes", type=float, help="start no run that would end after")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/experiments"), help="of the runs"
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="of the records")
    parser.add_argument(
        "--override", type=json.loads, default={}, help="JSON of fields for all runs, for trials"
    )
    parser.add_argument(
        "--override-tasks", type=json.loads, default={}, help="the same for runs of bert-glue"
    )
    arguments = parser.parse_args()
    trial = arguments.override or arguments.override_tasks
    if trial and arguments.results.resolve() == RESULTS.resolve():
        parser.error(
            f"{trial} makes runs that are not those of their names; name another folder for their"
            " records with --results"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    most = (
        arguments.parallel if visible is None else min(arguments.parallel, visible.count(",") + 1)
    )
    if not 1 <= arguments.gpus <= most:
        parser.error(
            f"--gpus={arguments.gpus} must be from 1 to {most}: no more than --parallel, nor than"
            " CUDA_VISIBLE_DEVICES names"
        )
    arguments.valid = dict(arguments.valid)
    arguments.folder = arguments.folder.resolve()
    arguments.results.mkdir(parents=True, exist_ok=True)
    return arguments


def _groups(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(GROUPS)}")
    return names


def _named_file(text: str) -> tuple[str, pathlib.Path]:
    name, _, path = text.partition("=")
    if not path or not pathlib.Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FILE, a file that is there")
    return name, pathlib.Path(path).resolve()


if __name__ == "__main__":
    main()
