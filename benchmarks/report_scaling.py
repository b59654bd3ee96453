"""What many devices exchange, counted, and what that costs on many GPUs, on paper."""

from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.pictures import DENSE, WIN, svg
from benchmarks.record import RESULTS
from benchmarks.scaling import BETWEEN, INSIDE, LAYOUTS, Layout
from benchmarks.tables import markdown, records, sources

PICTURE = "scaling.svg"
HALF = 0.5  # of the bandwidths
DRAWN = tuple(Layout(2**i, scaling.HOST) for i in range(8))
GB = 1e9


def sharded(folder: Path = RESULTS) -> str:
    """The step of a mesh of one device beside that without a mesh, in turns."""
    found = records("sharded-step", folder)
    if not found:
        return "Not measured yet: `python -m benchmarks.sharded_step`."
    header = ("device", "model", "layers", "micro-batch", "no mesh, ms", "mesh of one, ms", "ratio")
    rows = [
        (
            record["device"],
            r["model"],
            f"{r['depth']}",
            f"{r['tokens'] // r['length']} x {r['length']}",
            f"{r['unsharded_ms']:.2f}",
            f"{r['sharded_ms']:.2f}",
            f"{r['ratio']:.3f}",
        )
        for record in found
        for r in record["results"]
    ]
    failed = [f"Failed: {x['model']}: {x['error']}" for record in found for x in record["failed"]]
    return "\n\n".join([markdown(header, rows), *failed]) + sources(found)


def communication(folder: Path = RESULTS) -> str:
    """Bytes sent in a step by each device, by model and mesh."""
    found = records("communication", folder)
    if not found:
        return "Not counted yet: `python -m benchmarks.communication`."
    header = (
        "model",
        "mesh",
        "rank",
        "dense, GB",
        "2:4, GB",
        "ratio",
        "as compiled",
        "ratio, as compiled",
        "on paper, GB",
    )
    lines = []
    for dense, row in _pairs(found):
        compiled = [f"{r['compiled_bytes'] / GB:.2f}" for r in (dense, row)]
        lines.append(
            (
                row["model"],
                _mesh(row),
                f"{row['rank']}",
                f"{dense['sent_bytes'] / GB:.3f}",
                f"{row['sent_bytes'] / GB:.3f}",
                f"{row['sent_ratio']:.3f}",
                " → ".join(compiled),
                f"{row['compiled_ratio']:.3f}",
                " → ".join(f"{r['planned_bytes'] / GB:.3f}" for r in (dense, row)),
            )
        )
    refused = [
        f"\n\nLeft out, {left['model']} on {left['mesh']}: {left['why'].splitlines()[1].strip()}."
        for record in found
        for left in record["left_out"]
    ]
    return markdown(header, lines) + "".join(refused) + sources(found)


def kinds(folder: Path = RESULTS) -> str:
    """The same bytes by mesh axes, kind and dtype, without adapters."""
    found = records("communication", folder)
    if not found:
        return "Not counted yet: `python -m benchmarks.communication`."
    header = ("model", "mesh", "axes", "collective", "dtype", "dense, MB", "2:4, MB")
    lines = []
    for dense, row in _pairs(found):
        if row["rank"]:
            continue
        sides = [
            {(at["axes"], at["kind"], at["dtype"]): at["bytes"] for at in r["by"]}
            for r in (dense, row)
        ]
        for key in dict.fromkeys((*sides[0], *sides[1])):
            both = [side.get(key, 0) for side in sides]
            if max(both) >= 1e5:
                lines.append((row["model"], _mesh(row), *key, *(f"{x / 1e6:,.1f}" for x in both)))
    return markdown(header, lines)


def added(folder: Path = RESULTS) -> str:
    """What the compiler added by itself."""
    found = records("communication", folder)
    header = ("model", "mesh", "dense, MB", "2:4, MB", "of 2:4's bytes", "largest", "of it, MB")
    lines = []
    for dense, row in _pairs(found):
        if not row["rank"] and row["added"]["largest"]:
            most = row["added"]["largest"][0]
            lines.append(
                (
                    row["model"],
                    _mesh(row),
                    f"{dense['added']['bytes'] / 1e6:,.1f}",
                    f"{row['added']['bytes'] / 1e6:,.1f}",
                    f"{row['added']['bytes'] / row['sent_bytes']:.2%}",
                    f"{most['kind']}, {most['dtype']}, {most['axes']}",
                    f"{most['bytes'] / 1e6:,.1f}",
                )
            )
    return markdown(header, lines)


def links(folder: Path = RESULTS) -> str:
    """What a GPU sends over each link in a step, and how long that takes."""
    header = (
        "model",
        "GPUs",
        "mesh",
        *(f"{link}, GB" for link in (INSIDE, BETWEEN)),
        *(f"{link}, ms" for link in (INSIDE, BETWEEN)),
    )
    lines = []
    for row in _measured(folder):
        for layout in LAYOUTS:
            if scaling.refused(row, layout):
                continue
            sides = [scaling.links(row, layout, what) for what in ("dense", "sparse")]
            speeds = {INSIDE: scaling.NVLINK, BETWEEN: scaling.NETWORK}
            nbytes = [_both(*(s[link] / GB for s in sides), 2) for link in speeds]
            times = [_both(*(1e3 * s[link] / speed for s in sides), 1) for link, speed in speeds.items()]  # fmt: skip
            lines.append((row["model"], f"{layout.gpus}", str(layout), *nbytes, *times))
    return markdown(header, lines) + _refusals(folder)


