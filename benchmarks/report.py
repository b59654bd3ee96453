"""Write the tables of README.md: ``python -m benchmarks.report`` (``--check`` only compares).

Measured tables come from the records in benchmarks/results, the others are worked out from shapes.
Each lies between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``; a test holds README.md
to them.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT

README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results:\2 -->)", re.DOTALL)
STATE_MODELS = ("bert-base", "bert-large", "gpt2-small", "gpt2-large", "gpt2-xl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if arguments.check and new != old:
        sys.exit("README.md is not up to date with benchmarks/results; run: make report")
    if new != old:
        README.write_text(new, encoding="utf-8")


def updated(text: str) -> str:
    """The text of README.md with every table made anew.

    Raises:
      ValueError: a marker names no known table, or a table has no markers.
    """
    found = {match[2] for match in SECTION.finditer(text)}
    if found != TABLES.keys():
        raise ValueError(
            f"README.md has markers for {sorted(found)}; the tables are {sorted(TABLES)}"
        )
    return SECTION.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def records(benchmark: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records whose benchmark's name starts so, in the order of their files' names."""
    paths = sorted(folder.glob(f"{benchmark}*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def quickstart(folder: Path = RESULTS) -> str:
    """Held-out loss of the quickstart job, sparse and dense, from records."""
    found = records("quickstart", folder)
    if not found:
        return "Not measured yet: `python -m benchmarks.quickstart`."
    header = ("model", "method", "parameters", "tokens", "held-out loss", "perplexity", "accuracy")
    rows = [
        (
            r["model"],
            f"slope {r['sparsity']}, rank {r['adapter_rank']} from step {r['adapter_step']}"
            if r["method"] == "slope"
            else r["method"],
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
    return markdown((*header, "tokens/s"), rows) + _sources(found)


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
    return markdown(header, rows) + _sources(found)


def state() -> str:
    """Bytes of the training state by model, from shapes."""
    from train.plan import make_plan
    from train.recipes import make_config

    rows = []
    for model in STATE_MODELS:
        plan = make_plan(make_config(model, "paper"))
        stored, dense = plan.parameters
        ours = sum(amount.nbytes for amount in plan.amounts.values())
        theirs = sum(amount.dense_nbytes for amount in plan.amounts.values())
        rows.append(
            (
                model,
                f"{dense / 1e6:,.0f} M",
                f"{stored / 1e6:,.0f} M",
                f"{theirs / 2**30:.2f} GiB",
                f"{ours / 2**30:.2f} GiB",
                f"{ours / theirs:.2f}",
            )
        )
    header = ("model", "parameters, dense", "stored, 2:4", "state, dense", "state, 2:4", "ratio")
    return markdown(header, rows)


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
}


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown; columns of numbers to the right."""
    right = [all(re.match(r"[\d.]", row[i]) for row in rows) for i in range(len(header))]
    rule = tuple("---:" if number else "---" for number in right)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _sources(found: list[dict[str, Any]]) -> str:
    lines = [
        f"{r['device']}, JAX {r['versions']['jax']}, Python {r['versions']['python']}, {r['date']}, "
        f"commit {r['commit'][:10]}: `{r['command']}`"
        for r in found
    ]
    return "\n\n" + "  \n".join(lines)


if __name__ == "__main__":
    main()
