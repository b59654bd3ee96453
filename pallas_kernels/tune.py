"""Times the kernels' configurations on this device: ``python -m pallas_kernels.tune``.

Writes the fastest of each shape into ``pallas_kernels/tuned/<device>.json``, beside the time of the
dense product; shapes that are there already are replaced, others stay. A configuration that is
wrong on inputs made to break kernels (`gate`) is left out, and named at the end. With ``--minutes``
it stops in time; what it has by then is written. An adapter's first product in the kernel (with_first) comes
last, for it is timed beside the way apart as the package's table then has it: time it anew where nm_matmul is.
It counts by the less favourable of two times, of a card that is busy all along and of one that rests between.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from rich import console, progress

from pallas_kernels import candidates, device_time, gate, samples, tuning, xla
from pallas_kernels.candidates import Config
from pallas_kernels.compressed import CompressedMatrix
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.files import write_atomically
from pallas_kernels.mosaic import support
from pallas_kernels.pattern import Pattern
from pallas_kernels.products import narrow_matmul, nm_matmul
from pallas_kernels.tuning import Entry

DTYPE = jnp.bfloat16
PATTERN = Pattern(2, 4)
THREADS = 16
FEWEST = max(candidates.FEW_TOKENS)  # tokens at most that read a weight from memory
BATCH = 8  # problems that are compiled together
SIMILAR = 0.03  # times this close are the same: the rule's own choice wins
SWITCH_SECONDS = 0.06  # less, after another kernel, flatters one that draws more power
COOL_ROUNDS, COOL_SECONDS = 3, 0.1
# BERT, GPT-2, OPT: qkv, out, up, down; LLaMA-3-8B and Mistral-7B; and their transposes, for dx.
WIDTHS = (768, 1024, 1280, 1600, 2560, 4096, 5120, 7168, 9216)
GROUPED = ((4096, 6144), (4096, 28672), (14336, 4096))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product to tune: x (tokens, in) and an (in, out) matrix."""

    op: str
    tokens: int
    size: tuple[int, int]


def main() -> None:
    arguments = _arguments()
    if why := support.device_obstacle():
        sys.exit(f"nothing to tune here: {why}")
    device = jax.devices()[0]
    path = arguments.folder / f"{tuning.slug(device.device_kind)}.json"
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    problems = ordered(arguments.ops, arguments.tokens, arguments.shapes)
    tuner = Tuner(arguments.candidates, arguments.rounds)
    entries: dict[tuple, Entry] = {entry.key: entry for entry in _old_entries(path)}
    done = 0
    with progress_bar() as bar:
        task = bar.add_task("tuning", total=len(problems))
        while done < len(problems) and time.monotonic() < stop:
            batch = problems[done : done + BATCH]
            tuning.forget()  # with_first goes by what was found
            for entry in tuner.tune(batch):
                entries[entry.key] = entry
                bar.console.print(json.dumps(entry.to_json()), highlight=False, soft_wrap=True)
                write(path, device.device_kind, str(device.compute_capability), entries.values())
            done += len(batch)
            bar.update(task, completed=done)
    for name, why in tuner.rejected.items():
        print(f"left out, wrong: {name}: {why}", file=sys.stderr)
    for name, why in tuner.failed.items():
        print(f"not timed: {name}: {why}", file=sys.stderr)
    tuned = done - len(tuner.failed)
    print(f"{path.name}: {len(entries)} entries; {tuned} of {len(problems)} problems tuned")
    if tuner.rejected or tuner.failed:
        sys.exit(1)


