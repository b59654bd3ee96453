"""What a finetuning job leaves: OUT/finetune.json, written anew after every seed.

    task, metric        the task and its main metric
    run                 model, method, sparsity, adapter_rank, step, seed and lr of the pretraining,
                        and a digest of its checkpoint's files (None: written without digests)
    seeds               by seed: `evals` after every epoch, the `last` and the `best` of them by the
                        main metric, and seconds
    mean                of `last` and `best` by metric: mean and standard deviation over the seeds

`best` chooses the epoch by the held-out examples themselves: it flatters.
"""

import hashlib
import json
import math
import pathlib
import statistics
from typing import Any

from pallas_kernels.files import write_atomically
from train import integrity
from train.serving import Trained
from train.tasks.config import EARLIER, FinetuneConfig
from train.tasks.examples import Splits
from train.tasks.plan import Plan
from train.tasks.registry import Task

RESULT_FILE = "finetune.json"
IDENTITY = ("config", "run", "data")
LATER = ("lr", "weights")  # of `run`: earlier records lack them, and are read all the same


def open_record(
    config: FinetuneConfig, trained: Trained, plan: Plan, examples: Splits, folder: pathlib.Path
) -> dict[str, Any]:
    """The record that the folder holds, to go on with, or a new one.

    Raises:
      ValueError: the folder cannot be written, or holds results of other settings, of another
        checkpoint or of other data.
    """
    record = _new_record(config, trained, plan, examples)
    path = folder / RESULT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written: {error.strerror}; name another folder with --out"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); remove it, or name another --out"
        ) from error
    if saved is None:
        return record
    saved["config"] = EARLIER | saved.get("config", {})
    differing = [
        f"  {part} {name}: {saved.get(part, {}).get(name)} there, {value} here"
        for part in IDENTITY
        for name, value in record[part].items()
        if saved.get(part, {}).get(name) != value and not _is_later(part, name, saved)
    ]
    if differing:
        raise ValueError(
            f"{path} holds results of another job:\n"
            + "\n".join(differing)
            + "\nName another --out."
        )
    return record | saved


def of_seed(task: Task, evals: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of one seed from its evaluations, in order."""
    return {"last": evals[-1], "best": max(evals, key=lambda e: e[task.metrics[0]]), "evals": evals}


def write(record: dict[str, Any], folder: pathlib.Path) -> None:
    """Put the record on disk, with means over its seeds: the old file or the new one."""
    record["mean"] = {which: _means(record, which) for which in ("last", "best")}
    write_atomically(folder / RESULT_FILE, json.dumps(record, indent=1) + "\n")


def describe(record: dict[str, Any], folder: pathlib.Path) -> str:
    """The record as text."""
    lines = [f"{record['task']}, {len(record['seeds'])} seed(s)"]
    for which, metrics in record["mean"].items():
        cells = [
            f"{name} {m['mean']:.4f}" + (f" ± {m['std']:.4f}" if m["std"] is not None else "")
            for name, m in metrics.items()
        ]
        lines.append(f"  {which + ' epoch':11} {', '.join(cells)}")
    return "\n".join([*lines, f"  results     {folder / RESULT_FILE}"])


def _means(record: dict[str, Any], which: str) -> dict[str, dict[str, float | None]]:
    rows = [seed[which] for seed in record["seeds"].values()]
    means = {}
    for name in (name for name in rows[0] if name != "epoch"):
        values = [row[name] for row in rows]
        std = statistics.stdev(values) if len(values) > 1 else None
        means[name] = {"mean": math.fsum(values) / len(values), "std": std}
    return means


def _is_later(part: str, name: str, saved: dict[str, Any]) -> bool:
    return part == "run" and name in LATER and name not in saved.get(part, {})


def _new_record(config, trained, plan, examples) -> dict[str, Any]:
    about, task = trained.about, config.chosen
    names = ("model", "method", "sparsity", "seed", "lr")
    run = {name: about["config"][name] for name in names}
    if not trained.variables["masks"]:
        run["sparsity"] = "dense"
    rank = trained.model.config.rank
    checkpoint = config.run() / "checkpoints" / str(about["step"])
    weights = integrity.fingerprint(checkpoint)
    return {
        "task": task.name,
        "metric": task.metrics[0],
        "run": run | {"adapter_rank": rank, "step": about["step"], "weights": weights},
        "parameters": plan.parameters,
        "data": {split: _digest(rows) for split, rows in examples.items()},
        "examples": {split: len(rows) for split, rows in examples.items()},
        "config": config.identity(),
        "seeds": {},
    }


def _digest(examples) -> str:
    state = hashlib.sha256()
    for example in examples:
        state.update(repr(tuple(example)).encode())
    return state.hexdigest()[:16]
