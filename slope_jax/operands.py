"""What `slope_matmul` and its sharded form are given: checks, and the names of the ways back."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import CompressedMatrix
from pallas_kernels.compressed import check_array, check_compressed, check_dtype, check_pair
from pallas_kernels.epilogue import check_gated

if TYPE_CHECKING:
    from slope_jax.matmul import Working

DOUBLE_PRUNED, EXACT = "double-pruned", "exact"
BACKWARDS = (DOUBLE_PRUNED, EXACT)


def as_array(value, what: str) -> jax.Array:
    """An array of JAX's of one, so that NumPy's 64 bits are 32 where JAX's are.

    Raises:
      TypeError: it is none.
    """
    check_array(value, what)
    return jnp.asarray(value)


def check_operands(x, w, working: "Working", adapter, backward: str) -> None:
    """Raises an error unless the arguments of `slope_matmul` fit; w may be dense."""
    if isinstance(w, CompressedMatrix):
        check_dtype(x.dtype, "x")
        w.pattern.check_divides(w.shape[1], f"output axis of shape {w.shape}")
    _check_adapter(adapter, w.shape)
    _check_working(working, x, w)
    check_backward(backward)


def check_activated(activation: str, z, y) -> None:
    """Raises a ValueError unless z is what an `Activated` has beside y."""
    if (z is None) != (activation == "relu"):
        raise ValueError(
            f"an Activated of {activation!r} has {'no' if z is None else 'a'} z; relu's has none, and"
            " those of others have what entered the activation"
        )
    if z is None:
        return
    check_array(z, "the z of an Activated")
    if (z.shape, z.dtype) != (y.shape, y.dtype):
        raise ValueError(
            f"an Activated has z {z.dtype}{list(z.shape)}; it must be as y is,"
            f" {y.dtype}{list(y.shape)}"
        )


def check_terms(x, w, activation: str | None, residual, activated: bool) -> None:
    """Raises an error unless what is added or applied to y fits."""
    wanted = (*x.shape[:-1], w.shape[1])
    if residual is not None and (residual.shape, residual.dtype) != (wanted, x.dtype):
        raise ValueError(
            f"residual is {residual.dtype}{list(residual.shape)}; it must be {x.dtype}{list(wanted)}"
        )
    if activation is not None and residual is not None:
        raise ValueError(
            f"activation={activation!r} and a residual are both given; add the residual to y"
        )
    if activated and activation is None:
        raise ValueError("activated=True needs an activation: there is none to go back through")


def check_sections(sections, activation: str | None, residual) -> None:
    """Raises a ValueError if anything is asked of sections that is for y in one piece."""
    if sections is not None and (activation is not None or residual is not None):
        other = "a residual" if activation is None else f"activation={activation!r}"
        raise ValueError(f"sections and {other} are both given; sections are of a product alone")


def check_gate(gated: bool, out: int, residual, handed_on: bool, sections) -> None:
    """Raises a ValueError if a gate is asked of what has no halves, or something else of what it makes."""
    check_gated(gated, out)
    others = {
        "a residual": residual is not None,
        "activated=True": handed_on,
        "sections": sections is not None,
    }
    for name, given in others.items():
        if gated and given:
            raise ValueError(
                f"gated=True and {name} are both given; give {name} to a product without"
            )


def check_backward(backward: str) -> None:
    """Raises a ValueError unless `backward` is one of `BACKWARDS`."""
    if backward not in BACKWARDS:
        raise ValueError(f"backward={backward!r}; choose one of {', '.join(BACKWARDS)}")


def _check_adapter(adapter, shape: tuple[int, int]) -> None:
    if adapter is None:
        return
    check_pair(adapter, "adapter")
    left, right = adapter
    if left.ndim != 2 or right.shape != (left.shape[1], shape[1]) or left.shape[0] != shape[0]:
        raise ValueError(
            f"adapter has shapes {left.shape} and {right.shape}; for a weight {shape} they must be"
            f" ({shape[0]}, rank) and (rank, {shape[1]})"
        )


def _check_working(working: "Working", x: jax.Array, w: CompressedMatrix) -> None:
    if not isinstance(working, tuple) or len(working) != 2:
        raise TypeError(
            f"working is a {type(working).__name__}; it must be a Working, as slope_jax.working_copies"
            " makes them"
        )
    values, transpose = working
    shape = getattr(w, "values", w).shape
    if values is not None:
        check_array(values, "working.values")
        if (values.shape, values.dtype) != (shape, x.dtype):
            raise ValueError(
                f"working.values are {values.dtype}{list(values.shape)}; for this x and w they must be"
                f" {x.dtype}{list(shape)}, as slope_jax.working_copies makes them"
            )
    if transpose is None:
        return
    check_compressed(transpose, "working.transpose")
    found = (transpose.shape, transpose.pattern, transpose.axis, transpose.dtype)
    if found != (w.shape[::-1], w.pattern, 0, x.dtype):
        raise ValueError(
            f"working.transpose is {transpose.dtype}, {transpose.pattern}, {transpose.shape}; for"
            f" this x and w it must be nm_transpose(w, dtype={x.dtype}), of shape {w.shape[::-1]}"
        )
