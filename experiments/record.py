"""Rows of the records: which run each one is of, and what later runs take from them."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.tuning import slug
from train.config import Config
from train.data.sources import split_spec
from train.folder import ADAPTER_FIELDS
from train.methods import METHODS
from train.tasks.config import EARLIER, FinetuneConfig

MADE = ("date", "commit", "dirty", "command")  # of a record, and of each of its rows
FOLDERS = ("tokenizer", "init_from", "checkpoint")


def read(folder: pathlib.Path, group: str, device: str) -> list[dict[str, Any]]:
    """The rows of a group's record; or none."""
    path = folder / f"accuracy-{group}-{slug(device)}.json"
    return _rows(path) if path.exists() else []


def read_everywhere(folder: pathlib.Path, group: str) -> list[dict[str, Any]]:
    """The rows of a group's records, whatever the device."""
    return [row for path in sorted(folder.glob(f"accuracy-{group}-*.json")) for row in _rows(path)]


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def identity(config: Config | FinetuneConfig) -> dict[str, Any]:
    """All that decides a run's result, in JSON types, with names in place of this machine's paths."""
    fields = config.identity()
    names = {name: pathlib.PurePath(fields[name]).name for name in FOLDERS if name in fields}
    if isinstance(config, FinetuneConfig):
        return fields | names | {"data": pathlib.PurePath(config.data).name}
    sources = [
        (kind, pathlib.PurePath(argument).name if kind == "text" else argument)
        for kind, argument in split_spec(config.data)
    ]
    data = ",".join(f"{kind}:{argument}" if argument else kind for kind, argument in sources)
    return fields | names | {"data": data}


def is_of(row: Mapping[str, Any], config: Config | FinetuneConfig) -> bool:
    """Whether a row is of this run."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    earlier = EARLIER if isinstance(config, FinetuneConfig) else {}
    there = defaults | earlier | row["fields"]  # made by a version without some of today's
    decisive = identity(config).keys() - _idle(config)
    return all(there[name] == value for name, value in identity(config).items() if name in decisive)


def _idle(config: Config | FinetuneConfig) -> frozenset[str]:
    """Fields that decide nothing: of other methods, and of adapters where there are none."""
    if isinstance(config, FinetuneConfig):
        return frozenset()
    used = frozenset().union(*(method.fields for method in METHODS.values()))
    idle = used - METHODS[config.method].fields
    return idle | ADAPTER_FIELDS - {"adapter_rank"} if config.adapter_step is None else idle


def best_rate(rows: Sequence[Mapping[str, Any]], method: str, text: str, *, group: str) -> float:
    """The learning rate with the lowest perplexity of a text, by the mean logarithm over its seeds.

    Raises:
      ValueError: none of the rows says.
    """
    tried = [r for r in rows if r.get("method") == method and text in r.get("perplexity", {})]
    if not tried:
        raise ValueError(
            f"no record of {group} has a learning rate of {method} with a perplexity of"
            f" {text!r}: run --groups={group} first, with the same names in --valid, or give a rate"
            """ with --override='{"lr": 2e-3}' --results=FOLDER"""
        )
    logs: dict[float, list[float]] = {}
    for row in tried:
        logs.setdefault(row["lr"], []).append(math.log(row["perplexity"][text]))
    return min(logs, key=lambda rate: statistics.fmean(logs[rate]))
