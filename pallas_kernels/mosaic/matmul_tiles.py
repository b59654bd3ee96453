"""How `nm_matmul` is cut into tiles, and which cut is the fastest, by an estimate."""

import dataclasses
import math
from typing import NamedTuple

import jax.experimental.pallas as pl

from pallas_kernels.mosaic import exchange, first_tiles, frame
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.schedule import Schedule
from pallas_kernels.mosaic.support import gate_obstacle


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the product is cut: a CTA takes 128 * blocks outputs x `tokens` tokens at a time.

    `stages` deep, leaving through `slots` buffers of `slot_tokens` tokens per warpgroup; output
    tiles are visited in snakes `snake` wide along the outputs (0) or the tokens (1). A cluster of
    CTAs, `down` along the outputs and `across` along the tokens, loads together what its CTAs share.
    At most `splits` clusters share a tile of the last wave; 0 for an even share for all (`Schedule`).
    Or the CTAs of a cluster, `along` the inputs, share one tile, and have no other. Tiles of an adapter's
    first product (`first_tiles`) are cut into `slices` along the inputs.
    """

    blocks: int = 2
    tokens: int = 192
    stages: int = 4
    slot_tokens: int = 96
    slots: int = 2
    minor: int = 0
    snake: int = 16
    down: int = 1
    across: int = 1
    splits: int = 1
    along: int = 1
    slices: int = 1

    def __post_init__(self):
        if self.tokens % 8 or not 8 <= self.tokens <= 256:
            raise ValueError(f"{self}: tokens must be a multiple of 8 up to 256")
        if self.slots < 1:
            raise ValueError(f"{self}: a tile leaves through at least one slot")
        if self.tokens % self.slot_tokens or self.slot_tokens % 16:
            raise ValueError(f"{self}: slot_tokens must be a multiple of 16 that divides tokens")
        # Each tile begins with the first slot, which must then be the one that was filled longest ago.
        if (stores := self.blocks * self.tokens // self.slot_tokens) % self.slots:
            raise ValueError(f"{self}: slots must divide the {stores} times that a tile fills one")
        if min(self.down, self.across, self.along) < 1 or self.cluster > 8:
            raise ValueError(f"{self}: a cluster has 1 to 8 CTAs")
        if self.slices < 1:
            raise ValueError(f"{self}: tiles of a first product have at least one slice")
        if self.along > 1 and (self.down, self.across, self.splits) != (1, 1, 1):
            raise ValueError(f"{self}: who shares tiles along the inputs shares nothing else")
        frame.check_shared_memory(self)

    @property
    def size(self) -> "Tile":
        """Without what does not change how long a stage takes."""
        return dataclasses.replace(self, splits=1, slices=1)

    @property
    def rows(self) -> int:
        return 64 * self.blocks * CONSUMERS

    @property
    def cluster(self) -> int:
        return self.down * self.across * self.along

    @property
    def parts(self) -> tuple[int, int]:
        """Parts of a tile that leave other CTAs of the cluster for the first, and float32 numbers in each."""
        return self.along - 1, self.rows * self.tokens

    @property
    def gates(self) -> bool:
        """Whether a warpgroup can have 64 outputs of a gate and those that it multiplies, and its slots go round."""
        return self.blocks == 2 and self.tokens // self.slot_tokens % self.slots == 0

    @property
    def loads(self) -> int:
        """Copies that fill a stage."""
        return 1 + self.rows // 64 + self.rows // 128

    def grid(self, tokens: int, f: int) -> tuple[int, int]:
        """Clusters of output tiles along the outputs and the tokens."""
        return pl.cdiv(f, self.rows * self.down), pl.cdiv(tokens, self.tokens * self.across)

    def firsts(self, tokens: int, k: int, rank: int) -> int:
        """Tiles of an adapter's first product, one for each CTA of a cluster at a time."""
        cut = first_tiles.Cut.of(self, k, rank)
        return cut.parts * cut.slices * pl.cdiv(tokens, self.tokens * self.cluster)

    def schedule(
        self, tokens: int, k: int, f: int, processors: int, *, first_rank: int = 0
    ) -> Schedule:
        """Of pairs of stages, since the loop is unrolled by two; with the tiles of a first product of that
        rank."""
        tiles, steps = math.prod(self.grid(tokens, f)), pl.cdiv(k, 2 * STEP)
        tiles += self.firsts(tokens, k, first_rank)
        return Schedule(tiles, steps, self.splits, frame.clusters(processors, self.cluster))

    def fits(self, plan: Schedule) -> bool:
        """Whether each cluster that shares a tile has one, and each of its CTAs a part of it."""
        return self.along == 1 or (plan.tiles <= plan.processors and plan.steps >= self.along)

    @property
    def shared_memory(self) -> int:
        stage = self.tokens * STEP * 2 + self.rows * (STEP + 8)
        slots = CONSUMERS * self.slots * self.slot_tokens * 128
        return self.stages * stage + slots + exchange.nbytes(*self.parts)


