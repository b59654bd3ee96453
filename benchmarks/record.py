"""What every benchmark result carries: where, with what, from which commit it was measured.

A record is a JSON object under ``benchmarks/results``. It names no host and no path, so it can be
published as it is. One made from a tree with uncommitted changes says so ("dirty": true) and does
not belong into the repository.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def cpu() -> str:
    """The processor and the cores this process may use, such as "Intel Xeon (2 cores)"."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        model = match[1]
    model = re.sub(r"\(R\)|\(TM\)|\bCPU\b|@.*", "", model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{' '.join(model.split())} ({cores} cores)"


def accelerator() -> str:
    """The kind of JAX's devices and how many, such as "NVIDIA H100 80GB HBM3"; the CPU if none."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return cpu()
    count = f"{len(devices)}x " if len(devices) > 1 else ""
    return count + devices[0].device_kind


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
      device: ``cpu()`` or ``accelerator()``.
      module: as run, such as "benchmarks.input_pipeline".
      packages: distributions whose versions matter, besides JAX's and numpy.
    """
    commit, dirty = _commit()
    return {
        "benchmark": benchmark,
        "device": device,
        "driver": _driver(),
        "versions": {"python": platform.python_version()} | _versions([*PACKAGES, *packages]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "dirty": dirty,
        "command": command(module),
        "results": results,
    }


def write_record(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``<benchmark>-<device>.json`` atomically and returns its path."""
    path = folder / f"{record['benchmark']}-{slug(record['device'])}.json"
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if record["dirty"]:
        print("uncommitted changes: this record is not one to commit", file=sys.stderr)
    return path


def command(module: str) -> str:
    """The command line of this process without paths of this machine."""
    arguments = [re.sub(r"(^|=)[~/].*", r"\1...", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _commit() -> tuple[str | None, bool]:
    """The commit checked out, and whether files differ from it; earlier results may."""
    status = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return _output("git", "rev-parse", "HEAD"), status is None or bool(status)
