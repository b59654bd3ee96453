"""What a `SparseDense` and a call of it must be, in errors that name the layer."""

from typing import Any

from pallas_kernels.epilogue import check_activation
from pallas_kernels.sections import check_sizes
from slope_jax.matmul import Activated
from slope_jax.normed import Stream
from slope_jax.operands import check_backward
from slope_jax.prompts import is_integer

MASK_INITS = ("magnitude", "random")


def name_of(layer) -> str:
    """Its path, or the name of its class where it is the model."""
    return "/".join(layer.path) or type(layer).__name__


def check_layer(layer, inputs) -> None:
    """Raises a ValueError unless the layer's attributes fit each other and the inputs (..., in)."""
    where = name_of(layer)
    rank = layer.adapter_rank
    if not is_integer(rank):
        raise ValueError(
            f"{where}: adapter_rank {rank!r} must be an integer; fractions of the hidden size are"
            " for models"
        )
    if layer.sections is not None:
        check_sizes(layer.sections, layer.features, where)
    if rank < 0 or rank > min(inputs.shape[-1], layer.features):
        raise ValueError(
            f"{where}: adapter_rank {rank} must lie between 0 and"
            f" {min(inputs.shape[-1], layer.features)}, the smaller side of the layer"
            f" ({inputs.shape[-1]}, {layer.features})"
        )
    if not callable(layer.mask_init) and layer.mask_init not in MASK_INITS:
        raise ValueError(
            f"{where}: mask_init {layer.mask_init!r} must be one of {MASK_INITS} or a function"
        )
    check_activation(layer.activation)
    check_backward(layer.backward)
    if layer.pattern is None:
        return
    layer.pattern.check_divides(inputs.shape[-1], f"{where}: input axis")
    layer.pattern.check_divides(layer.features, f"{where}: output axis")
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        raise ValueError(
            f"{where}: dot_general does not apply to a compressed kernel; use sparsity=None"
        )


def check_call(
    layer, inputs, residual: Any, activated: bool, apart: bool, gate: str | None
) -> None:
    """Raises a ValueError if what is given to a call excludes each other, or the layer cannot do it."""
    _check_handing_on(layer, inputs, residual, activated)
    if gate is not None:
        _check_gate(layer, gate, residual, activated or apart)
    elif apart and (layer.sections is None or layer.activation is not None or residual is not None):
        raise ValueError(
            f"{name_of(layer)}: apart=True needs sections={layer.sections}, and neither an activation"
            " nor a residual"
        )


def _check_handing_on(layer, inputs, residual: Any, activated: bool) -> None:
    where = name_of(layer)
    if activated and layer.activation is None:
        raise ValueError(f"{where}: activated=True needs an activation to hand on")
    if activated and residual is not None:
        raise ValueError(f"{where}: activated=True hands on no sum; add the residual later")
    if not isinstance(inputs, Activated):
        return
    if not layer.joins:
        raise ValueError(
            f"{where}: what an activation hands on needs a layer whose `joins` is true, one that"
            " is sparse and not cut by a mesh; call up(x, activated=down.joins)"
        )
    if isinstance(residual, Stream):
        raise ValueError(
            f"{where}: a stream is added without gradients, which what an activation hands on is"
            " for; call up(x), or give the residual as an array"
        )


def _check_gate(layer, gate: str, residual: Any, other: bool) -> None:
    check_activation(gate, f"{name_of(layer)}: gate is")
    if not layer.joins:
        raise ValueError(
            f"{name_of(layer)}: gate={gate!r} needs a layer whose `joins` is true, one that is sparse"
            " and not cut by a mesh; make the gate of what it returns"
        )
    if layer.sections is not None and len(set(layer.sections)) + len(layer.sections) != 3:
        raise ValueError(
            f"{name_of(layer)}: gate={gate!r} needs sections that are two halves, not {layer.sections}"
        )
    if layer.activation is not None or residual is not None or other:
        raise ValueError(
            f"{name_of(layer)}: gate={gate!r} goes with no activation={layer.activation!r}, residual,"
            " activated=True or apart=True"
        )
