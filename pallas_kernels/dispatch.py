"""Which implementation of a product runs, and why."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.compressed import check_dtype
from pallas_kernels.device import current
from pallas_kernels.mosaic import support
from pallas_kernels.pattern import Pattern
from pallas_kernels.triton import support as triton_support

OPS = ("nm_matmul", "nm_sddmm", "nm_transpose")
IMPLEMENTATIONS = ("xla", "mosaic", "triton")


@dataclasses.dataclass(frozen=True)
class Query:
    """A product to be run: `tokens` rows of x against an (in, out) matrix, in `dtype`.

    `axis` is the one that the matrix is compressed along; `out_dtype` None is any that runs.
    """

    op: str
    shape: tuple[int, int]
    pattern: Pattern
    dtype: str
    tokens: int | None = None
    axis: int = 0
    out_dtype: str | None = None

    def __post_init__(self):
        if self.op not in OPS:
            raise ValueError(f"op is {self.op!r}; it must be one of {', '.join(OPS)}")
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        object.__setattr__(self, "shape", _matrix(self.shape))
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        check_dtype(jnp.dtype(self.dtype), "the query")
        if self.out_dtype is not None:
            object.__setattr__(self, "out_dtype", _dtype_name(self.out_dtype))


@dataclasses.dataclass(frozen=True)
class NarrowQuery:
    """An adapter's first product: `tokens` rows of x against an (in, rank) matrix, in `dtype`.

    `outputs` are those of the product by a kernel that the adapter joins, and that is `gated` by it or not;
    None for x @ l alone.
    """

    shape: tuple[int, int]
    dtype: str
    tokens: int
    outputs: int | None = None
    gated: bool = False

    def __post_init__(self):
        object.__setattr__(self, "shape", _matrix(self.shape))
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if self.outputs is not None and not (type(self.outputs) is int and self.outputs > 0):
            raise ValueError(f"outputs is {self.outputs!r}; it must be a positive integer, or None")


def _matrix(shape: Any) -> tuple[int, int]:
    if len(shape := tuple(shape)) != 2:
        raise ValueError(f"shape is {shape}; it must be that of a matrix, (in, out)")
    return shape


def _dtype_name(dtype: Any) -> str:
    try:
        if dtype is not None:  # which NumPy takes for float64
            return jnp.dtype(dtype).name
    except TypeError:
        pass
    raise ValueError(f"dtype is {dtype!r}; it must be one of JAX's, such as 'bfloat16'")


class Choice(NamedTuple):
    """The implementation that runs, and the reason in words."""

    implementation: str
    reason: str


def choose(query: Query, implementation: str | None = None) -> Choice:
    """What would run for `query`, without running it.

    Args:
      query: the product.
      implementation: None for the best one, or a name to insist on.

    Raises:
      ValueError: unknown name.
      NotImplementedError: the implementation asked for cannot run this here; says why.

    >>> choose(Query("nm_matmul", (768, 3072), Pattern(2, 4), "float32", tokens=8192)).implementation
    'xla'
    """
    check_implementation(implementation)
    if implementation == "xla":
        return Choice("xla", "asked for")
    obstacle = obstacle_to_mosaic(query)
    if implementation == "mosaic":
        if obstacle:
            raise NotImplementedError(f"implementation 'mosaic': {obstacle}; use None or 'xla'")
        return Choice("mosaic", "asked for")
    if implementation is None and (query.tokens == 0 or 0 in query.shape):
        return Choice("xla", f"there are no {'entries' if 0 in query.shape else 'tokens'}")
    obstacle_to_second = obstacle_to_triton(query)
    if implementation == "triton":
        if obstacle_to_second:
            raise NotImplementedError(
                f"implementation 'triton': {obstacle_to_second}; use None or 'xla'"
            )
        return Choice("triton", "asked for")
    reason = triton_support.reason_to_choose(query.op, query.shape, query.tokens)
    if reason and not obstacle_to_second:
        return Choice("triton", reason)
    if obstacle:
        wanted = f"; {obstacle_to_second}" if reason else ""
        return Choice("xla", f"{_instead(query)}: {obstacle}{wanted}")
    return _by_measurement(query)


def choose_narrow(query: NarrowQuery, implementation: str | None = None) -> Choice:
    """As `choose`, for an adapter's first product: XLA's where the kernel does not take it or is no faster.

    Raises:
      ValueError: unknown name.

    >>> choose_narrow(NarrowQuery((768, 16), "float32", 8192)).implementation
    'xla'
    """
    check_implementation(implementation)
    if implementation == "xla":
        return Choice("xla", "asked for")
    if implementation == "triton":
        return Choice("xla", "x @ l has no Triton kernel")
    missing = support.device_obstacle()
    if query.outputs and missing is None:
        from pallas_kernels.mosaic import products  # needs a newer JAX than the package does

        (k, rank), tokens = query.shape, query.tokens
        options = {"gated": query.gated}
        if products.tile_with_first(tokens, k, query.outputs, rank, query.dtype, **options):
            return Choice("mosaic", "by the kernel of the product that it joins")
    obstacle = missing or support.narrow_obstacle(query.shape, query.dtype, query.tokens)
    return (
        Choice("xla", obstacle) if obstacle else Choice("mosaic", "measured to be the faster one")
    )


def choose_gate(query: Query, implementation: str | None = None) -> Choice:
    """What makes activation(gate) * up of a product's halves (`nm_matmul`'s gated=True): the product's own
    kernel, or a pass of XLA's over what it makes.

    Raises:
      ValueError, NotImplementedError: as `choose`.

    >>> choose_gate(Query("nm_matmul", (768, 4096), Pattern(2, 4), "float32", tokens=8192)).implementation
    'xla'
    """
    product = choose(query, implementation)
    if product.implementation != "mosaic":
        return Choice("xla", f"the product is {product.implementation}'s")
    if why := support.gate_obstacle(query.shape, query.tokens):
        return Choice("xla", why)
    if query.tokens is None:
        return Choice("mosaic", "the number of tokens is not known here")
    from pallas_kernels.mosaic import products  # needs a newer JAX than the package does

    if products.gated_tile(query.tokens, *query.shape, query.dtype):
        return Choice("mosaic", "by the kernel of the product, where no gradient follows")
    if products.kernel_of(query.op, query.tokens, *query.shape, query.dtype) == "few_tokens":
        return Choice("xla", "the kernel for few tokens makes none")
    return Choice("xla", "a pass of its own, taken to be the faster way")


def check_implementation(implementation: str | None) -> None:
    """Raises a ValueError unless it is None or the name of one."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be None (the best one) or one of"
            f" {', '.join(map(repr, IMPLEMENTATIONS))}"
        )


