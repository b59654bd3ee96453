"""Memory of training, from shapes and from the device: ``python -m benchmarks.memory``.

With ``--shapes`` it prints the account of `slope_jax.memory` of each whole model, dense beside sparse,
and measures nothing. Without, it trains a few steps of each model cut to two depths, each in a process
of its own, because the allocator's peak (`memory_stats()["peak_bytes_in_use"]`) never goes down. The
line through the depths gives the whole model's; XLA's account of the compiled step stands beside. The
peak is that of the arrays, whatever the allocator holds in reserve; CUDA's own context, about 0.5 GB,
is not in it. XLA_PYTHON_CLIENT_PREALLOCATE=false lets the processes share the device.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of the device, at most

import jax
import jax.numpy as jnp

from benchmarks import steps, train_step
from benchmarks.record import ROOT, make_record, write_record
from benchmarks.steps import Case
from slope_jax import Memory, memory, models
from train.environment import accelerator

MEASURED = ("opt-13b", "llama-3-8b", "gpt2-xl", "bert-large", "opt-2.7b", "mistral-7b")
CHILD_SECONDS = 300
SPARE = 1.2  # what a process may take, of what its shapes say
CONTEXT_BYTES = 1.5e9


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        print(json.dumps(measure(Case(**json.loads(arguments.child)))))
        return
    if arguments.shapes:
        for model in arguments.models or steps.MODELS:
            for rank in arguments.ranks:
                case = whole(model, rank, arguments.accumulation, arguments.moments or "float32")
                print(
                    f"\n{model}, adapters of rank {case.config.rank}\n{account(case)}", flush=True
                )
        return
    measured = arguments.models or MEASURED
    name = f"memory-{arguments.part}" if arguments.part else "memory"
    record = make_record(name, [], device=accelerator(), module="benchmarks.memory")
    record |= {"failed": [], "left_out": list(measured)}  # until it is measured
    path = write_record(record, arguments.results)
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    device = Device(device_bytes())
    for model in measured:
        if time.monotonic() > stop:
            break
        cases = train_step.cases(model, arguments)
        with ThreadPoolExecutor(len(cases)) as pool:
            found = dict(zip(cases, pool.map(device.run, cases), strict=True))
        for case, numbers in found.items():
            if "error" in numbers:
                where = {"model": model, "depth": case.depth, "what": case.name}
                record["failed"].append(where | numbers)
                print(f"failed: {case}: {numbers['error']}", file=sys.stderr)
        record["results"] += results(cases, found)
        record["left_out"].remove(model)
        path = write_record(record, arguments.results)
        for row in record["results"]:
            if row["model"] == model:
                print(line(row), flush=True)
    if record["left_out"]:
        print(f"left out for want of time: {', '.join(record['left_out'])}")
    print(f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed")
    if record["failed"]:
        sys.exit(1)


def whole(model: str, rank: float = 0, accumulation: int = 1, moments: str = "float32") -> Case:
    """The whole model, its layers rematerialised, at the tokens it is timed with."""
    chosen = steps.setting(model)
    return Case(
        model=model,
        depth=models.variant_config(model).num_layers,
        sequences=chosen.sequences,
        length=chosen.length,
        rank=rank,
        accumulation=accumulation,
        moments=moments,
        remat=True,
    )


def account(case: Case, *, activations: bool = True) -> Memory:
    """`slope_jax.memory` of a case, with the job's optimizer."""
    setup = case.setup()
    shapes = jax.eval_shape(setup.model.init, jax.random.key(0), **setup.model.example_inputs())
    ids = jax.ShapeDtypeStruct((case.sequences // case.accumulation, case.length), jnp.int32)
    inputs = {"input_ids": ids}
    if case.model.startswith("bert"):
        size = (ids.shape[0], steps.predictions(case.length))
        inputs["mlm_positions"] = jax.ShapeDtypeStruct(size, jnp.int32)
    options = {"accumulation": case.accumulation, "activations": activations}
    return memory(setup.model, shapes, setup.tx, **options, **inputs)


def measure(case: Case) -> dict[str, Any]:
    """Trains a few steps in this process; bytes of the device and of XLA, None if it tells none."""
    program = steps.lower(case).compile(autotune=False)  # which would take memory for itself
    run = program.start()
    state = _stats().get("bytes_in_use")
    run.steps(2)
    run.loss()
    return {
        "peak_bytes": _stats().get("peak_bytes_in_use"),
        "state_bytes": state,
        "xla_bytes": program.xla_bytes,
        "xla_total_bytes": program.nbytes,
    }


class Device:
    """Runs measurements in processes, as many at a time as fit on the device together."""

    def __init__(self, nbytes: float):
        self.free, self.all = nbytes, nbytes
        self._changed = threading.Condition()

    def run(self, case: Case) -> dict[str, Any]:
        """What `measure` says of a case in its own process, or {"error": ...}."""
        needed = min(self.all, estimate(case))
        with self._changed:
            self._changed.wait_for(lambda: self.free >= needed)
            self.free -= needed
        try:
            return in_process(case)
        finally:
            with self._changed:
                self.free += needed
                self._changed.notify_all()


def in_process(case: Case) -> dict[str, Any]:
    """Runs `measure` in a new process."""
    fields = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "benchmarks.memory", f"--child={fields}"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {CHILD_SECONDS} s"}
    if done.returncode:
        errors = [text for text in done.stderr.splitlines() if text.strip()]
        return {"error": (errors or [f"exit code {done.returncode}"])[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def estimate(case: Case) -> float:
    """Bytes of the device that a process needs, on the safe side."""
    found = account(case)
    dense = case.sparsity == "dense"
    return SPARE * (found.dense_total() if dense else found.total()) + CONTEXT_BYTES


def results(cases: Sequence[Case], found: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """A result for each rank that was measured at both depths, beside dense."""
    made = []
    dense = [case for case in cases if case.sparsity == "dense"]
    for rank in dict.fromkeys(case.rank for case in cases if case.sparsity != "dense"):
        sparse = [c for c in cases if c.sparsity != "dense" and c.rank == rank]
        if not any("error" in found[case] for case in (*dense, *sparse)):
            made.append(result(dense, sparse, found))
    return made


def result(
    dense: Sequence[Case], sparse: Sequence[Case], found: dict[Case, dict[str, Any]]
) -> dict[str, Any]:
    """What the record says: the account from shapes, the whole model's peak, both depths."""
    case = sparse[0]
    full = account(whole(case.model, case.rank, case.accumulation, case.moments))
    layers = models.variant_config(case.model).num_layers
    depths = dense[0].depth, dense[1].depth

    def line(cases: Sequence[Case], name: str) -> int | None:
        values = tuple(found[case][name] for case in cases)
        return None if None in values else round(steps.line(depths, values, layers))

    peaks = line(dense, "peak_bytes"), line(sparse, "peak_bytes")
    kinds = dict.fromkeys(row.kind for row in full.state)
    return {
        "model": case.model,
        "layers": layers,
        "depths": list(depths),
        "tokens": case.tokens,
        "length": case.length,
        "accumulation": case.accumulation,
        "remat": case.remat,
        "moments": case.moments,
        "rank": case.config.rank,
        "dense_state_bytes": full.dense_state_bytes,
        "sparse_state_bytes": full.state_bytes,
        "state_ratio": round(full.ratio, 4),
        "kinds": {kind: [full.total(kind), full.dense_total(kind)] for kind in kinds},
        "dense_peak_bytes": peaks[0],
        "sparse_peak_bytes": peaks[1],
        "peak_ratio": None if None in peaks else round(peaks[1] / peaks[0], 4),
        "dense_xla_bytes": line(dense, "xla_total_bytes"),
        "sparse_xla_bytes": line(sparse, "xla_total_bytes"),
        "at_depths": [
            {"depth": d.depth, "dense": found[d], "sparse": found[s]}
            for d, s in zip(dense, sparse, strict=True)
        ],
    }


def line(row: dict[str, Any]) -> str:
    """A result in a line of text."""
    at = "; ".join(
        f"{x['depth']} layers peak {_gb(x['dense']['peak_bytes'])} -> "
        f"{_gb(x['sparse']['peak_bytes'])} (XLA {_gb(x['dense']['xla_total_bytes'])} -> "
        f"{_gb(x['sparse']['xla_total_bytes'])})"
        for x in row["at_depths"]
    )
    return (
        f"{row['model']}, rank {row['rank']}: state {row['state_ratio']:.3f} of dense, peak of all"
        f" {row['layers']} layers {row['peak_ratio']} of dense; {at}"
    )


def device_bytes() -> float:
    """Bytes of the device that may be taken; infinite if it does not tell."""
    return _stats().get("bytes_limit", float("inf"))


def _stats() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def _gb(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    train_step.add_arguments(parser)
    parser.add_argument("--shapes", action="store_true", help="print the accounts, measure nothing")
    parser.set_defaults(models=None)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
