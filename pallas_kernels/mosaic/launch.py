"""How the kernels of this package are made, and what JAX may do with them.

A kernel is a primitive of JAX (`kernel_p`). Pallas' own would do but for what it says where it cannot run:
of a device that is no NVIDIA GPU, of a derivative, and of `jax.shard_map`, which it needs check_vma=False in.
What is used of JAX beyond its public functions, here and in `pallas_kernels.varying`, was tried with 0.11.2 and
0.12.0, `varying` with 0.10.2 as well: rules of a primitive, `mlir.lower_fun`, and types of arrays in a mesh.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxlib.mlir import ir

from pallas_kernels.varying import alike

DUMP_NAME = "mosaic_gpu.dump_basename"


def once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function that makes a kernel: calls that are alike trace and lower it once.

    Args:
      static: names of its arguments that are no arrays.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, static_argnames=static)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            fixed = tuple((name, given.pop(name)) for name in sorted(given) if name in static)
            operands, tree = jax.tree.flatten(given)
            made = _Call(compiled, fixed, tree)
            _, shape = _shapes_of(made, operands)
            return jax.tree.unflatten(shape, kernel_p.bind(*alike(operands), call=made))

        return call

    return decorate


@dataclasses.dataclass(frozen=True, repr=False)
class _Call:
    """A function that makes a kernel, with what is fixed of its arguments."""

    function: Callable[..., Any]
    fixed: tuple[tuple[str, Any], ...]
    tree: Any

    def __call__(self, *operands):
        return self.function(**jax.tree.unflatten(self.tree, operands), **dict(self.fixed))

    @property
    def name(self) -> str:
        return self.function.__name__

    def __repr__(self) -> str:
        return self.name


kernel_p = Primitive("sparse_kernel")
kernel_p.multiple_results = True


@kernel_p.def_impl
def _run(*operands, call: _Call):
    with jax.disable_jit(False):  # a kernel has no operations to be run one by one
        return _compiled(call)(*operands)


@functools.cache
def _compiled(call: _Call):
    def run(*operands):
        return kernel_p.bind(*operands, call=call)

    run.__name__ = run.__qualname__ = call.name
    run._apply_primitive = True  # JAX, in search of a NaN, would take it apart without end
    return jax.jit(run)


def _shapes_of(call: _Call, operands):
    """Of a kernel's results, on one device, and their structure."""
    return _shapes(call, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))


@functools.cache
def _shapes(call: _Call, operands: tuple[jax.ShapeDtypeStruct, ...]):
    return jax.tree.flatten(jax.eval_shape(call, *operands))


@kernel_p.def_abstract_eval
def _results(*operands, call: _Call):
    for operand in operands:
        if any(part is not None for part in operand.sharding.spec):
            raise ValueError(
                f"{call.name}: an operand is sharded as {operand.sharding.spec}; a kernel runs on what one"
                " device has: call it in jax.shard_map, or use slope_jax.sharded_matmul"
            )
    first = operands[0]

    def result(shape):
        whole = first.sharding.update(spec=PartitionSpec(*(None,) * len(shape.shape)))
        return first.update(shape=shape.shape, dtype=shape.dtype, weak_type=False, sharding=whole)

    return [result(shape) for shape in _shapes_of(call, operands)[0]]


def _lower(ctx, *operands, call: _Call):
    count = getattr(ctx.module_context.axis_context, "num_devices", None) or 1
    if count > 1:
        warnings.warn(
            f"{call.name}: each of {count} devices will compute all of it, for nothing says how to cut it;"
            " call it in jax.shard_map, or use slope_jax.sharded_matmul",
            stacklevel=2,
        )

    def strip(avals):
        return [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in avals]

    own = ctx.replace(avals_in=strip(ctx.avals_in), avals_out=strip(ctx.avals_out))
    flat = mlir.lower_fun(lambda *arrays: jax.tree.leaves(call(*arrays)), multiple_results=True)
    return flat(own, *operands)


def _lower_elsewhere(ctx, *operands, call: _Call):
    platforms = ", ".join(ctx.module_context.platforms)
    raise ValueError(
        f"{call.name}: the kernel was chosen for the GPU that JAX computes on by default, and this program"
        f" is for {platforms}; pass implementation='xla', or set jax.default_device for what is not to run"
        " on the GPU"
    )


def _derivative(operands, tangents, *, call: _Call):
    raise NotImplementedError(
        f"{call.name} has no derivative of its own; slope_jax.slope_matmul and SparseDense have one, with the"
        " double-pruned backward pass, and implementation='xla' runs what JAX differentiates"
    )


def _one_by_one(operands, axes, *, call: _Call):
    moving = [
        jax.numpy.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
        if axis is not None
    ]

    def one(slices):
        slices = iter(slices)
        own = [x if axis is None else next(slices) for x, axis in zip(operands, axes, strict=True)]
        return kernel_p.bind(*own, call=call)

    results = jax.lax.map(one, moving)
    return results, [0] * len(results)


mlir.register_lowering(kernel_p, _lower_elsewhere)
mlir.register_lowering(kernel_p, _lower, platform="cuda")
ad.primitive_jvps[kernel_p] = _derivative
batching.primitive_batchers[kernel_p] = _one_by_one


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


def in_place(
    kernel: Callable[..., Any], operands: Mapping[str, jax.Array], *written: str
) -> tuple[Any, list[jax.Array]]:
    """What a kernel returns, and those of its operands that it writes, in place where nothing else needs them.

    In a scan, XLA makes one operation of a kernel, the slices of stacks that it takes and the updates of
    those that its results join, and forgets there that an operand and a result are one array: the kernel
    would write into what it takes, and the result would be anything.
    """
    arrays = jax.lax.optimization_barrier(list(operands.values()))
    operands = dict(zip(operands, arrays, strict=True))
    refs = {name: jax.new_ref(operands[name]) for name in written}
    results = kernel(*(operands | refs).values())
    return jax.lax.optimization_barrier((results, [jax.freeze(ref) for ref in refs.values()]))
