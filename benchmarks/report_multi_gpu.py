"""What was measured on the GPUs of one host, beside what `benchmarks.scaling` says on paper."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import scaling, steps
from benchmarks.pictures import DENSE, WIN, svg
from benchmarks.record import RESULTS
from benchmarks.scaling import Layout, Walk
from benchmarks.steps import Case
from benchmarks.tables import markdown, records, sources
from slope_jax.sharding import DATA, FSDP, TENSOR
from train.mesh import parse_mesh

PICTURE = "multi-gpu.svg"
MISSING = "Not measured yet: `python -m benchmarks.multi_gpu`."
SIDES = ("dense", "sparse")
Row = dict[str, Any]


class Point(NamedTuple):
    """A result beside what is on paper for both sides: None without one GPU, or with `tensor`."""

    row: Row
    paper: tuple[Walk, Walk] | None

    def ratios(self, name: str) -> list[float]:
        """Of both sides: "efficiency" as measured or as on paper, or "unhidden"."""
        if name == "measured":
            return [self.row[f"{side}_efficiency"] for side in SIDES]
        return [getattr(walk, name) for walk in self.paper]

    @property
    def mesh(self) -> str:
        return (self.row["mesh"] or "none") + (", overlap" if self.row["overlap"] else "")


def measured(folder: Path = RESULTS) -> str:
    """A picture, what the results say in words, and all of them."""
    found = records("multi-gpu", folder)
    if not found:
        return MISSING
    parts = []
    for record in found:
        points = on_paper(record["results"])
        words = [said(points), agreement(points)] if points else []
        parts += [*words, _table(points), *_troubles(record)]
    picture = f"![Efficiency on GPUs of one host]({PICTURE})"
    return "\n\n".join([picture, *parts]) + sources(found)


def drawn(docs: Path, folder: Path = RESULTS) -> dict[Path, str]:
    """The text of the picture, by its path in `docs`."""
    rows = [row for record in records("multi-gpu", folder) for row in record["results"]]
    return {docs / PICTURE: svg(_curves, on_paper(rows))} if rows else {}


def on_paper(rows: Iterable[Row]) -> list[Point]:
    """Each result beside the walk from the times that one GPU of the same record took."""
    ones = {row["model"]: row for row in rows if not row["mesh"]}
    return [Point(row, _paper(row, ones.get(row["model"]))) for row in rows]


def _paper(row: Row, one: Row | None) -> tuple[Walk, Walk] | None:
    sizes = parse_mesh(row["mesh"] or "data:1")
    if one is None or sizes[TENSOR] > 1:
        return None
    case = Case(row["model"], row["depth"], row["tokens"] // row["length"], row["length"])
    share = steps.layer_share(case)
    times = {f"{side}_ms": one[f"{side}_ms"] for side in SIDES}
    times |= {f"{side}_ms_per_layer": share * one[f"{side}_ms"] for side in SIDES}
    cut = {name: row[name] for name in ("model", "sparsity", "rank", "depth")}
    layout = Layout(sizes[DATA], sizes[FSDP])
    return tuple(scaling.side(cut | times, layout, side) for side in SIDES)


def said(points: Sequence[Point]) -> str:
    """The ranges of efficiency and of speed-ups on the most GPUs, and those of the paper."""
    most = max(point.row["gpus"] for point in points)
    there = [p for p in points if p.row["gpus"] == most and p.row["mesh"] and p.paper]
    text = ""
    for overlap, how in ((False, "As XLA schedules it"), (True, "With `--overlap`")):
        if shown := [p for p in there if p.row["overlap"] == overlap]:
            sides = [
                f"{_range(p.ratios('measured')[i] for p in shown)} {label} (on paper"
                f" {_range(p.ratios('efficiency')[i] for p in shown)}, with nothing hidden"
                f" {_range(p.ratios('unhidden')[i] for p in shown)})"
                for i, label in enumerate(("dense", "at 2:4"))
            ]
            text += f"{how}, each of {most} GPUs keeps, of the tokens a second that one GPU alone trains on, {' and '.join(sides)}; 2:4 is {_range(p.row['speedup'] for p in shown)} times as fast as dense. "  # fmt: skip
    if alone := [p.row["speedup"] for p in points if not p.row["mesh"]]:
        text += f"On one GPU 2:4 is {_range(alone)} times as fast."
    return text.strip()


def agreement(points: Sequence[Point]) -> str:
    """How many steps were held against one GPU, and which of them are not its steps."""
    checks = {
        f"{p.row['model']} on {p.mesh}, {side}": p.row[f"{side}_agreement"]
        for p in points
        for side in SIDES
        if p.row[f"{side}_agreement"]
    }
    wrong = [name for name, check in checks.items() if not check["agrees"]]
    if not checks:
        return "No mesh was held against one GPU."
    if wrong:
        return f"**Not the losses and gradients of one GPU: {'; '.join(wrong)}.**"
    first = max(abs(c["loss"] - c["loss_alone"]) / c["loss_alone"] for c in checks.values())
    return (
        f"All {len(checks)} steps on meshes have the losses and the norms of gradients of one GPU,"
        f" within rounding; the first losses differ by {first:.1e} of themselves at most."
    )


def _table(points: Sequence[Point]) -> str:
    header = (
        "model",
        "layers",
        "GPUs",
        "mesh",
        "step, ms",
        "speed-up",
        "tokens/s/GPU",
        "efficiency",
        "on paper",
        "nothing hidden",
        "GB a GPU",
        "apart, of what is allowed",
    )
    return markdown(header, [_cells(point) for point in points])


def _cells(point: Point) -> tuple[str, ...]:
    row, walks = point
    checks = [row[f"{side}_agreement"] for side in SIDES]
    return (
        row["model"],
        f"{row['depth']}",
        f"{row['gpus']}",
        point.mesh,
        _both((row[f"{side}_ms"] for side in SIDES), "{:,.1f}"),
        f"{row['speedup']:.2f}",
        _both((row[f"{side}_tokens_per_s_per_gpu"] for side in SIDES), "{:,}"),
        _both(point.ratios("measured"), "{:.3f}") if row["dense_efficiency"] else "",
        _both(point.ratios("efficiency"), "{:.3f}") if walks else "",
        _both(point.ratios("unhidden"), "{:.3f}") if walks else "",
        _both((row[f"{side}_bytes"] / 1e9 for side in SIDES), "{:.1f}"),
        _both((check["apart"] for check in checks), "{:.2f}") if all(checks) else "",
    )


def _troubles(record: dict[str, Any]) -> list[str]:
    """What failed, and what was left out."""
    failed = [
        f"Failed: {x['model']} on {x['mesh'] or 'one GPU'}, {x['what']}: {_first(x['error'])}"
        for x in record["failed"]
    ]
    left = [
        f"Left out: {x['model']} on {x['mesh'] or 'one GPU'}{', overlap' * x['overlap']}: {x['why']}."
        for x in record["left_out"]
    ]
    return failed + left


def _first(text: str) -> str:
    return text.splitlines()[0]


def _both(values: Iterable[float], form: str) -> str:
    return " → ".join(form.format(value) for value in values)


def _range(values: Iterable[float]) -> str:
    ordered = [f"{value:.2f}" for value in sorted(values)]
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _curves(pyplot, points: list[Point]):
    names = list(dict.fromkeys(point.row["model"] for point in points))
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(2.6 * len(names) + 0.6, 3), sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        shown = [p for p in points if p.row["model"] == name and _is_row(p)]
        for i, (colour, label) in enumerate(((DENSE, "dense"), (WIN, "2:4"))):
            for what, style in (("measured", "o-"), ("efficiency", ":"), ("unhidden", "--")):
                legend = label if what == "measured" else None
                values = [point.ratios(what)[i] for point in shown]
                gpus = [point.row["gpus"] for point in shown]
                axis.plot(gpus, values, style, color=colour, markersize=3, label=legend)
        axis.set_xscale("log", base=2)
        ticks = sorted({point.row["gpus"] for point in points})
        axis.set_xticks(ticks, [f"{n}" for n in ticks])
        axis.minorticks_off()
        axis.set(title=name, xlabel="GPUs, fsdp", ylim=(0, 1.05))
    axes[0][0].set_ylabel("efficiency; dotted on paper,\ndashed with nothing hidden")
    axes[0][-1].legend(loc="lower left", fontsize=7)
    figure.tight_layout()
    return figure


def _is_row(point: Point) -> bool:
    """Whether it is of one GPU or of a row of `fsdp`, as XLA schedules it."""
    row = point.row
    return point.paper is not None and row["mesh"] in ("", f"fsdp:{row['gpus']}") and not row["overlap"]  # fmt: skip