def _by_measurement(query: Query) -> Choice:
    """Never slower than dense, as far as is known of a device that runs the sparse kernels."""
    if query.op == "nm_transpose":
        return Choice("mosaic", "one pass at memory speed")
    if query.tokens is None:
        return Choice("mosaic", "the number of tokens is not known here")
    device = current()
    problem = query.tokens, *query.shape, query.dtype
    where = device.device_kind, str(device.compute_capability)
    verdict = tuning.verdict(tuning.kernel_of(query.op, *problem, *where), *problem, *where)
    if verdict is None:
        return Choice("mosaic", f"sparse tensor cores; {query.op} is not measured on this device")
    reason = verdict.reason
    if query.pattern != Pattern(2, 4):
        reason = f"by the times of 2:4, which {query.pattern} is first written as: {reason}"
    if verdict.use_sparse:
        return Choice("mosaic", reason)
    return Choice("xla", f"{_instead(query)}: {reason}")


def _instead(query: Query) -> str:
    """What XLA runs."""
    if query.op == "nm_transpose":
        return "XLA's operations, in several passes"
    return "dense product on the decompressed weight"


def obstacle_to_mosaic(query: Query) -> str | None:
    """Why the sparse kernels cannot run `query` on this machine, or None."""
    return support.device_obstacle() or support.problem_obstacle(
        query.op, query.shape, query.pattern, query.dtype, query.axis, query.out_dtype
    )


def obstacle_to_triton(query: Query) -> str | None:
    """Why the Triton kernel cannot run `query` on this machine, or None."""
    return triton_support.device_obstacle() or triton_support.problem_obstacle(
        query.op, query.shape, query.pattern, query.dtype
    )
