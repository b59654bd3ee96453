"""Kills a run at random moments until nothing is left to kill: ``python -m benchmarks.soak``.

Tiny runs of ``train.pretrain`` are killed (SIGKILL, now and then SIGTERM) again and again, while they
start, prepare data, train, save and give birth to adapters, and started anew by the same command.
After every kill the checkpoints must be whole and none may be lost; a run that reached its end must
equal one that was never stopped, bit for bit: parameters, masks, moments, counters, key, metrics.

The variant "processes" trains in two processes on a mesh of eight devices: one of the two is killed,
and the other must end by itself.

Children are forked from a process that has imported everything and computed nothing.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from train import integrity, metrics

JOIN, STEPS = 30, 60
SIGTERM_SHARE = 0.2
STARTING_SHARE = 0.5  # of kills that may come before the first step
TRAINING_SECONDS = 1.2  # after the first step of a child, in which the others come
PATIENCE = 300.0  # seconds after which a child that was not killed hangs
CLOCK = ("tokens_per_second",)  # metrics that depend on it
SHARED = {
    "vocab-size": 300,
    "valid-fraction": 0.2,
    "steps": STEPS,
    "adapter-rank": 0.0156,
    "adapter-start": JOIN / STEPS,
    "checkpoint-every": 2,
    "eval-every": 7,
    "eval-batches": 2,
}
VARIANTS = {
    "gpt2": {"model": "gpt2-nano", "seq-len": 8, "batch-size": 2},
    "bert": {
        "model": "bert-tiny",
        "seq-len": 16,
        "max-predictions": 3,
        "batch-size": 4,
        "accumulation": 2,
        "moments": "bfloat16",
        "dropout": 0.1,
    },
    "asynchronous": {"model": "gpt2-nano", "seq-len": 8, "batch-size": 2, "seed": 1},
    "processes": {
        "model": "gpt2-nano",
        "seq-len": 8,
        "batch-size": 8,
        "mesh": "data:2,fsdp:2,tensor:2",
        "heartbeat-seconds": 5,
        "adapter-rank": 8,
    },
}
PROCESSES = {"processes": 2}  # one if not named
DEVICES = 8
ENDED_ALONE = (1, -signal.SIGABRT)  # of those that lost another process


class Kill(NamedTuple):
    """One child's end."""

    signal: str
    moment: str  # what it was doing: "starting", "training", "saving", "joining adapters"
    redone: int  # steps that were done and not saved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--part", help="name of the record, for some of the variants")
    parser.add_argument("--results", type=Path, default=None, help="folder of the record")
    arguments = parser.parse_args()
    _prepare_children()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        _write_text(folder / "text.txt")
        soak = Soak(folder, random.Random(arguments.seed))
        soak.run(arguments.variants, arguments.kills)
    results = soak.results() | {"seconds": round(time.monotonic() - started, 1)}
    print(results)
    from benchmarks.record import RESULTS, make_record, write_record
    from train import environment

    record = make_record(
        f"soak-{arguments.part}" if arguments.part else "soak",
        results,
        device=environment.cpu(),
        module="benchmarks.soak",
        packages=environment.JOB_PACKAGES,
    )
    print(write_record(record, arguments.results or RESULTS).name)
    return 0


