"""What the sharded path costs on one device: ``python -m benchmarks.sharded_step``.

The 2:4 step of ``benchmarks.train_step`` at the smaller of its two depths, as it is and on a mesh of one
device, which runs every linear, table and attention under `jax.shard_map`; both in turns.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import train_step
from benchmarks.record import make_record, write_record
from benchmarks.steps import Case, Program
from benchmarks.train_step import Timing
from train.environment import accelerator


def main() -> None:
    arguments = _arguments()
    name = f"sharded-step-{arguments.part}" if arguments.part else "sharded-step"
    record = make_record(name, [], device=accelerator(), module="benchmarks.sharded_step")
    record["failed"] = []
    with ThreadPoolExecutor(train_step.THREADS) as pool:
        for model in arguments.models:
            planned = cases(model, arguments)
            programs = train_step.compiled(planned, pool, arguments)
            timings, failed = train_step.measured(programs, arguments)
            record["failed"] += failed
            if all(case in timings for case in planned):
                row = result(planned, [timings[case] for case in planned], programs[planned[1]])
                record["results"].append(row)
                print(f"{model}: {row['sharded_ms']:.2f} ms, {row['ratio']:.3f} of unsharded")
            path = write_record(record, arguments.results)
    print(f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed")
    if record["failed"]:
        sys.exit(1)


def cases(model: str, arguments: argparse.Namespace) -> list[Case]:
    """The sparse step as it is, and on a mesh of one device."""
    sparse = [case for case in train_step.cases(model, arguments) if case.sparsity != "dense"]
    return [sparse[0], dataclasses.replace(sparse[0], mesh="data:1")]


def result(planned: Sequence[Case], timings: Sequence[Timing], sharded: Program) -> dict[str, Any]:
    """What the record says of a model."""
    plain, meshed = timings
    return {
        "model": planned[0].model,
        "depth": planned[0].depth,
        "tokens": planned[0].tokens,
        "length": planned[0].length,
        "rank": planned[0].config.rank,
        "unsharded_ms": round(plain.milliseconds, 3),
        "sharded_ms": round(meshed.milliseconds, 3),
        "ratio": round(meshed.milliseconds / plain.milliseconds, 4),
        "unsharded_rounds_ms": [round(t, 3) for t in plain.rounds_ms],
        "sharded_rounds_ms": [round(t, 3) for t in meshed.rounds_ms],
        "unsharded_bytes": plain.nbytes,
        "sharded_bytes": meshed.nbytes,
        "unsharded_loss": plain.loss,
        "sharded_loss": meshed.loss,
        "in_turns": not (plain.alone or meshed.alone),
        "paths": sharded.paths,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    train_step.add_arguments(parser)
    train_step.add_compiler_arguments(parser)
    train_step.add_rounds(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
