"""Where the time of prefill and decode goes, dense beside sparse: ``python -m benchmarks.serving_profile``.

Traces the loops of `benchmarks.inference` at the lesser of its two depths and sorts the kernels on the
device by what they are for, as `benchmarks.step_profile` does for training. CUDA graphs are off in
this process, because kernels in a graph lose the name of the model's operation.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the profiler needs some, too

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from benchmarks import inference, serving_steps, train_step
from benchmarks.record import make_record, write_record
from benchmarks.serving_steps import ITERATIONS, Cut, Program, Work
from benchmarks.step_profile import (
    UNKNOWN,
    Instruction,
    events,
    instructions,
    is_attention,
    is_copy,
    is_product,
    rounded,
    tally,
)
from train.environment import accelerator

PROFILED = ("opt-13b", "llama-3-8b")
LOOPS = 2
LINEARS, ADAPTERS, ATTENTION = "linears", "first products of adapters", "attention"
ELEMENTWISE, COPIES, HEAD = "elementwise", "copies", "vocabulary"
CATEGORIES = (LINEARS, ADAPTERS, UNKNOWN, ATTENTION, ELEMENTWISE, COPIES, HEAD)


def main() -> None:
    arguments = _arguments()
    name = f"serving-profile-{arguments.part}" if arguments.part else "serving-profile"
    record = make_record(name, [], device=accelerator(), module="benchmarks.serving_profile")
    record |= {"failed": [], "left_out": list(arguments.models)}  # until it is measured
    path = write_record(record, arguments.results)
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    with ThreadPoolExecutor(inference.THREADS) as pool:
        for model in arguments.models:
            if time.monotonic() > stop:
                break
            try:
                rows = profiles(model, pool, arguments)
            except Exception as error:  # of one model, which must not end the others
                text = f"{type(error).__name__}: {error}"[:500]
                record["failed"].append({"model": model, "error": text})
                print(f"failed: {model}: {text}", file=sys.stderr, flush=True)
            else:
                record["results"] += rows
                print("\n".join(map(table, rows)), flush=True)
            gc.collect()
            record["left_out"].remove(model)
            path = write_record(record, arguments.results)
    if record["left_out"]:
        print(f"left out for want of time: {', '.join(record['left_out'])}")
    print(f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed")
    if record["failed"]:
        sys.exit(1)


def profiles(
    model: str, pool: ThreadPoolExecutor, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each work and rank of a model."""
    works = [Work(serving_steps.PREFILL, *prompt) for prompt in arguments.prompts]
    works += [Work(serving_steps.DECODE, batch, arguments.context) for batch in arguments.batches]
    depth = (arguments.depths or serving_steps.depths(model))[0]
    dense = Cut(model, depth, sparsity="dense", dtype=arguments.dtype)
    cuts = [
        dense,
        *(Cut(model, depth, rank=rank, dtype=arguments.dtype) for rank in arguments.ranks),
    ]
    programs = inference.compiled(list(itertools.product(cuts, works)), pool, arguments)
    found = {}
    for cut in 2 * cuts:  # the second turn counts: in the first, dense has a cooler card
        variables = serving_steps.random_variables(cut)
        for work in works:
            program = programs[cut, work]
            if isinstance(program, train_step.Failed):
                raise RuntimeError(program)
            found[cut, work] = profile(program, variables, arguments.preheat)
        del variables
        gc.collect()
    return [
        result(work, dense, cut, found[dense, work], found[cut, work])
        for work in works
        for cut in cuts[1:]
    ]


def profile(program: Program, variables: Mapping[str, Any], preheat: float) -> dict[str, Any]:
    """Milliseconds a step by category and by kernel, and of the step itself."""
    cut, work = program.cut, program.work
    known = instructions(program.loop.as_text())
    run = program.start(variables)
    run.loops(1)
    begin = time.perf_counter()
    while time.perf_counter() - begin < inference.FIRST_SECONDS * preheat:
        run.loops(1)
    count = LOOPS * ITERATIONS[work.phase]
    begin = time.perf_counter()
    run.loops(LOOPS)
    wall = (time.perf_counter() - begin) / count
    traced = list(events(lambda: run.loops(LOOPS)))
    run.check()
    if not traced:
        raise RuntimeError("the profile has no kernels: is this a GPU?")
    found = tally(traced, known, partial(classify, rank=cut.columns), CATEGORIES, count)
    return {"step_ms": 1e3 * wall} | found


