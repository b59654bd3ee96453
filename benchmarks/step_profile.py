"""Where the time of a training step goes, dense beside sparse: ``python -m benchmarks.step_profile``.

Traces some steps of `benchmarks.train_step`'s programs at the larger depth and sorts the kernels on
the device by what they are for. Kernels of our own, of cuBLAS and of cuDNN are told by their names;
what they belong to, by the operation of the model that XLA's program names for them. CUDA graphs are
off in this process, because kernels in a graph lose that name; their times do not change.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the profiler needs some, too

import argparse
import gc
import glob
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax

from benchmarks import hlo, steps, train_step
from benchmarks.record import make_record, write_record
from benchmarks.steps import Case, Program
from train.environment import accelerator

PROFILED = ("opt-13b", "llama-3-8b", "bert-large", "gpt2-xl")
STEPS = 3
MOST_KERNELS = 40  # in the record
FORWARD, DX, DW, HEAD = "forward", "dx", "dw", "vocabulary and heads"
ATTENTION, TRANSPOSES = "attention", "casts and transposes"
OPTIMIZER, ELEMENTWISE, COPIES = "optimizer", "elementwise", "copies"
UNKNOWN = "products of unknown use"
CATEGORIES = (
    FORWARD,
    DX,
    DW,
    UNKNOWN,
    HEAD,
    ATTENTION,
    TRANSPOSES,
    ELEMENTWISE,
    COPIES,
    OPTIMIZER,
)
PRODUCTS = (FORWARD, DX, DW, UNKNOWN)  # of the layers' linears
_PRODUCT = re.compile(
    r"nvjet|gemm|xmma|cutlass|cublas|splitk|nm_matmul|nm_sddmm|narrow_product", re.IGNORECASE
)
_ATTENTION = re.compile(r"sdpa|flash|fmha|mha_|cudnn", re.IGNORECASE)
_COPY = re.compile(
    r"memcpy|memset|copy|dynamic[-_]update|dynamic[-_]slice|transpose", re.IGNORECASE
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<op>[\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_DIMENSIONS = re.compile(r"\w+\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One of a compiled program: its first result's dimensions, and the model's operation."""

    dimensions: tuple[int, ...]
    operation: str


class Event(NamedTuple):
    """A kernel, copy or fill on the device: its name, XLA's instruction, nanoseconds."""

    name: str
    instruction: str
    start: float
    duration: float


def main() -> None:
    arguments = _arguments()
    name = f"step-profile-{arguments.part}" if arguments.part else "step-profile"
    record = make_record(name, [], device=accelerator(), module="benchmarks.step_profile")
    record |= {"failed": [], "left_out": list(arguments.models)}  # until it is measured
    path = write_record(record, arguments.results)
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    for model in arguments.models:
        if time.monotonic() > stop:
            break
        cases = train_step.cases(model, arguments)
        chosen = [case for case in cases if case.depth == max(c.depth for c in cases)]
        try:
            with ThreadPoolExecutor(len(chosen)) as pool:
                programs = list(pool.map(partial(compiled, arguments=arguments), chosen))
            # The second turn counts: in the first, whoever comes first has a cooler card.
            profiles = {p.case: profile(p, arguments.preheat) for p in 2 * programs}
        except Exception as error:  # of one model, which must not end the others
            text = f"{type(error).__name__}: {error}"[:500]
            record["failed"].append({"model": model, "error": text})
            print(f"failed: {model}: {text}", file=sys.stderr, flush=True)
        else:
            dense, *others = chosen
            for case in others:
                row = result(dense, case, profiles[dense], profiles[case])
                record["results"].append(row)
                print(table(row), flush=True)
        gc.collect()
        record["left_out"].remove(model)
        path = write_record(record, arguments.results)
    if record["left_out"]:
        print(f"left out for want of time: {', '.join(record['left_out'])}")
    print(f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed")
    if record["failed"]:
        sys.exit(1)


def compiled(case: Case, arguments: argparse.Namespace) -> Program:
    """A case's program."""
    return steps.lower(case).compile(autotune=arguments.autotune, options=arguments.xla)


def profile(program: Program, preheat: float) -> dict[str, Any]:
    """Milliseconds a step by category and by kernel, and of the step itself."""
    case = program.case
    found = instructions(program.step.as_text())
    run = program.start()
    run.steps(1)
    begin = time.perf_counter()
    while time.perf_counter() - begin < train_step.FIRST_SECONDS * preheat:
        run.steps(1)
    begin = time.perf_counter()
    run.steps(STEPS)
    wall = (time.perf_counter() - begin) / STEPS
    traced = list(events(lambda: run.steps(STEPS)))
    run.loss()
    if not traced:
        raise RuntimeError("the profile has no kernels: is this a GPU?")
    tokens = case.tokens // case.accumulation
    return {"step_ms": 1e3 * wall} | sums(traced, found, tokens, STEPS)


def sums(
    traced: Iterable[Event], program: Mapping[str, Instruction], tokens: int, count: int
) -> dict[str, Any]:
    """Milliseconds a step by category, and the kernels that take longest.

    Args:
      traced: the kernels of `count` steps.
      program: instructions by name.
      tokens: of a micro-batch.
    """
    found = tally(traced, program, partial(classify, tokens=tokens), CATEGORIES, count)
    del found["launches"]
    return found


def tally(
    traced: Iterable[Event],
    program: Mapping[str, Instruction],
    classify: Callable[[str, Instruction | None], str],
    categories: Sequence[str],
    count: int,
) -> dict[str, Any]:
    """What `count` steps ran, a step: milliseconds, launches, and the kernels that take longest.

    Args:
      program: instructions by name.
      classify: a kernel's name and instruction to one of `categories`.
    """
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    kernels: dict[tuple[str, str, str], list[float]] = {}
    unnamed = 0.0
    for event in traced:
        instruction = program.get(event.instruction) or program.get(_plain(event.name))
        unnamed += 0 if instruction else event.duration
        category = classify(event.name, instruction)
        times[category] += event.duration / count / 1e6
        launches[category] += 1
        operation = _tail(instruction.operation) if instruction else ""
        kernels.setdefault((event.name[:80], category, operation), []).append(event.duration)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]
    busy = sum(times.values())
    return {
        "busy_ms": busy,
        "categories": {name: times[name] for name in categories if times[name]},
        "launches": {name: launches[name] / count for name in categories if launches[name]},
        "unnamed": unnamed / count / 1e6 / busy if busy else 0.0,
        "kernels": [
            {
                "kernel": name,
                "category": category,
                "operation": operation,
                "calls": len(durations) / count,
                "ms": sum(durations) / count / 1e6,
            }
            for (name, category, operation), durations in longest
        ],
    }


