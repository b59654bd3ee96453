"""What the user sees while a run goes on: a progress bar, or plain lines where none can be drawn."""

import contextlib
import math
import time
from collections.abc import Iterator

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
    """How fast steps go, without what isn't a step: compilation, evaluation, saving.

    Attributes:
      seconds, tokens: measured in all.
    """

    def __init__(self, horizon: float = 30.0):
        self._horizon, self._marks, self._rates = horizon, [], (None, None)
        self.seconds, self.tokens = 0.0, 0

    def restart(self) -> None:
        """The next step compiles: count from its end on."""
        self._marks = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        start = time.monotonic()
        yield
        lost = time.monotonic() - start
        self._marks = [(when + lost, steps, tokens) for when, steps, tokens in self._marks]

    def update(self, steps: int, tokens: int) -> None:
        """Note that `steps` and `tokens` in all are done now."""
        self._marks.append((time.monotonic(), steps, tokens))
        if len(self._marks) == 1:
            return
        before, now = self._marks[-2:]
        self.seconds += now[0] - before[0]
        self.tokens += now[2] - before[2]
        while len(self._marks) > 2 and now[0] - self._marks[1][0] > self._horizon:
            self._marks.pop(0)
        first = self._marks[0]
        elapsed = max(now[0] - first[0], 1e-9)
        self._rates = (now[1] - first[1]) / elapsed, (now[2] - first[2]) / elapsed

    @property
    def steps_per_second(self) -> float | None:
        """Over the last half minute; None before two steps are done."""
        return self._rates[0]

    @property
    def tokens_per_second(self) -> float | None:
        return self._rates[1]


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
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def update(self, step: int, metrics: dict[str, float], speed: Speed) -> None:
        """Show that `step` steps are done, with the latest metrics."""
        tokens = speed.tokens_per_second
        status = f"loss {metrics['loss']:.3f}" + (f"  {tokens:,.0f} tokens/s" if tokens else "")
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
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(count, 1))) // 10, len(units) - 1)
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"
