"""What the tests of Hopper's kernels share: where they run, and their programs without a GPU."""

import re

import jax
import pytest

from pallas_kernels.mosaic import support

_obstacle = support.device_obstacle()
_version = support.version_obstacle()
needs_jax = pytest.mark.skipif(_version is not None, reason=str(_version))


def needs_gpu(test):
    """A test of what runs on the GPU, by the dispatcher's own predicate."""
    return pytest.mark.gpu(pytest.mark.skipif(_obstacle is not None, reason=str(_obstacle))(test))


def lowered(function, *args) -> str:
    """The program for CUDA, traced and lowered on any machine."""
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def fenced(text: str) -> bool:
    """Whether all that each kernel of a program takes and gives passes a barrier, but for its own flags.

    Without, XLA may make one operation of a kernel and slices of stacks, in which nothing is in place.
    Flags begin as zeros, and nobody else has them.
    """
    zeros = set(re.findall(r"(%\w+) = stablehlo.broadcast_in_dim %c\w*, .*xi32>$", text, re.M))
    fences = {
        name: re.findall(r"%[\w#]+", taken)
        for name, taken in re.findall(
            r"(%\w+)(?::\d+)? = stablehlo.optimization_barrier (.*) :", text
        )
    }
    kernels = re.findall(r"(%\w+)(?::(\d+))? = stablehlo.custom_call @mosaic_gpu\w*\((.*?)\)", text)
    assert kernels
    for kernel, count, taken in kernels:
        results = [f"{kernel}#{i}" for i in range(int(count))] if count else [kernel]
        results = [name for name in results if re.search(rf"{name}\b(?!:| =)", text)]
        operands = {name.partition("#")[0] for name in taken.split(", ")}
        if not operands <= zeros | fences.keys() or results not in fences.values():
            return False
    return True
