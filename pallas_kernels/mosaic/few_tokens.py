"""y = x @ w for few tokens (decoding), on Hopper: reads the compressed weight once, at memory speed.

The inputs are shared out over the warps of a CTA and the CTAs of a cluster, so that all processors
read from the first moment on, and partial sums are added in shared memory, a cluster's through
distributed shared memory: there is no second kernel and no workspace. Every warp copies its own
part of the weight, several stages ahead; warps side by side share the tokens.
"""

import dataclasses
import itertools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.epilogue import moments_shape
from pallas_kernels.mosaic import cluster, launch, normed, ring, warps
from pallas_kernels.mosaic.activations import PRECISE
from pallas_kernels.mosaic.frame import SHARED_MEMORY
from pallas_kernels.mosaic.low_rank import Product, Second
from pallas_kernels.mosaic.support import FEW_TOKENS, MOST_FIRST

REGISTERS = 65536  # of a processor
# Tokens whose norm the kernel makes: every warp does it anew, which takes longer than the weights of
# 64 tokens take to arrive.
MOST_NORMED = 32
# Of an adapter whose first product every warp makes of its inputs: its rank, and all entries of l. With a
# rank of 32 that takes up to twice as long as a kernel for it.
MOST_INNER, MOST_ROWS = 24, 1 << 16


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is cut: a CTA takes 64 * across outputs and 1 / split of the inputs.

    `across` warps side by side, `along` warps that share the CTA's inputs, clusters of `split`
    CTAs, and at most `stages` steps of 64 inputs a warp, of which one is being multiplied.
    """

    across: int = 1
    along: int = 4
    split: int = 2
    stages: int = 4

    def __post_init__(self):
        if self.across * self.along not in (4, 8, 16):
            raise ValueError(f"{self}: across * along must be 4, 8 or 16 warps")
        if self.split not in (1, 2, 4, 8):
            raise ValueError(f"{self}: split must be 1, 2, 4 or 8, the CTAs of a cluster")
        if self.stages < 2:
            raise ValueError(f"{self}: stages must be at least 2")

    def geometry(
        self, tokens: int, k: int, f: int, dtype: str = "bfloat16", norms: int = 0, rank: int = 0
    ) -> warps.Geometry:
        """With as many stages as the inputs need and shared memory holds."""
        cuts = dataclasses.asdict(self)
        g = warps.Geometry(tokens, k, f, dtype, **cuts, norms=norms, rank=rank)
        stages = max(2, min(self.stages, g.rounds + 1, SHARED_MEMORY // g.stage_bytes))
        g = dataclasses.replace(g, stages=stages)
        while g.stages > 2 and g.shared_memory > SHARED_MEMORY:
            g = dataclasses.replace(g, stages=g.stages - 1)
        if g.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"{self} needs {g.shared_memory} bytes of shared memory for {tokens} tokens, and"
                f" there are {SHARED_MEMORY}; fewer warps need less"
            )
        return g


# An H100: bytes per microsecond of its memory, of its cache for the tokens, and of one processor,
# and the microseconds that data take to arrive. By the CTAs of a cluster: processors that have room
# for clusters, microseconds to launch a CTA, and those lost when a processor goes on to another CTA.
# Fitted to 90 timings of 9 shapes of 8 to 64 tokens: 11 % off in the quadratic mean.
MEMORY_RATE, CACHE_RATE, PROCESSOR_RATE, LATENCY = 2.95e6, 12e6, 62e3, 0.75
PROCESSORS = {1: 132, 2: 132, 4: 116, 8: 96}
LAUNCH = {1: 0.003, 2: 0.003, 4: 0.005, 8: 0.006}
NEXT = {1: 1.0, 2: 1.0, 4: 2.5, 8: 3.0}
# What an adapter's first product adds, microseconds: of a byte of l that a CTA reads, of an entry that a warp
# multiplies, and where four warps read the same ones. Fitted to 121 timings of 11 shapes of ranks 16 and 24.
LEFT_OF_CTA, LEFT_OF_WARP, FOUR_ACROSS = 3.9e-5, 7e-5, 0.17
APART = 2.6  # microseconds that a kernel of its own takes, and the way to it


def choose(tokens: int, k: int, f: int) -> Config:
    """The configuration that should be the fastest.

    >>> choose(8, 4096, 4096)
    Config(across=1, along=4, split=2, stages=4)
    """
    return _ranked(tokens, tokens, k, f)[0]


def choose_with_first(
    tokens: int, k: int, f: int, dtype: str, norms: int, rank: int
) -> Config | None:
    """The configuration that should be the fastest where it makes an adapter's first product as well, for
    which every CTA reads its rows of l; None where that is best made apart.

    >>> choose_with_first(16, 1280, 5120, "bfloat16", 0, 24)
    Config(across=4, along=1, split=4, stages=4)
    >>> choose_with_first(16, 4096, 28672, "bfloat16", 0, 16)
    """
    if rank > MOST_INNER or tokens > MOST_FIRST or k * rank > MOST_ROWS:
        return None
    times = {}
    for across, split in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        config = Config(across, 4 // across, split)
        if not _idle(config, k) and fits(config, tokens, k, f, dtype, norms, rank):
            times[config] = _time_with_first(config.geometry(tokens, k, f, dtype, norms, rank))
    best = min(times, key=times.get, default=None)
    if best is None or times[best] > _time(choose(tokens, k, f).geometry(tokens, k, f)) + APART:
        return None
    return best


def fits(config: Config, *problem) -> bool:
    """Whether shared memory holds what it needs for a problem, as of `Config.geometry`."""
    try:
        config.geometry(*problem)
    except ValueError:
        return False
    return True


def candidates(tokens: int, k: int, f: int) -> list[Config]:
    """Configurations worth timing, best estimate first; they can take twice the tokens, too."""
    return _ranked(tokens, min(2 * tokens, FEW_TOKENS), k, f)[:24]


def _ranked(tokens: int, most_tokens: int, k: int, f: int) -> list[Config]:
    times = {}
    for across, along, split in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)):
        warp_count = across * along
        if warp_count not in (4, 8):
            continue
        for stages in {4: (4, 6, 3), 8: (3, 4, 2)}[warp_count]:
            config = Config(across, along, split, stages)
            if _idle(config, k) or not fits(config, most_tokens, k, f):
                continue
            times[config] = _time(config.geometry(tokens, k, f))
    return sorted(times, key=times.get)


def _idle(config: Config, k: int) -> bool:
    """Whether half of the warps that share the inputs have none."""
    shares = config.along * config.split
    return shares > 1 and shares * warps.STEP >= 2 * k


def _waves(g: warps.Geometry) -> tuple[int, int, int]:
    """Full waves of CTAs, how many are left for one more, and how many are in a full one."""
    registers = min(255, 75 + 3.4 * g.width)  # as ptxas reports
    room = max(
        1,
        min(
            (SHARED_MEMORY + 3072) // (g.shared_memory + 1024),
            REGISTERS // (32 * registers * g.warps),
        ),
    )
    slots = int(PROCESSORS[g.split] * room)
    return *divmod(pl.cdiv(g.f, warps.OUTPUTS * g.across) * g.split, slots), slots


def _time(g: warps.Geometry) -> float:
    """Microseconds, estimated: waves of CTAs, each as slow as the slowest thing that bounds it."""
    weight = warps.OUTPUTS * g.across * g.k / g.split * 9 / 8  # bytes of a CTA
    tokens = g.width * g.k / g.split * 2
    flight = (g.stages - 1) * g.warps * warps.WARP_BYTES
    # mma.sp takes 64 tokens at half of a processor's rate.
    processor_rate = PROCESSOR_RATE * min(1, 32 / g.width)

    def wave(count: float) -> float:
        rate = min(processor_rate / pl.cdiv(count, PROCESSORS[g.split]), flight / LATENCY)
        bounds = count * weight / MEMORY_RATE, count * tokens / CACHE_RATE, weight / rate
        return sum(bound**3 for bound in bounds) ** (1 / 3)

    full, rest, slots = _waves(g)
    time = 1.7 + 0.1 * (g.warps > 4) + LAUNCH[g.split] * (slots if full else rest)
    time += NEXT[g.split] * (full + (rest > 0) - 1) + full * wave(slots)
    return time + (wave(rest) if rest else 0.0)


def _time_with_first(g: warps.Geometry) -> float:
    """The same where it makes an adapter's first product."""
    full, rest, _ = _waves(g)
    rows = pl.cdiv(g.k, g.along * g.split * warps.STEP) * warps.STEP  # of l, a warp's
    first = LEFT_OF_CTA * (g.k / g.split * g.rank * 2) + LEFT_OF_WARP * (rows * g.rank)
    return _time(g) + (full + (rest > 0)) * first + FOUR_ACROSS * (g.across == 4)


