"""One run in a process of the pool: the training job, then perplexities of held-back texts."""

import json
import math
import pathlib
import time
import traceback
from collections.abc import Mapping
from typing import Any

from experiments.runs import GPT2
from pallas_kernels.files import write_atomically

FIELDS = ("method", "sparsity", "mask_init", "backward", "adapter_rank", "adapter_start")
FIELDS += ("adapter_init_scale", "adapter_lr_scale", "implementation", "prune_dy", "seed")
BATCH = 32


def prepare_data(data: str, folder: pathlib.Path) -> tuple[str, str]:
    """The device's name, and a tokenizer made once for all runs, with its tokens in the cache."""
    from train.data import prepare
    from train.environment import accelerator

    cache, path = folder / "tokens", folder / "tokenizer.json"
    if not path.exists():
        corpus = prepare(data, objective="clm", vocab_size=GPT2["vocab_size"], cache_dir=cache)
        write_atomically(path, corpus.tokenizer.to_json())
    prepare(data, objective="clm", tokenizer=path, cache_dir=cache)
    return accelerator(), str(path)


def train(
    fields: Mapping[str, Any], folder: pathlib.Path, valid: Mapping[str, pathlib.Path]
) -> dict[str, Any]:
    """Runs the job (or goes on with it) and scores the texts; {"error": ...} if it fails."""
    try:
        return _train(fields, folder, valid)
    except Exception as error:
        (folder.parent / f"{folder.name}.error").write_text(traceback.format_exc())
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _train(fields, folder, valid):
    from rich.console import Console

    from train.config import Config
    from train.job import pretrain

    started = time.monotonic()
    config = Config(**fields, run_dir=str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
        pretrain(config, console=Console(file=log, width=120))
    summary = json.loads((folder / "summary.json").read_text())
    perplexities = score(folder, valid)
    seconds = time.monotonic() - started
    return result(config, summary, perplexities, _curve(folder), seconds)


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