class Tuner:
    """Compiles, checks and times configurations.

    Args:
      limit: most configurations of a problem that are timed, the likeliest ones.
      rounds: turns of each configuration.
    """

    def __init__(self, limit: int, rounds: int):
        self.limit, self.rounds = limit, rounds
        self.rejected: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._verdicts: dict[tuple, str | None] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def tune(self, problems: Sequence[Problem]) -> Iterator[Entry]:
        """The entries of the problems that a right configuration was found for."""
        configs = {
            problem: candidates.kernel(problem.op).configs(problem.tokens, *problem.size)
            for problem in problems
        }
        configs = {problem: found[: self.limit] for problem, found in configs.items()}
        self._check({_key(p, c): (p, c) for p, found in configs.items() for c in found})
        for problem, found in configs.items():
            right = [c for c in found if self._verdicts[_key(problem, c)] is None]
            if right:
                try:
                    entry = fastest(problem, right, self._time(problem, right))
                    if entry.sparse_us > entry.dense_us and problem.op != "with_first":
                        entry = dataclasses.replace(entry, xla_us=self._time_without(problem))
                except RuntimeError as error:  # of one profile, which must not end the others
                    self.failed[str(problem)] = str(error)[:500]
                    continue
                yield entry

    def _check(self, wanted: Mapping[tuple, tuple[Problem, Config]]) -> None:
        new = {key: value for key, value in wanted.items() if key not in self._verdicts}
        reasons = self._pool.map(lambda value: fault(*value), new.values())
        for (key, (problem, config)), why in zip(new.items(), reasons, strict=True):
            self._verdicts[key] = why
            if why is not None:
                self.rejected[f"{problem.op} {config}"] = why

    def _time(self, problem: Problem, configs: Sequence[Config]) -> dict[str, float]:
        run = candidates.kernel(problem.op).run
        operands, dense = _operands(problem)
        sparse = self._pool.map(
            lambda config: samples.compile_for(functools.partial(run, config), *operands[0][0]),
            configs,
        )
        first = problem.op == "with_first"
        options = None if first else samples.CUBLAS
        product = samples.compile_for(dense, *operands[0][1], options=options)
        calls = {"dense": [functools.partial(product, *each) for _, each in operands]}
        if problem.tokens <= FEWEST and not first:  # of which XLA has kernels that are often faster
            product = samples.compile_for(dense, *operands[0][1])
            calls["dense_xla"] = [functools.partial(product, *each) for _, each in operands]
        for number, compiled in enumerate(sparse):
            calls[str(number)] = [functools.partial(compiled, *each) for each, _ in operands]
        times = device_time.measure(calls, rounds=self.rounds, preheating=SWITCH_SECONDS)
        found = {name: each.microseconds for name, each in times.items()}
        if first:  # in a model, between others, a card is cooler than under these alone
            times = device_time.cool(calls, rounds=COOL_ROUNDS, pause=COOL_SECONDS)
            return surest(found, {name: each.microseconds for name, each in times.items()})
        return found | {"dense": min(found["dense"], found.pop("dense_xla", math.inf))}

    def _time_without(self, problem: Problem) -> float:
        """Of what runs where the kernel does not."""
        operands, _ = _operands(problem)
        run = samples.compile_for(functools.partial(_with_xla, problem), *operands[0][0])
        calls = {"xla": [functools.partial(run, *each) for each, _ in operands]}
        times = device_time.measure(calls, rounds=self.rounds, preheating=SWITCH_SECONDS)
        return round(times["xla"].microseconds, 2)


