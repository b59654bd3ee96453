"""One run in a process of the pool: the training job, then perplexities of held-back texts."""

import json
import math
import os
import pathlib
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.runs import COMMON
from pallas_kernels.files import write_atomically
from train.summary import SUMMARY_FILE

HELD_OUT = "held out"  # the text that masked-LM runs are compared by: of their own data
FIELDS = ("method", "sparsity", "mask_init", "backward", "adapter_rank", "adapter_start")
FIELDS += (
    "pruned_lr_scale",
    "adapter_init_scale",
    "adapter_lr_scale",
    "implementation",
    "prune_dy",
    "seed",
)
BATCH = 32


def take_gpu(turns) -> None:
    """Leaves this process the next GPU of a queue; to be called before JAX looks for devices."""
    os.environ["CUDA_VISIBLE_DEVICES"] = turns.get()


def prepare_data(
    data: str, folder: pathlib.Path, families: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """The device's name, and for each family a tokenizer made once, with its tokens in the cache."""
    from train.data import prepare
    from train.environment import accelerator

    paths = {}
    for family in families:
        objective = "mlm" if family == "bert" else "clm"
        cache, path = folder / "tokens", folder / f"tokenizer-{objective}.json"
        if not path.exists():
            size = COMMON[family]["vocab_size"]
            corpus = prepare(data, objective=objective, vocab_size=size, cache_dir=cache)
            write_atomically(path, corpus.tokenizer.to_json())
        prepare(data, objective=objective, tokenizer=path, cache_dir=cache)
        paths[family] = str(path)
    return accelerator(), paths


def train(
    fields: Mapping[str, Any], folder: pathlib.Path, valid: Mapping[str, pathlib.Path]
) -> dict[str, Any]:
    """Runs the job (or goes on with it) and scores the texts; {"error": ...} if it fails."""
    return _caught(_train, fields, folder, valid)


def branch(
    source: pathlib.Path,
    step: int,
    fields: Mapping[str, Any],
    folder: pathlib.Path,
    valid: Mapping[str, pathlib.Path],
) -> dict[str, Any]:
    """`train` from another run's checkpoint on, which stays as it is; {"error": ...} if it fails."""
    return _caught(_branch, fields, folder, valid, source=source, step=step)


def finetune(
    fields: Mapping[str, Any], folder: pathlib.Path, valid: Mapping[str, pathlib.Path]
) -> dict[str, Any]:
    """Finetunes a run on a task; {"error": ...} if it fails. `valid` has no part in it."""
    return _caught(_finetune, fields, folder, valid)


def _caught(function, fields, folder, valid, **more):
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return function(fields, folder, valid, **more)
    except Exception as error:
        (folder.parent / f"{folder.name}.error").write_text(traceback.format_exc())
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _train(fields, folder, valid):
    from rich.console import Console

    from train.config import Config
    from train.job import pretrain

    started = time.monotonic()
    config = Config(**fields, run_dir=str(folder))
    with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
        pretrain(config, console=Console(file=log, width=120))
    summary = json.loads((folder / "summary.json").read_text())
    perplexities = _held_out(summary) if config.objective == "mlm" else score(folder, valid)
    seconds = time.monotonic() - started
    return result(config, summary, perplexities, _curve(folder), seconds)


def _branch(fields, folder, valid, *, source, step):
    if not folder.exists():
        copy_until(source, step, folder)
    return _train(fields, folder, valid)


def copy_until(source: pathlib.Path, step: int, folder: pathlib.Path) -> None:
    """Copies a run as it was after a step, of which it has a checkpoint.

    Raises:
      FileNotFoundError: it has none.
    """
    if not (source / "checkpoints" / str(step)).exists():
        raise FileNotFoundError(f"{source.name} has no checkpoint of step {step} to go on from")

    def others(path: str, names: list[str]) -> list[str]:
        if pathlib.Path(path) == source / "checkpoints":
            return [name for name in names if name != str(step)]
        return [SUMMARY_FILE] if pathlib.Path(path) == source else []

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=others)
    partial.rename(folder)


def _finetune(fields, folder, valid):
    from rich.console import Console

    from train.tasks.config import FinetuneConfig
    from train.tasks.job import finetune

    started = time.monotonic()
    config = FinetuneConfig(**fields, out=str(folder))
    with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
        record = finetune(config, console=Console(file=log, width=120))
    return {
        "task": config.task,
        "metric": record["metric"],
        "score": record["mean"]["last"][record["metric"]]["mean"],
        "mean": record["mean"],
        "finetuning_seeds": sorted(map(int, record["seeds"])),
        "run": record["run"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _held_out(summary) -> dict[str, dict[str, Any]]:
    """A masked LM has no perplexity of a text; that of masked words held out, at the end."""
    last = summary["held_out_last"]
    loss = last["eval_loss"]
    return {
        HELD_OUT: {"perplexity": last["eval_perplexity"], "nats_per_token": loss, "tokens": None}
    }


def result(config, summary, perplexities, curve, seconds: float) -> dict[str, Any]:
    """What the record says of a run."""
    settings = {name: getattr(config, name) for name in FIELDS}
    return {
        "model": config.model,
        **settings,
        "lr": config.lr[0],
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "batch_size": config.batch_size[0],
        "seq_len": config.seq_len[0],
        "adapter_rank": summary["adapter_rank"],
        "adapter_step": summary["adapter_step"],
        "parameters": summary["parameters"],
        "dense_parameters": summary["dense_parameters"],
        "held_out_loss": summary["held_out_last"]["eval_loss"],
        "perplexity": {name: found["perplexity"] for name, found in perplexities.items()},
        "loss": {name: found["nats_per_token"] for name, found in perplexities.items()},
        "scored_tokens": {name: found["tokens"] for name, found in perplexities.items()},
        "curve": curve,
        "tokens_per_second": _rounded(summary["tokens_per_second"]),
        "seconds": round(seconds, 1),
        "job_seconds": round(summary["seconds"], 1),
        "first_step_seconds": _rounded(summary["first_step_seconds"]),
        "compiling_seconds": _rounded(summary["compiling_seconds"]),
    }


def score(folder: pathlib.Path, valid: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """`train.evaluate.perplexity` of the last checkpoint on each text."""
    from train import serving
    from train.data import read_documents
    from train.evaluate import _tokens, perplexity

    served = serving.load(folder)
    found = {}
    for name, path in valid.items():
        tokens, _, _ = _tokens(served, read_documents(f"text:{path}"), None)
        found[name] = perplexity(served, tokens, batch_size=BATCH)
    return found


def _curve(folder: pathlib.Path) -> list[list[float]]:
    """[step, held-out loss] of each evaluation."""
    from train import metrics

    lines = metrics.read(folder / metrics.METRICS_FILE)
    pairs = [(x["step"], x["eval_loss"]) for x in lines if x.get("eval_loss") is not None]
    return [[step, round(loss, 4)] for step, loss in pairs if math.isfinite(loss)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
