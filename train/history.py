"""What a run tells of itself, carried from stop to stop in its checkpoints."""

import time
from typing import Any

from train import compiling
from train.display import Speed


class History(dict[str, Any]):
    """In JSON types: evaluations, and what the run took. Times are seconds over all its processes.

    Args:
      started: of this process, by `time.monotonic`.
    """

    def __init__(self, started: float):
        super().__init__(
            evals=[],
            adapters=0,
            seconds=0.0,
            first_step_seconds=None,
            compiling_seconds=0.0,
            programs=0,
            step_seconds=0.0,
            step_tokens=0,
            bad_steps=0,
        )
        self._clock, self._made = started, compiling.spent()

    def settle(self, speed: Speed) -> None:
        """Add what was spent since the last time; `speed` counts from zero again."""
        now, made = time.monotonic(), compiling.spent()
        spent = made.since(self._made)
        self["seconds"] += now - self._clock
        self["step_seconds"] += speed.seconds
        self["step_tokens"] += speed.tokens
        self["programs"] += spent.programs
        self["compiling_seconds"] += spent.seconds
        self._clock, self._made = now, made
        speed.seconds, speed.tokens = 0.0, 0
