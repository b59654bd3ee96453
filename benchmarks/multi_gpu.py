"""Weak scaling of the training step on the GPUs of one host: ``python -m benchmarks.multi_gpu``.

The step of ``benchmarks.train_step`` at the smaller of its two depths, on one GPU and on meshes of the
first GPUs that there are, all of one process; each share of a batch is the micro-batch of one GPU.
`data` and `fsdp` have a share for each GPU; `tensor` divides the shares that there are. Dense and 2:4
take turns on each mesh. With ``--overlap`` meshes are timed once more, compiled with XLA's
latency-hiding scheduler, which XLA leaves out unless told (XLA_FLAGS).

Ahead of its timing each mesh is held against one device (`benchmarks.agreement`). Bytes are XLA's
account of the step on a device. The record is written after each mesh; what fails is named in it.
"""

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

# Less than train_step's: what NCCL holds for each group of GPUs is not XLA's.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")

import jax

from benchmarks import agreement, steps, train_step
from benchmarks.agreement import Alone
from benchmarks.record import make_record, write_record
from benchmarks.steps import Case, Lowered, Program
from benchmarks.train_step import Failed, Timing, outcome
from slope_jax.sharding import check_model
from train.environment import accelerator
from train.mesh import parse_mesh

MODELS = ("opt-2.7b", "llama-3-8b", "gpt2-xl")
MESHES = ("fsdp:2", "fsdp:4", "fsdp:8", "data:8", "tensor:2")
OVERLAP = {"xla_gpu_enable_latency_hiding_scheduler": True}
SIDES = ("dense", "sparse")
# Tracing holds Python's lock: few at a time, so that the first ones are soon there to be compiled.
TRACERS, COMPILERS = 3, 24
MAKING = 0.6  # of the time: none is traced after
LATE = "no time was left"


class Trial(NamedTuple):
    """A model on a mesh, "" for one GPU without any: dense and sparse, to take turns."""

    dense: Case
    sparse: Case
    overlap: bool = False

    @property
    def name(self) -> dict[str, Any]:
        return {"model": self.dense.model, "mesh": self.dense.mesh, "overlap": self.overlap}

    def __str__(self) -> str:
        hidden = ", overlap" if self.overlap else ""
        return f"{self.dense.model}, {self.dense.mesh or 'one GPU'}{hidden}"


class Base(NamedTuple):
    """What one GPU was measured with: what it does, and milliseconds, of both sides."""

    alone: tuple[Alone, Alone]
    milliseconds: tuple[float, float]


def main() -> None:
    arguments = _arguments()
    begin = time.monotonic()
    seconds = 60 * arguments.minutes if arguments.minutes else float("inf")
    name = f"multi-gpu-{arguments.part}" if arguments.part else "multi-gpu"
    record = make_record(name, [], device=accelerator(), module="benchmarks.multi_gpu")
    record |= {"gpus": jax.device_count(), "failed": [], "left_out": []}
    planned = {model: trials(model, arguments, record["left_out"]) for model in arguments.models}
    programs = compiled(
        [t for each in planned.values() for t in each], arguments, begin + MAKING * seconds
    )
    print(f"{len(programs)} programs after {time.monotonic() - begin:.0f} s", flush=True)
    for each in planned.values():
        bases: list[Base] = []  # of the first trial, once it is measured
        for trial in each:
            if time.monotonic() > begin + seconds:
                programs |= {(case, trial.overlap): Failed(LATE) for case in trial[:2]}
            run(trial, programs, each, bases, arguments, record)
            path = write_record(record, arguments.results)
    for left in record["left_out"]:
        print(f"left out: {left['model']} on {left['mesh'] or 'one GPU'}: {left['why']}")
    disagree = [row for row in record["results"] if not agrees(row)]
    print(
        f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed,"
        f" {len(disagree)} do not agree with one GPU, {time.monotonic() - begin:.0f} s"
    )
    if record["failed"] or disagree:
        sys.exit(1)


