"""When a run ends ahead of its last step: at the same step in all of its processes."""

import enum
import time
from typing import NamedTuple

from train.config import Config
from train.processes import Agreement
from train.signals import StopRequest


class Exit(enum.IntEnum):
    """Exit codes of the command.

    A signal gives 128 + its number: 130 Ctrl-C, 143 SIGTERM, with all saved unless a second one came.
    """

    DONE = 0
    FAILED = 1  # not finite, full disk, a lost process, no time to save after SIGTERM
    BAD_INPUT = 2
    UNFINISHED = 75  # --max-minutes; the same command goes on


class Stopped(NamedTuple):
    """Why a run ended ahead of its last step."""

    code: int
    reason: str


class Stops:
    """What makes a run stop.

    Args:
      config: the run.
      request: a signal that may come.
      started: `time.monotonic()` at the start of the process.
      stop_at: stop after so many steps in all.
    """

    def __init__(self, config: Config, request: StopRequest, started: float, stop_at: int | None):
        self._config, self._request = config, request
        self._started, self._stop_at = started, stop_at
        self._agreement = Agreement()

    def after(self, step: int) -> Stopped | None:
        """Whether to save and stop now; to be called after every step, in every process."""
        own = self._own(step)
        code = self._agreement.agree(0 if own is None else own.code)
        if not code or step == self._config.total_steps:
            return None
        if own is not None and own.code == code:
            return own
        return Stopped(code, "Stopped, as another process of the run was asked to")

    def _own(self, step: int) -> Stopped | None:
        if (number := self._request.signal) is not None:
            return Stopped(128 + number, f"Stopped by {number.name}")
        if self._stop_at is not None and step >= self._stop_at:
            return Stopped(Exit.UNFINISHED, f"Stopped at step {self._stop_at}")
        limit = self._config.max_minutes
        if limit and time.monotonic() - self._started > 60 * limit:
            return Stopped(Exit.UNFINISHED, f"Stopped after {limit:g} minutes")
        return None
