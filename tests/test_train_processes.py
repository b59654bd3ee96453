"""Processes agree, fail together and find each other; a run of two of them loses nothing."""

import json
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

from train import integrity, metrics, processes
from train.job import Exit, pretrain
from train.recipes import make_config

ROOT = pathlib.Path(__file__).parents[1]
STEPS, KILLED, PATIENCE = 6, 3, 240
OPTIONS = {
    "model": "gpt2-nano",
    "vocab_size": 300,
    "valid_fraction": 0.2,
    "seq_len": 16,
    "batch_size": 8,
    "sparsity": "layers/[1-3]/mlp/.*=2:4; .*=dense",  # both ways that a mesh cuts a linear
    "steps": STEPS,
    "adapter_rank": 0,
    "eval_every": 3,
    "eval_batches": 2,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_text):
    path = tmp_path_factory.mktemp("processes")
    shutil.copytree(small_text, path / "text")
    return path


def start(folder, *options, mesh="fsdp:2,tensor:2", log="log"):
    """Two processes of one run; what they say goes to RUN.log.0 and RUN.log.1."""
    given = OPTIONS | {
        "data": f"text:{folder / 'text' / '*.txt'}",
        "cache_dir": folder / "cache",
        "run_dir": folder / "run",
        "mesh": mesh,
        "heartbeat_seconds": 5,
        "coordinator": free_address(),
        "processes": 2,
    }
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    children = []
    for i in range(2):
        with (folder / f"{log}.{i}").open("w") as file:
            command = [sys.executable, "-m", "train.pretrain", "--no-tensorboard", *arguments]
            command += [f"--process-id={i}", *options]
            children.append(
                subprocess.Popen(command, cwd=ROOT, env=environment(2), stdout=file, stderr=file)
            )
    return children


def ends(children) -> list[int]:
    return [child.wait(timeout=PATIENCE) for child in children]


def said(folder, index, log="log") -> str:
    return (folder / f"{log}.{index}").read_text()


