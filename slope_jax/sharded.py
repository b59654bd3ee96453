"""Linear layers on a mesh: the same functions, piece by piece under `shard_map`.

But for one thing: the double pruning for dx, unless working copies have it, selects among what was gathered,
which is cast to x's dtype already. In 16 bits, where such values tie, dx can differ from one device's.

Arguments and results are global arrays; inside, every device sees plain local matrices, so that the
sparse kernels run as on one device and are chosen by local shapes. A linear

    gathers its kernel over `fsdp`: compressed values in the compute dtype, and metadata,
    multiplies (for dx by the double-pruned transpose of what it gathered; where working copies are
    held, of its own piece, then gathered),
    adds up over `tensor` what its cut leaves in parts,
    scatters its gradient, compressed and in float32, back over `fsdp`, and adds it up over `data`.

Each collective is written out: automatic differentiation of a `shard_map` would add some.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels import CompressedMatrix, nm_transpose
from pallas_kernels.epilogue import ACTIVATIONS
from pallas_kernels.epilogue import apart as apart_of
from slope_jax import matmul, pieces
from slope_jax.matmul import NOTHING, Options, Working, for_transposes
from slope_jax.operands import DOUBLE_PRUNED, EXACT, as_array, check_operands, check_sections
from slope_jax.sharding import (
    BATCH,
    DATA,
    FSDP,
    TENSOR,
    Axes,
    Cut,
    active_mesh,
    batch_spec,
    cut_problems,
    size_of,
)

P = PartitionSpec


class Place(NamedTuple):
    """Where a linear stands: its cut, the projections in its output, and the mesh's sizes."""

    cut: Cut
    sections: tuple[int, ...]
    fsdp: int
    tensor: int

    @property
    def splits_outputs(self) -> bool:
        return self.tensor > 1 and self.cut.parallel == "outputs"

    @property
    def splits_inputs(self) -> bool:
        return self.tensor > 1 and self.cut.parallel == "inputs"


def sharded_matmul(
    x: jax.Array,
    w: CompressedMatrix | jax.Array,
    cut: Cut,
    *,
    sections: tuple[int, ...] | None = None,
    apart: bool = False,
    working: Working | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
    backward: str = DOUBLE_PRUNED,
) -> jax.Array | tuple[jax.Array, ...]:
    """`slope_matmul` on the mesh that is set, or the dense product with a dense `w`.

    Args:
      x: (B, ..., in); B is a multiple of the devices along `data` and `fsdp`.
      w: (in, out), compressed or dense, stored as `cut` says.
      sections: columns of each projection in the output; None is one. Where `tensor` cuts them, the
        result has the columns of the first device's share of every projection, then of the second's:
        `split_sections` takes them apart.
      apart: return a tuple of the sections, of a product without an activation: written apart by a
        kernel, where `tensor` does not cut them.
      The others: as of `slope_matmul`.

    Raises:
      ValueError: no mesh is set, or it does not divide the batch or the kernel, or x has no batch.
    """
    mesh = active_mesh()
    if mesh is None:
        raise ValueError("no mesh with the axes data, fsdp and tensor is set; see jax.set_mesh")
    x = as_array(x, "x")
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {x.shape}; on a mesh it must be (batch, ..., in), for its devices share the"
            " batch: pass x[None]"
        )
    check_batch(x.shape[0], size_of(mesh, BATCH))
    sections = (w.shape[1],) if sections is None else tuple(sections)
    place = Place(cut, sections, mesh.shape[FSDP], mesh.shape[TENSOR])
    working = Working() if working is None else working
    check_operands(x, w, working, adapter, backward)
    check_sections(sections if apart else None, activation, None)
    if problems := cut_problems("a linear", w.shape, getattr(w, "pattern", None), cut, mesh.shape):
        raise ValueError("; ".join(problems) + ": use fewer devices along these axes")
    options = Options(precision, implementation, w.dtype, backward)
    if apart and isinstance(w, CompressedMatrix) and place.tensor == 1:
        options = options._replace(sections=sections)
    y = _sharded(x, w, working, bias, adapter, activation, options, place)
    return tuple(split_sections(y, sections)) if apart and options.sections is None else y