def classify(kernel: str, instruction: Instruction | None, rank: int) -> str:
    """The category of a kernel.

    >>> path = "jit(_loop)/while/body/LLaMA/layers_1/attention/"
    >>> classify("nvjet_tst_64x8", Instruction((1, 4096), path + "qkv/dot_general"), 0)
    'linears'
    >>> classify("gemmk1", Instruction((32, 1, 512), path + "BNTS"), 0)
    'attention'
    >>> classify("nvjet_tst_64x8", Instruction((1, 64), path + "qkv/dot_general"), 64)
    'first products of adapters'
    >>> classify("first_product", Instruction((4, 1, 64), path + "qkv/first_product"), 64)
    'first products of adapters'
    """
    operation = instruction.operation if instruction else ""
    inside = "layers_" in operation
    linear = any(f"/{name}/" in f"{operation}/" for name in ("qkv", "output", "mlp"))
    if "nm_matmul" in kernel:
        return LINEARS
    if "first_product" in kernel or "narrow_product" in kernel:
        return ADAPTERS
    if is_attention(kernel) or (inside and "/attention/" in operation and not linear):
        return ATTENTION
    # XLA multiplies one token by elementwise operations and a sum.
    if is_product(kernel) or operation.endswith("/dot_general"):
        if not operation:
            return UNKNOWN
        if not inside:
            return HEAD
        return ADAPTERS if rank and instruction.dimensions[-1:] == (rank,) else LINEARS
    return COPIES if is_copy(kernel, operation) else ELEMENTWISE


def result(
    work: Work, dense: Cut, sparse: Cut, theirs: dict[str, Any], ours: dict[str, Any]
) -> dict[str, Any]:
    """What the record says of one pair of profiles."""
    products = [
        sum(p["categories"].get(name, 0) for name in (LINEARS, ADAPTERS)) for p in (theirs, ours)
    ]
    rest = theirs["busy_ms"] - products[0]
    return {
        "model": sparse.model,
        "depth": sparse.depth,
        **work._asdict(),
        "rank": sparse.columns,
        "dense_step_ms": rounded(theirs["step_ms"]),
        "sparse_step_ms": rounded(ours["step_ms"]),
        "dense_busy_ms": rounded(theirs["busy_ms"]),
        "sparse_busy_ms": rounded(ours["busy_ms"]),
        "busy_speedup": rounded(theirs["busy_ms"] / ours["busy_ms"]),
        "products_speedup": rounded(products[0] / products[1]) if products[1] else None,
        # Were the linears all that changes: the bound that their kernels set to the step.
        "kernel_bound": rounded((products[0] + rest) / (products[1] + rest)),
        # Layers' weights over the time of their products, which decode spends reading them.
        "dense_gb_per_s": rounded(dense.layer_bytes / products[0] / 1e6),
        "sparse_gb_per_s": rounded(sparse.layer_bytes / products[1] / 1e6),
        "dense": rounded(theirs["categories"]),
        "sparse": rounded(ours["categories"]),
        "dense_launches": rounded(theirs["launches"]),
        "sparse_launches": rounded(ours["launches"]),
        "dense_kernels": rounded(theirs["kernels"]),
        "sparse_kernels": rounded(ours["kernels"]),
    }


def table(row: dict[str, Any]) -> str:
    """A result as text."""
    lines = [
        f"{row['model']}, {row['depth']} layers, {row['phase']} {row['batch']} x {row['prompt']},"
        f" rank {row['rank']}: busy {row['dense_busy_ms']} -> {row['sparse_busy_ms']} ms"
        f" ({row['busy_speedup']}), products {row['products_speedup']}, bound by them"
        f" {row['kernel_bound']}; {row['dense_gb_per_s']:.0f} -> {row['sparse_gb_per_s']:.0f} GB/s"
    ]
    for name in CATEGORIES:
        times = [row[side].get(name, 0.0) for side in ("dense", "sparse")]
        counts = [row[f"{side}_launches"].get(name, 0.0) for side in ("dense", "sparse")]
        if any(times):
            both = (
                f"{ms:9.4f} ms in {count:3.0f}" for ms, count in zip(times, counts, strict=True)
            )
            lines.append(f"  {name:28}{' '.join(both)}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    inference.add_arguments(parser)
    parser.set_defaults(
        models=list(PROFILED), ranks=[0.0, inference.RANKS[1]], batches=[1, 16], prompts=[(8, 512)]
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
