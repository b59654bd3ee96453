"""What the records of ``python -m experiments`` say: which method learns how well."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy import stats  # JAX needs it, too

from benchmarks.pictures import svg
from benchmarks.record import RESULTS
from benchmarks.tables import markdown, records, sources
from experiments.runs import EARLY_ADAPTERS, GROUPS
from experiments.runs import METHODS as ALL_METHODS

MISSING = "Not measured yet: `python -m experiments`."
CONTROLS = ("dense", "slope")
BESIDE = ("slope", *EARLY_ADAPTERS)
Row = dict[str, Any]


def summary(folder: Path = RESULTS) -> str:
    """All methods: perplexities, mean and standard deviation over the seeds."""
    return _pages("gpt2-methods", folder, _methods)


def rates(folder: Path = RESULTS) -> str:
    """The learning rates that were tried."""
    found = [_pages(group, folder, _each) for group in ("gpt2-lr", "nano-lr", "bert-lr")]
    return "\n\n".join(page for page in found if page != MISSING) or MISSING


def adapters(folder: Path = RESULTS) -> str:
    """What adapters add to the run that is the same until they join."""
    return _pages("gpt2-adapters", folder, _adapters)


def beside_methods(folder: Path = RESULTS) -> str:
    """Runs of the experiments with adapters, which have more seeds, against other methods."""
    ours, theirs = (rows_by_variant(group, folder) for group in ("gpt2-adapters", "gpt2-methods"))
    runs = [name for name in BESIDE if name in ours]
    methods = [name for name in ALL_METHODS if name in theirs and not name.startswith("slope")]
    if not runs or not methods:
        return MISSING
    text = _texts(theirs[methods[0]])[0]
    header = [f"perplexity on {text} against", *methods]
    lines = [
        (name, *(_against(ours[name], theirs[method], text, None) for method in methods))
        for name in runs
    ]
    return markdown(header, lines)


def rows_by_variant(group: str, folder: Path) -> dict[str, list[Row]]:
    found = records(f"accuracy-{group}", folder)
    return by_variant(finished(row for record in found for row in record["results"]))


def _adapters(rows: list[Row]) -> str:
    texts, variants = _texts(rows), by_variant(rows)
    base = variants.get("slope", [])
    header = ["run", "seeds", "lr", *(f"perplexity, {t}" for t in texts)]
    header += [f"against slope of the same seed, {t}" for t in texts]
    lines = []
    for variant, found in variants.items():
        cells = [spread_of(row["perplexity"][text] for row in found) for text in texts]
        cells += ["–" if found is base else _paired(found, base, text) for text in texts]
        lines.append((variant, f"{len(found)}", f"{found[0]['lr']:g}", *cells))
    told = [
        "Changes are means over pairs of runs of one seed, ± half of their 95 % interval; those within it"
        " are marked as noise."
    ]
    if (apart := noise_of(rows)) is not None:
        told.append(f"Until adapters join, runs of one seed are {100 * apart:.2f} % apart at most.")
    return f"{markdown(header, lines)}\n\n{' '.join(told)}"


def _paired(found: list[Row], control: list[Row], text: str) -> str:
    """The mean change of perplexity in pairs of one seed, and how far it is known (Student's t).

    A run that joins another's course is paired with that one's end.
    """
    theirs = {row["seed"]: row["perplexity"] for row in control}
    pairs = [(row["perplexity"], row.get("without", theirs.get(row["seed"]))) for row in found]
    logs = [math.log(ours[text] / other[text]) for ours, other in pairs if other is not None]
    if not logs:
        return "–"
    change, spread = mean_and_deviation(logs)
    shown = f"{100 * math.expm1(change):+.2f} %"
    if spread is None:
        return shown
    margin = stats.t.ppf(0.975, len(logs) - 1) * spread / math.sqrt(len(logs))
    return f"{shown} ± {100 * margin:.2f}" + (" (noise)" if abs(change) < margin else "")


def ablations(folder: Path = RESULTS) -> str:
    """One thing changed at a time, and how far that may be by chance."""
    found = records(
        "accuracy-gpt2-adapters", folder
    )  # their "slope" has the settings of the ablations
    base = [row for record in found for row in record["results"]]
    told = _beside_seeds(finished(base), "slope")
    page = _pages("gpt2-ablations", folder, _each)
    return page if told is None or page == MISSING else f"{told}\n\n{page}"


def _beside_seeds(rows: list[Row], variant: str) -> str | None:
    """The seeds' mean, and how far one more run of the same may be from it; None of one seed."""
    found = [row for row in rows if row["variant"] == variant]
    if len(found) < 2:
        return None
    text = _texts(found)[0]
    spread = statistics.stdev(math.log(row["perplexity"][text]) for row in found)
    quantile = stats.t.ppf(0.975, len(found) - 1)
    margin = quantile * spread * math.sqrt(1 + 1 / len(found))
    return (
        f"{variant}, {len(found)} seeds: {spread_of(row['perplexity'][text] for row in found)} on {text}."
        f" One more run of the same would be less than {100 * margin:.1f} % away (95 % of the time), so"
        " smaller differences of single runs say nothing."
    )


def small(folder: Path = RESULTS) -> str:
    """GPT-2 small, with the speed of the training loop."""
    return _pages("gpt2-small", folder, _each)


def capacity(folder: Path = RESULTS) -> str:
    """A small model of many tokens, with and without adapters."""
    return _pages("nano-capacity", folder, _adapters)


def bert(folder: Path = RESULTS) -> str:
    """All methods with a masked LM: perplexity of masked words held out."""
    return _pages("bert-methods", folder, _methods)


def drawn(docs: Path, folder: Path = RESULTS) -> dict[Path, str]:
    """The learning curves, by their path in `docs`."""
    found = records("accuracy-gpt2-methods", folder)
    rows = finished(row for record in found for row in record["results"])
    rows = in_order("gpt2-methods", rows)
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
        rows = in_order(group, finished(record["results"]))
        if not rows:
            continue
        texts = [table(rows), *_notes(group, record)]
        pages.append("\n\n".join(texts) + made_by(record))
    return "\n\n".join(pages) or MISSING


def in_order(group: str, rows: list[Row]) -> list[Row]:
    """The rows as `experiments.runs` lists their runs, not as these ended; others behind them."""
    variants = list(dict.fromkeys(run.variant for run in GROUPS[group]))
    places = {variant: place for place, variant in enumerate(variants)}
    return sorted(rows, key=lambda r: (places.get(r["variant"], len(places)), r["seed"]))


def made_by(record: dict[str, Any]) -> str:
    """How the rows were made, which may have been at several times."""
    names = ("date", "commit", "command")
    found = [tuple(row.get(name, record[name]) for name in names) for row in record["results"]]
    return sources(record | dict(zip(names, made, strict=True)) for made in dict.fromkeys(found))


def finished(rows: Iterable[Row]) -> list[Row]:
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
    noise = noise_of(rows)
    controls = [name for name in CONTROLS if name in variants]
    header = ["method", "seeds", "lr", *(f"perplexity, {t}" for t in texts)]
    header += [f"against {name}, {texts[0]}" for name in controls]
    lines = []
    for variant, found in variants.items():
        cells = [spread_of(row["perplexity"][text] for row in found) for text in texts]
        cells += [_against(found, variants[name], texts[0], noise) for name in controls]
        lines.append((variant, f"{len(found)}", f"{found[0]['lr']:g}", *cells))
    told = [
        "± of a change is half of its 95 % interval, from the spread of the seeds; changes within it are"
        " marked as noise."
    ]
    if noise is not None:
        told.append(
            "Runs of one seed that are the same until adapters join differ there by up to"
            f" {100 * noise:.1f} % in held-out perplexity: a change of one seed that is smaller is"
            " noise."
        )
    return f"{markdown(header, lines)}\n\n{' '.join(told)}"


def _against(found: list[Row], control: list[Row], text: str, noise: float | None) -> str:
    """The mean change of perplexity, how far it is known, and whether it may be none at all."""
    if found[0]["variant"] == control[0]["variant"]:
        return "–"
    change, margin = change_and_margin(found, control, text)
    if change is None:
        return "–"
    shown = f"{100 * math.expm1(change):+.1f} %"
    if margin is None:
        small = noise is not None and abs(math.expm1(change)) < noise
    else:
        shown, small = f"{shown} ± {100 * margin:.1f}", abs(change) < margin
    return shown + (" (noise)" if small else "")


def change_and_margin(
    found: list[Row], control: list[Row], text: str
) -> tuple[float | None, float | None]:
    """The change of the mean log perplexity, and half of its 95 % interval by Welch's t-test.

    The margin is None where a side has one seed; the change is then that of the same seeds, None if
    there are none.
    """
    sides = [[math.log(row["perplexity"][text]) for row in rows] for rows in (found, control)]
    if min(map(len, sides)) < 2:
        theirs = {row["seed"]: row["perplexity"][text] for row in control}
        logs = [
            math.log(row["perplexity"][text] / theirs[row["seed"]])
            for row in found
            if row["seed"] in theirs
        ]
        return (statistics.fmean(logs) if logs else None), None
    interval = stats.ttest_ind(*sides, equal_var=False).confidence_interval(0.95)
    change = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
    return change, float(interval.high - interval.low) / 2


def noise_of(rows: Iterable[Row]) -> float | None:
    """How far runs that should be equal are apart, at most: slope of one seed before late adapters join.

    Returns:
      The relative difference of held-out perplexity at the last step at which all of them were
      evaluated; the largest of the seeds, None if no seed has two such runs.
    """
    seeds: dict[int, list[Row]] = {}
    for row in rows:
        joined = row.get("adapter_step")
        late = joined is None or joined > row["steps"] / 2
        if row.get("method") == "slope" and late:
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


def spread_of(values: Iterable[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:,.2f}" + ("" if deviation is None else f" ± {deviation:,.2f}")


def _each(rows: list[Row]) -> str:
    texts = _texts(rows)
    seeds = len({row["seed"] for row in rows}) > 1
    header = ("run", *(["seed"] * seeds), "lr", "steps", *(f"perplexity, {t}" for t in texts))
    header += ("tokens/s",)
    return markdown(
        header,
        [
            (
                row["variant"],
                *([f"{row['seed']}"] * seeds),
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