class Pace(NamedTuple):
    """Microseconds: of a stage where power bounds all, at the highest clock, and of an epilogue."""

    stage: float
    fastest: float
    epilogue: float


# Of an H100 under sustained load, from some 100 times of 17 shapes, and at the highest clock, from 40 times
# of an H200 and 90 of an H100, of shapes that leave processors idle or are short. They only rank tiles.
SIZES = {
    Tile(): Pace(0.740, 0.62, 1.5),
    Tile(down=2): Pace(0.730, 0.62, 1.5),
    Tile(tokens=160, slot_tokens=80): Pace(0.630, 0.51, 1.3),
    Tile(tokens=128, slot_tokens=64, stages=5): Pace(0.543, 0.45, 0.7),
    Tile(tokens=128, slot_tokens=64, stages=5, across=2): Pace(0.505, 0.45, 0.7),
    Tile(blocks=1, tokens=256, slot_tokens=64): Pace(0.565, 0.40, 0.7),
    Tile(blocks=1, tokens=256, slot_tokens=64, down=2): Pace(0.500, 0.40, 0.7),
    Tile(blocks=1, stages=5): Pace(0.420, 0.321, 0.7),
    (THIRD := Tile(blocks=1, tokens=176, slot_tokens=176, slots=1, stages=5)): Pace(
        0.400, 0.300, 0.7
    ),
    dataclasses.replace(THIRD, down=2): Pace(0.395, 0.300, 0.7),
    Tile(blocks=1, tokens=160, slot_tokens=80, stages=5): Pace(0.385, 0.285, 0.6),
    Tile(blocks=1, tokens=128, slot_tokens=64, stages=6): Pace(0.350, 0.237, 0.5),
    Tile(blocks=1, tokens=96, slot_tokens=48, stages=6): Pace(0.290, 0.208, 0.5),
    (HALF := Tile(tokens=64, slot_tokens=32, stages=5)): Pace(0.320, 0.270, 0.5),
    Tile(blocks=1, tokens=64, slot_tokens=32, stages=8): Pace(0.195, 0.163, 0.4),
    Tile(blocks=1, tokens=32, slot_tokens=16, stages=8): Pace(0.180, 0.150, 0.1),
}
SHARERS = (1, 8)  # of a tile of the last wave, at most
# Of tiles of 128 outputs x so many tokens: how many CTAs of a cluster may share one. More of them, or larger
# tiles, gained nothing.
ALONG = {32: (2, 3, 4), 64: (2, 3)}
TOGETHER = {
    dataclasses.replace(tile, along=along): pace
    for tile, pace in SIZES.items()
    for along in (ALONG.get(tile.tokens, ()) if tile.blocks == 1 else ())
}
PACES = SIZES | TOGETHER
TILES = (*(dataclasses.replace(tile, splits=n) for tile in SIZES for n in SHARERS), *TOGETHER)
IDLE = 0.4  # of a busy processor's power: what idle ones leave makes the others faster
FAR_SHORTER = 0.9
# Microseconds, of which the second each is of 128 x 128 outputs: until the first stage, and what each part
# takes on its way through global memory, and through a cluster. Flags take as long for any number of parts.
LAUNCH, PART, SENT = (1.7, 0.4), (0.15, 0.65), (0.2, 0.3)
FLAGS, EXCHANGE = 3.5, 1.4
LOADS = 65e3  # bytes in a microsecond that a CTA gets for a tile of t
PASSED = 2.5e6  # bytes in a microsecond, of a pass over memory


def choose(tokens: int, k: int, f: int, *, processors: int = 132) -> Tile:
    """The tile with the shortest estimate: full waves at small outputs, the fewest bytes per
    product at large ones.

    >>> choose(65536, 4096, 14336).tokens, choose(2048, 768, 768).tokens
    (192, 96)
    """
    return candidates(tokens, k, f, processors=processors)[0]


def candidates(tokens: int, k: int, f: int, *, processors: int = 132) -> list[Tile]:
    """All tiles worth timing, the shortest estimate first."""
    possible = (tile for tile in TILES if tile.cluster <= processors and _is_tried(tile, tokens))
    plans = {tile: tile.schedule(tokens, k, f, processors) for tile in possible}
    differ = [
        tile for tile, plan in plans.items() if tile.fits(plan) and (tile.splits == 1 or plan.slots)
    ]
    return sorted(differ, key=lambda tile: estimate(tile, plans[tile], pl.cdiv(k, STEP)))


def _is_tried(tile: Tile, tokens: int) -> bool:
    """256 x 64 of one row of tiles alone, and 128 x 176 of up to three: of more tokens these were not the
    best by more than 1 %, or not timed."""
    rows = {HALF: 1, THIRD: 3}.get(dataclasses.replace(tile.size, down=1))
    return rows is None or tokens <= rows * tile.tokens