def _with_xla(problem: Problem, x, second, metadata):
    if problem.op == "nm_sddmm":
        values = jax.ShapeDtypeStruct((problem.size[0] // 2, problem.size[1]), x.dtype)  # unread
        w = CompressedMatrix(values, metadata, PATTERN, 0, problem.size)
        return xla.nm_sddmm(x, second, w, jnp.float32, None)  # as training does
    w = CompressedMatrix(second, metadata, PATTERN, 0, problem.size)
    return xla.nm_matmul(x, w, x.dtype, None, Epilogue())


def fault(problem: Problem, config: Config) -> str | None:
    """What a configuration computes wrongly, or None."""
    kernel = candidates.kernel(problem.op)
    try:
        for tokens, k, f, options in kernel.cases(config, problem.tokens):
            run = jax.jit(functools.partial(kernel.run, config, **options))
            if problem.op == "with_first":
                rank = 3 * kernel.make(**config).rows // 4  # in two tiles
                gate.check_with_first(
                    lambda x, w, left, right: run(x, w.values, w.metadata, left, right),  # noqa: B023
                    *(tokens, k, f, rank),
                )
            elif problem.op == "nm_sddmm":
                gate.check_sddmm(lambda x, dy, w: run(x, dy, w.metadata), tokens, k, f)  # noqa: B023
            else:
                gate.check_matmul(lambda x, w: run(x, w.values, w.metadata), tokens, k, f)  # noqa: B023
    except gate.WrongResult as wrong:
        return f"{tokens} x {k} x {f}: {wrong}"
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return f"does not run: {type(error).__name__}: {error}"
    return None


def surest(*regimes: Mapping[str, float]) -> dict[str, float]:
    """Of several times of "dense" and of configurations: those of the configuration that gains most where it
    gains least, taken there; of all others none.

    >>> surest({"dense": 10.0, "0": 7.0, "1": 8.0}, {"dense": 9.0, "0": 9.5, "1": 8.5})
    {'dense': 9.0, '0': inf, '1': 8.5}
    """

    def least(name: str) -> Mapping[str, float]:
        return max(regimes, key=lambda times: times[name] / times["dense"])

    names = [name for name in regimes[0] if name != "dense"]
    best = min(names, key=lambda name: least(name)[name] / least(name)["dense"])
    return (
        {"dense": least(best)["dense"]} | dict.fromkeys(names, math.inf) | {best: least(best)[best]}
    )


def fastest(problem: Problem, configs: Sequence[Config], times: Mapping[str, float]) -> Entry:
    """The entry of a problem from the times of "dense" and of configurations "0", "1", ...

    Of configurations as fast as the fastest, within `SIMILAR`, the first wins; one without a time never.
    """
    least = min(times[str(number)] for number in range(len(configs)))
    number = next(
        number for number in range(len(configs)) if times[str(number)] <= least * (1 + SIMILAR)
    )
    return Entry(
        problem.op,
        tuning.dtype_class(jnp.dtype(DTYPE)),
        problem.tokens,
        problem.size,
        {name: int(value) for name, value in configs[number].items()},
        round(times[str(number)], 2),
        round(times["dense"], 2),
    )


def default_sizes() -> list[tuple[int, int]]:
    """(in, out) of the linear layers of known models and of their transposes, smallest first."""
    forward = {(w, factor * w) for w in WIDTHS for factor in (1, 3, 4)}
    forward |= {(4 * w, w) for w in WIDTHS} | set(GROUPED)
    both = forward | {(f, k) for k, f in forward}
    return sorted(both, key=lambda size: (size[0] * size[1], size))


def ordered(
    ops: Iterable[str], tokens: Sequence[int] | None, sizes: Sequence[tuple[int, int]] | None
) -> list[Problem]:
    """The problems, most telling first: 8192 tokens and few of them, then the extremes. with_first last."""
    found = [
        Problem(op, count, size)
        for op in ops
        for count in tokens or candidates.kernel(op).tokens
        for size in sizes or default_sizes()
    ]
    rank = {8192: 0, 16: 0, 65536: 1, 1: 1, 2048: 2, 64: 2}
    return sorted(found, key=lambda p: (p.op == "with_first", rank.get(p.tokens, 3)))


def write(path: Path, device: str, capability: str, entries: Iterable[Entry]) -> None:
    """Writes a table, whole or not at all, one entry a line."""
    head = {"device": device, "capability": capability, "jax": jax.__version__}
    lines = [json.dumps(entry.to_json()) for entry in sorted(entries, key=lambda e: e.key)]
    body = ",\n    ".join(lines)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n    {body}\n  ]\n}}\n'
    write_atomically(path, text)


