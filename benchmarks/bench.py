"""Times the problems of the kernel benchmark, and says what the record says of each."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from benchmarks import peers, problems
from benchmarks.problems import Case, Problem, Variant
from pallas_kernels import choose, device_time, samples, tuning

PEER_TOKENS = (8192,)
COOL_TOKENS = 8192  # and these kinds and sizes: also in bursts after a pause
COOL_KINDS = ("matmul", "epilogue")
COOL = {(768, 3072), (3072, 768), (1024, 1024), (1600, 6400), (4096, 4096), (4096, 16384)}
COOL_ROUNDS = 3
NAMED = ("kind", "op", "names", "tokens", "in", "out", "dtype", "epilogue", "rank")
DENSE = {"dense", "dense_xla"}  # variants, of which the faster one counts
WITH_KERNEL = ("sparse", "float32", "bare", "whole")  # variants
THREADS = 16
# Of preheating: after the pause in which a batch is made ready, before each other problem, and
# between the variants of a problem.
FIRST_OF_BATCH_SECONDS, FIRST_SECONDS, SWITCH_SECONDS = 0.5, 0.2, 0.06
AUTOTUNE_OFF = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass
class Ready:
    """A problem made ready: calls by variant, and the results that differ from it in float32."""

    problem: Problem
    calls: dict[str, list]
    error_ratio: float | None


class Bench:
    """Times problems in batches; keeps results, failures and what was left out.

    Args:
      implementation: of the products that are timed.
      rounds, repeats: as for `device_time.measure`.
      peer: to time cuSPARSELt beside them, or None.
      peer_tokens: numbers of tokens at which it is timed.
    """

    def __init__(
        self,
        implementation: str = "mosaic",
        *,
        rounds: int = 2,
        repeats: int = 20,
        peer: peers.Peer | None = None,
        peer_tokens: Sequence[int] = PEER_TOKENS,
    ):
        self.implementation, self.rounds, self.repeats = implementation, rounds, repeats
        self.peer, self.peer_tokens = peer, peer_tokens
        self.results: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.seen: set[Problem] = set()  # timed or failed
        # Programs, for the peer's turn.
        self._kept: dict[tuple[int, int, int], tuple[Problem, dict[str, Any]]] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def run(self, batch: Sequence[Problem]) -> Iterator[str]:
        """Makes a batch ready and times it; a line to read after each problem."""
        first = FIRST_OF_BATCH_SECONDS
        for ready in self._made_ready(batch):
            programs = {name: calls[0].function for name, calls in ready.calls.items()}
            try:
                found = self._timed(ready, first)
            except Exception as error:  # one product must not end the run; it is named at its end
                self._fail(ready.problem, error)
                continue
            finally:
                ready.calls.clear()
            first = FIRST_SECONDS
            self.seen.add(ready.problem)
            self.results.append(found)
            if self.peer is not None and self._has_peer(found):
                self._kept[_shape(found)] = ready.problem, programs
            yield line(found)

    def with_peer(self) -> list[dict[str, Any]]:
        """The results that the peer's numbers belong beside."""
        if self.peer is None:
            return []
        return [found for found in self.results if self._has_peer(found)]

    def _has_peer(self, found: dict[str, Any]) -> bool:
        forward = not all(name.endswith(" dx") for name in found["names"])
        return found["kind"] == "matmul" and found["tokens"] in self.peer_tokens and forward

    def beside(self, found: dict[str, Any]) -> str:
        """Adds the peer's numbers to a result, and ours once more, from right before; a line to read.

        For when all else is timed: seconds of another library's work between two of a problem's
        turns leave the card in another state for each of them. Minutes do so as well: hence once more.
        """
        if not self.peer.alive:
            return f"{line(found)}; without the peer, whose process has ended"
        try:
            again = self._again(found)
            numbers = self.peer.measure(found["tokens"], (found["in"], found["out"]))
        except RuntimeError as error:
            self._failed(found, error)
            return f"{line(found)}; {error}"
        found |= {name: rounded(value) for name, value in (again | numbers).items()}
        return line(found)

    def _again(self, found: dict[str, Any]) -> dict[str, float]:
        """Microseconds of ours and of the dense product, under the peer's conditions."""
        problem, programs = self._kept[_shape(found)]
        case = problems.make(problem, self.implementation)
        calls = {
            name: [_Call(programs[name], each) for each in case.variants[name].operands]
            for name in ("sparse", "dense")
        }
        times = device_time.sustained(calls, rounds=peers.ROUNDS, repeats=self.repeats)
        return {"beside_us": times["sparse"], "beside_dense_us": times["dense"]}

    def _timed(self, ready: Ready, first: float) -> dict[str, Any]:
        times = device_time.measure(
            ready.calls,
            rounds=self.rounds,
            repeats=self.repeats,
            first=first,
            preheating=SWITCH_SECONDS,
        )
        check_kernels(ready.problem, self.implementation, times)
        found = result(ready.problem, self.implementation, times, ready.error_ratio)
        if is_cool(ready.problem):
            cool = device_time.cool(ready.calls, rounds=COOL_ROUNDS)
            found |= {f"cool_{name}_us": rounded(t.microseconds) for name, t in cool.items()}
        return found

    def _made_ready(self, batch: Sequence[Problem]) -> list[Ready]:
        """Kernels are compiled in threads; what XLA chooses by timing, alone on the device."""
        made = {p: self._pool.submit(problems.make, p, self.implementation) for p in batch}
        cases, sparse = {}, {}
        for problem, case in made.items():
            try:
                cases[problem] = case.result()
            except Exception as error:
                self._fail(problem, error)
        for problem, case in cases.items():
            for name, variant in case.variants.items():
                if not variant.tries_kernels:
                    sparse[problem, name] = self._pool.submit(_compiled, variant)
        checks = {}
        for problem, case in cases.items():
            try:
                compiled = {
                    name: _compiled(variant) if variant.tries_kernels else sparse[problem, name]
                    for name, variant in case.variants.items()
                }
                checks[problem] = compiled, self._pool.submit(_check, case, compiled)
            except Exception as error:
                self._fail(problem, error)
        ready = []
        for problem, (compiled, check) in checks.items():
            try:
                ready.append(_ready(problem, cases[problem], compiled, check))
            except Exception as error:
                self._fail(problem, error)
        return ready

    def _fail(self, problem: Problem, error: Exception) -> None:
        self.seen.add(problem)
        self._failed(named(problem), error)

    def _failed(self, what: dict[str, Any], error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        named_fields = {name: what[name] for name in NAMED}
        self.failed.append({**named_fields, "error": text[:500]})
        print(f"failed: {named_fields}: {text[:300]}", file=sys.stderr)


def _shape(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["tokens"], found["in"], found["out"]


def _ready(problem: Problem, case: Case, compiled: dict, check) -> Ready:
    calls = {}
    for name, variant in case.variants.items():
        function = _done(compiled[name])
        calls[name] = [_Call(function, each) for each in variant.operands]
    ratio = None
    if case.error is not None:
        results = {name: calls[name][0]() for name in ("sparse", "dense")}
        errors = check.result()(results, *case.exact)
        ratio = float(errors["sparse"]) / max(float(errors["dense"]), 1e-30)
    return Ready(problem, calls, ratio)


@dataclasses.dataclass(frozen=True)
class _Call:
    function: Any
    operands: tuple

    def __call__(self):
        return self.function(*self.operands)


def _compiled(variant: Variant):
    return samples.compile_for(variant.function, *variant.operands[0], options=variant.options)


def _check(case: Case, compiled: dict[str, Any]):
    if case.error is None:
        return None
    results = {name: _done(compiled[name]).out_info for name in ("sparse", "dense")}
    options = AUTOTUNE_OFF if jax.default_backend() == "gpu" else None
    return samples.compile_for(case.error, results, *case.exact, options=options)


def _done(compiled):
    return compiled.result() if isinstance(compiled, Future) else compiled


def is_cool(problem: Problem) -> bool:
    """Whether a problem is timed in bursts after pauses, too."""
    return problem.kind in COOL_KINDS and problem.tokens == COOL_TOKENS and problem.size in COOL


def check_kernels(problem: Problem, implementation: str, times) -> None:
    """Raises RuntimeError unless the sparse variants ran the kernel, and the others did not."""
    if implementation == "xla":
        return
    for name, found in times.items():
        ran = any(problem.op in kernel for kernel in found.kernels)
        if ran != (name in WITH_KERNEL):
            raise RuntimeError(f"{name} of {problem.op} ran {', '.join(found.kernels)}")


def result(
    problem: Problem, implementation: str, times, error_ratio: float | None
) -> dict[str, Any]:
    """What the record says of a problem: microseconds by variant, and what follows from them."""
    microseconds = {name: found.microseconds for name, found in times.items()}
    sparse = microseconds["sparse"]
    best = min(microseconds.keys() & DENSE, key=microseconds.get, default=None)
    dense = microseconds.get(best)
    choice = choose(problem.query)
    found = {
        **named(problem),
        "dense_us": rounded(dense),
        "sparse_us": rounded(sparse),
        "peer_us": None,
        "speedup": dense and round(dense / sparse, 3),
        "path": f"{choice.implementation}: {choice.reason}",
        "implementation": implementation,
        "config": configuration(problem) if implementation == "mosaic" else {},
        "tflops": rounded(problem.flops / sparse / 1e6) if problem.flops else None,
        "max_error_ratio": error_ratio and round(error_ratio, 3),
        "kernels": list(times["sparse"].kernels),
        "dense_kernels": list(times[best].kernels) if best else None,
    }
    others = {f"{name}_us": rounded(t) for name, t in microseconds.items()}
    return found | {name: t for name, t in others.items() if name not in found}


def line(found: dict[str, Any]) -> str:
    """A result in a line of text."""
    times = ", ".join(
        f"{name.removesuffix('_us')} {value:.1f}"
        for name, value in found.items()
        if name.endswith("_us") and value is not None
    )
    what = f"{found['kind']} {found['tokens']} x {found['in']} x {found['out']}"
    return f"{what} {found['epilogue']}: {times} us, error ratio {found['max_error_ratio']}"


def named(problem: Problem) -> dict[str, Any]:
    """What tells a problem from others, in JSON types."""
    return {
        "kind": problem.kind,
        "op": problem.op,
        "names": list(problem.names),
        "tokens": problem.tokens,
        "in": problem.size[0],
        "out": problem.size[1],
        "dtype": problem.source,
        "epilogue": problem.epilogue,
        "rank": problem.rank,
    }


def configuration(problem: Problem) -> dict[str, int]:
    """What the kernel runs by for a problem."""
    from pallas_kernels.mosaic import products  # needs a newer JAX than the package does

    if problem.op not in tuning.OPS:
        return {}
    shape = problem.tokens, *problem.size, problem.source
    gated = products.gated_tile(*shape) if problem.gated else None
    return dataclasses.asdict(gated or products.configuration(problem.op, *shape))


def rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value
