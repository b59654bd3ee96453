"""Benchmark records: what they say of their circumstances and what they must not say."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import record, tables
from benchmarks.input_pipeline import tokens_per_second
from train import environment

COMMITTED = sorted(record.RESULTS.glob("*.json"))


def test_record_is_written_whole_and_without_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--cache-dir=/home/me/cache", "--data=text:/home/me/*.txt", "~/data", "--seconds=2"],
    )
    made = record.make_record(
        "speed", [{"ms": 1}], device="A GPU (80GB)", module="benchmarks.speed"
    )
    path = record.write_record(made, tmp_path)
    assert path.name == "speed-a-gpu-80gb.json"
    assert json.loads(path.read_text()) == made
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (
        made["command"]
        == "python -m benchmarks.speed --cache-dir=... --data=text:... ... --seconds=2"
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"])
    assert {"python", "jax", "numpy"} <= made["versions"].keys()


def test_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv(environment.COMMIT_VARIABLE, raising=False)
    assert environment.commit() == (None, True)
    monkeypatch.setenv(environment.COMMIT_VARIABLE, "a" * 40)
    assert environment.commit() == ("a" * 40, False)
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        assert environment._output("git", *arguments) == ""
    assert environment.commit() == ("a" * 40, False)
    monkeypatch.delenv(environment.COMMIT_VARIABLE)
    commit, dirty = environment.commit()
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    assert environment.commit() == (commit, False)
    (tmp_path / "new.py").write_text("")
    assert environment.commit() == (commit, True)


def test_device_names_have_no_marks_of_the_machine():
    name = environment.cpu()
    assert re.search(r"\(\d+ cores\)$", name)
    assert "/" not in record.slug(name)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_records_are_clean(path: Path):
    found = json.loads(path.read_text())
    assert found["dirty"] is False, "made from a tree with uncommitted changes"
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert path.name == f"{found['benchmark']}-{record.slug(found['device'])}.json"
    assert not re.search(r'"[^"]*(?:[ =:]|^)/(?:home|root|work|tmp|Users)/', path.read_text())


def test_rate_counts_text_and_not_padding():
    import itertools

    import numpy as np

    def rate(batch):
        return tokens_per_second(lambda: itertools.repeat(batch), seconds=0.02, repeats=3)

    ids = np.zeros((1000, 1000), np.int32)
    full = rate({"input_ids": ids})
    half = rate({"input_ids": ids, "lengths": np.full(1000, 1)})
    assert full > 50 * half > 0


def test_records_are_read_in_the_order_in_which_they_were_made(tmp_path):
    made = {"b": {"date": "2026-01-02"}, "c": {"date": "2026-01-01", "time": "23:59"}}
    made |= {"a": {"date": "2026-01-02", "time": "00:01"}, "d": {"date": "2026-01-02"}}
    for name, when in made.items():
        (tmp_path / f"trial-{name}.json").write_text(json.dumps(when | {"name": name}))
    found = [found["name"] for found in tables.records("trial", tmp_path)]
    assert found == ["c", "b", "d", "a"]


def test_gpu_tests_tell_failures_at_once_and_what_was_under_way(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(
        "import os, pathlib, time\n"
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_wrong():\n"
        "    assert 2 + 2 == 5\n"
        "def test_long():\n"
        "    (pathlib.Path(__file__).parent / 'started').touch()\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    program = (
        "import pathlib, sys\n"
        "from benchmarks import gpu_tests\n"
        "gpu_tests.ROOT = gpu_tests.RESULTS = pathlib.Path(sys.argv.pop())\n"
        "gpu_tests.KEPT_SECONDS = 0\n"
        "gpu_tests.main()\n"
    )
    command = [sys.executable, "-c", program, "-q", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=record.ROOT)
    while not (tests / "started").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert re.search(r"FAILED .*test_some.py::test_wrong\n", said)
    assert "assert (2 + 2) == 5" in said
    assert re.search(r"under way:\n  .*test_some.py::test_long\n", said)
    assert run.returncode == 2
    (path,) = tmp_path.glob("gpu-tests*.json")
    assert path.name.startswith("gpu-tests-cut-off")
    found = json.loads(path.read_text())["results"]
    assert (found["passed"], found["failed"]) == (0, 1)
    (test,) = found["tests"]
    assert test.endswith("test_wrong")

    (tests / "test_some.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_right():\n    pass\n"
    )
    subprocess.run(command, stdout=subprocess.PIPE, cwd=record.ROOT, timeout=60, check=True)
    (path,) = tmp_path.glob("gpu-tests*.json")  # in the place of the other
    assert not path.name.startswith("gpu-tests-cut-off")
    assert json.loads(path.read_text())["results"]["passed"] == 1
