"""What the Triton kernel can run, in words: the predicate of the dispatcher and of the tests."""

import importlib.util
import math

from pallas_kernels.device import current
from pallas_kernels.pattern import Pattern

OLDEST_CAPABILITY = (8, 0)
DTYPES = ("bfloat16", "float16")
FEW_TOKENS = 64
LARGE = 2**23  # entries; below, launches and sums take as long as reading the weight


def device_obstacle() -> str | None:
    """Why this machine cannot run the kernel, or None."""
    device = current()
    capability = _capability(device)
    if capability is None:
        return (
            "the Triton kernel needs an NVIDIA GPU of compute capability 8.0 or later, and this is"
            f" {device.device_kind}"
        )
    if capability < OLDEST_CAPABILITY:
        return (
            "the Triton kernel needs compute capability 8.0 (Ampere) or later, and"
            f" {device.device_kind} has {device.compute_capability}"
        )
    return package_obstacle()


def package_obstacle() -> str | None:
    """Which package is missing, or None. Imports nothing."""
    missing = [name for name in ("jax_triton", "triton") if not importlib.util.find_spec(name)]
    if missing:
        return (
            f"the Triton kernel needs the extra 'triton' ({' and '.join(missing)} missing): pip"
            " install 'slope-jax[triton]'"
        )
    return None


def problem_obstacle(op: str, shape: tuple[int, int], pattern: Pattern, dtype: str) -> str | None:
    """Why the kernel cannot take this product, or None."""
    if op != "nm_matmul":
        return f"there is no Triton kernel for {op}"
    if dtype not in DTYPES:
        return f"the Triton kernel computes in {' or '.join(DTYPES)}, not {dtype}"
    if pattern != Pattern(2, 4):
        return f"the Triton kernel takes 2:4, not {pattern}"
    if any(size % 8 or size == 0 for size in shape):
        return f"the Triton kernel needs sizes that are multiples of 8, not {shape}"
    return None


def reason_to_choose(op: str, shape: tuple[int, int], tokens: int | None) -> str | None:
    """Why the kernel is the best choice on this device, provided that it can run; or None."""
    device = current()
    capability = _capability(device)
    if capability is None or capability[0] != 8:  # asked first: tokens may be a symbol elsewhere
        return None
    if op != "nm_matmul" or tokens is None or tokens > FEW_TOKENS or math.prod(shape) < LARGE:
        return None
    return (
        f"up to {FEW_TOKENS} tokens take as long as reading the weight, and compressed it has 9/16"
        f" of the bytes (an estimate: not measured on {device.device_kind})"
    )


def _capability(device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU, None for anything else."""
    version = str(getattr(device, "compute_capability", "")).split(".")
    if device.platform != "gpu" or len(version) != 2 or not all(map(str.isdecimal, version)):
        return None
    return int(version[0]), int(version[1])