def trials(model: str, arguments: argparse.Namespace, left_out: list[dict]) -> list[Trial]:
    """One GPU first; what the model or the host cannot do is added to `left_out`."""
    cases = train_step.cases(model, arguments)
    dense = next(case for case in cases if case.sparsity == "dense")
    sparse = next(case for case in cases if case.sparsity != "dense")
    found = [Trial(dense, sparse)]
    for mesh in arguments.meshes:
        both = [dataclasses.replace(case, mesh=mesh) for case in (dense, sparse)]
        if why := refused(both):
            left_out.append({"model": model, "mesh": mesh, "overlap": False, "why": why})
            continue
        found.append(Trial(*both))
        if mesh in arguments.overlap:
            found.append(Trial(*both, overlap=True))
    return found


def refused(cases: Sequence[Case]) -> str:
    """Why a mesh cannot be had; empty if it can."""
    if (needed := cases[0].devices) > jax.device_count():
        return f"needs {needed} devices, {jax.device_count()} are there"
    try:
        for case in cases:
            check_model(case.config, case.sizes)
    except ValueError as error:
        return str(error).splitlines()[1].strip()  # the first of those that do not divide
    return ""


def compiled(
    planned: Sequence[Trial], arguments: argparse.Namespace, stop: float
) -> dict[tuple[Case, bool], Program | Failed]:
    """The program of each case, with and without overlap, or why it is not there.

    All of them before any is timed, as `train_step.compiled` says. The first dense one of each model
    alone, while others are traced: it tries the products that it shares with them.
    """

    def lower(case: Case) -> Lowered | Failed:
        return Failed(LATE) if time.monotonic() > stop else outcome(lambda: steps.lower(case))

    def compile_(case: Case, overlap: bool) -> Program | Failed:
        if isinstance(found := lowered[case].result(), Failed):
            return found
        options = dict(arguments.xla) | (OVERLAP if overlap else {})
        return outcome(lambda: found.compile(autotune=arguments.autotune, options=options))

    wanted = [(case, trial.overlap) for trial in planned for case in trial[:2]]
    firsts = [key for key in wanted if key[0].name == "dense" and not key[0].mesh]
    with ThreadPoolExecutor(TRACERS) as tracers, ThreadPoolExecutor(COMPILERS) as compilers:
        order = dict.fromkeys(case for case, _ in [*firsts, *wanted])
        lowered = {case: tracers.submit(lower, case) for case in order}
        found = {key: compile_(*key) for key in firsts}
        rest = {key: compilers.submit(compile_, *key) for key in wanted if key not in found}
        return found | {key: future.result() for key, future in rest.items()}


def run(
    trial: Trial,
    programs: dict[tuple[Case, bool], Program | Failed],
    planned: Sequence[Trial],
    bases: list[Base],
    arguments: argparse.Namespace,
    record: dict[str, Any],
) -> None:
    """Checks and times a trial; adds a result to the record, or why there is none."""
    both = {case: programs.pop((case, trial.overlap)) for case in trial[:2]}
    if LATE in both.values():
        record["left_out"].append(trial.name | {"why": LATE})
        return
    checks = outcome(lambda: checked(both, planned, bases))
    gc.collect()
    if isinstance(checks, Failed):
        record["failed"].append(trial.name | {"what": "check", "error": checks[:500]})
        print(f"failed: {trial}: {checks[:300]}", file=sys.stderr, flush=True)
        return
    timings, failed = train_step.measured(both, arguments)
    record["failed"] += [trial.name | error for error in failed]
    if len(timings) < len(both):
        return
    pair = [timings[case] for case in trial[:2]]
    if not trial.dense.mesh:
        bases.append(Base(checks, tuple(t.milliseconds for t in pair)))
    base = bases[0] if bases else None
    agreed = checks if trial.dense.mesh else ()
    row = result(trial, pair, base, agreed, both[trial.sparse].paths)
    record["results"].append(row)
    print(line(row), flush=True)


def checked(
    both: Mapping[Case, Program | Failed], planned: Sequence[Trial], bases: Sequence[Base]
) -> tuple:
    """What one GPU does, of both sides; of a mesh, what `agreement.compare` says against it.

    Raises:
      RuntimeError: a program is not there.
    """
    for case, program in both.items():
        if isinstance(program, Failed):
            raise RuntimeError(f"{case.name}: {program}")
    plain = planned[0].dense
    data = agreement.tokens(plain, max(trial.dense.shares for trial in planned))
    if not next(iter(both)).mesh:
        return tuple(agreement.alone(program, data) for program in both.values())
    if not bases:
        return ()
    pairs = zip(both.values(), bases[0].alone, strict=True)
    return tuple(agreement.compare(program, data, alone) for program, alone in pairs)


