"""What the records of training steps say: speed, memory, and where the time goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pictures import svg
from benchmarks.record import RESULTS, slug
from benchmarks.steps import MODELS
from benchmarks.tables import markdown, records, sources

MISSING = {
    "train-step": "Not measured yet: `python -m benchmarks.train_step`.",
    "memory": "Not measured yet: `python -m benchmarks.memory`.",
    "step-profile": "Not measured yet: `python -m benchmarks.step_profile`.",
}
KEY = ("model", "tokens", "length", "accumulation", "remat", "moments", "scan")
GIB = 2**30
COLOURS = ("#2f6f9f", "#5d94bd", "#8fb8d6", "#c6dbeb", "#d98e04", "#7a5195", "#c0392b", "#9a9a9a", "#cfcfcf", "#4d4d4d")  # fmt: skip


def steps(folder: Path = RESULTS) -> str:
    """Whole models by the line through two depths: times, speed-ups, bytes."""
    return _by_device("train-step", folder, _steps)


def depths(folder: Path = RESULTS) -> str:
    """What was measured at each depth."""
    return _by_device("train-step", folder, _depths)


def memory(folder: Path = RESULTS) -> str:
    """State from shapes, XLA's account, and the device's peak."""
    return _by_device("memory", folder, _memory)


def profile(folder: Path = RESULTS) -> str:
    """Milliseconds by what kernels are for, with a picture."""
    return _by_device("step-profile", folder, _profile)


def drawn(docs: Path, folder: Path = RESULTS) -> dict[Path, str]:
    """The text of every picture, by its path in `docs`."""
    found = {}
    for device, parts in _devices("step-profile", folder).items():
        if rows := _results(parts):
            found[docs / _picture(device)] = svg(_stacked, rows)
    return found


def _by_device(benchmark: str, folder: Path, text: Callable[[str, list[dict]], str]) -> str:
    found = _devices(benchmark, folder)
    if not found:
        return MISSING[benchmark]
    pages = []
    for device, parts in found.items():
        page = [text(device, _results(parts)), *_troubles(parts)]
        pages.append("\n\n".join(part for part in page if part) + sources(parts))
    return "\n\n".join(pages)


def _devices(benchmark: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records(benchmark, folder):
        found.setdefault(record["device"], []).append(record)
    return dict(sorted(found.items()))


def _results(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scanned = {"scan": True}  # as all were until records told
    rows = [scanned | row for record in parts for row in record["results"]]
    seen = set()
    for row in rows:
        key = (*(row[name] for name in KEY), row["rank"], row.get("dropout"), row.get("depth"))
        if key in seen:
            raise ValueError(f"two records hold {row['model']} at rank {row['rank']}: {key}")
        seen.add(key)
    order = {model: number for number, model in enumerate(MODELS)}
    return sorted(rows, key=lambda row: order.get(row["model"], len(order)))


def _troubles(parts: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in parts:
        for failed in record.get("failed", []):
            what = " ".join(
                f"{name} {failed[name]}" for name in ("what", "depth", "rank") if name in failed
            )
            lines.append(f"Failed: {failed['model']} {what}: {failed['error'].splitlines()[0]}")
    there = {row["model"] for record in parts for row in record["results"]}
    left = [model for record in parts for model in record.get("left_out", []) if model not in there]
    if left:
        lines.append(f"Left out for want of time: {', '.join(dict.fromkeys(left))}.")
    return lines


def _steps(device: str, rows: list[dict[str, Any]]) -> str:
    header = (
        "model",
        "layers",
        "micro-batch",
        "dense, ms",
        "2:4, ms",
        "speed-up",
        "with adapters",
        "of a layer",
        "dense MFU",
        "memory",
    )
    pairs: dict[tuple, dict[bool, dict]] = {}
    for row in rows:
        pairs.setdefault(tuple(row[name] for name in KEY), {})[row["rank"] > 0] = row
    lines = []
    for pair in pairs.values():
        row, adapted = pair.get(False, pair.get(True)), pair.get(True)
        bare = False in pair
        lines.append(
            (
                row["model"],
                f"{row['layers']}",
                _batch(row),
                f"{row['dense_ms']:,.1f}",
                f"{row['sparse_ms']:,.1f}" if bare else "",
                f"{row['speedup']:.2f}" if bare else "",
                f"{adapted['speedup']:.2f}" if adapted else "",
                f"{row['speedup_per_layer']:.2f}" if row["speedup_per_layer"] else "–",
                _share(row["mfu_dense"]),
                f"{row['ratio']:.2f}",
            )
        )
    told = _fastest(rows)
    return f"{device}:\n\n{markdown(header, lines)}" + (f"\n\n{told}" if told else "")


def _fastest(rows: list[dict[str, Any]]) -> str:
    """The faster dense model over the faster sparse one, where layers were scanned and unrolled."""
    found: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in rows:
        if not row["rank"]:
            found.setdefault(row["model"], {})[row["scan"]] = row
    ratios = [
        f"{model} {min(x['dense_ms'] for x in both) / min(x['sparse_ms'] for x in both):.2f}"
        for model, both in ((model, list(ways.values())) for model, ways in found.items())
        if len(both) == 2
    ]
    if not ratios:
        return ""
    return (
        f"The faster dense step over the faster 2:4 step, scanned or unrolled: {', '.join(ratios)}."
    )


def _depths(device: str, rows: list[dict[str, Any]]) -> str:
    header = (
        "model",
        "rank",
        "depth",
        "dense, ms",
        "2:4, ms",
        "speed-up",
        "dense MFU",
        "dense, GiB",
        "2:4, GiB",
        "in turns",
        "runs",
    )
    lines = [
        (
            row["model"],
            f"{row['rank']}",
            f"{at['depth']}",
            f"{at['dense_ms']:,.2f}",
            f"{at['sparse_ms']:,.2f}",
            f"{at['speedup']:.3f}",
            _share(at["mfu_dense"]),
            f"{at['dense_bytes'] / GIB:.2f}",
            f"{at['sparse_bytes'] / GIB:.2f}",
            "yes" if at["in_turns"] else "no",
            _paths(row["paths"]),
        )
        for row in rows
        for at in row["at_depths"]
    ]
    return f"## {device}\n\n{markdown(header, lines)}"


def _memory(device: str, rows: list[dict[str, Any]]) -> str:
    header = (
        "model",
        "rank",
        "micro-batch",
        "state, dense",
        "state, 2:4",
        "ratio",
        "peak, dense",
        "peak, 2:4",
        "peaks' ratio",
        "XLA's, dense",
        "XLA's, 2:4",
        "measured at",
    )
    lines = [
        (
            row["model"],
            f"{row['rank']}",
            _batch(row),
            _gib(row["dense_state_bytes"]),
            _gib(row["sparse_state_bytes"]),
            f"{row['state_ratio']:.3f}",
            _gib(row["dense_peak_bytes"]),
            _gib(row["sparse_peak_bytes"]),
            f"{row['peak_ratio']:.3f}" if row["peak_ratio"] else "",
            _gib(row["dense_xla_bytes"]),
            _gib(row["sparse_xla_bytes"]),
            "; ".join(
                f"{at['depth']} layers: {_gib(at['dense']['peak_bytes'])} →"
                f" {_gib(at['sparse']['peak_bytes'])}"
                for at in row["at_depths"]
            ),
        )
        for row in rows
    ]
    return f"{device}, in GiB, the whole model by the line through both depths:\n\n{markdown(header, lines)}"


def _profile(device: str, rows: list[dict[str, Any]]) -> str:
    names = _categories(rows)
    header = (
        "milliseconds a step",
        *(f"{_title(row)}, {s}" for row in rows for s in ("dense", "2:4")),
    )
    sides = [(row, side) for row in rows for side in ("dense", "sparse")]
    lines = [(name, *(f"{row[side].get(name, 0):.2f}" for row, side in sides)) for name in names]
    lines.append(("all", *(f"{row[f'{side}_busy_ms']:.2f}" for row, side in sides)))
    lines.append(
        ("the step, host included", *(f"{row[f'{side}_step_ms']:.2f}" for row, side in sides))
    )
    bounds = [
        f"- {_title(row)}: the linears' products run {row['products_speedup']:.2f} times as fast,"
        f" which alone would make the step {row['kernel_bound']:.2f} times as fast; it is"
        f" {row['busy_speedup']:.2f}."
        for row in rows
        if row["products_speedup"]
    ]
    picture = f"![Where the time of a step goes]({_picture(device)})"
    return "\n\n".join((f"{device}:", picture, markdown(header, lines), "\n".join(bounds)))


def _stacked(pyplot, rows: list[dict[str, Any]]):
    names = _categories(rows)
    bars = [(row, side) for row in rows for side in ("dense", "sparse")]
    figure, axis = pyplot.subplots(figsize=(8, 0.7 + 0.42 * len(bars)))
    lefts = [0.0] * len(bars)
    places = [i + 0.4 * (i // 2) for i in range(len(bars))]
    for name, colour in zip(names, COLOURS, strict=False):
        widths = [row[side].get(name, 0.0) / row["dense_busy_ms"] for row, side in bars]
        axis.barh(places, widths, left=lefts, color=colour, label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    labels = [f"{_title(row)}, {'2:4' if side == 'sparse' else side}" for row, side in bars]
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.set_xlabel("time on the device, dense = 1")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.tight_layout()
    return figure


def _categories(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for row in rows for side in ("dense", "sparse") for name in row[side]]
    order = list(dict.fromkeys(names))
    return sorted(order, key=lambda name: -sum(row["dense"].get(name, 0) for row in rows))


def _title(row: dict[str, Any]) -> str:
    rank = f", rank {row['rank']}" if row["rank"] else ""
    return f"{row['model']}{rank} ({row['depth']} layers)"


def _picture(device: str) -> str:
    return f"step-{slug(device)}.svg"


def _batch(row: dict[str, Any]) -> str:
    micro = row["tokens"] // row["accumulation"]
    many = f" x {row['accumulation']}" if row["accumulation"] > 1 else ""
    remat = ", remat" if row["remat"] else ""
    moments = "" if row["moments"] == "float32" else f", {row['moments']} moments"
    unrolled = "" if row["scan"] else ", unrolled"
    return f"{micro // row['length']} x {row['length']}{many}{remat}{moments}{unrolled}"


def _paths(paths: dict[str, int]) -> str:
    counts: dict[str, int] = {}
    for path, count in paths.items():
        name = path.partition(":")[0] if not path.startswith("y:") else path.partition(": ")[0]
        counts[name] = counts.get(name, 0) + count
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"
