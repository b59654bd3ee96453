"""How `nm_sddmm` may be cut into tiles, and which of these ways to prefer."""

import collections
import dataclasses
import functools
import itertools
import math

import jax.experimental.pallas as pl

from pallas_kernels.mosaic import frame
from pallas_kernels.mosaic.frame import CONSUMERS, STEP
from pallas_kernels.mosaic.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Tile:
    """A CTA takes 128 * blocks outputs x `columns` inputs at a time, `stages` deep.

    Clusters of `down` x `across` CTAs take neighbouring tiles, and share by multicast what they
    have in common: the inputs along the outputs (`down`), the outputs along the inputs. Tiles are
    visited in snakes `snake` wide along the outputs. At most `splits` clusters share a tile of the
    last wave; 0 for an even share for all (`Schedule`).
    """

    blocks: int = 2
    columns: int = 192
    stages: int = 4
    down: int = 1
    across: int = 1
    snake: int = 8
    splits: int = 1

    def __post_init__(self):
        if self.columns % 32 or not 64 <= self.columns <= 256:
            raise ValueError(f"{self}: columns must be a multiple of 32 from 64 to 256")
        if self.blocks < 1 or self.blocks * self.columns > 384:
            raise ValueError(f"{self}: blocks * columns is at most 384, a thread's accumulators")
        if self.down < 1 or self.across < 1 or self.cluster > 8:
            raise ValueError(f"{self}: a cluster has 1 to 8 CTAs")
        frame.check_shared_memory(self)

    @property
    def rows(self) -> int:
        return 64 * self.blocks * CONSUMERS

    @property
    def cluster(self) -> int:
        return self.down * self.across

    def grid(self, k: int, f: int) -> tuple[int, int]:
        """Clusters along the outputs and the inputs."""
        return pl.cdiv(f, self.rows * self.down), pl.cdiv(k, self.columns * self.across)

    def schedule(self, tokens: int, k: int, f: int, processors: int) -> Schedule:
        tiles, steps = math.prod(self.grid(k, f)), pl.cdiv(tokens, STEP)
        return Schedule(tiles, steps, self.splits, frame.clusters(processors, self.cluster))

    @property
    def boxes(self) -> tuple[int, int]:
        """Blocks of 64 outputs, and of 64 inputs, of a stage."""
        return self.rows // 64, pl.cdiv(self.columns, 64)

    @property
    def shared_memory(self) -> int:
        return self.stages * sum(self.boxes) * 64 * STEP * 2


# Blocks, columns and stages that fit the register file and shared memory.
MEASURED = ((2, 192, 4), (1, 256, 4), (2, 128, 4), (1, 192, 5), (1, 128, 6))
# For the tuner: taken where they were measured to be the best.
UNTIMED = ((2, 160, 4), (1, 224, 4), (1, 160, 5), (1, 96, 6))
CLUSTERS = ((1, 1), (2, 1), (1, 2))
TILES = tuple(
    Tile(blocks, columns, stages, down, across)
    for (blocks, columns, stages), (down, across) in itertools.product(MEASURED + UNTIMED, CLUSTERS)
)
# Larger clusters do not fill 132 processors. These gain where their tiles are 120: 768 x 3072 and 3072 x 768.
TILES += (Tile(1, 160, 5, down=4), Tile(1, 160, 5, down=2, across=2))
MOST_CANDIDATES, MOST_OF_A_SIZE = 24, 4

# Of an H100, fitted to some 40 times under sustained load. A CTA runs at `CLOCK` or at what the L2
# cache delivers to all; the whole no faster than the power allows, as if at `SUSTAINED`. In GHz,
# microseconds and bytes per microsecond.
CLOCK, SUSTAINED, LOAD_BYTES = 1.75, 1.42, 11.8e6
IDLE_POWER = 0.4  # of what busy CTAs draw
MULTICAST = {1: 1.0, 2: 0.85}  # of the loads without it, by the size of a cluster
OF_LARGER = 0.75
LAUNCH, CLEAR_FLAGS = 3.5, 1.0
# Of 128 x 128 outputs: the epilogue, leaving a part, adding one.
EPILOGUE, LEAVE, ADD = 0.8, 1.2, 0.5


