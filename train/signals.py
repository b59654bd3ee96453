"""Stopping on request: the first signal is noted, a second one ends the process at once."""

import os
import signal
import sys
import threading
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes SIGINT (Ctrl-C) and SIGTERM while used as a context manager.

    Args:
      grace: seconds after SIGTERM in which the context must be left, or the process ends itself,
        so that the log says why. 0: there is no such deadline.

    Attributes:
      signal: the one received, None so far.
    """

    def __init__(self, grace: float = 0.0):
        self.signal: signal.Signals | None = None
        self._grace, self._timer = grace, None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._grace and number == signal.SIGTERM:
            self._timer = threading.Timer(self._grace, self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        print(
            f"error: SIGTERM came {self._grace:g} s ago (--grace-seconds) and the run has not saved "
            f"yet: it ends without. The same command goes on from the last checkpoint, which is "
            f"intact",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # not 143, which says that all is saved