class Soak:
    """Runs in a folder, and what became of them."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.kills: list[Kill] = []
        self.runs = 0

    def run(self, variants: list[str], kills: int) -> None:
        """Kill so often in all, one run after the other; every run goes to its end."""
        while len(self.kills) < kills:
            name = variants[self.runs % len(variants)]
            whole = self.folder / f"{name}-whole"
            if not whole.exists():
                self._finish(name, whole)
            run = self.folder / f"{name}-{self.runs}"
            while len(self.kills) < kills:
                kill = self._kill(name, run)
                if kill is None:
                    break
                self.kills.append(kill)
                print(f"{len(self.kills):4}/{kills}  {run.name:16} {kill}", flush=True)
            self._finish(name, run)
            self._check_equal(whole, run)
            self.runs += 1

    def results(self) -> dict[str, Any]:
        count = collections.Counter
        return {
            "kills": len(self.kills),
            "by_signal": dict(count(kill.signal for kill in self.kills)),
            "by_moment": dict(count(kill.moment for kill in self.kills)),
            "runs": self.runs,
            "steps_of_each_run": STEPS,
            "runs_equal_to_the_uninterrupted_one": self.runs,
            "checkpoints_lost": 0,
            "steps_done_again": sum(kill.redone for kill in self.kills),
        }

    def _kill(self, name: str, run: Path) -> Kill | None:
        """Start, kill at a random moment; None if the run reached its end before."""
        before, lines = latest(run), last_step(run)
        number = signal.SIGTERM if self.rng.random() < SIGTERM_SHARE else signal.SIGKILL
        starting = self.rng.random() < STARTING_SHARE
        children = _start_all(name, run)
        child = children.pop(self.rng.randrange(len(children)))
        if starting:
            time.sleep(self.rng.uniform(0, 5))
        else:
            wait_until(lambda: last_step(run) > lines or not alive(child))
            time.sleep(self.rng.uniform(0, TRAINING_SECONDS))
        code = os.waitstatus_to_exitcode(end_of(child, number))
        others = [os.waitstatus_to_exitcode(wait_for(other)) for other in children]
        if code == 0 and not any(others):
            return None
        self._check_end(code, others, number, run)
        step, saved = last_step(run), latest(run)
        assert saved >= before, f"{run}: checkpoint {before} is gone, {saved} is the latest"
        if saved:
            found = integrity.problems(run / "checkpoints" / str(saved))
            assert not found, f"{run}: {found}"
        return Kill(number.name, moment(run, lines), max(0, step - saved))

    def _check_end(self, code: int, others: list[int], number: signal.Signals, run: Path) -> None:
        saved = code == 128 + number
        right = all(other == code if saved else other in ENDED_ALONE for other in others)
        if not (saved or code == -number) or not right:
            raise AssertionError(
                f"exit codes {[code, *others]} after {number.name}:\n"
                f"{run.with_suffix('.log').read_text()[-3000:]}"
            )
        if code == 128 + number and (step := last_step(run)) > 0:
            assert latest(run) == step, (
                f"{run}: {number.name} after step {step} saved {latest(run)}"
            )

    def _finish(self, name: str, run: Path) -> None:
        codes = [os.waitstatus_to_exitcode(wait_for(child)) for child in _start_all(name, run)]
        if any(codes):
            raise RuntimeError(
                f"exit codes {codes}:\n{run.with_suffix('.log').read_text()[-5000:]}"
            )

    def _check_equal(self, whole: Path, run: Path) -> None:
        assert record(whole) == record(run), f"{run}: other metrics than those of {whole}"
        self._expect(lambda: _compare(whole, run), run.with_suffix(".compare.log"))

    def _expect(self, function: Callable[[], int], log: Path) -> None:
        code = os.waitstatus_to_exitcode(wait_for(start(function, log)))
        if code:
            raise RuntimeError(f"exit code {code} where 0 was expected:\n{log.read_text()[-5000:]}")


def start(function: Callable[[], int], log: Path) -> int:
    """The process id of a child that runs `function` and exits with what it returns."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = function()
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def end_of(child: int, number: signal.Signals) -> int:
    """Send the signal and wait; the status, also of a child that had ended before."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    return wait_for(child)


def wait_for(child: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"a child did nothing for {PATIENCE:g} s")
        time.sleep(0.005)


def alive(child: int) -> bool:
    """Whether it runs still; one that ended is left for `wait_for`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step in {PATIENCE:g} s")
        time.sleep(0.005)


def latest(run: Path) -> int:
    """Steps of the last checkpoint; 0 without."""
    folder = run / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max([int(name) for name in names if name.isdigit()], default=0)


def last_step(run: Path) -> int:
    """The last training step that metrics.jsonl has; 0 without."""
    path = run / metrics.METRICS_FILE
    lines = metrics.read(path) if path.exists() else []
    return max([line["step"] for line in lines if "loss" in line], default=0)


