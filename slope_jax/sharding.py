"""How a model lies on a mesh of devices: one table of rules, for every array of a training state.

A mesh has the axes `data`, `fsdp` and `tensor` (size 1 where it is not used):

* a batch is cut along its first axis by `data` and `fsdp`;
* parameters and all that belongs to them (metadata, working copies, moments) are cut by `fsdp` and
  gathered where they are used, layer by layer;
* products are cut by `tensor`: columns of `qkv`, `up`, `gate_up`, heads and the token table, rows of
  `output` and `down`.

Compressed kernels are cut on borders of groups and of whole bytes of metadata, so that every piece is
a compressed matrix itself and nothing is ever decompressed to be moved.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Pattern

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
BATCH = (DATA, FSDP)

Axes = tuple[str, ...]


class Cut(NamedTuple):
    """How one matrix (in, out) is stored and multiplied on a mesh.

    Attributes:
      name: what it is called in messages.
      inputs, outputs: mesh axes that cut the stored matrix along each of its axes.
      parallel: the side of the product that `tensor` cuts: "inputs", "outputs" or "".
      exchanged: stored by rows, multiplied by columns: devices of `tensor` exchange pieces first.
        For kernels of several projections in a row, of which each device takes its share of each.
    """

    name: str
    inputs: Axes
    outputs: Axes
    parallel: str = ""
    exchanged: bool = False

    @property
    def gathered(self) -> int:
        """The axis of the matrix along which `fsdp` gathers: 0 inputs, 1 outputs."""
        return 1 if FSDP in self.outputs else 0


WHOLE = Cut("whole", (FSDP,), ())
COLUMN = Cut("column", (FSDP,), (TENSOR,), "outputs")
FUSED = Cut("fused columns", (FSDP, TENSOR), (), "outputs", exchanged=True)
ROW = Cut("row", (TENSOR,), (FSDP,), "inputs")

# Path of a linear or of a table -> its cut; the first that matches the end of the path counts.
RULES: tuple[tuple[str, Cut], ...] = (
    (r"attention/qkv", FUSED),
    (r"mlp/gate_up", FUSED),
    (r"mlp/up", COLUMN),
    (r"attention/output", ROW),
    (r"mlp/down", ROW),
    (r"lm_head", COLUMN),
    (r"embeddings/token", ROW),  # (vocabulary, hidden): the head multiplies by its transpose
    (r".*", WHOLE),
)


def cut_of(path: Iterable[str]) -> Cut:
    """The cut of the linear or table at a path in the tree of parameters, its leaf left out."""
    text = "/".join(path)
    return next(cut for rule, cut in RULES if re.search(rf"(^|/){rule}$", text))


def leaf_spec(path: tuple[str, ...], ndim: int) -> PartitionSpec:
    """How a parameter, or what belongs to it, lies on the mesh.

    Args:
      path: of a leaf in the tree of parameters or of masks, such as ("layers_0", "mlp", "up",
        "kernel"). A longer path counts by its end: `opt_state` has its names ahead.
      ndim: axes of the leaf; those ahead of the last two count layers and are not cut.

    >>> tuple(leaf_spec(("layers_1_to_11", "mlp", "up", "kernel"), 3))
    (None, 'fsdp', 'tensor')
    """
    *where, name = path
    cut = cut_of(where)
    if name == "kernel":
        axes = (cut.inputs, cut.outputs)
    elif name == "embedding":
        axes = (cut.inputs, cut.outputs) if cut is not WHOLE else ((), (FSDP,))
    elif name == "adapter_l":
        axes = ((TENSOR, FSDP) if cut.parallel == "inputs" else (FSDP,), ())
    elif name == "adapter_r":
        axes = ((), (FSDP,))
    else:
        return PartitionSpec()
    if ndim < 2:
        return PartitionSpec()
    return PartitionSpec(*[None] * (ndim - 2), *map(_entry, axes))


def state_specs(tree: Any) -> Any:
    """`leaf_spec` of every leaf of parameters, masks, optimizer state, or a whole training state."""

    def spec(path, leaf):
        names = tuple(map(_name, path))
        shared = names and names[-1] in ("kernel", "embedding", "adapter_l", "adapter_r")
        return leaf_spec(names, len(leaf.shape)) if shared else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`NamedSharding` of every leaf, for `jit`, `device_put` and checkpoints."""
    specs = state_specs(tree)
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def batch_spec(ndim: int) -> PartitionSpec:
    """Of an array of a batch, or of activations (B, ...)."""
    return PartitionSpec(BATCH, *[None] * (ndim - 1))


def active_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set, if it is one of ours and not inside a `shard_map`.

    Raises:
      ValueError: it has axes whose shardings are part of the types, which is JAX's default.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names) or mesh.manual_axes:
        return None
    if any(mesh.axis_types[mesh.axis_names.index(axis)] == AxisType.Explicit for axis in AXES):
        raise ValueError(
            f"the axes {', '.join(AXES)} of the mesh are Explicit; make it with jax.make_mesh(...,"
            f" axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
        )
    return mesh


