"""How the kernels of this package are made, so that those which are alike are compiled once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir

DUMP_NAME = "mosaic_gpu.dump_basename"


def once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function that makes a kernel: calls that are alike trace and lower it once.

    Args:
      static: names of its arguments that are no arrays.
    """
    return functools.partial(jax.jit, static_argnames=static)


def kernel(body: Callable[..., None], *, name: str, **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, whose program does not tell how many others this process has made.

    JAX writes a name for dumps into a kernel's program, with a number that counts on. The GPU's
    compiler knows programs by all their bytes: a kernel of every layer, and of every step that is
    compiled, would be a new one.
    """

    @plgpu.inline_mgpu()
    def set_name(context):
        context.module.operation.attributes[DUMP_NAME] = ir.StringAttr.get(name)

    def named(*refs, **scratch):
        set_name()
        body(*refs, **scratch)

    return plgpu.kernel(named, kernel_name=name, **options)
