"""Runs of the training job that compare methods, and their record:

    python -m experiments --groups=gpt2-lr,gpt2-methods --data='text:books/train.txt.xz' \
        --valid books=books/valid.txt.xz

Each group of `experiments.runs` becomes ``benchmarks/results/accuracy-<group>-<device>.json``,
written after every run; runs that are in it are not run again. Small models leave a GPU idle while
they are compiled, so several run at a time (``--parallel``), except where speed counts.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.console import Console

from benchmarks.record import RESULTS, make_record, write_record
from experiments import work
from experiments.runs import ALONE, COMMON, GROUPS, Run, family_of
from pallas_kernels.tuning import slug
from train.environment import JOB_PACKAGES

MOST_FAILURES = 3


def main() -> None:
    arguments = _arguments()
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    console = Console(width=120)
    with futures.ProcessPoolExecutor(arguments.parallel, mp_context=context) as pool:
        families = sorted(set(map(family_of, arguments.groups)))
        device, tokenizers = pool.submit(
            work.prepare_data, arguments.data, arguments.folder, families
        ).result()
        for group in arguments.groups:
            parallel = 1 if group in ALONE else arguments.parallel
            tokenizer = tokenizers[family_of(group)]
            _Group(group, arguments, device, tokenizer, console).run(pool, parallel, stop)


class _Group:
    """The runs of a group, their order and their record."""

    def __init__(self, name, arguments, device: str, tokenizer: str, console: Console):
        self.name, self.arguments, self.device, self.console = name, arguments, device, console
        self.tokenizer, self.longest = tokenizer, 0.0
        self.rows = [row for row in read(arguments.results, name, device) if "error" not in row]
        self.text = {n: _digest(path) for n, path in arguments.valid.items()}

    def run(self, pool: futures.Executor, parallel: int, stop: float) -> None:
        waiting = [run for run in GROUPS[self.name] if not self._done(run.variant, run.seed)]
        waiting = [run for run in waiting if not _left_out(run, self.arguments)]
        total, running = len(waiting), {}
        begin = time.monotonic()
        while waiting or running:
            if len(self.rows) >= MOST_FAILURES and all("error" in row for row in self.rows):
                self.console.print(f"{self.name}: every run failed; the others are not tried")
                waiting.clear()
            for run in [run for run in waiting if self._ready(run)][: parallel - len(running)]:
                if time.monotonic() + self.longest > stop:
                    break
                waiting.remove(run)
                function, fields = self._job(run)
                submit = functools.partial(pool.submit, function, fields)
                started = submit(self._folder(run.name), self.arguments.valid)
                running[started] = (run, time.monotonic())
            if not running:
                break
            for ended in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                run, since = running.pop(ended)
                self.longest = max(self.longest, time.monotonic() - since)
                self._add(run, ended.result())
                left = (time.monotonic() - begin) / max(1, total - len(waiting) - len(running))
                self.console.print(
                    f"{self.name}: {total - len(waiting) - len(running)} of {total}, about"
                    f" {left * (len(waiting) + len(running)):.0f} s to go"
                )
        for run in waiting:
            self.console.print(f"{self.name}: not run, for want of time: {run.name}")

    def _done(self, variant: str, seed: int) -> bool:
        done = (row for row in self.rows if "error" not in row)
        return any((row["variant"], row["seed"]) == (variant, seed) for row in done)

    def _ready(self, run: Run) -> bool:
        if run.task is not None:
            return (self._folder(_before(run), self._methods) / "summary.json").exists()
        return run.after is None or self._done(run.after, run.seed)

    @property
    def _methods(self) -> str:
        return f"{family_of(self.name)}-methods"

    def _folder(self, name: str, group: str | None = None) -> pathlib.Path:
        safe = "".join(c if c.isalnum() else "-" for c in name)
        return self.arguments.folder / (group or self.name) / safe

    def _job(self, run: Run) -> tuple[Callable, dict[str, Any]]:
        if run.task is None:
            return work.train, self._fields(run)
        fields = {"task": run.task, "data": self.arguments.glue, "seeds": (run.seed,)}
        fields["checkpoint"] = str(self._folder(_before(run), self._methods))
        return work.finetune, fields | dict(run.fields) | self.arguments.override_tasks

    def _fields(self, run: Run) -> dict[str, Any]:
        fields = dict(COMMON[family_of(self.name)]) | dict(run.fields) | {"seed": run.seed}
        fields |= {"data": self.arguments.data, "tokenizer": self.tokenizer}
        fields["cache_dir"] = str(self.arguments.folder / "tokens")
        if run.after is not None:
            fields["init_from"] = str(self._folder(_before(run)))
            del fields["tokenizer"]  # that of the other run
        if run.tuned_as is not None:
            family = family_of(self.name)
            rows = read(self.arguments.results, f"{family}-lr", self.device)
            text = work.HELD_OUT if family == "bert" else next(iter(self.arguments.valid))
            fields["lr"] = best_rate(rows, run.tuned_as, text)
        return fields | self.arguments.override

    def _add(self, run: Run, found: Mapping[str, Any]) -> None:
        self.rows.append({"variant": run.variant, "seed": run.seed, **found})
        record = make_record(
            f"accuracy-{self.name}",
            self.rows,
            device=self.device,
            module="experiments",
            packages=JOB_PACKAGES,
        )
        write_record(record | {"valid": self.text}, self.arguments.results)
        numbers = found.get("perplexity") or {found.get("metric"): found.get("score")}
        told = found.get("error") or ", ".join(f"{k} {v:.2f}" for k, v in numbers.items())
        self.console.print(f"{self.name}: {run.name}: {told}  ({found.get('seconds')} s)")


def _before(run: Run) -> str:
    return f"{run.after}-seed-{run.seed}"


def best_rate(rows: Sequence[Mapping[str, Any]], method: str, text: str) -> float:
    """The learning rate with the lowest perplexity; 2e-3 where none was tried."""
    tried = [row for row in rows if row.get("method") == method and "error" not in row]
    return min(tried, key=lambda row: row["perplexity"][text])["lr"] if tried else 2e-3


def read(folder: pathlib.Path, group: str, device: str) -> list[dict[str, Any]]:
    """The rows of a group's record; none if there is no record."""
    path = folder / f"accuracy-{group}-{slug(device)}.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def _left_out(run: Run, arguments: argparse.Namespace) -> bool:
    return bool(arguments.variants) and run.variant not in arguments.variants


def _digest(path: pathlib.Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


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