def losses(path) -> dict[int, float]:
    lines = metrics.read(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


# Both processes do one after the other; what each of them met is printed as a line of JSON.
TALK = """
import json, pathlib, sys
from train import processes
from train.job import Exit
from train.mesh import make_mesh, set_mesh
from train.recipes import make_config
from train.signals import StopRequest
from train.stops import Stops

index, address, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
fields = {"coordinator": address, "processes": 2, "process_id": index, "mesh": "data:4"}
fields |= {"heartbeat_seconds": 10, "batch_size": 8}
config = make_config("gpt2-nano", **fields)
processes.connect(config)

def fail(error):
    with processes.together("work"):
        if index == 1 and error is not None:
            raise error

def met(function, *arguments):
    try:
        return function(*arguments)
    except BaseException as error:
        return [type(error).__name__, str(error)]

def stops():
    request = StopRequest()
    all_stops, codes = Stops(config, request, 0.0, None), []
    for step in range(1, 5):
        if step == 2 and index == 1:
            request.signal = __import__("signal").SIGTERM
        stopped = all_stops.after(step)
        codes.append(None if stopped is None else [stopped.code, stopped.reason])
        if stopped:
            break
    return codes

answers = {
    "nothing": met(fail, None),
    "bad": met(fail, ValueError("mine")),
    "memory": met(fail, MemoryError("no room")),
    "interrupt": met(fail, KeyboardInterrupt()),
    "same": met(processes.check_same, "a", "it", "do"),
    "other": met(processes.check_same, f"a{index}", "it", "do"),
    "command": met(processes.check_command, config),
    "other command": met(processes.check_command, make_config("gpt2-nano", lr=1e-3 * (1 + index))),
    "folder": met(processes.check_shared, folder),
    "other folder": met(processes.check_shared, folder / str(index)),
    "first": met(processes.first_then_others, "count", lambda: 10 + index),
    "first fails": met(processes.first_then_others, "count", lambda: int("x" * (1 - index) or 1)),
}
with set_mesh(make_mesh(config)):
    answers["stops"] = stops()
print(json.dumps(answers))
sys.stdout.flush()
if index == 1:
    with processes.lost_together(lambda: "here"):
        raise RuntimeError("alone")
with processes.lost_together(lambda: "there"):
    fail(None)
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def environment(devices: int) -> dict[str, str]:
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return os.environ | {"PYTHONPATH": str(ROOT)} | cpu


def test_processes_agree_and_fail_together(tmp_path):
    address = free_address()
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TALK, str(index), address, str(tmp_path)],
            cwd=ROOT,
            env=environment(2),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    texts = [child.communicate(timeout=PATIENCE) for child in children]
    told = [out.splitlines() for out, _ in texts]
    assert told[0][0] == f"process 0 of 2 meets the others at {address}, within 300 s"
    first, second = (json.loads(next(x for x in lines if x[0] == "{")) for lines in told)

    could_not = "process 1 of 2 could not work: see what it says"
    assert first["nothing"] is second["nothing"] is None
    assert [first["bad"], second["bad"]] == [["ValueError", could_not], ["ValueError", "mine"]]
    assert [first["memory"], second["memory"]] == [
        ["OSError", could_not],
        ["MemoryError", "no room"],
    ]
    assert [first["interrupt"], second["interrupt"]] == [
        ["OSError", could_not],
        ["KeyboardInterrupt", ""],
    ]
    assert first["same"] is second["same"] is first["command"] is second["command"] is None
    assert first["other"] == second["other"]
    assert first["other"] == ["ValueError", "it is not the same in process 1 as in the first: do"]
    for answers, rate in ((first, 0.001), (second, 0.002)):
        assert answers["other command"] == [
            "ValueError",
            f"process 1 has another --lr than the first (this one has [{rate}]): give all processes"
            " the same command but for --process-id",
        ]
    assert first["folder"] is second["folder"] is None
    assert first["other folder"][0] == second["other folder"][0] == "ValueError"
    assert "give a --run-dir on a disk that all hosts share" in second["other folder"][1]
    assert not list(tmp_path.rglob(".shared*"))
    assert [first["first"], second["first"]] == [10, 11]
    assert first["first fails"][0] == second["first fails"][0] == "ValueError"
    assert "process 0 of 2 could not count" in second["first fails"][1]

    # Told at one step, known to both at the next.
    assert first["stops"] == [
        None,
        None,
        [143, "Stopped, as another process of the run was asked to"],
    ]
    assert second["stops"] == [None, None, [143, "Stopped by SIGTERM"]]

    # At once, without an orderly end, for which the first would have to be there.
    assert children[1].returncode == 1
    assert "process 1 of 2 failed: alone here. The same command" in texts[1][1]
    assert children[0].returncode in (1, -signal.SIGABRT)


def test_an_address_that_cannot_be_used_is_named(monkeypatch):
    fields = {"processes": 2, "mesh": "data:2", "batch_size": 8}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = make_config("gpt2-nano", coordinator=f"here:{port}", process_id=0, **fields)
        with pytest.raises(ValueError, match=f"here:{port}: port {port} of this host cannot be"):
            processes.connect(config)
    monkeypatch.setattr(processes, "MEETING_SECONDS", 0.5)
    address = free_address()
    config = make_config("gpt2-nano", coordinator=address, process_id=1, **fields)
    with pytest.raises(ValueError, match=f"{address}: nothing answers there .*; start process 0"):
        processes.connect(config)


def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(folder):
    children = start(folder)
    deadline = time.monotonic() + PATIENCE
    while KILLED not in losses(folder / "run") and time.monotonic() < deadline:
        assert children[0].poll() is None, said(folder, 0)
        time.sleep(0.02)
    children[1].send_signal(signal.SIGKILL)
    first, second = ends(children)
    assert second == -signal.SIGKILL
    assert first in (1, -signal.SIGABRT), said(folder, 0)
    assert ("another task died" in said(folder, 0)) or ("lost another process" in said(folder, 0))
    saved = sorted(int(p.name) for p in (folder / "run" / "checkpoints").iterdir())
    assert saved
    assert saved[-1] in (KILLED - 1, KILLED + 1)
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
    options = (f"--run-dir={folder / 'refused'}", f"--data=text:{folder / 'nowhere' / '*.txt'}")
    children = start(folder, *options, log="refused")
    assert ends(children) == [Exit.BAD_INPUT, Exit.BAD_INPUT], said(folder, 0, "refused")
    assert "matches no file" in said(folder, 0, "refused")
    assert "process 0 of 2 could not prepare the data" in said(folder, 1, "refused")