def weak(folder: Path = RESULTS) -> str:
    """Steps with communication one layer ahead, simulated."""
    header = (
        "model",
        "GPUs",
        "mesh",
        "computation, ms",
        "communication, ms",
        "step, ms",
        "exposed, ms",
        "efficiency",
        "at half the bandwidths",
        "nothing hidden",
        "speed-up",
        "nothing hidden",
    )
    lines = []
    for row in _measured(folder):
        for layout in LAYOUTS:
            if scaling.refused(row, layout):
                continue
            walks = [scaling.side(row, layout, what) for what in ("dense", "sparse")]
            slow = [scaling.side(row, layout, what, HALF) for what in ("dense", "sparse")]
            alone = [w.compute + w.communication for w in walks]
            lines.append(
                (
                    row["model"],
                    f"{layout.gpus}",
                    str(layout),
                    _both(*(1e3 * w.compute for w in walks), 0),
                    _both(*(1e3 * w.communication for w in walks), 0),
                    _both(*(1e3 * w.step for w in walks), 0),
                    _both(*(1e3 * w.exposed for w in walks), 1),
                    _both(*(w.efficiency for w in walks), 3),
                    _both(*(w.efficiency for w in slow), 3),
                    _both(*(w.unhidden for w in walks), 3),
                    f"{walks[0].step / walks[1].step:.2f}",
                    f"{alone[0] / alone[1]:.2f}",
                )
            )
    table = markdown(header, lines)
    picture = f"![Efficiency over the number of GPUs]({PICTURE})"
    return f"{picture}\n\n{table}" + sources(_sources(folder))


def assumptions() -> str:
    """The constants of the simulation."""
    header = ("assumed", "value")
    rows = [
        ("GPUs in a host", f"{scaling.HOST}"),
        ("what a GPU sends to its host's GPUs", f"{scaling.NVLINK / GB:.0f} GB/s"),
        ("what a GPU sends to other hosts", f"{scaling.NETWORK / GB:.0f} GB/s"),
        ("a layer's forward pass, of its time", f"{scaling.FORWARD_SHARE:.2f}"),
    ]
    return markdown(header, rows)


def drawn(docs: Path, folder: Path = RESULTS) -> dict[Path, str]:
    """The text of the picture, by its path in `docs`."""
    rows = _measured(folder)
    return {docs / PICTURE: svg(_curves, rows)} if rows else {}


def _pairs(found: list[dict[str, Any]]) -> list[tuple[dict, dict]]:
    """Each sparse result beside the dense one of its model and mesh."""
    rows = [row for record in found for row in record["results"]]
    dense = {(r["model"], _mesh(r)): r for r in rows if r["method"] == "dense"}
    return [(dense[r["model"], _mesh(r)], r) for r in rows if r["method"] != "dense"]


def _mesh(row: dict[str, Any]) -> str:
    return f"{row['mesh']}, remat" if row.get("remat") else row["mesh"]


def _measured(folder: Path) -> list[dict[str, Any]]:
    """Models that a GPU was timed with: the first result of each, without adapters."""
    found: dict[str, dict[str, Any]] = {}
    for row in (row for record in _sources(folder) for row in record["results"]):
        if not row["rank"] and row["accumulation"] == 1 and not row["remat"]:
            found.setdefault(row["model"], row)
    return list(found.values())


def _sources(folder: Path) -> list[dict[str, Any]]:
    return [r for r in records("train-step", folder) if r["device"] == scaling.DEVICE]


def _refusals(folder: Path) -> str:
    lines = []
    for row in _measured(folder):
        for layout in LAYOUTS:
            if why := scaling.refused(row, layout):
                lines.append(f"Not {row['model']} on {layout}: {why.splitlines()[1].strip()}.")
    return "".join(f"\n\n{line}" for line in lines)


def _both(dense: float, sparse: float, digits: int) -> str:
    return f"{dense:,.{digits}f} → {sparse:,.{digits}f}"


def _curves(pyplot, rows: list[dict[str, Any]]):
    figure, axes = pyplot.subplots(
        1, len(rows), figsize=(2.3 * len(rows) + 0.6, 3), sharey=True, squeeze=False
    )
    for axis, row in zip(axes[0], rows, strict=True):
        for what, colour, label in (("dense", DENSE, "dense"), ("sparse", WIN, "2:4")):
            walks = [scaling.side(row, layout, what) for layout in DRAWN]
            gpus = [layout.gpus for layout in DRAWN]
            hidden = [w.efficiency for w in walks]
            axis.plot(gpus, hidden, color=colour, marker="o", markersize=3, label=label)
            bare = [w.unhidden for w in walks]
            axis.plot(gpus, bare, color=colour, linestyle="--", label=f"{label}, nothing hidden")
        axis.set_xscale("log", base=2)
        ticks = dict.fromkeys(layout.gpus for layout in LAYOUTS)
        axis.set_xticks(list(ticks), [f"{n}" for n in ticks])
        axis.minorticks_off()
        axis.set(title=row["model"], xlabel="GPUs, fsdp:8 in a host", ylim=(0, 1.05))
    axes[0][0].set_ylabel("efficiency, simulated")
    axes[0][-1].legend(loc="lower left", fontsize=7)
    figure.tight_layout()
    return figure
