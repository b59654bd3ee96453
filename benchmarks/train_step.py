"""Time and memory of training steps, dense beside sparse: ``python -m benchmarks.train_step``.

The job's own step (`train.step`), AdamW, float32 parameters, gradients and moments (OPT-66B: 16-bit
moments, so that four layers fit), bfloat16 products, buffers donated, random parameters and tokens.
Each model is cut to two depths that fit on the device; the line through them gives the cost of a
layer, and of the whole model.

Times are wall times of many steps in a row, the last one waited for; the median of rounds, in which
dense and sparse take turns, if all fit on the device together, else one after the other, each after
a preheating. Bytes are XLA's account of the compiled step: arguments and temporaries;
``benchmarks.memory`` holds them against the device's. The record is written after each model; one
that fails is named in it, with the reason.
"""

import argparse
import dataclasses
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of the device, kept at once

import jax

from benchmarks import steps
from benchmarks.record import RESULTS, make_record, write_record
from benchmarks.steps import Case, Lowered, Program
from pallas_kernels.tune import numbers
from slope_jax import models
from train.environment import accelerator

FIRST_SECONDS, SWITCH_SECONDS = 1.0, 0.3  # of preheating: the first of all, and at each switch
FEWEST_STEPS = 3
USABLE = 0.98  # of what the allocator may take
THREADS = 8


class Failed(str):
    """Why a program could not be made or run."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a step in each round, XLA's bytes, and the loss of the last step."""

    rounds_ms: tuple[float, ...]
    nbytes: int
    loss: float
    alone: bool  # on the device

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.rounds_ms)


