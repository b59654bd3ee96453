"""A run of two processes with four devices each: one is killed, both go on, nothing is lost."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from train import integrity, metrics
from train.job import Exit, pretrain
from train.recipes import make_config

ROOT = pathlib.Path(__file__).parents[1]
STEPS, JOIN, PATIENCE = 8, 4, 240
OPTIONS = {
    "model": "gpt2-nano",
    "vocab_size": 300,
    "valid_fraction": 0.2,
    "seq_len": 16,
    "batch_size": 8,
    "steps": STEPS,
    "adapter_start": JOIN / STEPS,
    "adapter_rank": 8,
    "eval_every": 4,
    "eval_batches": 2,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_text):
    path = tmp_path_factory.mktemp("processes")
    shutil.copytree(small_text, path / "text")
    return path


def start(folder, *options, mesh="data:2,fsdp:2,tensor:2", log="log"):
    """Two processes of one run; what they say goes to RUN.log.0 and RUN.log.1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    given = OPTIONS | {
        "data": f"text:{folder / 'text' / '*.txt'}",
        "cache_dir": folder / "cache",
        "run_dir": folder / "run",
        "mesh": mesh,
        "heartbeat_seconds": 5,
        "coordinator": address,
        "processes": 2,
    }
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    children = []
    for i in range(2):
        with (folder / f"{log}.{i}").open("w") as file:
            command = [sys.executable, "-m", "train.pretrain", "--no-tensorboard", *arguments]
            command += [f"--process-id={i}", *options]
            children.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            )
    return children


def ends(children) -> list[int]:
    return [child.wait(timeout=PATIENCE) for child in children]


def said(folder, index, log="log") -> str:
    return (folder / f"{log}.{index}").read_text()


def losses(path) -> dict[int, float]:
    lines = metrics.read(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(folder):
    children = start(folder)
    deadline = time.monotonic() + PATIENCE
    while JOIN not in losses(folder / "run") and time.monotonic() < deadline:
        assert children[0].poll() is None, said(folder, 0)
        time.sleep(0.02)
    children[1].send_signal(signal.SIGKILL)  # adapters join, or are about to
    first, second = ends(children)
    assert second == -signal.SIGKILL
    assert first in (1, -signal.SIGABRT), said(folder, 0)
    assert ("another task died" in said(folder, 0)) or ("lost another process" in said(folder, 0))
    saved = sorted(int(p.name) for p in (folder / "run" / "checkpoints").iterdir())
    assert saved
    assert saved[-1] in (JOIN - 2, JOIN)
    assert not integrity.problems(folder / "run" / "checkpoints" / str(saved[-1]))

    assert ends(start(folder)) == [Exit.DONE, Exit.DONE], said(folder, 0)
    assert f"Going on after step {saved[-1]}" in said(folder, 0)
    assert "reports in" in said(folder, 1)
    log = (folder / "run" / "process-1.log").read_text()
    assert f"Going on after step {saved[-1]}" in log
    assert f"step {STEPS}/{STEPS}" in log

    # The same run on one device.
    fields = {k: v for k, v in OPTIONS.items() if k != "model"}
    fields |= {"data": f"text:{folder / 'text' / '*.txt'}", "cache_dir": str(folder / "cache")}
    alone = make_config("gpt2-nano", run_dir=str(folder / "alone"), tensorboard=False, **fields)
    with open(os.devnull, "w") as nowhere:
        assert pretrain(alone, console=Console(file=nowhere)) == Exit.DONE
    ours, expected = losses(folder / "run"), losses(folder / "alone")
    assert ours.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), rtol=1e-5)


def test_bad_input_ends_all_processes_alike(folder):
    children = start(folder, "--valid-fraction=0.4", log="refused")
    assert ends(children) == [Exit.BAD_INPUT, Exit.BAD_INPUT], said(folder, 0, "refused")
    for index in range(2):
        text = said(folder, index, "refused")
        assert ("of another configuration" in text) or ("process 0 of 2 could not" in text), text
