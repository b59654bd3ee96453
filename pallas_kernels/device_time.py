"""Time on the device itself, from the profiler: launch gaps and the host do not count.

Two regimes. `sustained` is what training sees: the card has been busy for long enough to have
settled at the clock that its power cap allows. `cool` is what a single step after a pause sees.
Copies and fills that a call makes on the device count like kernels.
"""

import dataclasses
import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import jax

PREHEAT_SECONDS = 0.2
WINDOW_SECONDS = 0.02
BURST_SECONDS = 0.012
PAUSE_SECONDS = 0.25
LEAD = 2  # calls at the head of each window that do not count
APART_SECONDS = 0.0005  # the clocks of host and device may differ by as much

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Time:
    """Busy microseconds of the device per call, and the names of the kernels that ran."""

    microseconds: float
    kernels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device, in nanoseconds of the profile's clock."""

    name: str
    start: float
    duration: float


def sustained(
    calls: Mapping[Hashable, Sequence[Call]], *, rounds: int = 3, repeats: int = 20
) -> dict[Hashable, float]:
    """Median device microseconds of each variant under sustained load, as `measure` takes them."""
    times = measure(calls, rounds=rounds, repeats=repeats)
    return {name: found.microseconds for name, found in times.items()}


def measure(
    calls: Mapping[Hashable, Sequence[Call]],
    *,
    rounds: int = 3,
    repeats: int = 20,
    first: float = PREHEAT_SECONDS,
    preheating: float = PREHEAT_SECONDS,
) -> dict[Hashable, Time]:
    """Median time of each variant under sustained load, and its kernels.

    Variants take turns, in alternating order, each after a preheating of its own, with no pause
    between them in which the card would cool. A variant is a
    list of calls on different inputs that are rotated through, so that caches do not flatter it.

    Args:
      repeats: most calls that count in a turn; fewer, but at least 3, where they take long.
      first: seconds of preheating before the first turn of all.
      preheating: seconds of it before all others, when the card is hot from another variant.
    """
    turns = _warm(calls)
    seconds = {name: _host_seconds(turn) for name, turn in turns.items()}

    def windows():
        heating = first
        for number in range(rounds):
            for name in _order(turns, number):
                preheat(turns[name], heating, seconds[name])
                heating = preheating
                count = min(repeats, max(3, round(WINDOW_SECONDS / seconds[name])))
                yield name, turns[name], count

    return _profiled(windows(), LEAD)


def cool(
    calls: Mapping[Hashable, Sequence[Call]],
    *,
    rounds: int = 5,
    burst: float = BURST_SECONDS,
    pause: float = PAUSE_SECONDS,
) -> dict[Hashable, Time]:
    """Median time of each variant in short bursts, each after a pause; variants take turns."""
    turns = _warm(calls)
    seconds = {name: _host_seconds(turn) for name, turn in turns.items()}

    def windows():
        for number in range(rounds):
            for name in _order(turns, number):
                time.sleep(pause)
                yield name, turns[name], min(200, max(1, round(burst / seconds[name])))

    return _profiled(windows(), 1)


def device_microseconds(call: Call, repeats: int) -> tuple[float, list[str]]:
    """Mean busy time of the device per call over `repeats` calls, and the names of its kernels."""
    jax.block_until_ready(call())
    found = _profiled([("call", call, repeats)], 0)["call"]
    return found.microseconds, list(found.kernels)


def preheat(call: Call, seconds: float = PREHEAT_SECONDS, seconds_per_call: float = 0.002) -> None:
    """Runs `call` until the card has settled at its sustained clock."""
    stop = time.perf_counter() + seconds
    batch = max(1, min(64, round(0.01 / seconds_per_call)))
    while time.perf_counter() < stop:
        _run(call, batch)


def mean_time(
    kernels: Sequence[Kernel], begin: float, end: float, calls: int, lead: int = 0
) -> Time:
    """The mean time of a call, from the kernels of a profile.

    Args:
      kernels: all of the profile, in any order.
      begin: when the first call was made, in the clock of the kernels.
      end: when the last call was done.
      calls: how many were made, the first `lead` of which do not count.

    Raises:
      RuntimeError: there is not the same number of kernels for each call, so that the profile has
        lost some or belongs to something else.
    """
    inside = sorted(
        (kernel for kernel in kernels if begin <= kernel.start + kernel.duration / 2 <= end),
        key=lambda kernel: kernel.start,
    )
    each, rest = divmod(len(inside), calls)
    if not each or rest:
        names = sorted({kernel.name for kernel in inside})
        raise RuntimeError(f"the profile has {len(inside)} kernels for {calls} calls: {names}")
    counted = inside[lead * each :]
    total = sum(kernel.duration for kernel in counted)
    names = tuple(sorted({kernel.name for kernel in counted}))
    return Time(total / (calls - lead) / 1e3, names)


def _profiled(windows: Iterable[tuple[Hashable, Call, int]], lead: int) -> dict[Hashable, Time]:
    """Median time by name of windows (name, call, repeats), each with `lead` calls ahead.

    All in one trace: the card would cool down while a profiler starts, stops and is read.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 1
    options.python_tracer_level = 0
    options.enable_hlo_proto = False
    made = []
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for name, call, repeats in windows:
                with jax.profiler.TraceAnnotation(f"{_WINDOW}{len(made)}"):
                    time.sleep(APART_SECONDS)
                    _run(call, lead + repeats)
                    time.sleep(APART_SECONDS)
                made.append((name, lead + repeats))
        finally:
            jax.profiler.stop_trace()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
        kernels, bounds = list(_kernels(profile)), _bounds(profile)
    times: dict[Hashable, list[Time]] = {}
    for number, (name, calls) in enumerate(made):
        times.setdefault(name, []).append(mean_time(kernels, *bounds[number], calls, lead))
    return {name: _median(found) for name, found in times.items()}


_WINDOW = "window-of-device-time-"


def _bounds(profile) -> dict[int, tuple[float, float]]:
    """Begin and end of each window by its number, in nanoseconds."""
    return {
        int(event.name.removeprefix(_WINDOW)): (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name.startswith(_WINDOW)
    }


def _kernels(profile) -> Iterator[Kernel]:
    for plane in profile.planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield Kernel(event.name, event.start_ns, event.duration_ns)


def _warm(calls: Mapping[Hashable, Sequence[Call]]) -> dict[Hashable, Call]:
    for variants in calls.values():
        jax.block_until_ready(variants[0]())
    return {name: _rotate(variants) for name, variants in calls.items()}


def _order(turns: Mapping[Hashable, Call], number: int) -> list[Hashable]:
    return list(turns) if number % 2 == 0 else list(turns)[::-1]


def _run(call: Call, count: int) -> None:
    """So many calls, the last one waited for; earlier results are dropped at once."""
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())


def _host_seconds(call: Call) -> float:
    """About how long a call takes, launch included."""
    start = time.perf_counter()
    _run(call, 3)
    return max(1e-6, (time.perf_counter() - start) / 3)


def _median(times: Sequence[Time]) -> Time:
    kernels = sorted({name for found in times for name in found.kernels})
    return Time(statistics.median(found.microseconds for found in times), tuple(kernels))


def _rotate(variants: Sequence[Call]) -> Call:
    count = -1

    def call():
        nonlocal count
        count += 1
        return variants[count % len(variants)]()

    return call
