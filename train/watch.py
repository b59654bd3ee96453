"""What the steps measured: told to the user and to the file of metrics, and judged."""

import math
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax

from train.config import Config
from train.display import Display, Speed
from train.history import History
from train.metrics import MetricsWriter

LAG = 1  # steps that may be under way while the host looks at the metrics of the one before


class NonFiniteError(ArithmeticError):
    """The loss, the gradient or the state is NaN or infinite."""


class Watch:
    """Looks at the metrics of the steps, in order, and late enough for the device never to wait.

    Args:
      config: the run.
      history: counts the steps that were skipped, and how long the first one took.
      display, writer: where the metrics go.
      started: this process, by `time.monotonic`.
      give_up: ends the run; told what is not finite.

    Attributes:
      speed: of the steps looked at.
    """

    def __init__(
        self,
        config: Config,
        history: History,
        display: Display,
        writer: MetricsWriter,
        started: float,
        give_up: Callable[[str], NoReturn],
    ):
        self.speed = Speed()
        self._config, self._history, self._started = config, history, started
        self._display, self._writer, self._give_up = display, writer, give_up
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the metrics of a step that was started, and look at those of `LAG` steps before."""
        self._pending.append((step, metrics))
        self._look(keep=LAG)

    def look(self) -> None:
        """Look at all that there is, waiting for the device."""
        self._look(keep=0)

    def compiles(self) -> None:
        """The next step will be compiled, which is not to count as its speed."""
        self.look()
        self.speed.restart()

    def _look(self, keep: int) -> None:
        while len(self._pending) > keep:
            step, arrays = self._pending.pop(0)
            metrics = {name: float(x) for name, x in jax.device_get(arrays).items()}
            self._count_bad(step, metrics)
            if step == 1:
                self._history["first_step_seconds"] = time.monotonic() - self._started
            tokens = self._tokens(step)
            self.speed.update(step, tokens)
            self._display.update(step, metrics, self.speed)
            if step % self._config.log_every == 0 or step == self._config.total_steps:
                rate = self.speed.tokens_per_second
                measured = {} if rate is None else {"tokens_per_second": round(rate, 1)}
                self._writer.write(step, metrics | {"tokens": tokens} | measured)

    def _count_bad(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step that `make_train_step` skipped; give up when there were too many."""
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        self._history["bad_steps"] += bool(bad)
        count, limit = self._history["bad_steps"], self._config.max_bad_steps
        if count:
            metrics["bad_steps"] = count
        if not bad:
            return
        what = f"{bad[0]} is {metrics[bad[0]]} at step {step}"
        if count > limit:
            skipped = f", after {count - 1} skipped steps (--max-bad-steps={limit})"
            self._give_up(what + (skipped if limit else ""))
        self._display.message(
            f"warning: {what}: skipped, weights and moments stay ({count} of at most {limit}, "
            f"--max-bad-steps)"
        )

    def _tokens(self, step: int) -> int:
        """Tokens seen after so many steps."""
        return sum(
            max(0, min(step, p.end) - p.start) * p.tokens_per_step for p in self._config.phases
        )