def suited(
    tile: Tile, measured: int, tokens: int, k: int, f: int, *, processors: int = 132
) -> Tile:
    """A tile that was measured to be the best for other tokens, unless another is by far the better one.

    Estimates of two tiles are off from each other by up to a tenth. By how much one was wrong for the
    number of tokens that was `measured`, where the other was not the better one, it is taken to be wrong
    here.

    >>> suited(Tile(), 2048, 2000, 768, 2304) == Tile()  # 99 tiles
    True
    >>> suited(Tile(), 2048, 1024, 768, 2304).rows  # 54 tiles
    128
    """
    other = choose(tokens, k, f, processors=processors)
    if not tile.fits(tile.schedule(tokens, k, f, processors)):
        return other
    if tile.size not in PACES:
        return tile

    def ratio(tokens: int) -> float:
        plans = [t.schedule(tokens, k, f, processors) for t in (other, tile)]
        if not other.fits(plans[0]):
            return 1.0
        stages = pl.cdiv(k, STEP)
        ours, theirs = (estimate(t, p, stages) for t, p in zip((other, tile), plans, strict=True))
        return ours / theirs

    return other if ratio(tokens) < FAR_SHORTER * min(1, ratio(measured)) else tile


def gating(tile: Tile, tokens: int, k: int, f: int, *, processors: int = 132) -> Tile | None:
    """The tile for a product with a gate whose best one it would be without; None where that and a pass of its
    own over what it makes are the shorter way.

    >>> tile = Tile(blocks=1, tokens=256, slot_tokens=64, down=2)
    >>> gating(tile, 2048, 4096, 28672).blocks, gating(tile, 2048, 4096, 28680)
    (2, None)
    """
    if gate_obstacle((k, f), tokens):
        return None
    if tile.gates:
        return tile
    stages = pl.cdiv(k, STEP)

    def microseconds(tile: Tile) -> float:
        return estimate(tile, tile.schedule(tokens, k, f, processors), stages)

    able = [t for t in candidates(tokens, k, f, processors=processors) if t.gates]
    best = min(able, key=microseconds, default=None)
    passing = LAUNCH[0] + 3 * tokens * f / PASSED
    if best is None or tile.size not in PACES or microseconds(best) > microseconds(tile) + passing:
        return None
    return best


def firsts(tokens: int, k: int, f: int, rank: int, *, processors: int = 132) -> list[Tile]:
    """All tiles for a product that makes an adapter's first one as well, the shortest estimate first. None of
    them shares those of the last wave, which gained nothing.

    >>> firsts(512, 5120, 5120, 80)[0].tokens
    176
    """

    def fits(tile: Tile) -> bool:
        plan = tile.schedule(tokens, k, f, processors, first_rank=rank)
        return first_tiles.obstacle(tile, plan, tile.firsts(tokens, k, rank)) is None

    possible = (
        tile
        for size in SIZES
        for tile in (size, dataclasses.replace(size, slices=2))
        if tile.cluster <= processors and _is_tried(tile, tokens) and fits(tile)
    )
    return sorted(
        possible, key=lambda tile: _estimate_with_first(tile, tokens, k, f, rank, processors)
    )


def _estimate_with_first(tile: Tile, tokens, k: int, f: int, rank: int, processors: int) -> float:
    """Tiles of t taken for tiles of y. Where t comes later than the first of these end, they wait."""
    plan, stages = tile.schedule(tokens, k, f, processors, first_rank=rank), pl.cdiv(k, STEP)
    cut = first_tiles.Cut.of(tile, k, rank)
    loaded = STEP * 2 * (tile.tokens + first_tiles.RANKS * cut.rank_blocks)
    late = stages * max(0, loaded / LOADS / cut.slices - PACES[tile.size].stage)
    return estimate(tile, plan, stages) + late


def estimate(tile: Tile, plan: Schedule, stages: int) -> float:
    """Microseconds of a product of so many stages a tile, to rank tiles by."""
    pace, area = PACES[tile.size], tile.rows * tile.tokens / 128**2
    launch, part, sent = (once + each * area for once, each in (LAUNCH, PART, SENT))
    work = plan.tiles / plan.processors
    longest = plan.waves + (plan.share / plan.steps if plan.left else 0)
    sharing = FLAGS + part * (plan.sharers - 1) if plan.slots else 0
    if tile.along > 1:
        longest = pl.cdiv(plan.steps, tile.along) / plan.steps
        work, sharing = work * longest, EXCHANGE + sent * (tile.along - 1)
    power = pace.stage * stages * (work + IDLE * (longest - work)) + IDLE * launch
    clock = pace.fastest * stages * longest + launch
    return max(power, clock) + pace.epilogue * (plan.waves + bool(plan.left)) + sharing