def classify(kernel: str, instruction: Instruction | None, tokens: int) -> str:
    """The category of a kernel.

    >>> up = Instruction((8192, 64), "jit(train_step)/jvp(OPT)/while/body/layers_1_to_2/mlp/up/dot")
    >>> classify("nvjet_tst_128x256", up, 8192)
    'forward'
    """
    operation = instruction.operation if instruction else ""
    backward = "transpose(" in operation and "rematted_computation" not in operation
    inside = "layers_" in operation or "Layer/" in operation  # the class, where it has no name
    if "nm_transpose" in kernel:
        return TRANSPOSES
    if "nm_sddmm" in kernel:
        return DW
    if is_attention(kernel):
        return ATTENTION
    if is_product(kernel):
        if not instruction:
            return UNKNOWN
        if not inside:
            return HEAD
        if not backward:
            return FORWARD
        return DX if _has_tokens(instruction.dimensions, tokens) else DW
    model = "jvp(" in operation or inside
    if instruction and not model:
        return OPTIMIZER
    if operation.endswith("convert_element_type") and inside:
        weights = not _has_tokens(instruction.dimensions, tokens)
        return TRANSPOSES if weights else ELEMENTWISE
    if is_copy(kernel, operation):
        return COPIES
    return ELEMENTWISE


def instructions(text: str) -> dict[str, Instruction]:
    """Those of a compiled program's text, by name, and by the name that its kernel would have.

    A fusion without an operation of its own has that of what it computes: of its product, if any. If
    XLA has lost that, too, it has the one of what uses its result.
    """
    found, (_, bodies) = {}, hlo.computations(text)
    users = {}
    for row in text.splitlines():
        match, operation = _INSTRUCTION.match(row), _operation(row) or _inner_operation(row, bodies)
        if match and operation:
            for operand in _OPERAND.findall(row[match.end() :].partition(")")[0]):
                users.setdefault(operand, operation)
    for row in text.splitlines():
        match = _INSTRUCTION.match(row)
        operation = match and (_operation(row) or _inner_operation(row, bodies))
        if match and not operation and " fusion(" in row:
            operation = users.get(match["name"])
        if not operation:
            continue
        sizes = _DIMENSIONS.search(match["shape"])
        dimensions = tuple(int(size) for size in sizes[1].split(",") if size) if sizes else ()
        entry = Instruction(dimensions, operation)
        found[match["name"]] = entry
        found.setdefault(_plain(match["name"]), entry)
    return found


