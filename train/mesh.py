"""The devices of a run: `--mesh`, and which part of every batch each process gives."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from slope_jax.sharding import (
    AXES,
    BATCH,
    TENSOR,
    batch_spec,
    current_mesh,
    model_problems,
    refuse,
    size_of,
)
from train.config import Config


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis of a mesh written as "data:2,fsdp:4,tensor:2"; axes left out have size 1.

    >>> parse_mesh("fsdp:4")
    {'data': 1, 'fsdp': 4, 'tensor': 1}

    Raises:
      ValueError: it cannot be read; says how a mesh is written.
    """
    form = f"write sizes by axis, such as data:2,fsdp:4,tensor:1 (axes: {', '.join(AXES)})"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition(":")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: {part!r} is no axis and size; {form}")
        if axis in sizes:
            raise ValueError(f"mesh {text!r} names {axis} twice; {form}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(config: Config) -> Mesh | None:
    """The mesh of a run; None is one device.

    Raises:
      ValueError: there are not as many devices as the mesh has, or processes without a mesh.
    """
    count, found = jax.process_count(), jax.device_count()
    if not config.mesh:
        if count > 1:
            raise ValueError(
                f"{count} processes with {found} devices need a mesh: --mesh=fsdp:{found}, or"
                f" another of {found} devices"
            )
        return None
    sizes = parse_mesh(config.mesh)
    needed = math.prod(sizes.values())
    if needed > found or (count > 1 and needed != found):
        raise ValueError(
            f"--mesh={config.mesh} has {needed} devices, but there are {found}"
            f" ({count} process(es)); make their product {found}{_few_seen(count)}"
        )
    devices = jax.devices()[:needed]
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _few_seen(processes: int) -> str:
    """Under SLURM and Open MPI JAX gives a process one device, however many the host has."""
    if jax.default_backend() == "cpu" or processes == 1 or jax.local_device_count() > 1:
        return ""
    return ", or, if a host has more than one device, start a process for each of them"


@contextlib.contextmanager
def set_mesh(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """`jax.set_mesh` while the context lasts; of shapes alone if it is abstract; None sets none."""
    if mesh is None:
        yield
    elif isinstance(mesh, AbstractMesh):
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    else:
        with jax.set_mesh(mesh):
            yield


def abstract_mesh(config: Config) -> AbstractMesh | None:
    """The mesh of a run without its devices, to plan with."""
    if not config.mesh:
        return None
    sizes = tuple(parse_mesh(config.mesh).values())
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(config: Config, model: Any, simulated: bool) -> None:
    """Refuse a mesh that cannot share the model or the batches; computes nothing.

    Args:
      model: the configuration of the model, with its adapters.
      simulated: whether the method's products are dense ones of masked kernels.

    Raises:
      ValueError: names the size, the rule and the remedy.
    """
    if not config.mesh:
        return
    sizes = parse_mesh(config.mesh)
    problems = model_problems(model, sizes)
    if simulated and sizes[TENSOR] > 1:
        problems.append(
            f"--method={config.method} multiplies densely and cannot be cut by tensor:"
            f"{sizes[TENSOR]}; use data and fsdp"
        )
    share = math.prod(sizes[axis] for axis in BATCH)
    for phase in config.phases:
        micro = phase.batch_size // phase.accumulation
        if micro % share:
            problems.append(
                f"micro-batches of {micro} sequences (batch_size {phase.batch_size} / accumulation"
                f" {phase.accumulation}) cannot be shared by data:{sizes['data']} x fsdp:"
                f"{sizes['fsdp']} = {share} devices; make batch_size a multiple of"
                f" {share * phase.accumulation}, or cut by tensor"
            )
    refuse(sizes, problems, "this run")


class Share(NamedTuple):
    """This process loads part `index` of `count` equal parts of every batch."""

    index: int
    count: int


ALONE = Share(0, 1)


def share_of(mesh: Mesh | None) -> Share:
    """Processes whose devices hold the same rows of a batch (cut by tensor) load the same part.

    Raises:
      ValueError: the rows of this process are not one equal part.
    """
    if mesh is None:
        return ALONE
    total = size_of(mesh, BATCH)
    places = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((total,))
    rows = {rows.indices(total)[0] for (rows,) in places.values()}
    first, own = min(rows), len(rows)
    if rows != set(range(first, first + own)) or total % own or first % own:
        raise ValueError(
            f"process {jax.process_index()} holds rows {sorted(rows)} of {total}, which are not one"
            " equal part of a batch; put processes along data or fsdp, and tensor inside of them"
        )
    return Share(first // own, total // own)


def place(batch: Mapping[str, np.ndarray], share: Share) -> Mapping[str, Any]:
    """The batch that this process loaded its share of, on the mesh that is set; as is without."""
    mesh = current_mesh()
    if mesh is None:
        return batch
    return {
        name: jax.make_array_from_process_local_data(
            NamedSharding(mesh, batch_spec(x.ndim)), x, (len(x) * share.count, *x.shape[1:])
        )
        for name, x in batch.items()
    }