def _operands(problem: Problem):
    """Pairs of the sparse and the dense product's operands, to rotate through; the dense product."""
    tokens, (k, f) = problem.tokens, problem.size
    if problem.op == "nm_sddmm":
        count = samples.copies(2 * tokens * (k + f))
        ((w, _),) = samples.weights(0, 1, (k, f))
        xs = samples.normal(1, count, (tokens, k))
        dys = samples.normal(2, count, (tokens, f))
        pairs = [((x, dy, w.metadata), (x, dy)) for x, dy in zip(xs, dys, strict=True)]
        return pairs, lambda x, dy: jnp.matmul(x.T, dy)
    if problem.tokens <= FEWEST:  # weights that the cache does not hold
        count = samples.copies(2 * k * f / 2, most=samples.MOST_COPIES)
        found = samples.weights(0, count, (k, f))
        xs = samples.normal(1, 1, (tokens, k)) * count
    else:
        found = samples.weights(0, 1, (k, f))
        xs = samples.normal(1, samples.copies(2 * tokens * (k + f)), (tokens, k))
        found = found * len(xs)
    pairs = [
        ((x, w.sparse.values, w.sparse.metadata), (x, w.dense))
        for x, w in zip(xs, found, strict=True)
    ]
    if problem.op == "with_first":
        rank, scale = samples.adapter_rank(min(k, f)), jnp.asarray(k**-0.5, DTYPE)
        (left,), (right,) = samples.normal(2, 1, (k, rank)), samples.normal(3, 1, (rank, f))
        pairs = [((*sparse, left * scale, right * scale),) * 2 for sparse, _ in pairs]
        return pairs, functools.partial(_apart, problem)
    return pairs, jnp.matmul


def _apart(problem: Problem, x, values, metadata, left, right):
    """What runs where the product's kernel does not make the adapter's first one as well."""
    w = CompressedMatrix(values, metadata, PATTERN, 0, problem.size)
    t = narrow_matmul(x, left)
    return nm_matmul(x, w, low_rank=(t, right), implementation="mosaic")


def _key(problem: Problem, config: Config) -> tuple:
    tokens = problem.tokens if problem.op == "few_tokens" else None
    return problem.op, tokens, tuple(sorted(config.items()))


def _old_entries(path: Path) -> tuple[Entry, ...]:
    if not path.exists():
        return ()
    table = tuning.load(path.stem, path.parent)
    return table.entries


def _sizes(text: str) -> list[tuple[int, int]]:
    """ "768x3072,3072x768" -> [(768, 3072), (3072, 768)]."""
    found = [re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: give IN x OUT,..., as in 768x3072,3072x768")
    sizes = [(int(match[1]), int(match[2])) for match in found]
    if wrong := [size for size in sizes if size[0] % 8 or size[1] % 8]:
        raise argparse.ArgumentTypeError(f"{wrong}: sizes must be multiples of 8")
    return sizes


def _ops(text: str) -> list[str]:
    ops = text.split(",")
    for op in ops:
        if op not in candidates.KERNELS:
            raise argparse.ArgumentTypeError(
                f"op is {op!r}; it must be of {', '.join(candidates.KERNELS)}"
            )
    return ops


def numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers, as in 2048,8192")
    return [int(part) for part in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", type=_ops, default=list(candidates.KERNELS), help="a,b,...")
    parser.add_argument("--tokens", type=numbers, help="a,b,...; each op's classes if not given")
    parser.add_argument(
        "--shapes", type=_sizes, help="INxOUT,...; those of known models if not given"
    )
    parser.add_argument("--candidates", type=int, default=4, help="most to time for a shape")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="stop before; what is done is kept")
    parser.add_argument("--folder", type=Path, default=tuning.FOLDER, help="of the table")
    return parser.parse_args()


def progress_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
    )


if __name__ == "__main__":
    main()