@launch.once("config", "activation", "save_preactivation", "save_moments", "out_dtype", "form")
def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    metadata: jax.Array,
    config: Config,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    norm: tuple[jax.Array, jax.Array | None, jax.Array] | None = None,
    form: normed.Form | None = None,
    residual: jax.Array | None = None,
    save_preactivation: bool = False,
    save_moments: bool = False,
    out_dtype=None,
):
    """activation(x @ w + t @ r + bias) + residual; what enters the activation, and moments, if saved.

    Args:
      x: (tokens, in), 1 to 64 tokens, bfloat16 or float16; in is a multiple of 8.
      values: (in / 2, out) in x's dtype, metadata: uint8 (in / 8, out); out a multiple of 8.
      bias: (out,), float32, bfloat16 or float16.
      low_rank: t (tokens, rank) in x's dtype, or its float32 summands (parts, tokens, rank) as of
        `first_product`; r (rank, out) in x's dtype. rank is a multiple of 8.
      adapter: l (in, rank) and r, in the place of `low_rank`: every warp multiplies what it has of x by
        l as well, and that, rounded, by r. For ranks up to `MOST_INNER`.
      norm: scale and shift (or None) of a norm of x, float32 (in,), and x's moments; and its `form`.
      residual: (tokens, out), in x's dtype.
      save_moments: those of the result as well, as of `epilogue.moments`.
      out_dtype: x's dtype (None) or float32.
    """
    tokens, k = x.shape
    f = values.shape[1]
    if not 1 <= tokens <= FEW_TOKENS:
        raise ValueError(f"x has {tokens} tokens; this kernel takes 1 to {FEW_TOKENS}")
    if activation is not None and activation not in PRECISE:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(PRECISE)}")
    operands = {"values": values, "metadata": metadata, "x": x}
    if norm is not None:
        operands |= normed.operands(*norm)
    rank = 0 if adapter is None else adapter[0].shape[1]
    if rank > MOST_INNER or (tokens > MOST_FIRST and rank):
        raise ValueError(
            f"an adapter of rank {rank} and {tokens} tokens; this kernel makes the first product of up"
            f" to {MOST_INNER} and {MOST_FIRST}"
        )
    norms = len(normed.parameters(operands))
    geometry = config.geometry(tokens, k, f, str(x.dtype), norms, rank)
    if bias is not None:
        operands["bias"] = bias
    if low_rank is not None:
        operands |= {"t": low_rank[0], "r": low_rank[1]}
    if adapter is not None:
        operands |= {"l": adapter[0], "r": adapter[1]}
    if residual is not None:
        operands["residual"] = residual
    y = jax.ShapeDtypeStruct((tokens, f), out_dtype or x.dtype)
    results = {"y": y} | ({"z": y} if save_preactivation else {})
    if save_moments:
        results["moments"] = jax.ShapeDtypeStruct((tokens, *moments_shape(f)), jnp.float32)

    def body(*refs):
        names = (*operands, *results, "stages")
        _kernel(geometry, activation, form, dict(zip(names, refs, strict=True)))

    kernel = cluster.kernel(
        geometry,
        body,
        out_type=list(results.values()),
        grid={"tile": pl.cdiv(f, warps.OUTPUTS * config.across)},
        name="nm_matmul_few",
    )
    y, *others = kernel(*operands.values())
    return (y, *others) if others else y