def estimate(tokens: int, k: int, f: int, tile: Tile, processors: int = 132) -> float:
    """Microseconds, to rank tiles by."""
    plan = tile.schedule(tokens, k, f, processors)
    area = tile.rows * tile.columns / 128**2
    cycles = 512 * area  # of a stage
    loads = sum(tile.boxes) * MULTICAST.get(tile.cluster, OF_LARGER)

    def stage(active: int) -> float:
        delivery = active * tile.cluster * loads * 64 * STEP * 2 / LOAD_BYTES
        return max(cycles / CLOCK / 1e3, delivery)

    path = plan.waves * plan.steps * stage(plan.processors)
    longest = plan.waves * plan.steps
    overhead = LAUNCH + plan.waves * EPILOGUE * area
    if plan.left:
        parts = plan.sharers - 1 + 2 * bool(plan.fillers)
        sharing = EPILOGUE * area + bool(parts) * (CLEAR_FLAGS + area * (LEAVE + ADD * parts))
        steps = plan.share
        if plan.fillers:
            pieces = plan.left / plan.fillers + 1
            sharing = max(sharing, CLEAR_FLAGS + area * (LEAVE + EPILOGUE) * pieces)
            steps = max(steps, plan.left * plan.rest / plan.fillers)
        path += steps * stage(plan.fillers + plan.left * plan.sharers)
        longest += steps
        overhead += sharing
    busy = plan.tiles * plan.steps * cycles / (plan.processors * SUSTAINED) / 1e3
    idle = max(0.0, longest * cycles / SUSTAINED / 1e3 - busy) + overhead
    filled = plan.left * plan.rest / (plan.tiles * plan.steps)
    busy *= 1 + filled**2  # fillers are at other tokens than the rest, and share no loads
    busy *= 0.96 + 0.06 * loads / (6 * area)  # moving bytes takes power too
    return max(path + overhead, busy + IDLE_POWER * idle)


@functools.lru_cache
def ranked(tokens: int, k: int, f: int, processors: int) -> tuple[Tile, ...]:
    """All configurations that differ, the likeliest first."""
    found = {}
    for tile in TILES:
        if processors < tile.cluster:
            continue
        rows, columns = tile.grid(k, f)
        if tile.cluster > 1 and rows * columns == 1:
            continue  # no neighbour to share with
        for splits in range(9):
            split = dataclasses.replace(tile, splits=splits)
            plan = split.schedule(tokens, k, f, processors)
            key = tile, plan.sharers, plan.fillers
            if key not in found:
                found[key] = estimate(tokens, k, f, split, processors), split
    return tuple(tile for _, tile in sorted(found.values(), key=lambda entry: entry[0]))


def candidates(tokens: int, k: int, f: int, *, processors: int = 132) -> list[Tile]:
    """Configurations worth timing: the likeliest of each size, likeliest first, then the second of
    each size, and so on, since the estimate knows one size from another worst."""
    turns: list[list[Tile]] = [[] for _ in range(MOST_OF_A_SIZE)]
    of_size = collections.Counter()
    for tile in ranked(tokens, k, f, processors):
        if of_size[_size(tile)] < MOST_OF_A_SIZE:
            turns[of_size[_size(tile)]].append(tile)
        of_size[_size(tile)] += 1
    return [tile for turn in turns for tile in turn][:MOST_CANDIDATES]


def _size(tile: Tile) -> tuple[int, int, int, bool]:
    return tile.blocks, tile.columns, tile.stages, tile.cluster > 2


def choose(tokens: int, k: int, f: int, *, processors: int = 132) -> Tile:
    """The tile with the shortest estimate, among the sizes that were measured.

    >>> tile = choose(8192, 1024, 4096)
    >>> tile.rows * tile.columns * 132 > 1024 * 4096
    True
    """
    measured = ranked(tokens, k, f, processors)
    return next(tile for tile in measured if _size(tile) in {(*size, False) for size in MEASURED})
