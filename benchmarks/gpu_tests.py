"""Runs the tests that need a GPU and records the outcome: ``python -m benchmarks.gpu_tests``.

They skip elsewhere, by the predicate of the dispatcher, so this record is what shows that they ran.
What fails is told at once. A run that SIGTERM or Ctrl-C ends leaves no record, but says what was under way.
"""

import os
import signal
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cuda,cpu"  # read by JAX when it is imported
# pytest-xdist's processes share the device (-n 12).
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.record import ROOT, make_record, write_record
from train.environment import accelerator

SHOWN = 3000  # characters of a failure


class Outcomes:
    """A pytest plugin that keeps each test's outcome, and shows a failure when it happens."""

    def __init__(self):
        self.tests: dict[str, str] = {}
        self.under_way: set[str] = set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.under_way.add(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome
            self.under_way.discard(report.nodeid)
        if report.outcome == "failed":
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-SHOWN:]}", flush=True)


def main() -> None:
    outcomes = Outcomes()
    # Libraries of the GPU warn of much that is not ours to mend.
    options = ["-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *sys.argv[1:]]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = pytest.main([str(ROOT / "tests"), *options], plugins=[outcomes])
    if code == pytest.ExitCode.INTERRUPTED:
        print("interrupted; under way:", *sorted(outcomes.under_way), sep="\n  ")
        sys.exit(int(code))
    counts = {kind: 0 for kind in ("passed", "failed", "skipped")}
    for outcome in outcomes.tests.values():
        counts[outcome] += 1
    results = {**counts, "tests": outcomes.tests}
    record = make_record("gpu-tests", results, device=accelerator(), module="benchmarks.gpu_tests")
    print(write_record(record).name)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