def result(
    trial: Trial,
    timings: Sequence[Timing],
    base: Base | None,
    agreed: Sequence[dict[str, Any]],
    paths: dict[str, int],
) -> dict[str, Any]:
    """What the record says of a trial. Efficiency is of the tokens a second of one GPU."""
    case = trial.sparse
    row: dict[str, Any] = trial.name | {
        "gpus": case.devices,
        "shares": case.shares,
        "depth": case.depth,
        "tokens": case.tokens,  # of each share
        "length": case.length,
        "remat": case.remat,
        "dtype": case.dtype,
        "sparsity": case.sparsity,
        "rank": case.config.rank,
        "speedup": round(timings[0].milliseconds / timings[1].milliseconds, 3),
        "ratio": round(timings[1].nbytes / timings[0].nbytes, 4),
        "in_turns": not any(t.alone for t in timings),
    }
    for i, (side, timing) in enumerate(zip(SIDES, timings, strict=True)):
        rate = case.shares / case.devices / timing.milliseconds  # of micro-batches, on each GPU
        row |= {
            f"{side}_ms": round(timing.milliseconds, 3),
            f"{side}_rounds_ms": [round(t, 3) for t in timing.rounds_ms],
            f"{side}_tokens_per_s_per_gpu": round(1e3 * case.tokens * rate),
            f"{side}_efficiency": round(rate * base.milliseconds[i], 4) if base else None,
            f"{side}_bytes": timing.nbytes,  # of each GPU
            f"{side}_agreement": agreed[i] if agreed else None,
        }
    return row | {"paths": paths}


def agrees(row: Mapping[str, Any]) -> bool:
    """Whether nothing that was held against one GPU differs from it."""
    checks = [row[f"{side}_agreement"] for side in SIDES]
    return all(check is None or check["agrees"] for check in checks)


def line(row: Mapping[str, Any]) -> str:
    """A result in a line or two of text."""

    def both(name: str, form: str) -> str:
        return " -> ".join(f"{row[f'{side}_{name}']:{form}}" for side in SIDES)

    where = (row["mesh"] or "one GPU") + (", overlap" if row["overlap"] else "")
    text = (
        f"{row['model']}, {row['depth']} layers, {where}: {both('ms', '.2f')} ms"
        f" ({row['speedup']:.3f}), {both('tokens_per_s_per_gpu', ',')} tokens/s/GPU"
    )
    if row["dense_efficiency"] is not None:
        text += f", efficiency {both('efficiency', '.3f')}"
    text += f", {row['dense_bytes'] / 1e9:.1f} -> {row['sparse_bytes'] / 1e9:.1f} GB a GPU"
    for side in SIDES:
        if check := row[f"{side}_agreement"]:
            text += (
                f"\n  {side}: first loss {check['loss']:.6f}, one GPU {check['loss_alone']:.6f};"
                f" at most {check['apart']:.3f} of what is allowed:"
                f" {'agrees' if check['agrees'] else 'DOES NOT AGREE'}"
            )
    return text


def meshes(text: str) -> list[str]:
    """Parses meshes with semicolons between them."""
    try:
        return [part for part in text.split(";") if part and parse_mesh(part)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    train_step.add_arguments(parser)
    train_step.add_compiler_arguments(parser)
    train_step.add_rounds(parser)
    parser.add_argument("--meshes", type=meshes, default=list(MESHES), help="'a;b;...'")
    parser.add_argument("--overlap", type=meshes, default=["fsdp:8"], help="meshes timed again")
    parser.set_defaults(models=list(MODELS), ranks=[0.0], seconds=0.3, minutes=4.0)
    arguments = parser.parse_args()
    if arguments.dropout:
        parser.error("dropout draws other numbers on a mesh: losses could not be compared")
    return arguments


if __name__ == "__main__":
    main()
