"""What every benchmark result carries: where, with what, from which commit it was measured.

A record is a JSON object under ``benchmarks/results``. It names no host and no path, so it can be
published as it is. One made from a tree with uncommitted changes says so ("dirty": true) and does
not belong into the repository.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.files import write_atomically
from pallas_kernels.tuning import slug
from train import environment

ROOT = environment.ROOT
RESULTS = ROOT / "benchmarks" / "results"


def make_record(
    benchmark: str,
    results: Sequence[dict[str, Any]] | dict[str, Any],
    *,
    device: str,
    module: str,
    packages: Iterable[str] = (),
) -> dict[str, Any]:
    """Joins results with the circumstances they were measured in.

    Args:
      benchmark: its name, such as "input-pipeline".
      results: a dict, or a list of dicts, of numbers with the unit in the key.
      device: ``environment.cpu()`` or ``environment.accelerator()``.
      module: as run, such as "benchmarks.input_pipeline".
      packages: distributions whose versions matter, besides JAX's and numpy.
    """
    return {
        "benchmark": benchmark,
        **environment.describe(packages),
        "device": device,
        "command": command(module),
        "results": results,
    }


def write_record(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``<benchmark>-<device>.json`` atomically and returns its path."""
    path = folder / f"{record['benchmark']}-{slug(record['device'])}.json"
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    if record["dirty"]:
        print("uncommitted changes: this record is not one to commit", file=sys.stderr)
    return path


def command(module: str) -> str:
    """The command line of this process without paths of this machine."""
    arguments = [re.sub(r"(^|=|:)[~/].*", r"\1...", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])
