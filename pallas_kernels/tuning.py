"""Measured configurations: tables in `tuned/`, one per kind of device, made by `python -m
pallas_kernels.tune`.

An entry says which configuration of a kernel is the fastest for a shape, what it takes, and what
the dense product takes in the same run. Devices of one compute capability share their entries; of
one shape a device's own counts. An entry of T tokens stands for half to twice as many,
[T / 2, 2 T]; the largest T of a shape for any more. Where two would do, the nearer one by ratio
counts, and of equally near ones the larger. Where its tile of `nm_matmul` suits other tokens by far
the worse, that of the rule runs (`matmul_tiles.suited`). Other sizes have no entry: kernels then choose
a configuration by rule, and `verdict` goes by the nearest shape.
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.mosaic.support import FEW_TOKENS

FOLDER = Path(__file__).parent / "tuned"
OPS = ("nm_matmul", "few_tokens", "nm_sddmm", "with_first")
DTYPE_CLASSES = {"bfloat16": "16-bit", "float16": "16-bit", "float32": "32-bit"}
FIELDS = {
    "op": str,
    "dtype": str,
    "tokens": int,
    "in": int,
    "out": int,
    "config": dict,
    "sparse_us": (int, float),
    "dense_us": (int, float),
    "xla_us": (int, float),
}
OPTIONAL = {"xla_us"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest configuration for x (tokens, in) and an (in, out) matrix; microseconds. Of "with_first",
    `dense_us` is of no dense product, but of nm_matmul with an adapter's first product apart, and both are of
    a busy device or of one that rests between, whichever of these leaves it less to gain.

    `xla_us` is what runs where the kernel does not: the dense product, and the way from compressed
    to dense or back. Only measured where the kernel is slower than a dense product alone. `device`
    is the one it was measured on.
    """

    op: str
    dtype: str
    tokens: int
    size: tuple[int, int]
    config: dict[str, int]
    sparse_us: float
    dense_us: float
    xla_us: float | None = None
    device: str = dataclasses.field(default="", repr=False, compare=False)

    @property
    def key(self) -> tuple:
        return self.op, self.dtype, self.size, self.tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "in": self.size[0],
            "out": self.size[1],
            "config": self.config,
            "sparse_us": self.sparse_us,
            "dense_us": self.dense_us,
        } | ({} if self.xla_us is None else {"xla_us": self.xla_us})


@dataclasses.dataclass(frozen=True)
class Table:
    """The entries of one kind of device, or those that count on it."""

    device: str
    capability: str
    entries: tuple[Entry, ...]

    def entry(self, op: str, tokens: int, size: tuple[int, int], dtype: str) -> Entry | None:
        """The entry that stands for this shape, by the rule of the module."""
        known = self._shapes.get((op, dtype, size))
        if not known:
            return None
        found = min(known, key=lambda entry: (_ratio(entry.tokens, tokens), -entry.tokens))
        largest = max(known, key=lambda entry: entry.tokens)
        if _ratio(found.tokens, tokens) <= 1 or (found == largest and tokens > found.tokens):
            return found
        return None

    def nearest(self, op: str, tokens: int, size: tuple[int, int], dtype: str) -> Entry | None:
        """The entry of this op whose tokens, in and out are least octaves away, summed."""
        wanted = (tokens, *size)
        known = [entry for entry in self.entries if (entry.op, entry.dtype) == (op, dtype)]

        def distance(entry: Entry) -> float:
            return sum(map(_ratio, (entry.tokens, *entry.size), wanted))

        return min(known, key=lambda entry: (distance(entry), entry.key), default=None)

    @functools.cached_property
    def _shapes(self) -> dict[tuple, list[Entry]]:
        shapes: dict[tuple, list[Entry]] = {}
        for entry in self.entries:
            shapes.setdefault((entry.op, entry.dtype, entry.size), []).append(entry)
        return shapes


