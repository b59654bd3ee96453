"""Write the tables and pictures: ``python -m benchmarks.report`` (``--check`` only compares).

Measured tables come from the records in benchmarks/results, the others are worked out from shapes.
Each lies between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->`` in README.md or a page of
docs; a test holds them to it. The pictures are drawn from the same records.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    pictures,
    report_accuracy,
    report_inference,
    report_kernels,
    report_multi_gpu,
    report_scaling,
    report_tasks,
    report_training,
)
from benchmarks.record import RESULTS, ROOT
from benchmarks.tables import markdown, records, sources

README = ROOT / "README.md"
DOCS = ROOT / "docs"
SECTION = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results:\2 -->)", re.DOTALL)
STATE_MODELS = ("bert-large", "gpt2-small", "gpt2-xl", "opt-2.7b", "opt-13b", "opt-66b", "llama-3-8b", "mistral-7b")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    changed = {}
    for page, tables in PAGES.items():
        old = page.read_text(encoding="utf-8")
        if (new := updated(old, tables, page.name)) != old:
            changed[page] = new
    for path, new in drawn().items():
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            changed[path] = new
    if arguments.check and changed:
        names = ", ".join(path.name for path in changed)
        sys.exit(f"not up to date with benchmarks/results: {names}; run: make report")
    for path, new in changed.items():
        path.write_text(new, encoding="utf-8")


def updated(
    text: str, tables: dict[str, Callable[[], str]] | None = None, name: str = "README.md"
) -> str:
    """The text of a page with every table made anew.

    Args:
      tables: those of the page, by name; README.md's if not given.

    Raises:
      ValueError: a marker names no known table, or a table has no markers.
    """
    tables = TABLES if tables is None else tables
    found = {match[2] for match in SECTION.finditer(text)}
    if found != tables.keys():
        raise ValueError(f"{name} has markers for {sorted(found)}; the tables are {sorted(tables)}")
    return SECTION.sub(lambda match: f"{match[1]}{tables[match[2]]()}\n{match[3]}", text)


def drawn() -> dict[Path, str]:
    """The text of every picture of the records, by its path in docs."""
    parts = (pictures, report_training, report_accuracy, report_scaling, report_multi_gpu)
    return {path: text for part in parts for path, text in part.drawn(DOCS).items()}


def quickstart(folder: Path = RESULTS) -> str:
    """Held-out loss of the quickstart job, sparse and dense, from records."""
    found = records("quickstart", folder)
    if not found:
        return "Not measured yet: `python -m benchmarks.quickstart`."
    header = ("model", "method", "parameters", "tokens", "held-out loss", "perplexity", "accuracy")
    rows = [
        (
            r["model"],
            _method(r),
            f"{r['parameters_stored'] / 1e6:.1f} M",
            f"{r['tokens']:,} in {r['steps']:,} steps",
            f"{r['held_out_loss_first']:.3f} → {r['held_out_loss']:.3f}",
            f"{r['held_out_perplexity']:,.0f}",
            f"{r['held_out_accuracy']:.3f}",
            f"{r['tokens_per_second']:,.0f}",
        )
        for record in found
        for r in record["results"]
    ]
    return markdown((*header, "tokens/s"), rows) + sources(found)


def _method(row: dict[str, Any]) -> str:
    if row["method"] != "slope":
        return row["method"]
    joined = row["adapter_step"]
    adapters = "" if joined is None else f", rank {row['adapter_rank']} from step {joined}"
    return f"slope {row['sparsity']}{adapters}"


def input_pipeline(folder: Path = RESULTS) -> str:
    """Tokens per second of the input pipeline, from records."""
    found = records("input-pipeline", folder)
    if not found:
        return "Not measured yet: `python -m benchmarks.input_pipeline`."
    cells: dict[tuple[str, int, int], dict[str, str]] = {}
    for r in (r for record in found for r in record["results"]):
        key = (r["objective"], r["seq_len"], r["batch_size"])
        cells.setdefault(key, {})[r["mode"]] = f"{r['tokens_per_s'] / 1e6:.1f} M"
    modes = list(dict.fromkeys(mode for row in cells.values() for mode in row))
    rows = [
        (objective, f"{batch} x {length}", *(row.get(mode, "") for mode in modes))
        for (objective, length, batch), row in cells.items()
    ]
    header = ("objective", "batch", *(f"tokens/s, {mode}" for mode in modes))
    return markdown(header, rows) + sources(found)


def state() -> str:
    """Bytes of the training state by model, from shapes."""
    from benchmarks.memory import account, whole

    rows = []
    for model in STATE_MODELS:
        found = account(whole(model), activations=False)
        rows.append(
            (
                model,
                f"{found.dense_total('parameters') / 4e6:,.0f} M",
                f"{found.total('parameters') / 4e6:,.0f} M",
                f"{found.dense_state_bytes / 2**30:,.1f} GiB",
                f"{found.state_bytes / 2**30:,.1f} GiB",
                f"{found.ratio:.2f}",
            )
        )
    header = ("model", "parameters, dense", "stored, 2:4", "state, dense", "state, 2:4", "ratio")
    return markdown(header, rows)


def soak() -> str:
    """What kills at random moments did to runs."""
    header = ("record", "kills", "at", "runs", "equal to one never stopped", "checkpoints lost")
    found = records("soak")
    rows = [
        (
            record["benchmark"],
            f"{r['kills']}",
            ", ".join(f"{moment} {count}" for moment, count in r["by_moment"].items()),
            f"{r['runs']}",
            f"{r['runs_equal_to_the_uninterrupted_one']}",
            f"{r['checkpoints_lost']}",
        )
        for record in found
        for r in [record["results"]]
    ]
    return markdown(header, rows) + sources(found)


def explanation() -> str:
    """What `explain` prints for BERT-base with adapters, on a CPU."""
    import jax

    from slope_jax import explain
    from slope_jax.models import build

    model = build("bert-base", adapter_rank=12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    return f"```\n{explain(model, shapes)}\n```"


TABLES: dict[str, Callable[[], str]] = {
    "explain": explanation,
    "state": state,
    "quickstart": quickstart,
    "input-pipeline": input_pipeline,
    "kernels": report_kernels.summary,
    "train-step": report_training.steps,
    "inference": report_inference.summary,
    "accuracy": report_accuracy.summary,
    "accuracy-beside": report_accuracy.beside_methods,
    "accuracy-glue": report_tasks.glue,
}
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: TABLES,
    DOCS / "kernels.md": {"kernels-in-full": partial(report_kernels.full, names=pictures.names)},
    DOCS / "training.md": {
        "train-step": report_training.steps,
        "train-step-depths": report_training.depths,
        "training-memory": report_training.memory,
        "step-profile": report_training.profile,
    },
    DOCS / "inference.md": {
        "inference": report_inference.summary,
        "inference-weights": report_inference.weights,
        "inference-times": report_inference.times,
        "serving-profile": report_inference.profile,
        "generation": report_inference.generation,
    },
    DOCS / "accuracy.md": {
        "accuracy": report_accuracy.summary,
        "accuracy-rates": report_accuracy.rates,
        "accuracy-adapters": report_accuracy.adapters,
        "accuracy-beside": report_accuracy.beside_methods,
        "accuracy-capacity": report_accuracy.capacity,
        "accuracy-ablations": report_accuracy.ablations,
        "accuracy-small": report_accuracy.small,
        "accuracy-bert": report_accuracy.bert,
        "accuracy-glue": report_tasks.glue,
    },
    DOCS / "robustness.md": {"soak": soak},
    DOCS / "devices.md": {"sharded-step": report_scaling.sharded},
    DOCS / "scaling.md": {
        "communication": report_scaling.communication,
        "communication-kinds": report_scaling.kinds,
        "communication-added": report_scaling.added,
        "multi-gpu": report_multi_gpu.measured,
        "scaling-assumed": report_scaling.assumptions,
        "scaling-links": report_scaling.links,
        "scaling-weak": report_scaling.weak,
    },
}


if __name__ == "__main__":
    main()
