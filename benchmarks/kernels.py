"""The kernels beside dense products, on one GPU: ``python -m benchmarks.kernels``.

Kernel device time under sustained load (`pallas_kernels.device_time`), random normal data, dense =
`jnp.matmul` through cuBLAS in the same run, of few tokens the faster of that and XLA's own choice.
Kinds of product (``--ops``):

* matmul: x @ w, for every linear layer of ``--models``, forward and dx;
* epilogue: with bias and activation, what enters it saved where training needs it; dense is what
  XLA fuses of `activation(jnp.matmul(x, w) + b)`; for gate_up the gate, `silu(gate) * up`;
* adapters: with a low-rank product of rank 1.56 % of the hidden size, beside the bare product;
* sddmm: the kept x.T @ dy; dense is the bfloat16 x.T @ dy;
* transpose: the double-pruned transpose, beside a copy of as many bytes;
* few: 1 to 64 tokens, with weights rotated through more memory than the cache holds.

The record goes to benchmarks/results (``--results``) and is written anew after every few products,
so that nothing is lost if the run is cut off; ``--minutes`` ends it in time and names in the record
what was left out. ``--part=NAME`` makes a record of its own of a part of the list.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory, too

from benchmarks import peers, problems, shapes
from benchmarks.bench import PEER_TOKENS, Bench, named
from benchmarks.problems import Problem
from benchmarks.record import RESULTS, make_record, write_record
from pallas_kernels.mosaic import support
from pallas_kernels.triton import support as triton_support
from pallas_kernels.tune import numbers, progress_bar
from train.environment import accelerator

DEFAULT_TOKENS = {
    "matmul": (8192, 65536, 2048, 16384),
    "epilogue": (8192, 65536, 16384, 2048),
    "adapters": (8192,),
    "sddmm": (8192, 65536, 2048, 16384),
    "transpose": (0,),
    "few": (16, 1, 64, 4),
}
BATCH = 12  # problems, and bytes, that are made ready together
BATCH_BYTES = 16e9
MOST_ERROR = 2.0  # times that of the dense product


def batches(listed: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Consecutive problems that fit on the device together."""
    batch, total = [], 0.0
    for problem in listed:
        if batch and (len(batch) == BATCH or total + problem.nbytes > BATCH_BYTES):
            yield batch
            batch, total = [], 0.0
        batch.append(problem)
        total += problem.nbytes
    if batch:
        yield batch


def ordered(
    kinds: Sequence[str], models: Sequence[str], tokens: Sequence[int] | None
) -> list[Problem]:
    """The problems of all kinds: first each kind's first number of tokens, then its second, ..."""
    turns = []
    for kind in kinds:
        counts = tokens if tokens and kind != "transpose" else DEFAULT_TOKENS[kind]
        turns.append([problems.listed(kind, models, (count,)) for count in counts])
    rounds = itertools.zip_longest(*turns, fillvalue=[])
    return [problem for turn in rounds for listed in turn for problem in listed]


def main() -> None:
    arguments = _arguments()
    module = {"mosaic": support, "triton": triton_support}[arguments.implementation]
    if why := module.device_obstacle():
        sys.exit(f"nothing to measure here: {why}")
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    try:
        peer = peers.Peer() if arguments.peer else None
        if peer is not None:
            peer.ready()
    except RuntimeError as error:
        sys.exit(str(error))
    bench = Bench(
        arguments.implementation,
        rounds=arguments.rounds,
        repeats=arguments.repeats,
        peer=peer,
        peer_tokens=arguments.peer_tokens,
    )
    listed = ordered(arguments.ops, arguments.models, arguments.tokens)
    record = _record(bench, arguments)
    record["versions"] |= peer.versions if peer is not None else {}
    path, done = None, 0
    with progress_bar() as bar:
        task = bar.add_task("timing", total=len(listed))
        for batch in batches(listed):
            if time.monotonic() > stop:
                break
            for line in bench.run(batch):
                bar.console.print(line, highlight=False, soft_wrap=True)
                bar.advance(task)
                path = _write(record, bench, listed, arguments.results)
            done += len(batch)
            bar.update(task, completed=done)
            path = _write(record, bench, listed, arguments.results)
        beside = bench.with_peer()
        for found in bar.track(beside, description="cuSPARSELt") if beside else ():
            if time.monotonic() > stop:
                break
            bar.console.print(bench.beside(found), highlight=False, soft_wrap=True)
            path = _write(record, bench, listed, arguments.results)
    if peer is not None:
        peer.close()
    if without := sum(found["peer_us"] is None for found in bench.with_peer()):
        print(f"{without} results without the peer's numbers")
    if path is not None:
        print(path.name, end=": ")
    print(
        f"{len(bench.results)} results, {len(bench.failed)} failed, {len(listed) - done} left out"
    )
    wrong = [r for r in bench.results if (r["max_error_ratio"] or 0) > MOST_ERROR]
    for found in wrong:
        print(f"error ratio {found['max_error_ratio']}: {found}", file=sys.stderr)
    if bench.failed or wrong:
        sys.exit(1)


def _record(bench: Bench, arguments) -> dict[str, Any]:
    """The record, whose lists grow while the bench runs."""
    name = f"kernels-{arguments.part}" if arguments.part else "kernels"
    record = make_record(name, bench.results, device=accelerator(), module="benchmarks.kernels")
    return record | {"regime": "sustained", "failed": bench.failed, "left_out": []}


def _write(record: dict[str, Any], bench: Bench, listed: Sequence[Problem], folder: Path) -> Path:
    record["left_out"] = [named(problem) for problem in listed if problem not in bench.seen]
    return write_record(record, folder)


def _names(known: Sequence[str], what: str):
    def parse(text: str) -> list[str]:
        found = text.split(",")
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{what} {wrong} are not of {', '.join(known)}")
        return found

    return parse


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds, models = _names(problems.KINDS, "kinds"), _names(list(shapes.MODELS), "models")
    parser.add_argument("--ops", type=kinds, default=list(problems.KINDS), help="kinds of product")
    parser.add_argument("--models", type=models, default=list(shapes.MODELS), help="a,b,...")
    parser.add_argument("--tokens", type=numbers, help="a,b,...; of each kind if not given")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant")
    parser.add_argument("--repeats", type=int, default=20, help="most calls in a turn")
    parser.add_argument("--peer", choices=("cusparselt",), help="beside matmul, through PyTorch")
    parser.add_argument("--peer-tokens", type=numbers, default=list(PEER_TOKENS))
    parser.add_argument("--minutes", type=float, help="stop before; what is done is kept")
    parser.add_argument("--part", help="name of the record, for a part of the list")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--implementation", choices=("mosaic", "triton"), default="mosaic")
    return parser.parse_args()


if __name__ == "__main__":
    main()
