"""What the user sees while a run goes on: a progress bar, or plain lines where none can be drawn."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 15.0  # between plain lines


class Speed:
    """Tokens per second and seconds to go, over recent steps; compilation is left out."""

    def __init__(self, horizon: float = 30.0):
        self._horizon = horizon
        self.restart()

    def restart(self) -> None:
        """Forget the past: the next step compiles."""
        self._marks: list[tuple[float, int, int]] = []

    def update(self, steps: int, tokens: int, now: float | None = None) -> None:
        """Note that `steps` and `tokens` in all are done."""
        self._marks.append((time.monotonic() if now is None else now, steps, tokens))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] > self._horizon:
            self._marks.pop(0)

    @property
    def tokens_per_second(self) -> float:
        return self._rate(2)

    @property
    def steps_per_second(self) -> float:
        return self._rate(1)

    def _rate(self, column: int) -> float:
        if len(self._marks) < 2:
            return 0.0
        first, last = self._marks[0], self._marks[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-9)


class Display:
    """A rich progress bar on a terminal, else a line every quarter of a minute.

    Use as a context manager around the training loop.
    """

    def __init__(self, console: Console, *, total: int, done: int):
        self._console, self._total = console, total
        self._live = console.is_terminal
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("training", total=total, completed=done, status="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def update(self, step: int, metrics: dict[str, float], speed: Speed) -> None:
        """Show that `step` steps are done, with the latest metrics."""
        status = f"loss {metrics['loss']:.3f}  {speed.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        if self._live or (now - self._last_line < LINE_SECONDS and step < self._total):
            return
        self._last_line = now
        rate = speed.steps_per_second
        eta = f"  ETA {duration((self._total - step) / rate)}" if rate else ""
        self.message(f"step {step}/{self._total}  {status}{eta}")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count /= 1024
    else:
        unit = "TiB"
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
