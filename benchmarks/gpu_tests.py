"""Runs the tests that need a GPU and records the outcome: ``python -m benchmarks.gpu_tests``.

They skip elsewhere, by the predicate of the dispatcher, so this record is what shows that they ran.
What fails is told at once. A run that is cut off does not replace the record of one that was not, but leaves
one of its own, ``gpu-tests-cut-off``, of what had run by then; by SIGTERM or Ctrl-C, it says what was under way.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cuda,cpu"  # read by JAX when it is imported
# pytest-xdist's processes share the device (-n 12).
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.record import RESULTS, ROOT, make_record, write_record
from train.environment import accelerator

SHOWN = 3000  # characters of a failure
NAME, CUT_OFF = "gpu-tests", "gpu-tests-cut-off"
KEPT_SECONDS = 30.0  # between records of what has run


class Outcomes:
    """A pytest plugin that keeps each test's outcome, and shows a failure when it happens."""

    def __init__(self):
        self.tests: dict[str, str] = {}
        self.under_way: set[str] = set()
        self.kept_at = time.monotonic()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.under_way.add(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome
            self.under_way.discard(report.nodeid)
        if report.outcome == "failed":
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-SHOWN:]}", flush=True)
        if time.monotonic() - self.kept_at >= KEPT_SECONDS:
            self.keep(CUT_OFF)
            self.kept_at = time.monotonic()

    def keep(self, name: str) -> Path:
        """Writes the record."""
        counts = {kind: 0 for kind in ("passed", "failed", "skipped")}
        for outcome in self.tests.values():
            counts[outcome] += 1
        results = {**counts, "tests": self.tests}
        device, module = accelerator(), "benchmarks.gpu_tests"
        return write_record(make_record(name, results, device=device, module=module), RESULTS)


def main() -> None:
    outcomes = Outcomes()
    # Libraries of the GPU warn of much that is not ours to mend.
    options = ["-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *sys.argv[1:]]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = pytest.main([str(ROOT / "tests"), *options], plugins=[outcomes])
    if code == pytest.ExitCode.INTERRUPTED:
        print("interrupted; under way:", *sorted(outcomes.under_way), sep="\n  ")
        sys.exit(int(code))
    path = outcomes.keep(NAME)
    path.with_name(path.name.replace(NAME, CUT_OFF, 1)).unlink(missing_ok=True)
    print(path.name)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
