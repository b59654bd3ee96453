"""y = x @ w on Hopper's sparse tensor cores: `nm_matmul` in Pallas Mosaic GPU.

The sparse operand must be wgmma's A, so a tile is computed transposed, acc[out, token], and is
transposed again on its way out. A may lie MN-major, so the logical compressed form is read as it
is. Persistent CTAs, each with two consumer warpgroups and one producer warp that runs ahead across
tiles; they meet only at two mbarriers per stage (`full`, `empty`). A stage is 64 input features:
x (tokens x 64), values (32 x rows), metadata (8 x rows bytes). One wgmma group stays in flight, so
a stage is released one step late, and the loop is unrolled by two: wgmma.sp reads its metadata
registers asynchronously, and a loop of one step would reload them under the group in flight.
Ragged sizes are left to TMA, which fills loads with zeros and clips stores.

Where that would leave most processors without a tile, the CTAs of a cluster share one along the inputs
(`exchange`), and have no other.

A low-rank product t @ r joins the accumulator in further stages of 32 ranks: r (32 x rows) lies as
values do, and t as x does, only that the instruction is the dense one; t = x @ l may be made here as well
(`first_tiles`). What joins the results, a
residual or the argument of an activation, comes through the ring as well, 64 outputs a stage, in the
place of x: it arrives while the product's last stages are multiplied.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic import exchange, first_tiles, frame, launch, wgmma
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.matmul_body import Kernel
from pallas_kernels.mosaic.matmul_tiles import (
    Tile,
    candidates,
    choose,
    firsts,
    gating,
    suited,
)
from pallas_kernels.mosaic.support import gate_obstacle
from pallas_kernels.sections import Sections

__all__ = ["Tile", "candidates", "choose", "firsts", "gating", "nm_matmul", "suited"]

SECTION = 64  # outputs of a section of the results are a multiple of so many


@launch.once(
    "tile",
    "activation",
    "through",
    "save_preactivation",
    "save_sums",
    "sections",
    "gated",
    "out_dtype",
    "transposed",
    "processors",
)
def nm_matmul(
    x: jax.Array | Sections,
    values: jax.Array,
    metadata: jax.Array,
    tile: Tile,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    transposed: bool = False,
    joining: jax.Array | None = None,
    through: str | None = None,
    save_preactivation: bool = False,
    save_sums: bool = False,
    sections: tuple[int, ...] | None = None,
    gated: bool = False,
    out_dtype=None,
    processors: int = 132,
):
    """y = activation(x @ w + t @ r + bias) + joining; what enters the activation, and x's sums, if saved.

    Args:
      x: (tokens, in), bfloat16 or float16; in is a multiple of 8, tokens are any number > 0. Sections
        are multiples of 64.
      values: (in / 2, out) in x's dtype, metadata: uint8 (in / 8, out); out a multiple of 8.
      bias: (out,). low_rank: t (tokens, rank), r (rank, out) in x's dtype, rank a multiple of 8.
      adapter: l (in, rank) and r in the place of low_rank: the kernel makes t = x @ l as well, and returns
        it last, unless the rank is 0. Where `first_tiles.obstacle` has none.
      transposed: l is (rank, in).
      joining: (tokens, out) in x's dtype, which the results then have as well.
      through: an activation, by whose derivative at `joining` the product is multiplied, in the place
        of the sum.
      save_sums: those of x over the tokens of each tile, float32 (tiles, in).
      sections: how many outputs each of several arrays has, multiples of 64, that y then comes in, in
        x's dtype and without a preactivation.
      gated: y is activation(gate) * up, (tokens, out / 2), of the halves of the outputs, and all else that is
        returned is t. For tiles that `gate`.
      out_dtype: x's dtype (None) or float32.
      processors: of the device; a CTA is put on each.

    Raises:
      ValueError: the tile does not fit the product, it cannot make t, or what joins does not go with the rest.
    """
    (tokens, k), out = x.shape, values.shape[1]
    if gated and not tile.gates:
        raise ValueError(
            f"{tile}: none of its warpgroups has 64 outputs of both halves; gated needs that"
        )
    if gated and (why := gate_obstacle((k, out), tokens)):
        raise ValueError(why)
    if gated and (save_preactivation or save_sums or sections is not None or joining is not None):
        raise ValueError("gated=True goes with a bias and an adapter or low_rank alone")
    if out % 16:  # the rows of an array for TMA are multiples of 16 bytes
        metadata = jnp.pad(metadata, ((0, 0), (0, 8)))
    out_type = jax.ShapeDtypeStruct((tokens, out // (1 + gated)), out_dtype or x.dtype)
    operands = frame.named("x", x) | {"w": values, "e": metadata}
    if low_rank is not None and adapter is not None:
        raise ValueError("low_rank and adapter are both given; leave out one, they are the same")
    if transposed and adapter is None:
        raise ValueError("transposed=True is of an adapter's l, and there is no adapter")
    rank, count = 0, 0  # of what the kernel makes of an adapter
    if low_rank is not None:
        operands |= {"t": low_rank[0], "r": low_rank[1]}
    if adapter is not None:
        operands |= {"l": adapter[0], "r": adapter[1]}
        rank = adapter[1].shape[0]
        count = tile.firsts(tokens, k, rank)
    if bias is not None:
        operands["bias"] = _laid_out(bias.astype(jnp.float32), tile, gated)
    if through is not None and joining is None:
        raise ValueError(f"through={through!r} needs joining: what entered the activation")
    if joining is not None:
        if tile.stages < tile.rows // 64:
            raise ValueError(f"{tile}: what joins takes {tile.rows // 64} stages at a time")
        if out_type.dtype != x.dtype:
            raise ValueError(f"what joins needs results in x's {x.dtype}, not {out_type.dtype}")
        operands["joining"] = joining
    results = {name: out_type for name in (("z", "y") if save_preactivation else ("y",))}
    if sections is not None:
        _check_sections(sections, out)
        if save_preactivation or out_type.dtype != x.dtype:
            raise ValueError(f"sections need results in x's {x.dtype}, and no preactivation")
        results = {
            f"y{number}": jax.ShapeDtypeStruct((tokens, size), x.dtype)
            for number, size in enumerate(sections)
        }
    if save_sums:
        tiles = tile.grid(tokens, out)[1] * tile.across
        results["sums"] = jax.ShapeDtypeStruct((tiles, k), jnp.float32)
    schedule = tile.schedule(tokens, k, out, processors, first_rank=rank)
    if not tile.fits(schedule):
        raise ValueError(
            f"{tile}: needs at most {schedule.processors} tiles, of {tile.along} pairs of stages or more;"
            f" there are {schedule.tiles} of {schedule.steps}"
        )
    if count:
        if why := first_tiles.obstacle(tile, schedule, count):
            raise ValueError(why)
        results["t"] = jax.ShapeDtypeStruct((tokens, rank), x.dtype)
        cut = first_tiles.Cut.of(tile, k, rank)
        if others := count // cut.slices * (cut.slices - 1):
            part = (
                others * tile.cluster,
                CONSUMERS,
                first_tiles.RANKS * cut.rank_blocks * cut.half,
            )
            results["t_parts"] = jax.ShapeDtypeStruct(part, jnp.float32)
    if schedule.slots:
        part = (schedule.slots * tile.cluster, CONSUMERS, tile.rows // CONSUMERS * tile.tokens)
        results["partial"] = jax.ShapeDtypeStruct(part, jnp.float32)
    blocked = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=wgmma.SWIZZLED)
    empty, cluster = plgpu.Barrier, {}
    if tile.along > 1:
        cluster = {"cluster": (tile.along,), "cluster_names": ("along",)}
    elif tile.cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("down", "across"))
        cluster = {"cluster": (tile.down, tile.across), "cluster_names": ("down", "across")}
    scratch = {
        "x_smem": blocked((tile.stages, tile.tokens, STEP)),
        "w_smem": blocked((tile.stages, tile.rows // 64, STEP // 2, 64)),
        "e_smem": plgpu.SMEM(
            (tile.stages, tile.rows // 128, STEP // 8, 128),
            jnp.uint8,
            transforms=wgmma.SWIZZLED,
        ),
        "out_smem": blocked((CONSUMERS, tile.slots, tile.slot_tokens, 64)),
        "full": plgpu.Barrier(num_arrivals=tile.loads, num_barriers=tile.stages),
        "empty": empty(num_arrivals=CONSUMERS, num_barriers=tile.stages),
    }
    if tile.along > 1:
        scratch["exchange"] = plgpu.SMEM((exchange.nbytes(*tile.parts),), jnp.uint8)

    def body(*refs):
        names = (*operands, *results, *scratch)
        refs = dict(zip(names, refs, strict=True))
        halves = Kernel(
            tile, schedule, activation, through, sections, refs, count, transposed, gated
        )
        if tile.along > 1:
            exchange.prepare(refs["exchange"], *tile.parts)
        frame.run(halves.produce, halves.consume)

    kernel = launch.kernel(
        body,
        out_type=list(results.values()),
        grid=(schedule.processors,),
        grid_names=("grid",),
        **cluster,
        scratch_types=list(scratch.values()),
        **frame.OPTIONS,
        name="nm_matmul",
    )
    found = dict(zip(results, kernel(*operands.values()), strict=True))
    names = ["y"] if sections is None else [f"y{number}" for number in range(len(sections))]
    made = tuple(found[name] for name in (*names, "z", "sums", "t") if name in found)
    return made if len(made) > 1 or sections is not None else made[0]


def _laid_out(bias: jax.Array, tile: Tile, gated: bool) -> jax.Array:
    """A bias as tiles have the outputs: if gated, 64 of the gate and 64 of the rest, in turn."""
    halves = bias.reshape(1 + gated, -1)
    rows = tile.rows // (1 + gated) * tile.down
    halves = jnp.pad(halves, ((0, 0), (0, -halves.shape[1] % rows)))
    return halves.reshape(1 + gated, -1, 64).swapaxes(0, 1).reshape(-1)


def _check_sections(sections: tuple[int, ...], out: int) -> None:
    if sum(sections) != out or any(size < 1 or size % SECTION for size in sections):
        raise ValueError(
            f"sections={sections} must be multiples of {SECTION} that add up to the {out} outputs"
        )
