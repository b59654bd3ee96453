"""The loss curve of a run as a picture."""

import pathlib
from typing import Any


def loss_curve(
    lines: list[dict[str, Any]],
    path: pathlib.Path,
    *,
    title: str,
    adapter_step: int | None = None,
    phase_starts: tuple[int, ...] = (),
) -> None:
    """Draw training and held-out loss against steps into a PNG.

    Args:
      lines: the lines of metrics.jsonl.
      path: where to write.
      title: above the picture.
      adapter_step: completed steps when the adapters joined; marked. None: not marked.
      phase_starts: first steps of the second and later phases; marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
    held_out = [(x["step"], x["eval_loss"]) for x in lines if x.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="training, per step")
        axes.plot(
            steps, _smooth(losses), color="#1f5a91", linewidth=1.8, label="training, smoothed"
        )
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="#d1632a", markersize=4, label="held out")
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(6, -4), textcoords="offset points"
        )
    for start in phase_starts:
        axes.axvline(start, color="0.6", linewidth=1, linestyle=":")
        axes.text(
            start, 0.98, " next phase", transform=axes.get_xaxis_transform(), va="top", size=9
        )
    if adapter_step is not None:
        last = max((step for step, _ in train + held_out), default=adapter_step)
        axes.axvspan(adapter_step, last, color="#2b8a3e", alpha=0.12, linewidth=0)
        axes.axvline(adapter_step, color="#2b8a3e", linewidth=1.4, linestyle="--")
        axes.text(
            adapter_step,
            0.98,
            f"adapters join at {adapter_step} ",
            transform=axes.get_xaxis_transform(),
            color="#2b8a3e",
            ha="right",
            va="top",
            size=9,
        )
    axes.set(title=title, xlabel="optimizer steps", ylabel="loss (nats per predicted token)")
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    if train or held_out:
        axes.legend(loc="lower left", frameon=False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential average over about a twentieth of the curve, free of bias at its start."""
    decay = 1 - 1 / max(len(values) / 20, 1)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        smoothed.append(total / weight)
    return smoothed
