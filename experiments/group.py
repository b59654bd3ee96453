"""The runs of a group: their order, their settings and their record."""

import argparse
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent import futures
from typing import Any

from rich.console import Console

from benchmarks.record import make_record, write_record
from experiments import work
from experiments.record import MADE, best_rate, identity, is_of, read, read_everywhere
from experiments.runs import COMMON, GROUPS, Run, family_of
from train.config import Config
from train.environment import JOB_PACKAGES
from train.summary import SUMMARY_FILE
from train.tasks.config import FinetuneConfig

MOST_FAILURES = 3
Before = tuple[str, str | None, int]  # group, variant and seed of a run that others begin from


class Group:
    """The runs of a group on a device."""

    def __init__(self, name, arguments, device: str, tokenizer: str, console: Console):
        self.name, self.arguments, self.device, self.console = name, arguments, device, console
        self.tokenizer, self.longest = tokenizer, 0.0
        self.rows = [row for row in read(arguments.results, name, device) if "error" not in row]
        self.text = {n: _digest(path) for n, path in arguments.valid.items()}
        self.runs = [run for run in GROUPS[name] if not _left_out(run, arguments)]
        self.failed = False

    def run(
        self, pool: futures.Executor, parallel: int, stop: float, needed: Set[Before] = frozenset()
    ) -> bool:
        """Runs what isn't recorded; False if a run failed, or waits for one that did.

        Args:
          needed: runs, of this group among others, whose folders another group goes on from.
        """
        try:
            self.check_rates()
        except ValueError as error:  # the group of rates failed, or had no time
            self.console.print(f"{self.name}: not run: {error}", markup=False)
            return False
        waiting = self._waiting(needed)
        total, running = len(waiting), {}
        begin = time.monotonic()
        while waiting or running:
            if len(self.rows) >= MOST_FAILURES and all("error" in row for row in self.rows):
                self.console.print(f"{self.name}: every run failed; the others are not tried")
                waiting.clear()
            busy = [*waiting, *(run for run, _ in running.values())]
            for run in [run for run in waiting if self._ready(run, busy)][
                : parallel - len(running)
            ]:
                if time.monotonic() + self.longest > stop:
                    break
                waiting.remove(run)
                submit = functools.partial(pool.submit, self._function(run), self._fields(run))
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
        blocked = [run for run in waiting if self._blocked(run, waiting)]
        for run in waiting:
            why = "for want of time"
            if run in blocked:
                why = f"it waits for {_before(run)}, which failed or was not run"
            self.console.print(f"{self.name}: not run, {why}: {run.name}", soft_wrap=True)
        return not self.failed and not blocked

    def _function(self, run: Run) -> Callable[..., dict[str, Any]]:
        if run.task is not None:
            return work.finetune
        if run.branch is None:
            return work.train
        return functools.partial(work.branch, self._folder(_before(run)), run.branch)

    @property
    def rates(self) -> str:
        """The group of the learning rates that this one takes."""
        return f"{family_of(self.name)}-lr"

    def check_rates(self) -> None:
        """Raises a ValueError if there is no learning rate for one of the runs."""
        for run in self.runs:
            self._rate(run)

    def needed_elsewhere(self) -> set[Before]:
        """The runs of other groups that runs of this one have yet to go on from."""
        tasks = [run for run in self.runs if run.task is not None and not self._done(run)]
        return {(self._methods, run.after, run.seed) for run in tasks}

    def _waiting(self, needed: Set[Before]) -> list[Run]:
        """What isn't recorded, and what is but has lost its folder, where a run begins from that."""
        new = [run for run in self.runs if not self._done(run)]
        needed = needed | {(self.name, run.after, run.seed) for run in new if run.task is None}
        again = [
            run
            for run in GROUPS[self.name]
            if (self.name, run.variant, run.seed) in needed
            and self._done(run)
            and not _is_complete(self._folder(run.name))
        ]
        for run in again:
            self.console.print(f"{self.name}: run again, for its folder is needed: {run.name}")
        return [run for run in GROUPS[self.name] if run in new or run in again]

    def _row(self, variant: str, seed: int) -> dict[str, Any]:
        (row,) = (r for r in self.rows if (r["variant"], r["seed"]) == (variant, seed))
        return row

    def _done(self, run: Run) -> bool:
        found = (
            row for row in self.rows if (row["variant"], row["seed"]) == (run.variant, run.seed)
        )
        return any("error" not in row and is_of(row, self._config(run)) for row in found)

    def _ready(self, run: Run, busy: Sequence[Run] = ()) -> bool:
        if run.after is None:
            return True
        if run.task is not None:
            return _is_complete(self._folder(_before(run), self._methods))
        (before,) = (r for r in GROUPS[self.name] if (r.variant, r.seed) == (run.after, run.seed))
        complete = _is_complete(self._folder(before.name))
        return before not in busy and complete and self._done(before)

    def _blocked(self, run: Run, waiting: Sequence[Run]) -> bool:
        """Whether the run waits for one that will not come, however much time there is."""
        if run.task is None:
            for before in waiting:
                if (before.variant, before.seed) == (run.after, run.seed):
                    return self._blocked(before, waiting)
        return not self._ready(run)

    @property
    def _methods(self) -> str:
        return f"{family_of(self.name)}-methods"

    def _folder(self, name: str, group: str | None = None) -> pathlib.Path:
        safe = "".join(c if c.isalnum() else "-" for c in name)
        return self.arguments.folder / (group or self.name) / safe

    def _config(self, run: Run) -> Config | FinetuneConfig:
        fields = self._fields(run)
        return Config(**fields) if run.task is None else FinetuneConfig(**fields)

    def _fields(self, run: Run) -> dict[str, Any]:
        if run.task is not None:
            return self._task_fields(run)
        fields = dict(COMMON[family_of(self.name)]) | dict(run.fields) | {"seed": run.seed}
        fields |= {"data": self.arguments.data, "tokenizer": self.tokenizer}
        fields["cache_dir"] = str(self.arguments.folder / "tokens")
        if run.after is not None and run.branch is None:
            fields["init_from"] = str(self._folder(_before(run)))
            del fields["tokenizer"]  # that of the other run
        return fields | self._rate(run) | self.arguments.override

    def _task_fields(self, run: Run) -> dict[str, Any]:
        fields = {"task": run.task, "data": self.arguments.glue, "seeds": (run.seed,)}
        fields["checkpoint"] = str(self._folder(_before(run), self._methods))
        return fields | dict(run.fields) | self.arguments.override_tasks

    def _rate(self, run: Run) -> dict[str, float]:
        if run.tuned_as is None or "lr" in self.arguments.override:
            return {}
        rows = read_everywhere(self.arguments.results, self.rates)
        bert = family_of(self.name) == "bert"
        text = work.HELD_OUT if bert else next(iter(self.arguments.valid))
        return {"lr": best_rate(rows, run.tuned_as, text, group=self.rates)}

    def _add(self, run: Run, found: Mapping[str, Any]) -> None:
        failed = "error" in found
        self.failed |= failed
        record = make_record(
            f"accuracy-{self.name}",
            [],
            device=self.device,
            module="experiments",
            packages=JOB_PACKAGES,
        )
        made = {name: record[name] for name in MADE}
        fields = {} if failed else {"fields": identity(self._config(run))}
        row = {"variant": run.variant, "seed": run.seed, **found, **fields, **made}
        if run.branch is not None and not failed:
            # Should the other be run again, it will come out differently.
            row["without"] = self._row(run.after, run.seed)["perplexity"]
        if not (failed and self._done(run)):  # run again for its folder: its result stays
            same = (run.variant, run.seed)
            self.rows = [r for r in self.rows if (r["variant"], r["seed"]) != same] + [row]
        dirty = any(row.get("dirty", False) for row in self.rows)
        record |= {"results": self.rows, "dirty": dirty, "valid": self.text}
        write_record(record, self.arguments.results)
        numbers = found.get("perplexity") or {found.get("metric"): found.get("score")}
        told = found.get("error") or ", ".join(f"{k} {v:.2f}" for k, v in numbers.items())
        self.console.print(f"{self.name}: {run.name}: {told}  ({found.get('seconds')} s)")


def _before(run: Run) -> str:
    return f"{run.after}-seed-{run.seed}"


def _is_complete(folder: pathlib.Path) -> bool:
    return (folder / SUMMARY_FILE).exists()


def _left_out(run: Run, arguments: argparse.Namespace) -> bool:
    return bool(arguments.variants) and run.variant not in arguments.variants


def _digest(path: pathlib.Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
