"""Which processor of the GPU works on which tile: arithmetic alone, in or out of a kernel."""

import dataclasses

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which processor takes which steps of which tile; a processor is a cluster of CTAs.

    After whole waves of tiles, up to `splits` processors ("sharers") take a tile that is left over,
    each an equal share of its steps. With `splits` 0 all processors take part: beside as many
    sharers as fit, which take `share` steps each, the other processors ("fillers") take equal parts
    of what these leave of all tiles, one tile after the other.

    A unit of work is the steps [start, stop) of a tile. One that starts at 0 ends in the output,
    after the parts of the others have been added; each of these leaves its part in a slot.
    Those who wait are the last processors, and those they wait for never wait for a slot themselves.
    """

    tiles: int
    steps: int
    splits: int
    processors: int

    def __post_init__(self):
        if self.splits < 0:
            raise ValueError(f"splits is {self.splits}; it must be 0 (an even share) or more")
        if self.processors < 1:
            raise ValueError(f"{self}: fewer processors than a cluster has")

    @property
    def waves(self) -> int:
        return self.tiles // self.processors

    @property
    def left(self) -> int:
        return self.tiles % self.processors

    @property
    def sharers(self) -> int:
        if not self.left:
            return 1
        return min(self.splits or self.processors, self.processors // self.left, self.steps)

    @property
    def share(self) -> int:
        """Steps of a sharer; the last ones may have one less where there are no fillers."""
        return -(-self.steps // self.sharers) if not self.fillers else self._even_share

    @property
    def _even_share(self) -> int:
        return -(-self.left * self.steps // self.processors)

    @property
    def fillers(self) -> int:
        if self.splits or not self.left or self._even_share * self.sharers >= self.steps:
            return 0
        return self.processors - self.left * self.sharers

    @property
    def rest(self) -> int:
        """Steps of each tile that fillers take."""
        return self.steps - self.share * self.sharers if self.fillers else 0

    @property
    def slots(self) -> int:
        if not self.left:
            return 0
        return (self.sharers - 1) * self.left + (self.left + self.fillers if self.fillers else 0)

    def _fill(self, filler):
        """Where a filler starts in the rests of all tiles, laid end to end."""
        return _div(filler * (self.left * self.rest), self.fillers)

    def units(self, processor):
        """How many units a processor takes."""
        if not self.left:
            return jnp.int32(self.waves)
        busy = processor < self.fillers + self.left * self.sharers
        mine = jnp.where(busy, 1, 0)
        if self.fillers:
            first, stop = self._fill(processor), self._fill(processor + 1)
            count = _div(stop - 1, self.rest) - _div(first, self.rest) + 1
            mine = jnp.where(processor < self.fillers, count, mine)
        return self.waves + mine

    def unit(self, processor, number):
        """(tile, start, stop, slot, parts) of a unit: the slot it is left in, or -1 if it is
        finished here; the number of parts to be added then."""
        whole = number < self.waves
        member = processor - self.fillers
        tile = lax.rem(member, jnp.int32(max(self.left, 1)))
        rank = self.sharers - 1 - _div(member, max(self.left, 1))
        if self.fillers:
            start, stop = rank * self.share, (rank + 1) * self.share
        else:
            start, stop = (_div((rank + i) * self.steps, self.sharers) for i in (0, 1))
        slot = jnp.where(rank == 0, -1, (rank - 1) * self.left + tile)
        parts = self.sharers - 1
        if self.fillers:
            first, last = self._fillers_of(tile)
            parts = parts + last - first + 1
            begin, end = self._fill(processor), self._fill(processor + 1)
            filled = _div(begin, self.rest) + number - self.waves
            base = self.share * self.sharers - filled * self.rest
            is_filler = processor < self.fillers
            tile = jnp.where(is_filler, filled, tile)
            start = jnp.where(is_filler, base + jnp.maximum(begin, filled * self.rest), start)
            stop = jnp.where(is_filler, base + jnp.minimum(end, (filled + 1) * self.rest), stop)
            slot = jnp.where(is_filler, (self.sharers - 1) * self.left + processor + filled, slot)
        return (
            jnp.where(
                whole, number * self.processors + processor, self.waves * self.processors + tile
            ),
            jnp.where(whole, 0, start),
            jnp.where(whole, self.steps, stop),
            jnp.where(whole, -1, slot),
            jnp.where(whole | (slot >= 0), 0, parts),
        )

    def _fillers_of(self, tile):
        """The first and the last filler that have a part of a tile left over."""
        line = self.left * self.rest

        def filler_at(position):  # the one whose part has this position
            return _div((position + 1) * self.fillers + line - 1, line) - 1

        return filler_at(tile * self.rest), filler_at((tile + 1) * self.rest - 1)

    def slot_of(self, tile, part):
        """The slot of a tile's part."""
        tile = tile - self.waves * self.processors
        shared = part * self.left + tile
        if not self.fillers:
            return shared
        filler = self._fillers_of(tile)[0] + part - (self.sharers - 1)
        filled = (self.sharers - 1) * self.left + filler + tile
        return jnp.where(part < self.sharers - 1, shared, filled)


def _div(x, y: int):
    return lax.div(x, jnp.int32(y))
