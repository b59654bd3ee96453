"""How long this process makes programs: traces, lowers and compiles them."""

import threading
from typing import NamedTuple

import jax.monitoring

STAGES = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
COMPILED = STAGES[-1]


class Spent(NamedTuple):
    """Programs compiled, and seconds of all stages."""

    programs: int
    seconds: float

    def since(self, earlier: "Spent") -> "Spent":
        """What was spent after `earlier`.

        >>> Spent(5, 9.0).since(Spent(2, 4.0))
        Spent(programs=3, seconds=5.0)
        """
        return Spent(self.programs - earlier.programs, self.seconds - earlier.seconds)


_lock = threading.Lock()
_spent = Spent(0, 0.0)


def spent() -> Spent:
    """So far, since this module was imported."""
    return _spent


def _listen(event: str, seconds: float, **_) -> None:
    global _spent
    name = event.rsplit("/", 1)[-1]
    if name in STAGES:
        with _lock:
            _spent = Spent(_spent.programs + (name == COMPILED), _spent.seconds + seconds)


jax.monitoring.register_event_duration_secs_listener(_listen)
