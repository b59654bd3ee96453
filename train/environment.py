"""What a result was obtained on: device, versions, date, commit. No paths, no host names."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
JOB_PACKAGES = ("orbax-checkpoint", "grain", "tokenizers")  # besides, for a pretraining run
COMMIT_VARIABLE = "SLOPE_COMMIT"


def describe(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Device, driver, versions, date and time (UTC, ISO 8601) and commit, in JSON types.

    Args:
      packages: distributions whose versions matter, besides JAX's and numpy.

    Example:
      >>> sorted(describe())
      ['commit', 'cpu', 'date', 'device', 'dirty', 'driver', 'system', 'time', 'versions']
    """
    revision, dirty = commit()
    now = datetime.datetime.now(datetime.UTC)
    return {
        "device": accelerator(),
        "cpu": cpu(),
        "driver": _driver(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions((*PACKAGES, *packages))},
        "date": now.date().isoformat(),
        "time": now.time().isoformat("minutes"),
        "commit": revision,
        "dirty": dirty,
    }


def cpu() -> str:
    """The processor and the cores this process may use, such as "Intel Xeon (2 cores)"."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        model = match[1]
    model = re.sub(r"\(R\)|\(TM\)|\bCPU\b|@.*", "", model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{' '.join(model.split())} ({cores} cores)"


def accelerator() -> str:
    """The kind of JAX's devices and how many, such as "NVIDIA H100 80GB HBM3"; the CPU if none."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return cpu()
    count = f"{len(devices)}x " if len(devices) > 1 else ""
    return count + devices[0].device_kind


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> tuple[str | None, bool]:
    """The commit checked out, and whether files differ from it; earlier results may.

    SLOPE_COMMIT names the commit where the code lies without its history, or with an older one.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named, False
    head = _output("git", "rev-parse", "--verify", "--quiet", "HEAD")
    if head is None:
        return None, True
    status = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head, status != ""


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
