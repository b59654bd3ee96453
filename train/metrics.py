"""What a run records as it goes: metrics.jsonl, and TensorBoard events without TensorFlow."""

import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

from pallas_kernels.files import explained_errors, write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object per line to RUN/metrics.jsonl, each with its `step`.

    Args:
      run_dir: the run's folder.
      step: completed steps that the run goes on from; later lines, which belong to work that was
        lost, are removed, and TensorBoard is told to forget them.
      evaluated: whether the checkpoint knows of an evaluation after `step`; if not, one that is told
        of was made after the checkpoint, and is removed too.
      tensorboard: also write RUN/tensorboard.
      active: False writes nothing at all, for all but one of a run's processes.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        *,
        step: int,
        evaluated: bool = True,
        tensorboard: bool,
        active: bool = True,
    ):
        self.path = run_dir / METRICS_FILE
        self._file = self._events = None
        if not active:
            return
        truncate(self.path, step, evaluated)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _Events(run_dir / "tensorboard", step) if tensorboard else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics (plain numbers) of the state after `step` steps."""
        if self._file is None:
            return
        line = {"step": step} | {k: _number(v) for k, v in metrics.items()}
        with explained_errors(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._events:
            self._events.write(step, metrics)

    def sync(self) -> None:
        """Return when all lines have reached the disk."""
        if self._file is None:
            return
        with explained_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self.sync()
        finally:
            with contextlib.suppress(OSError):  # what is buffered can't be written to a full disk
                self._file.close()
        if self._events:
            self._events.close()


def truncate(path: pathlib.Path, step: int, evaluated: bool = True) -> None:
    """Drop the lines of metrics.jsonl after `step`, unless `evaluated` the evaluation there as well, and
    a last line that was cut off."""
    if not path.exists():
        return

    def is_lost(line: dict[str, Any]) -> bool:
        return line["step"] > step or (
            line["step"] == step and "eval_loss" in line and not evaluated
        )

    kept = [line for line in read(path) if not is_lost(line)]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a crash cut off, or that is none, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def _number(value: float) -> float | int | None:
    """JSON has no NaN nor infinity; they become null."""
    return value if isinstance(value, int) or math.isfinite(value) else None


class _Events:
    """Scalars as TensorBoard reads them, by the record writer and protos of its own package."""

    def __init__(self, folder: pathlib.Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder), flush_secs=30)
        if step:  # START makes TensorBoard drop what an earlier file has from this step on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=step + 1, session_log=start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [
            self._summary.Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in metrics.items()
        ]
        self._add(step=step, summary=self._summary.Summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), **fields))


def _tag(name: str) -> str:
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
