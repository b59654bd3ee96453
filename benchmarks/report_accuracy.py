"""What the records of ``python -m experiments`` say: which method learns how well."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pictures import svg
from benchmarks.record import RESULTS
from benchmarks.tables import markdown, records, sources
from experiments.runs import GROUPS

MISSING = "Not measured yet: `python -m experiments`."
CONTROL = "dense"
Row = dict[str, Any]


def summary(folder: Path = RESULTS) -> str:
    """All methods: perplexities, mean and standard deviation over the seeds."""
    return _pages("gpt2-methods", folder, _methods)


def rates(folder: Path = RESULTS) -> str:
    """The learning rates that were tried."""
    return _pages("gpt2-lr", folder, _each)


def ablations(folder: Path = RESULTS) -> str:
    """One thing changed at a time."""
    return _pages("gpt2-ablations", folder, _each)


def small(folder: Path = RESULTS) -> str:
    """GPT-2 small, with the speed of the training loop."""
    return _pages("gpt2-small", folder, _each)


def bert(folder: Path = RESULTS) -> str:
    """All methods with a masked LM: perplexity of masked words held out."""
    return _pages("bert-methods", folder, _methods)


def glue(folder: Path = RESULTS) -> str:
    """What the BERTs of every method score after finetuning."""
    pages = []
    for record in records("accuracy-bert-glue", folder):
        rows = _finished(record["results"])
        if rows:
            failed = [
                f"Failed: {r['variant']}: {r['error']}" for r in record["results"] if "error" in r
            ]
            pages.append("\n\n".join([_scores(rows), *failed]) + _sources(record))
    return "\n\n".join(pages) or MISSING


def drawn(docs: Path, folder: Path = RESULTS) -> dict[Path, str]:
    """The learning curves, by their path in `docs`."""
    found = records("accuracy-gpt2-methods", folder)
    rows = _finished(row for record in found for row in record["results"])
    return {docs / "learning-curves.svg": svg(_curves, rows)} if rows else {}


def by_variant(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each variant, in the order of the first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample (None of one value)."""
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread


def _pages(group: str, folder: Path, table) -> str:
    pages = []
    for record in records(f"accuracy-{group}", folder):
        rows = _finished(record["results"])
        if not rows:
            continue
        texts = [table(rows), *_notes(group, record)]
        pages.append("\n\n".join(texts) + _sources(record))
    return "\n\n".join(pages) or MISSING


def _sources(record: dict[str, Any]) -> str:
    """How the rows were made, which may have been at several times."""
    names = ("date", "commit", "command")
    found = [tuple(row.get(name, record[name]) for name in names) for row in record["results"]]
    return sources(record | dict(zip(names, made, strict=True)) for made in dict.fromkeys(found))


def _finished(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def _notes(group: str, record: dict[str, Any]) -> list[str]:
    rows = record["results"]
    done = {(row["variant"], row["seed"]) for row in rows}
    left = [run for run in GROUPS[group] if (run.variant, run.seed) not in done]
    first = next(row for row in rows if "error" not in row)
    lines = [
        f"{first['model']}, {first['dense_parameters'] / 1e6:.1f} million parameters without sparsity,"
        f" {first['tokens'] / 1e6:.1f} million tokens in sequences of {first['seq_len']}."
    ]
    lines += [
        f"Failed: {r['variant']}, seed {r['seed']}: {r['error']}" for r in rows if "error" in r
    ]
    if left:
        names = "; ".join(
            f"{variant} (seeds {', '.join(str(run.seed) for run in runs)})"
            for variant, runs in _runs_by_variant(left).items()
        )
        lines.append(f"Not run yet, for want of time: {names}.")
    return lines


def _runs_by_variant(runs):
    found: dict[str, list] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run)
    return found


def _texts(rows: list[Row]) -> list[str]:
    return list(rows[0]["perplexity"])


