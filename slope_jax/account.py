"""The table of `slope_jax.memory`: kinds of bytes by parts of a model, beside those of a dense one."""

import dataclasses
from collections.abc import Iterable

PRUNED, KERNELS, HEADS = "pruned kernels", "dense kernels", "heads"
PARTS = (PRUNED, KERNELS, HEADS, "embeddings", "biases", "norms", "adapters", "other")
PARAMETERS, METADATA, GRADIENTS = "parameters", "metadata", "gradients"
CAST, TRANSPOSED, ACTIVATIONS = "cast copies", "transposed copies", "activations"
CACHED = "keys and values"


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind (such as "mu") for one part of the model (such as "embeddings").

    `dense_nbytes` are those of the dense model in the same precisions, None if it is not known.
    """

    kind: str
    part: str
    nbytes: int
    dense_nbytes: int | None


@dataclasses.dataclass(frozen=True)
class Memory:
    """The rows of `memory`; printing it gives a table of kinds by parts."""

    rows: tuple[MemoryRow, ...]

    @property
    def state(self) -> tuple[MemoryRow, ...]:
        """All rows but the activations."""
        return tuple(row for row in self.rows if row.kind != ACTIVATIONS)

    @property
    def state_bytes(self) -> int:
        return sum(row.nbytes for row in self.state)

    @property
    def dense_state_bytes(self) -> int | None:
        return _sum(row.dense_nbytes for row in self.state)

    @property
    def ratio(self) -> float | None:
        """State over dense state; None where there is no dense model to compare with."""
        dense = self.dense_state_bytes
        return self.state_bytes / dense if dense else None

    def total(self, kind: str | None = None, part: str | None = None) -> int:
        """Bytes of a kind, of a part, or of both; of everything, activations included."""
        return sum(row.nbytes for row in self._select(kind, part))

    def dense_total(self, kind: str | None = None, part: str | None = None) -> int | None:
        """As `total`, of the dense model."""
        return _sum(row.dense_nbytes for row in self._select(kind, part))

    def _select(self, kind, part):
        return [r for r in self.rows if kind in (None, r.kind) and part in (None, r.part)]

    def __str__(self) -> str:
        parts = [part for part in PARTS if any(row.part == part for row in self.state)]
        kinds = dict.fromkeys(row.kind for row in self.rows)
        lines = [("", *parts, "all", "share", "dense", "of dense")]
        for kind in kinds:
            cells = [_size(self.total(kind, part)) for part in parts]
            if kind == ACTIVATIONS:
                lines.append(self._line("state", [""] * len(parts), self.state))
                cells = [""] * len(parts)
            lines.append(self._line(kind, cells, self._select(kind, None)))
        if ACTIVATIONS not in kinds:
            cells = [_size(self.total(part=part)) for part in parts]
            lines.append(self._line("state", cells, self.state))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _line(self, name: str, cells: list[str], rows: Iterable[MemoryRow]) -> tuple[str, ...]:
        ours, dense = sum(row.nbytes for row in rows), _sum(row.dense_nbytes for row in rows)
        share = f"{ours / self.state_bytes:.1%}" if name != ACTIVATIONS else ""
        ratio = f"{ours / dense:.3f}" if dense else "-"
        return (name, *cells, _size(ours), share, "-" if dense is None else _size(dense), ratio)


def _sum(numbers: Iterable[int | None]) -> int | None:
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
