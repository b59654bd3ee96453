"""Collectives in the text of compiled programs: what each moves, how often, and between whom."""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
BITS |= {"f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r'op_name="([^"]*)"')
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{[\d,{} ]*\}\})")
_ASKED = re.compile(
    r'"stablehlo\.(all_gather|reduce_scatter|all_reduce|all_to_all|collective_permute)"'
    r".*?replica_groups = dense<([\[\]\d, ]+)>.*?(?:>|\)) : \(tensor.*?\) -> (\([^)]*\)|\S+)",
    re.DOTALL,
)

_DTYPES = {"i1": "pred", "i8": "s8", "ui8": "u8", "i32": "s32", "ui32": "u32"}  # StableHLO's, XLA's

Group = tuple[int, ...]
Key = tuple[str, int, Group]


class Collective(NamedTuple):
    """One array that devices exchange.

    Attributes:
      kind: one of `KINDS`.
      dtype: as XLA writes it, such as "bf16".
      elements: of the result on one device.
      group: places of devices in the program's order that take part with the first one of them.
      count: how often a step runs it.
      name: of the operation that it comes from.
      narrow: whether what computes its operands holds 16-bit numbers.
    """

    kind: str
    dtype: str
    elements: int
    group: Group
    count: int
    name: str
    narrow: bool = False

    @property
    def key(self) -> Key:
        return self.kind, self.elements, self.group

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, as rings do it.

        >>> Collective("all-gather", "bf16", 800, tuple(range(8)), 3, "").sent
        4200.0
        """
        k, nbytes = len(self.group), self.elements * BITS[self.dtype] / 8
        shares = {
            "all-gather": (k - 1) / k,  # of the gathered result
            "reduce-scatter": k - 1,  # times the result, which is a share already
            "all-reduce": 2 * (k - 1) / k,  # scattered, then gathered
            "all-to-all": (k - 1) / k,
            "collective-permute": 1,
        }
        return self.count * nbytes * shares[self.kind]


def collectives(text: str) -> list[Collective]:
    """The collectives that one call of a compiled program runs, but for those of one device alone.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: how often something runs is unknown, or the text is not understood.
    """
    entry, bodies = computations(text)

    @functools.cache
    def found(name: str) -> tuple[Collective, ...]:
        result = []
        for line in bodies[name]:
            if not (match := _INSTRUCTION.match(line)):
                continue
            operation = match[3]
            if operation.removesuffix("-start") in KINDS:
                if operation.endswith("-start"):
                    raise ValueError(f"{operation} is not counted: {line.strip()[:200]}")
                narrow = _narrow(line[match.end() :], bodies[name], bodies)
                result += _parsed(operation, match[2], line, narrow)
                continue
            inner = [c for name in called(line) for c in found(name)]
            if not inner:
                continue
            if operation == "conditional":
                raise ValueError(f"collectives under a condition: {line.strip()[:200]}")
            times = 1
            if operation == "while":
                if not (trips := _TRIPS.search(line)):
                    raise ValueError(f"unknown trip count of {match[1]}, which has collectives")
                times = int(trips[1])
            result += [c._replace(count=times * c.count) for c in inner]
        return tuple(result)

    return list(found(entry))


def asked(lowered: str) -> dict[Key, set[str]]:
    """The dtypes that a program asks for, by kind, elements and group of its collectives.

    Args:
      lowered: `jax.stages.Lowered.as_text()`, in StableHLO: without those that the partitioner adds.
    """
    found: dict[Key, set[str]] = {}
    for kind, groups, results in _ASKED.findall(lowered):
        group = tuple(json.loads(groups)[0]) if "[" in groups else (int(groups),)
        for shape in re.findall(r"tensor<([^>]*)>", results):
            *sizes, dtype = shape.split("x")
            key = (kind.replace("_", "-"), math.prod(map(int, sizes)), group)
            found.setdefault(key, set()).add(_DTYPES.get(dtype, dtype))
    return found


def as_asked(found: list[Collective], dtypes: Mapping[Key, set[str]]) -> list[Collective]:
    """Collectives in the dtype that the program asked for: XLA widens 16-bit ones on a CPU.

    Those that nobody asked for, because the compiler added them, stay as they are. Where both float32
    and 16 bits are asked for in one kind, size and group, those count as narrow whose operands were so.

    Args:
      found: of `collectives`; dtypes: of `asked`, of the same program.
    """
    result = []
    for c in found:
        floats = dtypes.get(c.key, set()) & {"bf16", "f16", "f32"}
        widened = c.dtype == "f32" and floats and (c.narrow or "f32" not in floats)
        result.append(c._replace(dtype=min(floats)) if widened else c)
    return result


def axes_of(group: Group, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which the devices of a group lie.

    >>> axes_of((0, 2, 4, 6), {"data": 2, "fsdp": 2, "tensor": 2})
    ('data', 'fsdp')

    Raises:
      ValueError: the group is not all devices along some axes.
    """
    strides = {a: math.prod(list(sizes.values())[i + 1 :]) for i, a in enumerate(sizes)}
    places = [[place // strides[a] % sizes[a] for a in sizes] for place in group]
    varying = [a for a, column in zip(sizes, zip(*places, strict=True), strict=True) if len(set(column)) > 1]  # fmt: skip
    if math.prod(sizes[a] for a in varying) != len(group):
        raise ValueError(f"the group {group} is not all devices along {varying} of {dict(sizes)}")
    return tuple(varying)


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of a program's entry, and the lines of each computation."""
    entry, bodies, current = None, {}, None
    for line in text.splitlines():
        if (match := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None:
            current.append(line)
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return entry, bodies


def called(line: str) -> Iterator[str]:
    """The computations that an instruction calls."""
    for _, names in _CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in names.strip("{}").split(",") if name)


def _narrow(operands: str, body: list[str], bodies: Mapping[str, list[str]]) -> bool:
    names = set(re.findall(r"%([\w.-]+)", operands.partition(")")[0]))
    for line in body:
        if (match := _INSTRUCTION.match(line)) and match[1] in names:
            inside = [inner for name in called(line) for inner in bodies[name]]
            if any(re.search(r"\bb?f16\[", text) for text in (line, *inside)):
                return True
    return False


def _parsed(kind: str, shapes: str, line: str, narrow: bool) -> list[Collective]:
    name = _NAME.search(line)
    group = _group(kind, line)
    if len(group) == 1:
        return []
    arrays = [(d, math.prod(map(int, s.split(","))) if s else 1) for d, s in _ARRAY.findall(shapes)]
    if not arrays or any(dtype not in BITS for dtype, _ in arrays):
        raise ValueError(f"no known shape in {line.strip()[:200]}")
    if kind == "all-to-all" and len(arrays) > 1:  # one array, in a piece for each device
        arrays = [(arrays[0][0], sum(elements for _, elements in arrays))]
    name = name[1] if name else ""
    return [Collective(kind, d, elements, group, 1, name, narrow) for d, elements in arrays]


def _group(kind: str, line: str) -> Group:
    if match := _LISTED.search(line):
        groups = json.loads(match[1].replace("{", "[").replace("}", "]"))
        if kind == "collective-permute":
            return tuple(sorted(next(pair for pair in groups if pair[0] != pair[1])))
        return tuple(groups[0])
    if match := _IOTA.search(line):
        return _iota(match[3], match[4])[: int(match[2])]
    if match := _MESH.search(line):
        sizes = dict(part.split("=") for part in match[1].split(","))
        chosen = [part.strip() for part in match[4].split(",")]
        if set(chosen) <= sizes.keys():
            shape = ",".join(sizes.values())
            order = [i for i, name in enumerate(sizes) if name not in chosen]
            order += [list(sizes).index(name) for name in chosen]
            devices = _iota(match[2] or shape, match[3])
            size = math.prod(int(sizes[name]) for name in chosen)
            return tuple(devices[i] for i in _iota(shape, ",".join(map(str, order)))[:size])
    raise ValueError(f"no replica groups that are understood in {line.strip()[:300]}")


def _iota(shape: str, order: str | None) -> Group:
    """Numbers 0, 1, ... in an array of such a shape, read after its axes were put in an order."""
    sizes = [int(x) for x in shape.split(",")]
    axes = [int(x) for x in order.split(",")] if order else range(len(sizes))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    steps = itertools.product(*(range(sizes[axis]) for axis in axes))
    return tuple(sum(i * strides[a] for i, a in zip(at, axes, strict=True)) for at in steps)