def _operation(row: str) -> str:
    found = _OPERATION.search(row)
    return found[1] if found else ""


def _inner_operation(row: str, bodies: Mapping[str, Sequence[str]]) -> str:
    if " fusion(" not in row:
        return ""
    inside = [inner for name in hlo.called(row) for inner in bodies.get(name, ())]
    products = [inner for inner in inside if " dot(" in inner]
    named = filter(None, map(_operation, [*products, *reversed(inside)]))
    return next(named, "")


def events(call) -> Iterator[Event]:
    """What the device runs during a call, from the profiler."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 1
    options.python_tracer_level = 0
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            call()
        finally:
            jax.profiler.stop_trace()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
        for plane in profile.planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        stats = {str(name): value for name, value in event.stats}
                        instruction = str(stats.get("hlo_op", ""))
                        yield Event(event.name, instruction, event.start_ns, event.duration_ns)


def result(
    dense: Case, sparse: Case, theirs: dict[str, Any], ours: dict[str, Any]
) -> dict[str, Any]:
    """What the record says of one pair of profiles."""
    products = [sum(p["categories"].get(name, 0) for name in PRODUCTS) for p in (theirs, ours)]
    made = products[1] + ours["categories"].get(TRANSPOSES, 0)
    rest = theirs["busy_ms"] - products[0]
    return {
        "model": sparse.model,
        "depth": sparse.depth,
        "tokens": sparse.tokens,
        "length": sparse.length,
        "accumulation": sparse.accumulation,
        "remat": sparse.remat,
        "moments": sparse.moments,
        "rank": sparse.config.rank,
        "dense_step_ms": rounded(theirs["step_ms"]),
        "sparse_step_ms": rounded(ours["step_ms"]),
        "dense_busy_ms": rounded(theirs["busy_ms"]),
        "sparse_busy_ms": rounded(ours["busy_ms"]),
        "busy_speedup": rounded(theirs["busy_ms"] / ours["busy_ms"]),
        "products_speedup": rounded(products[0] / products[1]) if products[1] else None,
        # Were the linears' products all that changes: the bound that the kernels set to the step.
        "kernel_bound": rounded((products[0] + rest) / (products[1] + rest)),
        "products_with_transposes_ms": rounded(made),
        "dense": rounded(theirs["categories"]),
        "sparse": rounded(ours["categories"]),
        "dense_unnamed": rounded(theirs["unnamed"]),
        "sparse_unnamed": rounded(ours["unnamed"]),
        "dense_kernels": rounded(theirs["kernels"]),
        "sparse_kernels": rounded(ours["kernels"]),
    }


def table(row: dict[str, Any]) -> str:
    """A result as text."""
    lines = [
        f"{row['model']}, {row['depth']} layers, {row['tokens']} tokens, rank {row['rank']}: busy"
        f" {row['dense_busy_ms']} -> {row['sparse_busy_ms']} ms ({row['busy_speedup']}), products"
        f" {row['products_speedup']}, bound by them {row['kernel_bound']}"
    ]
    for name in CATEGORIES:
        times = [row[side].get(name, 0.0) for side in ("dense", "sparse")]
        if any(times):
            lines.append(f"  {name:24} {times[0]:9.2f} {times[1]:9.2f} ms")
    return "\n".join(lines)


def _has_tokens(dimensions: tuple[int, ...], tokens: int) -> bool:
    """Whether leading or trailing dimensions make up the tokens."""
    splits = range(1, len(dimensions))
    return any(tokens in (math.prod(dimensions[:i]), math.prod(dimensions[i:])) for i in splits)


def is_product(kernel: str) -> bool:
    """Whether a kernel of this name multiplies matrices."""
    return bool(_PRODUCT.search(kernel))


def is_attention(kernel: str) -> bool:
    """Whether a kernel of this name is a fused attention."""
    return bool(_ATTENTION.search(kernel))


def is_copy(kernel: str, operation: str) -> bool:
    """Whether a kernel moves data and computes nothing, by its name or the model's operation."""
    return bool(_COPY.search(kernel) or _COPY.search(operation.rpartition("/")[2]))


def _plain(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def _tail(operation: str) -> str:
    """The last parts of an operation's path."""
    return "/".join(operation.split("/")[-4:])


def rounded(value: Any) -> Any:
    """With 4 decimals, in whatever it is nested."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    train_step.add_arguments(parser)
    train_step.add_compiler_arguments(parser)
    parser.set_defaults(models=list(PROFILED), ranks=[0.0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
