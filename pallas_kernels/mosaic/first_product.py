"""t = x @ l for few tokens, an adapter's first product: as soon as possible, by many processors.

CTAs share the inputs, and each starts the loads of all of its share at once. Sums are added up over
warps and clusters as in `few_tokens`; each cluster leaves a part of its own, which `few_tokens` adds
up while it loads them: no second pass, no atomics, no memory to be cleared.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import cluster, launch, low_rank, normed, warps
from pallas_kernels.mosaic.support import FEW_TOKENS


@dataclasses.dataclass(frozen=True)
class Cut:
    """How 64 columns of the product are shared: `parts` clusters of `split` CTAs of `along` warps."""

    along: int = 4
    split: int = 8
    parts: int = 8

    def __post_init__(self):
        if self.along not in (4, 8, 16):
            raise ValueError(f"{self}: along must be 4, 8 or 16 warps")
        if self.split not in (1, 2, 4, 8):
            raise ValueError(f"{self}: split must be 1, 2, 4 or 8, the CTAs of a cluster")
        if self.parts < 1:
            raise ValueError(f"{self}: parts must be at least 1")

    @property
    def sharers(self) -> int:
        return self.split * self.parts


def choose(k: int, rank: int) -> Cut:
    """One unit of inputs a warp, on at most 64 CTAs for 64 columns and 128 in all.

    >>> choose(4096, 64), choose(768, 64)
    (Cut(along=4, split=8, parts=8), Cut(along=4, split=8, parts=1))
    """
    along = 4
    wanted = max(1, k // (low_rank.UNIT * along))
    most = max(1, 128 // pl.cdiv(rank, warps.OUTPUTS))
    sharers = 1 << (min(wanted, most, 64).bit_length() - 1)  # a power of two
    split = min(8, sharers)
    return Cut(along, split, sharers // split)


@launch.once("cut", "form")
def first_product(
    x: jax.Array,
    left: jax.Array,
    cut: Cut,
    *,
    norm: tuple[jax.Array, jax.Array | None, jax.Array] | None = None,
    form: normed.Form | None = None,
) -> jax.Array:
    """Parts of x @ left, float32 (parts, tokens, rank): it is their sum.

    Args:
      x: (tokens, in), 1 to 64 tokens, bfloat16 or float16; in is a multiple of 8.
      left: (in, rank) in x's dtype; rank is a multiple of 8.
      norm: scale and shift (or None) of a norm of x, float32 (in,), and x's moments; and its `form`.
    """
    (tokens, k), rank = x.shape, left.shape[1]
    if not 1 <= tokens <= FEW_TOKENS:
        raise ValueError(f"x has {tokens} tokens; this kernel takes 1 to {FEW_TOKENS}")
    cuts = {"across": 1, "along": cut.along, "split": cut.split, "stages": 0}
    operands = {"x": x, "left": left} | ({} if norm is None else normed.operands(*norm))
    norms = len(normed.parameters(operands))
    geometry = warps.Geometry(tokens, k, rank, str(x.dtype), **cuts, norms=norms)

    def body(*refs):
        names = (*operands, "y", "shared")
        _kernel(geometry, cut, form, dict(zip(names, refs, strict=True)))

    kernel = cluster.kernel(
        geometry,
        body,
        out_type=jax.ShapeDtypeStruct((cut.parts, tokens, rank), jnp.float32),
        grid={"tile": pl.cdiv(rank, warps.OUTPUTS), "part": cut.parts},
        name="first_product",
    )
    return kernel(*operands.values())


def _kernel(g: warps.Geometry, cut: Cut, form: normed.Form | None, refs: dict) -> None:
    shared_ref = refs["shared"]
    tile, part = lax.axis_index("tile"), lax.axis_index("part")
    share = cluster.share_of(g)
    cluster.open_exchange(g, shared_ref, share)
    number = part * g.split + share
    norm = normed.parameters(refs)
    product = low_rank.Product(g, refs["x"], refs["left"], tile, number, cut.sharers, norm)
    started = product.start()
    if norm:
        normed.measure(g, form, refs["moments_of_x"], shared_ref)
    acc = product.add(warps.zeros(g), started, shared_ref)
    first_row = part * g.tokens
    cluster.finish(g, acc, shared_ref, tile, share, {"y": refs["y"]}, first_row=first_row)
