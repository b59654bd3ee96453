"""What the tests of Hopper's kernels share: where they run, and their programs without a GPU."""

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