def kernel_of(
    op: str,
    tokens: int,
    k: int,
    f: int,
    dtype,
    device_kind: str,
    capability: str | None = None,
    *,
    folder: Path = FOLDER,
) -> str:
    """The kernel that runs `op` for x (tokens, k) and a (k, f) matrix.

    nm_matmul has one of its own for few tokens. As many as that takes at the most, or more than half of
    them, are for the kernel for many where a device ran both and that was the faster one. It takes as long
    for fewer tokens than were measured; that for few takes less, in proportion, where it was measured
    with fewer as well.
    """
    if op != "nm_matmul" or tokens > FEW_TOKENS:
        return op
    if 2 * tokens <= FEW_TOKENS:
        return "few_tokens"
    known, kind = _known(device_kind, capability, folder), dtype_class(dtype)
    few, many = (known.entry(each, tokens, (k, f), kind) for each in ("few_tokens", "nm_matmul"))
    if few is None or many is None or (few.tokens, few.device) != (many.tokens, many.device):
        return "few_tokens"
    less, microseconds = known.entry("few_tokens", few.tokens // 4, (k, f), kind), few.sparse_us
    if less is not None and less.device == few.device and less.tokens < tokens < few.tokens:
        each = (few.sparse_us - less.sparse_us) / (few.tokens - less.tokens)
        microseconds -= each * (few.tokens - tokens)
    return "nm_matmul" if many.sparse_us < microseconds else "few_tokens"


class Verdict(NamedTuple):
    """Whether the sparse kernel is at least as fast as the dense product, and how that is known."""

    use_sparse: bool
    reason: str


def best(
    op: str,
    tokens: int,
    k: int,
    f: int,
    dtype,
    device_kind: str,
    capability: str | None = None,
    *,
    folder: Path = FOLDER,
) -> Entry | None:
    """The measured entry for x (tokens, k) and a (k, f) matrix, or None if there is none.

    What was not measured on a device goes by another device of its compute capability.

    Args:
      op: "nm_matmul", "few_tokens" (the same product, by the kernel for few tokens), "nm_sddmm", or
        "with_first" (nm_matmul with an adapter, of which it makes both products).
      dtype: of x; bfloat16 and float16 share their entries.
      device_kind: as `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3".
      capability: the device's compute capability, such as "9.0".
    """
    known = _known(device_kind, capability, folder)
    return known.entry(op, tokens, (k, f), dtype_class(dtype))


def verdict(
    op: str,
    tokens: int,
    k: int,
    f: int,
    dtype,
    device_kind: str,
    capability: str | None = None,
    *,
    folder: Path = FOLDER,
) -> Verdict | None:
    """Whether to run the kernel or the dense product for a shape, from what is measured.

    The shape's own entry decides if it has one. Else that of the nearest measured shape of the
    same op: the fewest octaves away in tokens, in and out together. What was not measured on a
    device goes by another device of the same compute capability. None: nothing of this kind is
    measured.

    Args:
      op, dtype, device_kind, capability: as for `best`.
    """
    kind = dtype_class(dtype)
    known = _known(device_kind, capability, folder)
    entry, name = known.entry(op, tokens, (k, f), kind), "measured"
    if entry is None:
        entry = known.nearest(op, tokens, (k, f), kind)
        if entry is None:
            return None
        name = f"nearest shape measured ({_shape(entry)})"
    elif entry.tokens != tokens:
        name = f"measured with {entry.tokens} tokens"
    where = "on" if entry.device == device_kind else f"not on {device_kind} but on"
    times = f"dense {entry.dense_us:.4g} us, sparse {entry.sparse_us:.4g} us"
    if entry.xla_us is not None:
        times += f", dense from compressed {entry.xla_us:.4g} us"
    return Verdict(
        entry.sparse_us <= (entry.xla_us or entry.dense_us),
        f"{name}, {where} {entry.device}: {times}",
    )


def load(device_kind: str, folder: Path = FOLDER) -> Table | None:
    """The table of a kind of device, or None; read once.

    Raises:
      ValueError: it holds something else; names the file and the entry.
    """
    return _load(folder / f"{slug(device_kind)}.json")


def forget() -> None:
    """Tables are read anew."""
    _load.cache_clear()
    _known.cache_clear()


def slug(device_kind: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def dtype_class(dtype) -> str:
    """The class of a dtype; those of one class take the same time.

    >>> dtype_class("bfloat16"), dtype_class("float16")
    ('16-bit', '16-bit')
    """
    name = getattr(dtype, "name", str(dtype))
    if name not in DTYPE_CLASSES:
        raise ValueError(f"dtype is {name}; it must be one of {', '.join(DTYPE_CLASSES)}")
    return DTYPE_CLASSES[name]


@functools.cache
def _load(path: Path) -> Table | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    for name in ("device", "capability", "entries"):
        if name not in found:
            raise ValueError(f"{path.name} lacks {name!r}")
    if path.stem != slug(found["device"]):
        raise ValueError(f"{path.name} holds the table of {found['device']}")
    entries = [
        dataclasses.replace(_entry(path.name, i, entry), device=found["device"])
        for i, entry in enumerate(found["entries"])
    ]
    seen: set[tuple] = set()
    for i, entry in enumerate(entries):
        if entry.key in seen:
            raise ValueError(f"{path.name}, entry {i}: {entry.op} {_shape(entry)} is there twice")
        seen.add(entry.key)
    return Table(found["device"], found["capability"], tuple(entries))


def _entry(name: str, index: int, found: Any) -> Entry:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{name}, entry {index}: {what}; make it anew: pallas_kernels.tune")

    if not isinstance(found, dict) or found.keys() | OPTIONAL != FIELDS.keys():
        raise wrong(f"it must have {', '.join(FIELDS)}, and has {found}")
    for field, kind in ((field, FIELDS[field]) for field in found):
        if not isinstance(found[field], kind) or isinstance(found[field], bool):
            raise wrong(f"{field} is {found[field]!r}")
    if found["op"] not in OPS:
        raise wrong(f"op is {found['op']!r}; it must be one of {', '.join(OPS)}")
    if found["dtype"] not in DTYPE_CLASSES.values():
        raise wrong(f"dtype is {found['dtype']!r}")
    for field in found.keys() & {"tokens", "in", "out", "sparse_us", "dense_us", "xla_us"}:
        if not 0 < found[field] < math.inf:
            raise wrong(f"{field} is {found[field]}; it must be positive")
    if not all(type(value) is int for value in found["config"].values()):
        raise wrong(f"config is {found['config']}; its values must be integers")
    return Entry(
        found["op"],
        found["dtype"],
        found["tokens"],
        (found["in"], found["out"]),
        found["config"],
        found["sparse_us"],
        found["dense_us"],
        found.get("xla_us"),
    )


@functools.cache
def _known(device_kind: str, capability: str | None, folder: Path) -> Table:
    """The device's own entries, and what it lacks from other devices of its capability."""
    others = (table for table in map(_load, sorted(folder.glob("*.json"))) if table is not None)
    related = [t for t in others if capability is not None and t.capability == capability]
    entries: dict[tuple, Entry] = {}
    for table in (load(device_kind, folder), *related):
        for entry in () if table is None else table.entries:
            entries.setdefault(entry.key, entry)
    return Table(device_kind, capability or "", tuple(entries.values()))


def _ratio(a: int, b: int) -> float:
    """Octaves between two sizes."""
    return abs(math.log2(a / b))


def _shape(entry: Entry) -> str:
    return f"{entry.tokens} x {entry.size[0]} x {entry.size[1]}"
