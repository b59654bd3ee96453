"""What runs, and why: one row per linear layer of a model."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Choice, NarrowQuery, Query, choose, choose_gate, choose_narrow
from pallas_kernels.mosaic.support import MOST_FIRST
from slope_jax.dense import ADAPTER_L, ADAPTER_R, MASKS, SparseDense
from slope_jax.inputs import eval_shape, example_inputs, unboxed
from slope_jax.operands import EXACT
from slope_jax.sharding import local_product


@dataclasses.dataclass(frozen=True)
class Row:
    """One linear layer; `layers` of them when it is a scanned stack.

    `shape` is (in, out); `choices` maps y, dx and dw to what runs and why, and `first_product` says
    so of an adapter's x @ l, where the product itself has a kernel, and `gate` of a gate that the layer
    was asked for; bytes are those stored for kernel, metadata and adapters, and for a dense kernel of
    the same dtype.
    """

    path: str
    layers: int
    shape: tuple[int, int]
    pattern: str
    choices: dict[str, Choice]
    stored_bytes: int
    dense_bytes: int
    first_product: Choice | None = None
    gate: Choice | None = None

    @property
    def implementation(self) -> str:
        """The implementation, or "y:.. dx:.. dw:.." where the three products differ."""
        names = {name: choice.implementation for name, choice in self.choices.items()}
        if len(set(names.values())) == 1:
            return names["y"]
        return " ".join(f"{name}:{value}" for name, value in names.items())

    @property
    def reason(self) -> str:
        products: dict[str, list[str]] = {}
        for name, choice in self.choices.items():
            products.setdefault(choice.reason, []).append(name)
        reasons = list(products)
        if len(products) > 1:
            reasons = [f"{', '.join(names)}: {why}" for why, names in products.items()]
        for part, choice in (("x @ l", self.first_product), ("gate", self.gate)):
            if choice is not None:
                reasons.append(f"{part} {choice.implementation}: {choice.reason}")
        return "; ".join(reasons)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The rows of `explain`; printing it gives a table."""

    rows: tuple[Row, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(row.stored_bytes for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        return sum(row.dense_bytes for row in self.rows)

    @property
    def forward_paths(self) -> dict[str, int]:
        """The sparse linears by what runs in a forward pass, and why."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.pattern != "dense":
                way = f"{row.choices['y'].implementation}: {row.choices['y'].reason}"
                counts[way] = counts.get(way, 0) + row.layers
        return counts

    def __str__(self) -> str:
        header = ("path", "layers", "shape", "pattern", "runs", "bytes", "of dense", "why")
        lines = [header] + [
            (
                row.path,
                str(row.layers),
                f"{row.shape[0]}x{row.shape[1]}",
                row.pattern,
                row.implementation,
                f"{row.stored_bytes:,}",
                f"{row.stored_bytes / row.dense_bytes:.3f}",
                row.reason,
            )
            for row in self.rows
        ]
        total = f"{self.stored_bytes:,}"
        share = f"{self.stored_bytes / max(self.dense_bytes, 1):.3f}"
        lines.append(("all", str(sum(r.layers for r in self.rows)), "", "", "", total, share, ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def explain(model: nn.Module, variables: Any, *args, strict: bool = False, **kwargs) -> Explanation:
    """Says for each linear layer what it stores, what runs, and why. Computes nothing.

    On a mesh (`jax.set_mesh`, see `slope_jax.sharding`) what runs is what each device runs on its
    part; shapes and bytes are those of all devices together.

    Args:
      model: any Flax module; its `nn.Dense` and `SparseDense` layers are listed in call order.
      variables: from `model.init`, or shapes from `jax.eval_shape(model.init, ...)`.
      *args, **kwargs: example inputs (arrays, shapes, Python values) as `model.apply` takes them; by
        default `model.example_inputs()`. Their number of tokens decides what runs.
      strict: raise if a layer with a pattern would be multiplied densely.

    Raises:
      ValueError: no example inputs, or `strict` and a sparse layer runs a dense product.

    >>> layer = SparseDense(8)
    >>> x = jnp.ones((1, 8))
    >>> explain(layer, layer.init(jax.random.key(0), x), x).rows[0].pattern
    '2:4'
    """
    args, kwargs = example_inputs(model, args, kwargs)
    variables = unboxed(variables)
    rows: dict[tuple[str, ...], Row] = {}

    def record(call, call_args, call_kwargs, context):
        module = context.module
        dense = isinstance(module, nn.Dense) and context.method_name == "__call__"
        tied = isinstance(module, nn.Embed) and context.method_name == "attend"
        if (dense or tied) and module.path not in rows:
            gated = call_kwargs.get("gate") is not None
            describe = functools.partial(_dense_row, gated=gated) if dense else _tied_row
            rows[module.path] = describe(module, call_args[0], variables)
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        eval_shape(model.apply, variables, *args, **kwargs)
    explanation = Explanation(tuple(rows.values()))
    if strict:
        _raise_if_dense(explanation)
    return explanation


def _dense_row(module: nn.Dense, x: jax.Array, variables: Any, *, gated: bool) -> Row:
    params = _at(variables["params"], module.path)
    pattern = module.pattern if isinstance(module, SparseDense) else None
    shape = (x.shape[-1], module.features)
    kernel = params["kernel"]
    layers = math.prod(kernel.shape[:-2])
    names = ("kernel", ADAPTER_L, ADAPTER_R)
    stored = sum(_nbytes(params[name]) for name in names if name in params)
    name, first, gate = "dense" if pattern is None else str(pattern), None, None
    if getattr(module, "simulated", False):
        name = module.sparsity or "dense"
        why = f"{name} is simulated: a dense product with a dense kernel that is masked outside"
        choices = dict.fromkeys(("y", "dx", "dw"), Choice("xla", why))
    elif pattern is None:
        why = "sparsity is dense" if isinstance(module, SparseDense) else "flax.linen.Dense"
        choices = dict.fromkeys(("y", "dx", "dw"), Choice("dense", why))
    else:
        stored += _nbytes(_at(variables[MASKS], module.path)["kernel"])
        choices = _choices(module, pattern, shape, x, kernel)
        if gated:
            gate = choose_gate(_query(module, pattern, shape, x, kernel), module.implementation)
        if module.adapter_rank:
            inside = gate is not None and gate.implementation == "mosaic"
            first = _first_product(module, shape, x, kernel, choices["y"], gated=inside)
    return Row(
        path="/".join(module.path) or type(module).__name__,
        layers=layers,
        shape=shape,
        pattern=name,
        choices=choices,
        stored_bytes=stored,
        dense_bytes=layers * math.prod(shape) * kernel.dtype.itemsize,
        first_product=first,
        gate=gate,
    )


def _choices(module, pattern, shape, x, kernel) -> dict[str, Choice]:
    forward = _query(module, pattern, shape, x, kernel)
    queries = {
        "y": forward,
        "dx": dataclasses.replace(forward, shape=forward.shape[::-1]),
        "dw": dataclasses.replace(forward, op="nm_sddmm"),
    }
    choices = {name: choose(query, module.implementation) for name, query in queries.items()}
    if module.backward == EXACT:
        choices["dx"] = Choice("xla", "backward is exact: dx by a dense product with w_r.T")
    return choices


def _query(module, pattern, shape, x, kernel) -> Query:
    """Of a forward pass, on each device."""
    tokens, shape = local_product(module.path, math.prod(x.shape[:-1]), shape)
    return Query("nm_matmul", shape, pattern, _dtype(module, x, kernel), tokens)


def _first_product(module, shape, x, kernel, product: Choice, *, gated: bool) -> Choice | None:
    """Of a forward pass; None where the product has no kernel, which says all."""
    tokens, shape = local_product(module.path, math.prod(x.shape[:-1]), shape)
    if product.implementation != "mosaic":
        return None
    if tokens <= MOST_FIRST:
        return Choice("mosaic", f"a kernel for up to {MOST_FIRST} tokens")
    size, dtype = (shape[0], module.adapter_rank), _dtype(module, x, kernel)
    query = NarrowQuery(size, dtype, tokens, outputs=shape[1], gated=gated)
    return choose_narrow(query, module.implementation)


def _dtype(module, x, kernel) -> str:
    return str(jnp.dtype(module.dtype or jnp.result_type(x.dtype, kernel)))


def _tied_row(module: nn.Embed, x: jax.Array, variables: Any) -> Row:
    size = _nbytes(_at(variables["params"], module.path)["embedding"])
    choices = dict.fromkeys(("y", "dx", "dw"), Choice("dense", "tied embedding"))
    shape = (module.features, module.num_embeddings)
    return Row("/".join(module.path), 1, shape, "dense", choices, size, size)


def _raise_if_dense(explanation: Explanation) -> None:
    silent = [
        f"{row.path} ({row.reason})"
        for row in explanation.rows
        if row.pattern != "dense" and "xla" in row.implementation
    ]
    if silent:
        raise ValueError("sparse layers that would run a dense product: " + ", ".join(silent))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
