"""What is left of a run when it is over: summary.json, the loss curve, a few lines of text."""

import json
import pathlib
import resource
import shlex
import sys
from typing import Any

import jax

from pallas_kernels.files import write_atomically
from train import environment, metrics, plot
from train.config import Config, to_json
from train.display import duration, size
from train.methods import METHODS
from train.plan import Plan

SUMMARY_FILE, PLOT_FILE = "summary.json", "loss.png"


def write_summary(
    config: Config,
    plan: Plan,
    folder: pathlib.Path,
    history: dict[str, Any],
    checkpoints: dict[str, str],
) -> dict[str, Any]:
    """Write summary.json and loss.png of a finished run; returns the summary.

    Args:
      config, plan: the run.
      folder: the run's folder.
      history: what the last checkpoint's record holds under "history".
      checkpoints: paths of the "last" and "best" checkpoints.
    """
    lines = metrics.read(folder / metrics.METRICS_FILE)
    losses = [x["loss"] for x in lines if x.get("loss") is not None]
    tail = losses[-max(len(losses) // 20, 1) :]
    stored, dense = plan.parameters
    evals = history["evals"]
    step_seconds = history["step_seconds"]
    summary = {
        "model": config.model,
        "recipe": config.recipe,
        "method": config.method,
        "sparsity": _sparsity(plan),
        "steps": config.total_steps,
        "tokens": config.total_tokens,
        "held_out_first": evals[0],
        "held_out_last": evals[-1],
        "held_out_best": min(evals, key=lambda x: x["eval_loss"]),
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": sum(tail) / len(tail) if tail else None,
        "tokens_per_second": history["step_tokens"] / step_seconds if step_seconds else None,
        "seconds": history["seconds"],
        "first_step_seconds": history["first_step_seconds"],
        "compiling_seconds": history["compiling_seconds"],
        "programs": history["programs"],
        "peak_memory_bytes": peak_memory(),
        "parameters": stored,
        "dense_parameters": dense,
        "density": plan.density,
        "adapter_step": config.adapter_step,
        "adapter_rank": plan.rank if plan.adapters else 0,
        "adapters": history["adapters"],
        "bad_steps": history["bad_steps"],
        "checkpoints": checkpoints,
        "command": command(),
        "environment": environment.describe(environment.JOB_PACKAGES),
        "config": to_json(config),
    }
    plot.loss_curve(
        lines,
        folder / PLOT_FILE,
        title=f"{config.model}, {config.method} {summary['sparsity']}, {config.data}",
        adapter_step=config.adapter_step,
        phase_starts=tuple(p.start for p in config.phases[1:]),
    )
    write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    return summary


def _sparsity(plan: Plan) -> str:
    """What the run prunes by, as configured; "dense" if it prunes nothing."""
    patterns = {row.pattern for row in plan.explanation.rows} - {"dense"}
    if not patterns:
        return "dense"
    fields = METHODS[plan.config.method].fields
    return plan.config.sparsity if "sparsity" in fields else ",".join(sorted(patterns))


def peak_memory() -> dict[str, int]:
    """Most bytes held so far, by this process and on the device (if it tells)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak["device"] = stats["peak_bytes_in_use"]
    return peak


def command() -> str:
    """The command line of this process, without the path of the interpreter."""
    return shlex.join(["python", "-m", "train.pretrain", *sys.argv[1:]])


def describe(summary: dict[str, Any], folder: pathlib.Path) -> str:
    """The summary as text."""
    first, last, best = (summary[f"held_out_{x}"] for x in ("first", "last", "best"))
    accuracy = next(v for k, v in last.items() if k in ("eval_mlm_accuracy", "eval_token_accuracy"))
    rate, memory = summary["tokens_per_second"], summary["peak_memory_bytes"]
    rows = [
        (
            "held-out loss",
            f"{first['eval_loss']:.4f} -> {last['eval_loss']:.4f} (perplexity "
            f"{last['eval_perplexity']:,.1f}, accuracy {accuracy:.3f}); best "
            f"{best['eval_loss']:.4f} at step {best['step']}",
        ),
        (
            "tokens",
            f"{summary['tokens']:,} in {summary['steps']:,} steps"
            + (f", {rate:,.0f} tokens/s" if rate else ""),
        ),
        ("time", _time(summary)),
        ("memory", ", ".join(f"{where} {size(peak)}" for where, peak in memory.items())),
        (
            "parameters",
            f"{summary['parameters']:,} stored, {summary['dense_parameters']:,} dense; density of "
            f"the pruned kernels {summary['density']:.3f}",
        ),
        ("adapters", _adapters(summary)),
        ("checkpoints", ", ".join(f"{k}: {v}" for k, v in summary["checkpoints"].items())),
        ("run", f"{folder} ({PLOT_FILE}, {metrics.METRICS_FILE}, {SUMMARY_FILE})"),
    ]
    if summary["bad_steps"]:
        rows.append(
            ("skipped", f"{summary['bad_steps']} steps whose loss or gradient was not finite")
        )
    return "\n".join(f"{name:14}{text}" for name, text in rows)


def _time(summary: dict[str, Any]) -> str:
    first, made = summary["first_step_seconds"], summary["compiling_seconds"]
    text = (
        f"{duration(summary['seconds'])} with evaluation, saving, and {duration(made)} of compiling"
        f" {summary['programs']} programs"
    )
    return text if first is None else f"{text}; the first step was done after {duration(first)}"


def _adapters(summary: dict[str, Any]) -> str:
    if not summary["adapters"]:
        return "none"
    return (
        f"{summary['adapters']} linears, rank {summary['adapter_rank']}, joined after step "
        f"{summary['adapter_step']}"
    )