def main() -> None:
    arguments = _arguments()
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    name = f"train-step-{arguments.part}" if arguments.part else "train-step"
    record = make_record(name, [], device=accelerator(), module="benchmarks.train_step")
    record |= {"failed": [], "left_out": []}
    planned = {model: cases(model, arguments) for model in arguments.models}
    record["left_out"] = list(planned)  # until it is measured
    path = write_record(record, arguments.results)
    with ThreadPoolExecutor(THREADS) as pool:
        for model in planned:
            if time.monotonic() > stop:
                break
            begin = time.monotonic()
            programs = compiled(planned[model], pool, arguments)
            paths = {case: p.paths for case, p in programs.items() if isinstance(p, Program)}
            timings, failed = measured(programs, arguments)
            del programs
            record["results"] += results(planned[model], timings, accelerator(), paths)
            record["failed"] += failed
            record["left_out"].remove(model)
            path = write_record(record, arguments.results)
            print(f"{model}: {time.monotonic() - begin:.0f} s", flush=True)
            for row in record["results"]:
                if row["model"] == model:
                    print(line(row), flush=True)
    if record["left_out"]:
        print(f"left out for want of time: {', '.join(record['left_out'])}")
    print(f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed")
    if record["failed"]:
        sys.exit(1)


def cases(model: str, arguments: argparse.Namespace) -> list[Case]:
    """Dense first, at both depths, then sparse with each rank.

    Raises:
      SystemExit: the tokens do not make whole sequences.
    """
    chosen = steps.setting(model)
    length, sequences = chosen.length, chosen.sequences
    if arguments.tokens:
        length = min(length, arguments.tokens)
        sequences, rest = divmod(arguments.tokens, length)
        if rest:
            sys.exit(f"--tokens={arguments.tokens} are not whole sequences of {length} ({model})")
    remat = chosen.remat if arguments.remat is None else arguments.remat == "layers"
    common = {
        "model": model,
        "length": length,
        "sequences": sequences * arguments.accumulation,
        "accumulation": arguments.accumulation,
        "remat": remat,
        "dropout": arguments.dropout,
        "moments": arguments.moments or chosen.moments,
        "dtype": arguments.dtype,
        "scan": arguments.scan,
    }
    variants = [{"sparsity": "dense"}, *({"rank": rank} for rank in arguments.ranks)]
    depths = arguments.depths or chosen.depths
    return [Case(**common, depth=depth, **other) for other in variants for depth in depths]


def compiled(
    planned: Sequence[Case], pool: ThreadPoolExecutor, arguments: argparse.Namespace
) -> dict[Case, Program | Failed]:
    """The compiled programs of a model, or why one could not be.

    Never while another model is timed: tracing holds up the launches of its steps, and XLA tries
    out dense products on the device.
    """

    def lower(case: Case) -> Lowered | Failed:
        return outcome(lambda: steps.lower(case))

    def compile_(lowered: Lowered | Failed) -> Program | Failed:
        if isinstance(lowered, Failed):
            return lowered
        options = dict(arguments.xla)
        return outcome(lambda: lowered.compile(autotune=arguments.autotune, options=options))

    found = dict(zip(planned, pool.map(lower, planned), strict=True))
    first, *rest = found
    # The first one tries the products that it shares with the others, alone.
    programs = {first: compile_(found[first])}
    return programs | dict(zip(rest, pool.map(lambda c: compile_(found[c]), rest), strict=True))


def measured(
    programs: Mapping[Case, Program | Failed], arguments: argparse.Namespace
) -> tuple[dict[Case, Timing], list[dict[str, Any]]]:
    """Times by case, and what failed, with the reason."""
    timings: dict[Case, Timing] = {}
    errors = {case: p for case, p in programs.items() if isinstance(p, Failed)}
    limit = bytes_limit()
    for case, program in programs.items():
        if case not in errors and program.nbytes > limit:
            errors[case] = Failed(
                f"needs {program.nbytes / 1e9:.1f} GB by XLA's account, {limit / 1e9:.1f} are there"
            )
    for depth in dict.fromkeys(case.depth for case in programs):
        left = {c: p for c, p in programs.items() if c.depth == depth and c not in errors}
        for group in groups(left, limit):
            found = outcome(lambda group=group: timed(group, arguments))
            gc.collect()
            if not isinstance(found, Failed):
                timings |= found
                continue
            for case in group:  # together they did not fit, or one failed
                alone = found
                if len(group) > 1:
                    alone = outcome(lambda case=case: timed({case: programs[case]}, arguments))
                    gc.collect()
                if isinstance(alone, Failed):
                    errors[case] = alone
                else:
                    timings |= alone
    failed = []
    for case, text in errors.items():
        print(f"failed: {case}: {text[:300]}", file=sys.stderr, flush=True)
        where = {"model": case.model, "depth": case.depth, "what": case.name, "rank": case.rank}
        failed.append({**where, "error": text[:500]})
    return timings, failed


def groups(programs: Mapping[Case, Program], limit: float) -> list[dict[Case, Program]]:
    """All together, if their states and the largest of their temporaries fit; else one by one."""
    states = sum(p.xla_bytes["arguments"] for p in programs.values())
    most = max((p.nbytes - p.xla_bytes["arguments"] for p in programs.values()), default=0)
    if states + most < limit:
        return [dict(programs)] if programs else []
    return [{case: program} for case, program in programs.items()]


def timed(programs: Mapping[Case, Program], arguments: argparse.Namespace) -> dict[Case, Timing]:
    """Rounds of many steps in alternating order, each after a preheating."""
    runs = {case: program.start() for case, program in programs.items()}
    counts = {}
    for case, run in runs.items():
        run.steps(1)
        seconds = min(_seconds(run.steps, 1) for _ in range(2))
        counts[case] = max(FEWEST_STEPS, round(arguments.seconds / seconds))
    times: dict[Case, list[float]] = {case: [] for case in runs}
    heating = FIRST_SECONDS
    for number in range(arguments.rounds):
        for case in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            begin = time.perf_counter()
            while time.perf_counter() - begin < heating * arguments.preheat:
                runs[case].steps(1)
            heating = SWITCH_SECONDS
            times[case].append(1e3 * _seconds(runs[case].steps, counts[case]) / counts[case])
    return {
        case: Timing(tuple(times[case]), programs[case].nbytes, run.loss(), len(runs) == 1)
        for case, run in runs.items()
    }


def results(
    planned: Sequence[Case],
    timings: Mapping[Case, Timing],
    device: str,
    paths: Mapping[Case, dict[str, int]],
) -> list[dict[str, Any]]:
    """A result for each rank that was timed at both depths, beside dense."""
    found = []
    dense = [case for case in planned if case.sparsity == "dense"]
    for rank in dict.fromkeys(case.rank for case in planned if case.sparsity != "dense"):
        sparse = [c for c in planned if c.sparsity != "dense" and c.rank == rank]
        if all(case in timings for case in (*dense, *sparse)):
            both = [(timings[d], timings[s]) for d, s in zip(dense, sparse, strict=True)]
            found.append(result(dense, sparse, both, device, paths.get(sparse[1], {})))
    return found


def result(
    dense: Sequence[Case],
    sparse: Sequence[Case],
    timings: Sequence[tuple[Timing, Timing]],
    device: str,
    paths: dict[str, int],
) -> dict[str, Any]:
    """What the record says: the whole model by the line through both depths, and the depths."""
    case = sparse[0]
    depths = dense[0].depth, dense[1].depth
    layers = models.variant_config(case.model).num_layers

    def whole(side: int, value: Callable[[Timing], float], depth: int = layers) -> float:
        return steps.line(depths, tuple(value(pair[side]) for pair in timings), depth)

    def slope(side: int, value: Callable[[Timing], float]) -> float:
        return whole(side, value, depths[1] + 1) - value(timings[1][side])

    ms, nbytes = (lambda t: t.milliseconds), (lambda t: float(t.nbytes))
    dense_ms, sparse_ms = whole(0, ms), whole(1, ms)
    return {
        "model": case.model,
        "layers": layers,
        "depths": list(depths),
        "tokens": case.tokens,
        "length": case.length,
        "accumulation": case.accumulation,
        "remat": case.remat,
        "dropout": case.dropout,
        "moments": case.moments,
        "dtype": case.dtype,
        "scan": case.scan,
        "sparsity": case.sparsity,
        "rank": case.config.rank,
        "dense_ms": round(dense_ms, 3),
        "sparse_ms": round(sparse_ms, 3),
        "speedup": round(dense_ms / sparse_ms, 3),
        "dense_bytes": round(whole(0, nbytes)),
        "sparse_bytes": round(whole(1, nbytes)),
        "ratio": round(whole(1, nbytes) / whole(0, nbytes), 4),
        "mfu_dense": steps.mfu(steps.flops(dense[1], depth=layers), dense_ms, device),
        "dense_ms_per_layer": round(slope(0, ms), 4),
        "sparse_ms_per_layer": round(slope(1, ms), 4),
        # None where noise hides the cost of a layer.
        "speedup_per_layer": round(slope(0, ms) / slope(1, ms), 3) if slope(1, ms) > 0 else None,
        "dense_bytes_per_layer": round(slope(0, nbytes)),
        "sparse_bytes_per_layer": round(slope(1, nbytes)),
        "at_depths": [
            {
                "depth": one.depth,
                "dense_ms": round(d.milliseconds, 3),
                "sparse_ms": round(s.milliseconds, 3),
                "speedup": round(d.milliseconds / s.milliseconds, 3),
                "mfu_dense": steps.mfu(steps.flops(one), d.milliseconds, device),
                "dense_rounds_ms": [round(t, 3) for t in d.rounds_ms],
                "sparse_rounds_ms": [round(t, 3) for t in s.rounds_ms],
                "dense_bytes": d.nbytes,
                "sparse_bytes": s.nbytes,
                "in_turns": not (d.alone or s.alone),
                "dense_loss": round(d.loss, 4),
                "sparse_loss": round(s.loss, 4),
            }
            for one, (d, s) in zip(dense, timings, strict=True)
        ],
        "paths": paths,
    }


def line(row: dict[str, Any]) -> str:
    """A result in a line of text."""
    at = "; ".join(
        f"{x['depth']} layers {x['dense_ms']:.1f} -> {x['sparse_ms']:.1f} ms ({x['speedup']:.2f})"
        for x in row["at_depths"]
    )
    return (
        f"  rank {row['rank']}: {row['speedup']:.2f} of all {row['layers']} layers,"
        f" {row['speedup_per_layer']} per layer, memory {row['ratio']:.2f}, dense MFU"
        f" {row['mfu_dense']}; {at}"
    )


def bytes_limit() -> float:
    """Bytes that arrays may take on the device; infinite if it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return USABLE * stats.get("bytes_limit", float("inf"))


def _seconds(function: Callable[[int], None], count: int) -> float:
    begin = time.perf_counter()
    function(count)
    return time.perf_counter() - begin


def outcome(function: Callable[[], Any]) -> Any:
    """The result, or why there is none: in words, because an exception's frames hold arrays."""
    try:
        return function()
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, for how long, and where the record goes."""
    parser.add_argument("--models", type=model_names, default=list(steps.MODELS), help="a,b,...")
    parser.add_argument("--depths", type=two_depths, help="A,B; each model's if not given")
    parser.add_argument("--tokens", type=int, help="in a micro-batch; each model's if not given")
    parser.add_argument("--ranks", type=ranks, default=[0.0, steps.ADAPTERS], help="of adapters")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--remat", choices=("none", "layers"), help="each model's if not given")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--moments", choices=("float32", "bfloat16"), help="each model's if not given"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--scan", action=argparse.BooleanOptionalAction, default=True, help="stack layers"
    )
    parser.add_argument("--minutes", type=float, help="start no model after; what is done is kept")
    parser.add_argument("--part", help="name of the record, for a part of the list")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")


def add_compiler_arguments(parser: argparse.ArgumentParser) -> None:
    """How programs are compiled, and how warm the device is when they are timed."""
    parser.add_argument("--preheat", type=float, default=1.0, help="times the usual; 0 for none")
    parser.add_argument("--autotune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--xla", type=_options, default={}, help="NAME=VALUE,... for the compiler")


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """How often, and for how long, each program is timed."""
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=0.6, help="of a turn; at least 3 steps")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    add_compiler_arguments(parser)
    add_rounds(parser)
    return parser.parse_args()


def model_names(text: str) -> list[str]:
    """Parses names of models with commas between them."""
    found = text.split(",")
    if wrong := [name for name in found if name not in models.VARIANTS]:
        raise argparse.ArgumentTypeError(f"{wrong} are not of {', '.join(models.VARIANTS)}")
    return found


def two_depths(text: str) -> tuple[int, int]:
    """Parses two depths, the smaller first."""
    found = numbers(text)
    if len(found) != 2 or found[0] >= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: give two depths, the smaller first: 3,5")
    return found[0], found[1]


def ranks(text: str) -> list[float]:
    """Parses ranks of adapters with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if any(rank < 0 or (rank >= 1 and rank % 1) for rank in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give ranks, or fractions of the width below 1")
    return found


def _options(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    values = {"true": True, "false": False}
    return {
        name: values.get(value, int(value) if value.lstrip("-").isdigit() else value)
        for name, _, value in pairs
    }


if __name__ == "__main__":
    main()
