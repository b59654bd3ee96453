"""Time on the device itself, from the profiler: launch gaps and the host do not count."""

import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import jax

PREHEAT_SECONDS = 0.15


def device_microseconds(call: Callable[[], object], repeats: int) -> tuple[float, list[str]]:
    """Mean busy time of the device per call over `repeats` calls, and the names of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call() for _ in range(repeats)][-1])
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        events = _kernels(jax.profiler.ProfileData.from_file(path))
    total = sum(duration for _, duration in events)
    return total / repeats / 1e3, sorted({name for name, _ in events})


def _kernels(profile) -> list[tuple[str, float]]:
    return [
        (event.name, event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def preheat(call: Callable[[], object], seconds: float = PREHEAT_SECONDS) -> None:
    """Runs `call` until the card has settled at its sustained clock."""
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        jax.block_until_ready([call() for _ in range(4)][-1])


def sustained(
    calls: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int = 3, repeats: int = 20
) -> dict[str, float]:
    """Median device microseconds of each variant under sustained load.

    Variants take turns, in alternating order, each after a preheating of its own. A variant is a
    list of calls on different inputs that are rotated through, so that caches do not flatter it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for variants in calls.values():
        jax.block_until_ready([call() for call in variants])
    for number in range(rounds):
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in order:
            turn = _rotate(calls[name])
            preheat(turn)
            times[name].append(device_microseconds(turn, repeats)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def _rotate(variants: Sequence[Callable[[], object]]) -> Callable[[], object]:
    count = -1

    def call():
        nonlocal count
        count += 1
        return variants[count % len(variants)]()

    return call
