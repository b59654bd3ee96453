"""cuSPARSELt's 2:4 product beside PyTorch's dense one, in a process of its own.

`Peer` starts ``python -m benchmarks.peers`` and asks it for one shape at a time, so that it is
measured on the same machine in the same run, when the benchmark's own shapes are done. PyTorch and JAX
in one process would fight for the device's memory. Requests and replies are lines of JSON on stdin
and stdout. Preheating and turns are as in `pallas_kernels.device_time.sustained`; the times are of
CUDA graphs of many calls.
"""

import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import time
from typing import Any

PATIENCE = 240  # seconds for one product: the search tries every algorithm
ROUNDS = 2
SWITCH_SECONDS = 0.2
RECORDED = 8  # calls in a CUDA graph
SHORT_SECONDS = 1e-4
WINDOW_SECONDS = 0.02
LARGEST_ERROR = 0.02  # of the largest entry: a product that is off by more is of something else


def obstacle() -> str | None:
    """Why cuSPARSELt cannot be measured here, without importing PyTorch; or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    return None


class Peer:
    """The process that measures; one request at a time.

    Raises:
      RuntimeError: it cannot measure here; says why.
    """

    def __init__(self):
        if why := obstacle():
            raise RuntimeError(f"--peer=cusparselt: {why}")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions: dict[str, Any] = {}

    def ready(self) -> None:
        """Waits until PyTorch is loaded."""
        if not self.versions:
            self.versions = self._reply()

    def measure(self, tokens: int, size: tuple[int, int]) -> dict[str, Any]:
        """Times of x (tokens, in) @ w (in, out): see `measure` of this module."""
        self.ready()
        try:
            print(json.dumps([tokens, *size]), file=self._process.stdin, flush=True)
        except OSError as error:
            raise RuntimeError(
                f"the process of cuSPARSELt ended: {self._process.wait()}"
            ) from error
        return self._reply()

    @property
    def alive(self) -> bool:
        """Whether it answers still."""
        return self._process.poll() is None

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _reply(self) -> dict[str, Any]:
        readable, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not readable:
            self._process.kill()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of cuSPARSELt ended: {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"cuSPARSELt: {reply['error']}")
        return reply


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the replies

    def reply(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        import torch

        torch.cuda.init()
        reply({"torch": torch.__version__, "cusparselt": _cusparselt_version(torch)})
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        try:
            reply(measure(torch, *json.loads(line)))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})
        torch.cuda.empty_cache()


def measure(torch, tokens: int, k: int, f: int) -> dict[str, Any]:
    """Kernel microseconds of the dense product and of cuSPARSELt's best algorithm.

    cuSPARSELt computes y.T = w.T @ x.T with w.T compressed. Its search tries every algorithm, once
    for a result laid out as y and once as y.T; the faster of the two is the peer.
    """
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, w = torch.randn(tokens, k, **options), torch.randn(f, k, **options)
    order = torch.rand(f, k // 4, 4, device="cuda").argsort(-1).argsort(-1)
    w *= (order < 2).view(f, k)
    compressed = torch._cslt_compress(w)
    calls = {"dense": lambda: torch.matmul(x, w.t())}
    settings: dict[str, dict[str, Any]] = {}
    for name, transposed in (("y", True), ("y.T", False)):
        found = _search(torch, compressed, x.t(), transposed)
        settings[name] = {**found, "transpose_result": transposed}

        def sparse(settings=settings[name]):
            return torch._cslt_sparse_mm(compressed, x.t(), **settings)

        calls[name] = sparse
    error = _error(torch, calls["dense"](), calls["y"](), calls["y.T"]().t())
    times = _sustained(torch, calls)
    layout = min(settings, key=lambda name: times[name])
    return {
        "peer_us": times[layout],
        "peer_dense_us": times["dense"],
        "peer_layout": layout,
        "peer_algorithm": {name: int(value) for name, value in settings[layout].items()},
        "peer_error": error,
    }


def _search(torch, compressed, dense, transposed: bool) -> dict[str, int]:
    """The best algorithm; with its split of the contraction where this PyTorch tells it."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is not None:
        algorithm, split_k, split_k_mode, *_ = search(
            compressed, dense, None, None, None, transposed
        )
        return {"alg_id": algorithm, "split_k": split_k, "split_k_mode": split_k_mode}
    algorithm = torch._cslt_sparse_mm_search(compressed, dense, transpose_result=transposed)
    return {"alg_id": int(algorithm)}


def _error(torch, dense, *others) -> float:
    largest = dense[:256].float().abs().max()
    off = max(float((other[:256] - dense[:256]).float().abs().max() / largest) for other in others)
    if not off <= LARGEST_ERROR:
        raise RuntimeError(f"its product differs from the dense one by {off:.3g} of the largest")
    return off


def _sustained(torch, calls) -> dict[str, float]:
    """Microseconds of a call among others, replayed without a pause: a call of cuSPARSELt may take
    longer to launch than to run, and would find a card that has cooled down."""
    replays = {name: _recorded(torch, call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            replay, is_graph = replays[name]
            each = _preheat(torch, replay)
            alone = not is_graph or each < SHORT_SECONDS * RECORDED
            seen = _kernels if alone else _between_events
            times[name].append(seen(torch, replay, WINDOW_SECONDS / each))
    return {name: statistics.median(values) for name, values in times.items()}


def _recorded(torch, call):
    """What makes `RECORDED` calls, and whether it is a CUDA graph, where the call can be in one."""

    def run():
        for _ in range(RECORDED):
            call()

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def _preheat(torch, replay) -> float:
    """Replays until the card is hot; returns the seconds of a replay."""
    stop, count, start = time.perf_counter() + SWITCH_SECONDS, 0, time.perf_counter()
    while time.perf_counter() < stop:
        replay()
        torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def _between_events(torch, replay, count: float) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = max(2, round(count))
    replay()
    begin.record()
    for _ in range(count):
        replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / count / RECORDED


def _kernels(torch, replay, count: float) -> float:
    """The kernels alone, without the microsecond between two of them."""
    from torch.profiler import ProfilerActivity, profile

    count = max(2, round(2 * count))  # twice, to be hot again after the profiler's start
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(count):
            replay()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in found.key_averages())
    if total <= 0:
        raise RuntimeError("PyTorch's profiler saw no kernels")
    return total / count / RECORDED


def _cusparselt_version(torch) -> int | None:
    library = getattr(torch.backends, "cusparselt", None)
    return library.version() if library is not None and library.is_available() else None


if __name__ == "__main__":
    serve()