def _methods(rows: list[Row]) -> str:
    texts, variants = _texts(rows), by_variant(rows)
    control = {row["seed"]: row for row in variants.get(CONTROL, [])}
    noise = noise_of(rows)
    header = ("method", "seeds", "lr", *(f"perplexity, {t}" for t in texts))
    lines = []
    for variant, found in variants.items():
        cells = [_spread(row["perplexity"][text] for row in found) for text in texts]
        lines.append(
            (
                variant,
                f"{len(found)}",
                f"{found[0]['lr']:g}",
                *cells,
                _against(found, control, texts[0], noise),
            )
        )
    table = markdown((*header, f"against dense, {texts[0]}"), lines)
    if noise is None:
        return table
    return (
        f"{table}\n\nRuns of one seed that are the same until adapters join differ there by up to"
        f" {100 * noise:.1f} % in held-out perplexity: differences below that are noise."
    )


def _against(found: list[Row], control: dict[int, Row], text: str, noise: float | None) -> str:
    """The mean change of perplexity against the dense runs of the same seeds."""
    logs = [
        math.log(row["perplexity"][text] / control[row["seed"]]["perplexity"][text])
        for row in found
        if row["seed"] in control
    ]
    if not logs:
        return "–"
    change = math.expm1(statistics.fmean(logs))
    small = noise is not None and abs(change) < noise and found[0]["variant"] != CONTROL
    return f"{100 * change:+.1f} %" + (" (noise)" if small else "")


def noise_of(rows: Iterable[Row]) -> float | None:
    """How far runs that should be equal are apart, at most: slope of one seed before adapters join.

    Returns:
      The relative difference of held-out perplexity at the last step at which all of them were
      evaluated; the largest of the seeds, None if no seed has two such runs.
    """
    seeds: dict[int, list[Row]] = {}
    for row in rows:
        if row.get("method") == "slope":
            seeds.setdefault(row["seed"], []).append(row)
    found = [_apart(same) for same in seeds.values()]
    return max((apart for apart in found if apart is not None), default=None)


def _apart(rows: list[Row]) -> float | None:
    joins = [row["adapter_step"] for row in rows if row["adapter_step"] is not None]
    curves = [dict(map(tuple, row["curve"])) for row in rows]
    steps = set.intersection(*map(set, curves))
    before = [step for step in steps if 0 < step <= min(joins, default=math.inf)]
    if len(rows) < 2 or not before:
        return None
    losses = [curve[max(before)] for curve in curves]
    return math.expm1(max(losses) - min(losses))


def _spread(values: Iterable[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:,.2f}" + ("" if deviation is None else f" ± {deviation:,.2f}")


def _scores(rows: list[Row]) -> str:
    """Percent of each task's metric, mean and standard deviation over the seeds of pretraining."""
    tasks = dict.fromkeys((row["task"], row["metric"]) for row in rows)
    methods: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        method = row["variant"].rpartition(",")[0]
        methods.setdefault(method, {}).setdefault(row["task"], []).append(100 * row["score"])
    header = ("method", "seeds", *(f"{task}, {metric}" for task, metric in tasks))
    return markdown(
        header,
        [
            (
                method,
                f"{min(map(len, found.values()))}",
                *(_spread(found[task]) if task in found else "–" for task, _ in tasks),
            )
            for method, found in methods.items()
        ],
    )


def _each(rows: list[Row]) -> str:
    texts = _texts(rows)
    header = ("run", "lr", "steps", *(f"perplexity, {t}" for t in texts), "tokens/s")
    return markdown(
        header,
        [
            (
                row["variant"],
                f"{row['lr']:g}",
                f"{row['steps']:,}",
                *(f"{row['perplexity'][text]:,.2f}" for text in texts),
                f"{row['tokens_per_second'] or 0:,.0f}",
            )
            for row in rows
        ],
    )


def _curves(pyplot, rows: list[Row]):
    """Held-out loss over steps, the mean of the seeds, where all of them were evaluated."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.8))
    for variant, found in by_variant(rows).items():
        curves = [dict(map(tuple, row["curve"])) for row in found]
        steps = sorted(step for step in set.intersection(*map(set, curves)) if step > 0)
        if not steps:
            continue
        losses = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        axis.plot(steps, losses, linewidth=1.1, label=variant)
    axis.set(xlabel="step", ylabel="held-out loss, nats a token", xscale="log")
    axis.legend(fontsize=7)
    figure.tight_layout()
    return figure
