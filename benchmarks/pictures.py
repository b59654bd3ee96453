"""Pictures of the kernels' records, as SVG: the same records give the same bytes."""

import io
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.report_kernels import Device, devices, over_peer

KINDS = {
    "matmul": "x @ w",
    "epilogue": "with bias, activation or gate",
    "sddmm": "x.T @ dy, kept",
    "few": "1 to 64 tokens",
}
WIN, LOSS, DENSE, PEER = "#2f6f9f", "#c0392b", "#8a8a8a", "#d98e04"
# TFLOP/s in bfloat16 dense and 2:4, and TB/s of memory, as NVIDIA's data sheets say.
PEAKS = {"NVIDIA H100 80GB HBM3": (989, 1979, 3.35), "NVIDIA H200": (989, 1979, 4.8)}
STYLE = {
    "svg.hashsalt": "slope_jax",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def names(device: Device) -> dict[str, str]:
    """The files of a device's pictures, by what they show."""
    found = {}
    if any(device.results(kind) for kind in KINDS):
        found["Speed-up over dense, all shapes sorted"] = f"speedup-{device.slug}.svg"
    if device.results("matmul"):
        found["Roofline of nm_matmul"] = f"roofline-{device.slug}.svg"
    if device.beside_peer():
        found["nm_matmul beside cuSPARSELt"] = f"peers-{device.slug}.svg"
    return found


def drawn(docs: Path, folder: Path = RESULTS) -> dict[Path, str]:
    """The text of every picture, by its path in `docs`."""
    draw = {"speedup": _speedup, "roofline": _roofline, "peers": _peers}
    return {
        docs / name: svg(draw[name.partition("-")[0]], device)
        for device in devices(folder)
        for name in names(device).values()
    }


def intensity(r: dict, *, dense: bool) -> float:
    """FLOPs for each byte that a 16-bit product must move: x, y, and w or 9/16 of it."""
    tokens, k, f = r["tokens"], r["in"], r["out"]
    weight = 2 * k * f * (1 if dense else 9 / 16)
    return 2 * tokens * k * f / (2 * tokens * (k + f) + weight)


def svg(draw, subject) -> str:
    """What `draw(pyplot, subject)` draws, the same text each time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = draw(pyplot, subject)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _speedup(pyplot, device: Device):
    kinds = [kind for kind in KINDS if device.results(kind)]
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(2.6 * len(kinds), 2.8), sharey=True, squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        ratios = sorted(r["speedup"] for r in device.results(kind))
        colours = [WIN if ratio >= 1 else LOSS for ratio in ratios]
        axis.scatter(range(len(ratios)), ratios, c=colours, s=6)
        axis.axhline(1, color=DENSE, linewidth=0.8)
        axis.set(title=KINDS[kind], xlabel=f"{len(ratios)} shapes, sorted")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("speed-up over dense")
    figure.tight_layout()
    return figure


def _roofline(pyplot, device: Device):
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    rows = device.results("matmul")
    for what, colour, label in (("dense", DENSE, "dense"), ("sparse", WIN, "nm_matmul")):
        axis.scatter(
            [intensity(r, dense=what == "dense") for r in rows],
            [_tflops(r, what) for r in rows],
            s=8,
            color=colour,
            label=label,
        )
    if device.name in PEAKS:
        dense, sparse, bandwidth = PEAKS[device.name]
        span = [intensity(r, dense=True) for r in rows] + [intensity(r, dense=False) for r in rows]
        low, high = min(span) / 1.3, max(span) * 1.3
        for peak, colour in ((dense, DENSE), (sparse, WIN)):
            knee = min(max(peak / bandwidth, low), high)
            axis.plot([low, knee, high], [min(peak, x * bandwidth) for x in (low, knee, high)], color=colour, linewidth=0.8)  # fmt: skip
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs of the dense product for each byte moved",
        ylabel="TFLOP/s",
        title="x @ w; lines: the data sheet's peaks",
    )
    axis.legend()
    figure.tight_layout()
    return figure


def _peers(pyplot, device: Device):
    rows = device.beside_peer()
    rows.sort(key=lambda r: (r["in"] * r["out"], r["in"], r["tokens"]))
    places = range(len(rows))
    figure, axis = pyplot.subplots(figsize=(8, 3.6))
    ours = [r["speedup"] for r in rows]
    theirs = [r["speedup"] / over_peer(r) for r in rows]
    axis.scatter(places, ours, s=12, color=WIN, label="nm_matmul")
    axis.scatter(places, theirs, s=12, color=PEER, label="cuSPARSELt, best algorithm")
    axis.axhline(1, color=DENSE, linewidth=0.8)
    labels = [f"{r['tokens']} x {r['in']} x {r['out']}" for r in rows]
    axis.set_xticks(list(places), labels, rotation=90, fontsize=6)
    axis.set_ylabel("speed-up over dense")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.tight_layout()
    return figure


def _tflops(r: dict, what: str) -> float:
    return 2 * r["tokens"] * r["in"] * r["out"] / r[f"{what}_us"] / 1e6