def _kernel(
    g: warps.Geometry, activation: str | None, form: normed.Form | None, refs: dict
) -> None:
    stages = refs["stages"]
    tile = lax.axis_index("tile")
    share = cluster.share_of(g)
    first, last = (lax.div(s * g.steps, jnp.int32(g.split)) for s in (share, share + 1))
    limit = jnp.minimum(last * (warps.STEP // 8), g.k // 8)

    def fetch(number, stage):
        arrays = (refs["values"], refs["metadata"], refs["x"], *normed.parameters(refs))
        arrays += (refs["l"],) if g.rank else ()
        ring.fetch(g, arrays, stages, tile, first + number * g.along, stage, limit)

    cluster.open_exchange(g, stages, share)
    low_rank = Product(g, refs["t"], refs["r"], tile, share, g.split) if "t" in refs else None
    second = Second(g, refs["r"], tile) if g.rank else None
    # Loads of r go ahead of the ring's, and arrive with the first stage.
    started = (low_rank or second).start() if "r" in refs else None
    ring.start(g, fetch)
    if g.norms:
        normed.measure(g, form, refs["moments_of_x"], stages)
    acc = warps.zeros(g)
    if low_rank:
        acc = low_rank.add(acc, started)

    def multiply(number, state):
        acc, stage = state
        ring.wait(g, g.stages - 2)
        free = lax.select(stage == 0, jnp.int32(g.stages - 1), stage - 1)
        fetch(number + (g.stages - 1), free)
        acc = warps.multiply(g, acc, stages, stage, normed.in_registers if g.norms else None)
        return acc, lax.select(stage == g.stages - 1, jnp.int32(0), stage + 1)

    acc, _ = lax.fori_loop(0, g.rounds, multiply, (acc, jnp.int32(0)))
    if second:
        acc = second.add(acc, started)
    cluster.finish(g, acc, stages, tile, share, refs, activation)
