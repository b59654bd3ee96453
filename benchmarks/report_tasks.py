"""What the records of ``python -m experiments`` say of models finetuned on tasks."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.report_accuracy import MISSING, Row, finished, in_order, made_by, spread_of
from benchmarks.tables import markdown, records


def glue(folder: Path = RESULTS) -> str:
    """What the BERTs of every method score after finetuning."""
    pages = []
    for record in records("accuracy-bert-glue", folder):
        rows = in_order("bert-glue", finished(record["results"]))
        if rows:
            failed = [
                f"Failed: {r['variant']}: {r['error']}" for r in record["results"] if "error" in r
            ]
            pages.append("\n\n".join([_scores(rows), *failed]) + made_by(record))
    return "\n\n".join(pages) or MISSING


def _scores(rows: list[Row]) -> str:
    """Percent of each task's metric at its best rate: mean and deviation over seeds of pretraining."""
    tasks = sorted(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    methods: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        method = row["variant"].partition(f", {row['task']}")[0]
        methods.setdefault(method, {}).setdefault(row["task"], []).append(row)
    header = ("method", "seeds", *(f"{task}, {metric} (lr)" for task, metric in tasks))
    return markdown(
        header,
        [
            (
                method,
                f"{min(len(best_of_rates(found)[1]) for found in by_task.values())}",
                *(_score(by_task.get(task)) for task, _ in tasks),
            )
            for method, by_task in methods.items()
        ],
    )


def best_of_rates(rows: Iterable[Row]) -> tuple[float | None, list[float]]:
    """The learning rate whose mean score is the highest, and its scores."""
    rates: dict[float | None, list[float]] = {}
    for row in rows:
        rates.setdefault(row["fields"]["lr"], []).append(row["score"])
    most = max(map(len, rates.values()))
    whole = {rate: scores for rate, scores in rates.items() if len(scores) == most}
    return max(whole.items(), key=lambda item: statistics.fmean(item[1]))


def _score(rows: list[Row] | None) -> str:
    if not rows:
        return "–"
    rate, scores = best_of_rates(rows)
    shown = spread_of(100 * score for score in scores)
    return shown if rate is None else f"{shown} ({rate:g})"
