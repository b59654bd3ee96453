"""What the records of prefill and decode say: speed, tokens a second, and bytes of the weights."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.tables import markdown, records, sources

SHOWN = 0.005  # what the tables round to
MISSING = "Not measured yet: `python -m benchmarks.inference`."
KEY = ("model", "phase", "batch", "prompt")
IMPORTANT = (("prefill", 1, 2048), ("prefill", 8, 512), ("decode", 1, 512), ("decode", 16, 512))


def summary(folder: Path = RESULTS) -> str:
    """A line for each model and rank: the speed-ups that matter most, and the weights."""
    return _by_device(folder, _summary)


def times(folder: Path = RESULTS) -> str:
    """Every point: whole models by the line through two depths, and the depths."""
    return _by_device(folder, _times)


def weights(folder: Path = RESULTS) -> str:
    """Bytes of the weights, as the device and as their shapes say."""
    return _by_device(folder, _weights)


def profile(folder: Path = RESULTS) -> str:
    """Where the time of a step goes, by what the kernels are for."""
    pages = [
        "\n\n".join([f"{record['device']}:", _profile(record["results"]), *_failures(record)])
        + sources([record])
        for record in records("serving-profile", folder)
    ]
    return "\n\n".join(pages) or MISSING.replace("inference", "serving_profile")


def _profile(rows: list[dict[str, Any]]) -> str:
    """Microseconds of a step on the device, dense → 2:4."""
    fullest_first = sorted((row[side] for row in rows for side in ("sparse", "dense")), key=len)[
        ::-1
    ]
    kinds = list(dict.fromkeys(kind for times in fullest_first for kind in times))
    header = ("model", "work", "rank", *(f"{kind}, us" for kind in kinds), "all, us", "speed-up", "linears, GB/s")  # fmt: skip
    lines = []
    for row in rows:
        cells = [
            " → ".join(f"{1e3 * row[side].get(kind, 0.0):,.0f}" for side in ("dense", "sparse"))
            for kind in kinds
        ]
        busy = f"{1e3 * row['dense_busy_ms']:,.0f} → {1e3 * row['sparse_busy_ms']:,.0f}"
        rate = f"{row['dense_gb_per_s']:,.0f} → {row['sparse_gb_per_s']:,.0f}"
        model = f"{row['model']}, {row['depth']} layers"
        speedup = f"{row['busy_speedup']:.2f}"
        lines.append((model, _work(row), f"{row['rank']}", *cells, busy, speedup, rate))
    return markdown(header, lines)


def _failures(record: dict[str, Any]) -> list[str]:
    return [f"Failed: {x['model']}: {x['error'].splitlines()[0]}" for x in record["failed"]]


def generation(folder: Path = RESULTS) -> str:
    """Text of models trained here: time to the first token, and the rate of those that follow."""
    pages = [
        f"{record['device']}, {_served(record)}:\n\n{_generated(record['results'])}"
        + sources([record])
        for record in records("generation-", folder)
    ]
    return "\n\n".join(pages) or MISSING.replace("inference", "generation")


def _served(record: dict[str, Any]) -> str:
    name = record["benchmark"].removeprefix("generation-")
    sides = [
        f"{method} {side['bytes'] / 1e6:,.1f} MB{' with adapters' if side['adapters'] else ''}"
        for method, side in record["models"].items()
    ]
    return f"{name} after {record['models']['dense']['steps']} steps ({', '.join(sides)})"


def _generated(rows: list[dict[str, Any]]) -> str:
    header = ("prompts", "first token, dense, ms", "2:4, ms", "speed-up", "then tokens/s, dense", "2:4", "speed-up", "first call, dense, s", "2:4, s")  # fmt: skip
    return markdown(
        header,
        [
            (
                f"{row['batch']} x {row['prompt']}",
                f"{row['dense_first_ms']:,.1f}",
                f"{row['sparse_first_ms']:,.1f}",
                f"{row['first_speedup']:.2f}",
                f"{row['dense_tokens_per_s']:,.0f}",
                f"{row['sparse_tokens_per_s']:,.0f}",
                f"{row['speedup']:.2f}",
                f"{row['dense_compiling_s']:.1f}",
                f"{row['sparse_compiling_s']:.1f}",
            )
            for row in rows
        ],
    )


def _by_device(folder: Path, text: Callable[[list[dict], list[dict]], str]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    measured = (r for r in records("inference", folder) if r["results"] or r["weights"])
    for record in measured:  # others hold what was planned, until they were stopped
        found.setdefault(record["device"], []).append(record)
    pages = []
    for device, parts in sorted(found.items()):
        rows = _once((r for p in parts for r in p["results"]), (*KEY, "rank"))
        weighed = _once((r for p in parts for r in p["weights"]), ("model", "rank"))
        page = [f"{device}:", text(rows, weighed), *_troubles(parts)]
        pages.append("\n\n".join(page) + sources(parts))
    return "\n\n".join(pages) or MISSING


def _once(rows, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of which several parts may hold the same: the last of each."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def _noise(rows: list[dict[str, Any]]) -> list[str]:
    """More work cannot take less time: where it seems to, the line through two depths is noise."""
    found = []
    for row in rows:
        less = [r for r in rows if all(r[n] == row[n] for n in KEY) and r["rank"] < row["rank"]]
        slower = [r for r in less if r["sparse_ms"] > (1 + SHOWN) * row["sparse_ms"]]
        if slower:
            most = max(slower, key=lambda r: r["sparse_ms"])
            found.append(
                f"{row['model']}, {_work(row)}: rank {row['rank']} cannot be faster than rank"
                f" {most['rank']}; the line through two depths is off by"
                f" {most['sparse_ms'] / row['sparse_ms'] - 1:.0%} or more."
            )
    return found


def _work(row: dict[str, Any]) -> str:
    return f"{row['phase']} {row['batch']} x {row['prompt']}"


def _troubles(parts: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in parts:
        for failed in record["failed"]:
            where = f"{failed['model']}, {failed['depth']} layers, {failed['what']}"
            lines.append(f"Failed: {where}: {failed['error'].splitlines()[0]}")
    measured = {
        (row["model"], _work(row), f"{row['share']:g}")
        for record in parts
        for row in record["results"]
    }
    stages = (_missing(left, measured) for record in parts for left in record["left_out"])
    if left := _left_out(dict.fromkeys(filter(None, stages))):
        lines.append(f"Left out for want of time: {left}.")
    return lines


def _missing(stage: str, measured: set[tuple[str, str, str]]) -> str | None:
    """Of "MODEL: WORK, ...; rank SHARE, ..." the works and shares with a point that is not measured."""
    model, _, what = stage.partition(": ")
    works, ranks = (part.split(", ") for part in what.split("; rank "))
    points = [p for p in itertools.product(works, ranks) if (model, *p) not in measured]
    if not points:
        return None
    works, ranks = (", ".join(dict.fromkeys(column)) for column in zip(*points, strict=True))
    return f"{model}: {works}; rank {ranks}"


def _left_out(stages: Iterable[str]) -> str:
    """Stages "MODEL: WHAT", models of which the same is missing together."""
    models: dict[str, list[str]] = {}
    for stage in stages:
        model, _, what = stage.partition(": ")
        models.setdefault(what, []).append(model)
    return "; ".join(f"{', '.join(names)} ({what})" for what, names in models.items())


def _summary(rows: list[dict[str, Any]], weighed: list[dict[str, Any]]) -> str:
    known = list(dict.fromkeys((r["phase"], r["batch"], r["prompt"]) for r in rows))
    works = [work for work in IMPORTANT if work in known] or known
    header = ("model", "rank", *(_title(work) for work in works), "weights")
    ratios = {  # a device's allocator rounds, now and then one side alone
        (row["model"], row["rank"]): f"{max(row['ratio'], row['shape_ratio']):.3f}"
        for row in weighed
    }
    lines: dict[tuple[str, int], dict[tuple, str]] = {}
    for row in rows:
        cells = lines.setdefault((row["model"], row["rank"]), {})
        cells[row["phase"], row["batch"], row["prompt"]] = f"{row['speedup']:.2f}"
    table = markdown(
        header,
        [
            (model, f"{rank}", *(cells.get(w, "–") for w in works), ratios.get((model, rank), "–"))
            for (model, rank), cells in lines.items()
            if not cells.keys().isdisjoint(works)
        ],
    )
    return "\n\n".join([table, *_noise(rows)])


def _title(work: tuple[str, int, int]) -> str:
    phase, batch, prompt = work
    return f"decode {batch}" if phase == "decode" else f"prefill {batch} x {prompt}"


def _times(rows: list[dict[str, Any]], _) -> str:
    header = ("model", "work", "rank", "dense, ms", "2:4, ms", "speed-up", "of a layer", "2:4, tokens/s", "at depths", "runs")  # fmt: skip
    lines = [
        (
            row["model"],
            _work(row),
            f"{row['rank']}",
            f"{row['dense_ms']:,.3f}",
            f"{row['sparse_ms']:,.3f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_per_layer']:.2f}" if row["speedup_per_layer"] else "–",
            f"{row['sparse_tokens_per_s']:,.0f}",
            "; ".join(
                f"{at['depth']}: {at['dense_ms']:.3f} → {at['sparse_ms']:.3f}"
                for at in row["at_depths"]
            ),
            _paths(row["paths"]),
        )
        for row in rows
    ]
    return "\n\n".join([markdown(header, lines), *_noise(rows)])


def _weights(_, weighed: list[dict[str, Any]]) -> str:
    header = ("model", "rank", "dense, GB", "2:4, GB", "ratio", "by", "shapes' ratio")
    lines = [
        (
            row["model"],
            f"{row['rank']}",
            f"{row['dense_bytes'] / 1e9:.3f}",
            f"{row['sparse_bytes'] / 1e9:.3f}",
            f"{row['ratio']:.4f}",
            row["source"],
            f"{row['shape_ratio']:.4f}",
        )
        for row in weighed
    ]
    return markdown(header, lines)


def _paths(paths: dict[str, int]) -> str:
    counts: dict[str, int] = {}
    for path, count in paths.items():
        name = path.partition(":")[0]
        counts[name] = counts.get(name, 0) + count
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