def size_of(mesh: Mesh | AbstractMesh, axes: Iterable[str]) -> int:
    """Devices along some axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


def current_mesh() -> Mesh | None:
    """The devices of `active_mesh`. Not inside of functions that are being traced."""
    return None if active_mesh() is None else jax.sharding.get_mesh()


def constrain_state(tree: Any) -> Any:
    """`state_specs` as constraints on the leaves of a tree, inside of a traced function."""
    if active_mesh() is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    specs = treedef.flatten_up_to(state_specs(tree))
    return treedef.unflatten(map(jax.lax.with_sharding_constraint, leaves, specs))


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`jax.lax.with_sharding_constraint` on our mesh, `x` itself without one."""
    return x if active_mesh() is None else jax.lax.with_sharding_constraint(x, spec)


def local_product(
    path: Iterable[str], tokens: int, shape: tuple[int, int]
) -> tuple[int, tuple[int, int]]:
    """The tokens and the (in, out) of the linear at `path` on one device of the mesh that is set."""
    if (mesh := active_mesh()) is None:
        return tokens, shape
    side, count = cut_of(path).parallel, mesh.shape[TENSOR]
    inputs, outputs = shape
    inputs //= count if side == "inputs" else 1
    outputs //= count if side == "outputs" else 1
    return tokens // size_of(mesh, BATCH), (inputs, outputs)


def granule(pattern: Pattern | None) -> int:
    """Entries of a dense axis that a cut must keep together: whole groups and bytes of metadata."""
    if pattern is None or pattern.is_dense:
        return 1
    per_byte = 8 // math.gcd(8, pattern.bits)  # positions that end where a byte ends
    return math.lcm(per_byte, pattern.n) // pattern.n * pattern.m


def cut_problems(
    what: str, shape: tuple[int, int], pattern: Pattern | None, cut: Cut, sizes: Mapping[str, int]
) -> list[str]:
    """Why a mesh of these sizes cannot cut an (in, out) matrix; nothing if it can."""
    unit, kind = granule(pattern), pattern or "dense"
    found = []
    for side, size, axes in zip(("input", "output"), shape, (cut.inputs, cut.outputs), strict=True):
        name = f"of {what} ({kind}, cut as {cut.name}) the {side} axis"
        found += _uneven(name, size, axes, sizes, unit)
    return found


def _uneven(what: str, size: int, axes: Axes, sizes: Mapping[str, int], unit: int = 1) -> list[str]:
    count = math.prod(sizes[axis] for axis in axes)
    if count == 1 or size % (count * unit) == 0:
        return []
    over = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
    whole = f" in multiples of {unit}" if unit > 1 else ""
    return [f"{what} has {size}, which {over} = {count} devices cannot cut{whole}"]


def check_model(config: Any, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh that cannot cut the model evenly.

    Args:
      config: a `slope_jax.models.TransformerConfig`.
      sizes: devices by mesh axis; those left out are 1.

    Raises:
      ValueError: lists every size that does not divide, the rule, and what to do.
    """
    refuse(sizes, model_problems(config, sizes), "this model")


def refuse(sizes: Mapping[str, int], problems: Iterable[str], what: str) -> None:
    """Raise a ValueError that lists the problems of a mesh of these sizes, if there are any."""
    if problems := list(dict.fromkeys(problems)):
        mesh = ",".join(f"{axis}:{sizes.get(axis, 1)}" for axis in AXES)
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"the mesh {mesh} does not divide {what}:\n{listed}\nKernels are cut on whole groups of"
            " N:M and whole bytes of metadata. Use fewer devices along these axes and more along"
            " data."
        )


def model_problems(config: Any, sizes: Mapping[str, int]) -> list[str]:
    """Every size of a model that a mesh cannot cut evenly; nothing if it can.

    Args:
      config: a `slope_jax.models.TransformerConfig`.
      sizes: devices by mesh axis; those left out are 1.
    """
    sizes = dict.fromkeys(AXES, 1) | dict(sizes)
    problems = []

    def check(what: str, size: int, axes: Axes, unit: int = 1) -> None:
        problems.extend(_uneven(what, size, axes, sizes, unit))

    check("num_heads", config.num_heads, (TENSOR,))
    check("num_kv_heads", config.num_kv_heads, (TENSOR,))
    seen = set()
    for linear in config.linears:
        text = config.patterns[linear.path]
        pattern = None if text == "dense" else Pattern.parse(text)
        path = re.sub(r"^layers/\d+", "layers/*", linear.path)
        if (path, text) in seen:
            continue
        seen.add((path, text))
        cut = COLUMN if linear.tied else cut_of(path.split("/"))
        shape = (linear.in_features, linear.out_features)
        problems += cut_problems(path, shape, pattern, cut, sizes)
        if cut.exchanged:
            is_qkv = path.endswith("qkv")
            heads = config.num_kv_heads * config.head_width
            name = f"of {path} ({text}) the smallest projection"
            smallest = heads if is_qkv else linear.out_features // 2
            check(name, smallest, (TENSOR,), granule(pattern))
        if config.rank and pattern is not None:
            inputs = (TENSOR, FSDP) if cut.parallel == "inputs" else (FSDP,)
            check(f"of {path}/adapter_l the input axis", linear.in_features, inputs)
            check(f"of {path}/adapter_r the output axis", linear.out_features, (FSDP,))
    check("hidden_size", config.hidden_size, (FSDP,))
    return problems


def _entry(axes: Axes):
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else axes


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