def check_batch(rows: int, devices: int) -> None:
    """Raises a ValueError unless the devices can share the rows of a batch."""
    if rows % devices:
        raise ValueError(
            f"a batch of {rows} sequences cannot be shared by the {devices} devices along data and"
            f" fsdp; make it a multiple of {devices}"
        )


def split_sections(y: jax.Array, sections: tuple[int, ...]) -> list[jax.Array]:
    """The projections (..., section) in the output of a linear that has several."""
    mesh = active_mesh()
    if mesh is None or mesh.shape[TENSOR] == 1:
        return list(apart_of(y, sections))
    count = mesh.shape[TENSOR]
    shares = y.reshape(*y.shape[:-1], count, y.shape[-1] // count)
    parts = apart_of(shares, tuple(size // count for size in sections))
    return [part.reshape(*y.shape[:-1], -1) for part in parts]


def transposed(w: CompressedMatrix, cut: Cut, dtype, implementation: str | None):
    """`nm_transpose` of a kernel or a stack of them, each device of its own piece."""
    lead = [None] * (w.values.ndim - 2)
    inputs, outputs = cut.inputs or None, cut.outputs or None

    def local(values, metadata):
        piece = _local_matrix(values, metadata, w.pattern)
        result = pieces.transposes(piece, dtype, implementation)
        return result.values, result.metadata

    specs = (P(*lead, inputs, outputs),) * 2
    values, metadata = mapped(local, specs, (P(*lead, outputs, inputs),) * 2)(w.values, w.metadata)
    return CompressedMatrix(values, metadata, w.pattern, 0, w.shape[::-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _sharded(x, w, working, bias, adapter, activation, options, place):
    return _run_forward(x, w, working, bias, adapter, activation, options, place, NOTHING)[0]


def _forward(x, w, working, bias, adapter, activation, options, place):
    saved = matmul.saved_with(activation)
    y, z, t = _run_forward(x, w, working, bias, adapter, activation, options, place, saved)
    if isinstance(w, CompressedMatrix) and None not in working:
        w = w.with_values(working.values)
    residuals = (x, w, working, bias, adapter, y if activation == "relu" else z, t)
    return y, residuals


def _run_forward(x, w, working, bias, adapter, activation, options, place, saved):
    values = _values(w) if working.values is None else working.values
    metadata = w.metadata if isinstance(w, CompressedMatrix) else None
    arguments = (x, values, metadata, bias, adapter)

    def local(x, values, metadata, bias, adapter):
        weight = _gathered_weight(values.astype(x.dtype), metadata, w, place)
        adapter = _gathered_adapter(adapter, x.dtype, place)
        bias = _own_columns(bias, place)
        if not place.splits_inputs:
            return pieces.product(x, weight, bias, adapter, activation, options, saved)
        # The devices' parts of the sum come first; what is not linear follows.
        linear = saved._replace(preactivation=False)
        y, _, t = pieces.product(x, weight, None, adapter, None, options, linear)
        z = summed(y, TENSOR)
        t = None if t is None else summed(t, TENSOR)
        if bias is not None:
            z = z + bias.astype(z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
        y = z if activation is None else ACTIVATIONS[activation](z)
        return y, z if saved.preactivation else None, t

    specs = (
        _x_spec(x, place),
        *_weight_specs(place, metadata),
        P(),
        _adapter_specs(place, adapter),
    )
    y_spec = _y_spec(x, place)
    return mapped(local, specs, (y_spec, y_spec, batch_spec(x.ndim)))(*arguments)


def _backward(activation, options, place, residuals, dy):
    x, w, working, bias, adapter, z, t = residuals
    is_sparse = isinstance(w, CompressedMatrix)
    metadata = w.metadata if is_sparse else None
    transpose = working.transpose
    values = _values(w) if working.values is None or is_sparse else working.values
    arguments = (x, dy, z, t, values, metadata, transpose, bias, adapter)

    def local(x, dy, z, t, values, metadata, transpose, bias, adapter):
        other = None
        if transpose is None:
            weight = _gathered_weight(values.astype(x.dtype), metadata, w, place)
            if is_sparse and options.backward != EXACT:
                other = nm_transpose(weight, implementation=for_transposes(options.implementation))
        else:
            other = _gathered_transpose(transpose, w, place)
            weight = _positions(metadata, w, place)
        adapter_here = _gathered_adapter(adapter, x.dtype, place)
        if adapter is not None:  # whose gradients have the dtype of these, until they are summed
            kinds = [a.dtype for a in adapter]
            adapter_here = tuple(a.astype(k) for a, k in zip(adapter_here, kinds, strict=True))
        bias_here = _own_columns(bias, place)
        saved = (x, weight, other, bias_here, adapter_here, z, t)
        dx, dw, dbias, dadapter = pieces.gradients(activation, options, saved, dy)
        if place.splits_outputs:
            dx = summed(dx, TENSOR)
        dw = _scattered(dw, place)
        if dbias is not None:
            dbias = summed(_all_columns(dbias, place), BATCH).astype(bias.dtype)
        if dadapter is not None:
            dadapter = _scattered_adapter(dadapter, adapter, place)
        return dx, dw, dbias, dadapter

    y_spec = _y_spec(x, place)
    values_spec, metadata_spec = _weight_specs(place, metadata)
    turned = P(*reversed((*values_spec, *[None] * (2 - len(values_spec)))))
    adapters = _adapter_specs(place, adapter)
    t_spec = batch_spec(x.ndim)
    specs = (_x_spec(x, place), y_spec, y_spec, t_spec, values_spec, metadata_spec, turned)
    outputs = (_x_spec(x, place), values_spec, P(), adapters)
    dx, dw, dbias, dadapter = mapped(local, (*specs, P(), adapters), outputs)(*arguments)
    if is_sparse:
        no_gradient = np.zeros(w.metadata.shape, jax.dtypes.float0)
        dw = CompressedMatrix(dw, no_gradient, w.pattern, w.axis, w.shape)
    return dx, dw, None, dbias, dadapter


_sharded.defvjp(_forward, _backward, optimize_remat=True)


def summed(x, axes):
    """`jax.lax.psum`, but nothing at all over a single device."""
    axes = (axes,) if isinstance(axes, str) else axes
    axes = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
    return lax.psum(x, axes) if axes else x


def mapped(function, in_specs, out_specs):
    """`function` on every device's pieces; collectives are all its own."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# Where arguments lie


def _x_spec(x, place: Place) -> P:
    return P(*batch_spec(x.ndim)[:-1], TENSOR if place.cut.parallel == "inputs" else None)


def _y_spec(x, place: Place) -> P:
    return P(*batch_spec(x.ndim)[:-1], TENSOR if place.cut.parallel == "outputs" else None)


def _weight_specs(place: Place, metadata) -> tuple[P, P]:
    spec = P(place.cut.inputs or None, place.cut.outputs or None)
    return spec, spec


def _adapter_specs(place: Place, adapter) -> tuple[P, P] | None:
    if adapter is None:
        return None
    inputs: Axes = (TENSOR, FSDP) if place.cut.parallel == "inputs" else (FSDP,)
    return P(inputs, None), P(None, FSDP)


# Weights: local pieces to local operands, and gradients the way back


def _values(w):
    return w.values if isinstance(w, CompressedMatrix) else w


def _local_matrix(values, metadata, pattern) -> CompressedMatrix:
    shape = (values.shape[-2] // pattern.n * pattern.m, values.shape[-1])
    return CompressedMatrix(values, metadata, pattern, 0, shape)


def _gathered_weight(values, metadata, like, place: Place):
    values = _gathered(values, place)
    if metadata is None:
        return values
    return _local_matrix(values, _gathered(metadata, place), like.pattern)


def _positions(metadata, like: CompressedMatrix, place: Place) -> CompressedMatrix:
    """The gathered matrix with its positions alone: nobody reads its values."""
    metadata = _gathered(metadata, place)
    rows = like.values.shape[0] // (place.tensor if place.splits_inputs else 1)
    values = jnp.zeros((rows, metadata.shape[1]), like.dtype)
    return _local_matrix(values, metadata, like.pattern)


def _gathered_transpose(transpose, like, place: Place):
    values = _gathered(transpose.values, place, turned=True)
    return _local_matrix(values, _gathered(transpose.metadata, place, turned=True), like.pattern)


def _gathered(piece: jax.Array, place: Place, *, turned: bool = False) -> jax.Array:
    inputs, outputs = (1, 0) if turned else (0, 1)
    if place.cut.exchanged and place.tensor > 1:
        piece = _regrouped(piece, outputs, place)
        piece = lax.all_to_all(piece, TENSOR, outputs, inputs, tiled=True)
    if place.fsdp > 1:
        axis = outputs if place.cut.gathered else inputs
        piece = lax.all_gather(piece, FSDP, axis=axis, tiled=True)
    return piece


def _scattered(gradient: jax.Array, place: Place) -> jax.Array:
    if place.fsdp > 1:
        axis = place.cut.gathered
        gradient = lax.psum_scatter(gradient, FSDP, scatter_dimension=axis, tiled=True)
    if place.cut.exchanged and place.tensor > 1:
        gradient = lax.all_to_all(gradient, TENSOR, 0, 1, tiled=True)
        gradient = _regrouped(gradient, 1, place, back=True)
    return summed(gradient, DATA)


def _regrouped(x: jax.Array, axis: int, place: Place, *, back: bool = False) -> jax.Array:
    """Columns from projection by projection to device by device, or `back`."""
    if len(place.sections) == 1:
        return x
    total, length = sum(place.sections), x.shape[axis]
    sizes = [length * section // total for section in place.sections]  # packed axes are shorter
    if back:
        shares = _reshaped(x, axis, (place.tensor, length // place.tensor))
        bounds = np.cumsum([size // place.tensor for size in sizes])[:-1].tolist()
        parts = jnp.split(shares, bounds, axis=axis + 1)
        parts = [p.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]) for p in parts]
        return jnp.concatenate(parts, axis)
    parts = jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=axis)
    parts = [_reshaped(p, axis, (place.tensor, p.shape[axis] // place.tensor)) for p in parts]
    return jnp.concatenate(parts, axis + 1).reshape(x.shape)


def _reshaped(x: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    return x.reshape(*x.shape[:axis], *shape, *x.shape[axis + 1 :])


# Biases and adapters, which are small: whole on every device of `tensor` where columns are cut


def _own_columns(x: jax.Array | None, place: Place) -> jax.Array | None:
    if x is None or not place.splits_outputs:
        return x
    axis = x.ndim - 1
    size = x.shape[axis] // place.tensor
    start = lax.axis_index(TENSOR) * size
    return lax.dynamic_slice_in_dim(_regrouped(x, axis, place), start, size, axis)


def _all_columns(x: jax.Array, place: Place) -> jax.Array:
    if not place.splits_outputs:
        return x
    axis = x.ndim - 1
    return _regrouped(lax.all_gather(x, TENSOR, axis=axis, tiled=True), axis, place, back=True)


def _gathered_adapter(adapter, dtype, place: Place):
    if adapter is None:
        return None
    left, right = (a.astype(dtype) for a in adapter)
    if place.fsdp > 1:
        left = lax.all_gather(left, FSDP, axis=0, tiled=True)
        right = lax.all_gather(right, FSDP, axis=1, tiled=True)
    return left, _own_columns(right, place)


def _scattered_adapter(gradients, adapter, place: Place):
    left, right = gradients
    if place.splits_outputs:
        left, right = summed(left, TENSOR), _all_columns(right, place)
    if place.fsdp > 1:
        left = lax.psum_scatter(left, FSDP, scatter_dimension=0, tiled=True)
        right = lax.psum_scatter(right, FSDP, scatter_dimension=1, tiled=True)
    left, right = summed((left, right), DATA)
    return left.astype(adapter[0].dtype), right.astype(adapter[1].dtype)