def moment(run: Path, lines: int) -> str:
    """What a killed child was doing, from what it left; `lines`: its first step."""
    folder = run / "checkpoints"
    if folder.is_dir() and any("tmp" in p.name for p in folder.iterdir()):
        return "saving"
    step = last_step(run)
    if step == JOIN:
        return "joining adapters"
    return "training" if step > lines else "starting"


def record(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = metrics.read(run / metrics.METRICS_FILE)
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def command(name: str, run: Path) -> list[str]:
    """The arguments of `train.pretrain`; every run has a cache of its own to build."""
    fields = {
        **SHARED,
        **VARIANTS[name],
        "data": f"text:{run.parent / 'text.txt'}",
        "cache-dir": run.with_suffix(".cache"),
        "run-dir": run,
    }
    return ["--no-tensorboard", *(f"--{key}={value}" for key, value in fields.items())]


def _start_all(name: str, run: Path) -> list[int]:
    """The children that train: one, or several processes of one run."""
    run.with_suffix(".log").unlink(missing_ok=True)
    count = PROCESSES.get(name, 1)
    if count == 1:
        return [start(lambda: _train(name, run, []), run.with_suffix(".log"))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = [f"--coordinator={address}", f"--processes={count}"]
    return [
        start(
            lambda i=i: _train(name, run, [*options, f"--process-id={i}"]), run.with_suffix(".log")
        )
        for i in range(count)
    ]


def _train(name: str, run: Path, options: list[str]) -> int:
    import jax

    from train import pretrain

    if options:
        jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES[name])
    if name == "asynchronous":
        _save_behind_the_steps()
    arguments = command(name, run) + options
    sys.argv[1:] = arguments
    code = pretrain.main(arguments)
    if options:
        jax.distributed.shutdown()  # which waits for the others, as at an interpreter's end
    return code


def _save_behind_the_steps() -> None:
    """Make saves on CPU asynchronous as elsewhere: of a copy, since steps reuse the buffers."""
    import jax
    import jax.numpy as jnp

    from train import checkpoint

    save = checkpoint.Checkpoints.save
    checkpoint.Checkpoints.save = lambda self, state, *rest: save(
        self, jax.tree.map(jnp.copy, state), *rest
    )
    checkpoint._shares_memory = lambda: False


def _compare(whole: Path, run: Path) -> int:
    """Exit code 0 if the last checkpoints of two runs are equal bit for bit."""
    import jax
    import numpy as np

    from train.checkpoint import Checkpoints
    from train.config import from_json
    from train.data.tokenizer import vocabulary_from_json
    from train.state import abstract_state, make_setup

    import json  # isort: skip

    states = []
    for folder in (whole, run):
        checkpoints = Checkpoints(folder, keep=1, read_only=True)
        about, tokenizer = checkpoints.read_run(STEPS)
        config = from_json(about["config"])
        size = vocabulary_from_json(json.dumps(tokenizer), config.objective).size
        shapes = abstract_state(
            make_setup(config, vocab_size=size), adapters=config.adapter_step is not None
        )
        state, key = checkpoints.restore(STEPS, shapes)
        states.append((state.params, state.masks, state.opt_state, state.step, key))
        checkpoints.close()
    paired = zip(*map(jax.tree_util.tree_leaves_with_path, states), strict=True)
    other = [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in paired
        if not np.array_equal(_bits(a), _bits(b))
    ]
    print("\n".join(other))
    return int(bool(other))


def _bits(x: Any) -> Any:
    import jax
    import numpy as np

    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).reshape(-1).view(np.uint8)


def _prepare_children() -> None:
    """Import what they need. No device is touched: threads would not outlive the fork."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import grain  # noqa: F401
    import tyro  # noqa: F401

    import train.job  # noqa: F401


def _write_text(path: Path) -> None:
    rng = random.Random(0)
    words = ["sparse", "kernel", "mask", "values", "dense", "layer", "adapter", "rank", "token"]
    sentences = lambda: " ".join(rng.choices(words, k=8)).capitalize() + "."  # noqa: E731
    documents = (" ".join(sentences() for _ in range(12)) for _ in range(60))
    path.write_text("\n\n".join(documents))


if __name__ == "__main__":
    sys.exit(main())
