"""What the records of ``benchmarks.kernels`` say, as Markdown: a summary, and all of it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, slug
from benchmarks.tables import markdown, records, sources

MISSING = "Not measured yet: `python -m benchmarks.kernels --peer=cusparselt`."
LARGE = 4096 * 4096  # few tokens are compared on matrices of at least so many entries
FEWEST = 16  # tokens, beyond which multiplying takes as long as reading the weights
DENSE = "†"  # the dispatcher runs the dense product
TITLES = {
    "matmul": "nm_matmul",
    "epilogue": "nm_matmul with bias, activation or gate",
    "adapters": "nm_matmul with adapters",
    "sddmm": "nm_sddmm",
    "transpose": "nm_transpose",
    "few": "nm_matmul, few tokens",
}


@dataclasses.dataclass(frozen=True)
class Device:
    """All records of one kind of device."""

    name: str
    records: tuple[dict[str, Any], ...]

    @property
    def slug(self) -> str:
        return slug(self.name)

    def results(self, kind: str) -> list[dict[str, Any]]:
        return [r for record in self.records for r in record["results"] if r["kind"] == kind]

    def beside_peer(self) -> list[dict[str, Any]]:
        """Products with cuSPARSELt's numbers."""
        return [r for r in self.results("matmul") if r["peer_us"]]


def devices(folder: Path = RESULTS) -> list[Device]:
    """The devices that there are records of, by name.

    Raises:
      ValueError: two records hold the same product.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records("kernels", folder):
        found.setdefault(record["device"], []).append(record)
    made = [Device(name, tuple(parts)) for name, parts in sorted(found.items())]
    for device in made:
        seen: set[tuple] = set()
        for r in (r for kind in TITLES for r in device.results(kind)):
            key = _key(r)
            if key in seen:
                raise ValueError(f"{device.name}: two records hold {dict(zip(KEY, key))}")  # noqa: B905
            seen.add(key)
    return made


KEY = ("tokens", "in", "out", "dtype", "epilogue", "rank", "kind")


def _key(r: dict[str, Any]) -> tuple:
    return tuple(r.get(name) for name in KEY)


def summary(folder: Path = RESULTS) -> str:
    """One row for each kind of product and class of tokens, and every loss by name."""
    found = devices(folder)
    if not found:
        return MISSING
    return "\n\n".join(_summary(device) for device in found)


def full(
    folder: Path = RESULTS, names: Callable[["Device"], dict[str, str]] = lambda device: {}
) -> str:
    """All results: a table for each kind of product, sizes against tokens.

    Args:
      names: the files of a device's pictures, beside the page, by what they show.
    """
    found = devices(folder)
    if not found:
        return MISSING
    pages = []
    for device in found:
        parts = [f"## {device.name}", _summary(device)]
        parts += [f"![{shown}]({name})" for shown, name in names(device).items()]
        for kind, title in TITLES.items():
            if rows := device.results(kind):
                parts.append(f"### {title}\n\n{TABLES.get(kind, _speedups)(rows)}")
        if peers := _peers(device):
            parts.append(f"### Beside cuSPARSELt\n\n{peers}")
        if left := _left_out(device):
            parts.append(left)
        pages.append("\n\n".join(parts))
    return "\n\n".join(pages)


def geometric_mean(numbers: Iterable[float]) -> float:
    """
    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    numbers = list(numbers)
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def _summary(device: Device) -> str:
    header = (
        "product",
        "tokens",
        "shapes",
        "against",
        "mean",
        "worst",
        "best",
        "dispatched, worst",
    )
    rows = []
    for kind, tokens, chosen, dense in _classes(device):
        ratios = [r["speedup"] for r in chosen]
        through = [max(r["speedup"], 0) if _is_sparse(r) else 1.0 for r in chosen]
        rows.append(
            (
                TITLES[kind],
                tokens,
                str(len(chosen)),
                dense,
                f"{geometric_mean(ratios):.2f}",
                f"{min(ratios):.2f}",
                f"{max(ratios):.2f}",
                f"{min(through):.2f}",
            )
        )
    text = [markdown(header, rows)] if rows else []
    text += [line for line in (_costs(device), _bandwidth(device), _beside(device)) if line]
    text.append(_losses(device))
    text.append(_errors(device))
    return "\n\n".join(line for line in text if line) + sources(device.records)


def _classes(device: Device):
    for kind, dense in (
        ("matmul", "dense"),
        ("epilogue", "dense, fused by XLA"),
        ("sddmm", "dense x.T @ dy"),
    ):
        found = device.results(kind)
        fewer = sorted({r["tokens"] for r in found if r["tokens"] < 8192})
        for chosen in (
            [r for r in found if r["tokens"] >= 8192],
            *([r for r in found if r["tokens"] == tokens] for tokens in fewer),
        ):
            if chosen:
                yield kind, _tokens(chosen), chosen, dense
    for name, large in (("4096² and larger", True), ("smaller", False)):
        few = [r for r in device.results("few") if (r["in"] * r["out"] >= LARGE) == large]
        for chosen in (
            [r for r in few if r["tokens"] <= FEWEST],
            [r for r in few if r["tokens"] > FEWEST],
        ):
            if chosen:
                yield "few", f"{_tokens(chosen)}; {name}", chosen, "dense"


def _tokens(rows: list[dict[str, Any]]) -> str:
    """Which numbers of tokens were measured: "16", or "1 to 64"."""
    least, most = (f"{f(row['tokens'] for row in rows):,}" for f in (min, max))
    return least if least == most else f"{least} to {most}"


def _costs(device: Device) -> str:
    found = device.results("adapters")
    if not found:
        return ""
    fused = [r["sparse_us"] / r["bare_us"] - 1 for r in found]
    whole = [r["whole_us"] / r["bare_us"] - 1 for r in found]
    return (
        f"Adapters of rank 1.56 % of the hidden size add {_percent(fused)} to the product (worst"
        f" {max(fused):.1%}), and {_percent(whole)} with x @ L (worst {max(whole):.1%}); geometric"
        f" mean of {len(found)} shapes."
    )


def _percent(costs: list[float]) -> str:
    return f"{geometric_mean(1 + cost for cost in costs) - 1:.1%}"


def _bandwidth(device: Device) -> str:
    lines = []
    for source in ("float32", "bfloat16"):
        found = [r for r in device.results("transpose") if r["dtype"] == source]
        if found:
            ratios = [r["copy_us"] / r["sparse_us"] for r in found]
            lines.append(
                f"from {source} {geometric_mean(ratios):.0%} (worst {min(ratios):.0%},"
                f" {len(found)} shapes)"
            )
    if not lines:
        return ""
    return f"nm_transpose reaches of the bandwidth of a copy: {', '.join(lines)}."


def _beside(device: Device) -> str:
    found = device.beside_peer()
    if not found:
        return ""
    ratios = [over_peer(r) for r in found]
    at_once = sum("beside_us" in r for r in found)
    how = (
        "both timed within seconds" if at_once else "each against its own dense product of the run"
    )
    if 0 < at_once < len(found):
        how = f"both timed within seconds for {at_once} of them, else each against its own dense product"
    return (
        f"nm_matmul takes 1 / {geometric_mean(ratios):.2f} of the time of cuSPARSELt's best"
        f" algorithm (geometric mean of {len(found)} shapes; worst {min(ratios):.2f}, best"
        f" {max(ratios):.2f}), {how}.{_dense_beside(found)}"
    )


def _dense_beside(found: Sequence[dict[str, Any]]) -> str:
    """What of that is the dense product's own, which PyTorch takes from cuBLAS by other rules."""
    rows = [r for r in found if "beside_us" in r]
    if not rows:
        return ""
    dense = geometric_mean([r["peer_dense_us"] / r["beside_dense_us"] for r in rows])
    own = geometric_mean([over_peer(r) * r["beside_dense_us"] / r["peer_dense_us"] for r in rows])
    return (
        f" PyTorch's dense product takes {dense:.2f} of the time of XLA's there: over each library's own"
        f" dense product, nm_matmul wins {own:.2f} times what cuSPARSELt does."
    )


def over_peer(r: dict[str, Any]) -> float:
    """How much faster than the peer: timed right before it, or else by ratios to each one's own dense product,
    since the card may be in another state minutes later."""
    if "beside_us" in r:
        return r["peer_us"] / r["beside_us"]
    return r["speedup"] / (r["peer_dense_us"] / r["peer_us"])


def _losses(device: Device) -> str:
    lost: dict[str, list[str]] = {}
    for kind in ("matmul", "epilogue", "sddmm", "few"):
        for r in sorted(device.results(kind), key=lambda r: r["speedup"]):
            if r["speedup"] < 1:
                extra = f" {r['epilogue']}" if r["epilogue"] else ""
                text = f"{_shape(r)}{extra} ({r['speedup']:.2f}{'' if _is_sparse(r) else DENSE})"
                lost.setdefault(kind, []).append(text)
    if not lost:
        return "No shape is slower than dense."
    lines = [f"- {TITLES[kind]}: {', '.join(shapes)}" for kind, shapes in lost.items()]
    head = f"Slower than dense, tokens x in x out ({DENSE} the dispatcher runs the dense product):"
    return "\n".join((head, "", *lines))


def _errors(device: Device) -> str:
    ratios = [
        r["max_error_ratio"]
        for kind in TITLES
        for r in device.results(kind)
        if r["max_error_ratio"] is not None
    ]
    if not ratios:
        return ""
    return (
        f"The largest error against float32 is at most {max(ratios):.2f} times that of the dense"
        f" bfloat16 product ({len(ratios)} products)."
    )


def _speedups(rows: list[dict[str, Any]]) -> str:
    """Sizes against tokens; a cell is the speed-up and both times in microseconds."""

    def cell(r):
        exact = f", {_us(r, 'float32')} to float32" if "float32_us" in r else ""
        return f"{r['speedup']:.2f}{_mark(r)} ({_us(r, 'dense')} → {_us(r)}{exact})"

    return _grid(rows, cell)


def _mark(r: dict[str, Any]) -> str:
    return "" if _is_sparse(r) else DENSE


def _adapters(rows: list[dict[str, Any]]) -> str:
    header = ("in x out", "linear layers", "tokens", "rank", "bare", "fused", "with x @ L", "dense")
    return markdown(
        header,
        [
            (
                _size(r),
                _layers(r),
                f"{r['tokens']:,}",
                str(r["rank"]),
                _us(r, "bare"),
                f"{_us(r)} ({r['sparse_us'] / r['bare_us'] - 1:+.1%})",
                f"{_us(r, 'whole')} ({r['whole_us'] / r['bare_us'] - 1:+.1%})",
                _us(r, "dense"),
            )
            for r in sorted(rows, key=_order)
        ],
    )


def _transposes(rows: list[dict[str, Any]]) -> str:
    header = ("in x out", "linear layers", "from", "µs", "copy, µs", "of its bandwidth")
    return markdown(
        header,
        [
            (
                _size(r),
                _layers(r),
                r["dtype"],
                _us(r),
                _us(r, "copy"),
                f"{r['copy_us'] / r['sparse_us']:.0%}",
            )
            for r in sorted(rows, key=_order)
        ],
    )


def _peers(device: Device) -> str:
    rows = device.beside_peer()
    if not rows:
        return ""
    header = ("tokens x in x out", "dense", "nm_matmul", "PyTorch's dense", "cuSPARSELt", "ratio")
    return markdown(
        header,
        [
            (
                _shape(r),
                _us(r, "beside_dense" if "beside_us" in r else "dense"),
                _us(r, "beside" if "beside_us" in r else "sparse"),
                _us(r, "peer_dense"),
                _us(r, "peer"),
                f"{over_peer(r):.2f}",
            )
            for r in sorted(rows, key=_order)
        ],
    )


def _left_out(device: Device) -> str:
    lines = []
    measured = {_key(r) for kind in TITLES for r in device.results(kind)}
    for record in device.records:
        left = [r for r in record.get("left_out", []) if _key(r) not in measured]
        failed = record.get("failed", [])
        if left:
            lines.append(
                f"Left out for want of time: {len(left)} products of `{record['command']}`."
            )
        lines += [f"Failed: {r['kind']} {_shape(r)}: {r['error']}" for r in failed]
    return "\n\n".join(lines)


TABLES = {"adapters": _adapters, "transpose": _transposes}


def _grid(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    tokens = sorted({r["tokens"] for r in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for r in sorted(rows, key=_order):
        key = (_size(r), _layers(r), r["epilogue"])
        lines.setdefault(key, {})[r["tokens"]] = cell(r)
    epilogues = any(key[2] for key in lines)
    header = ("in x out", "linear layers", *(["epilogue"] if epilogues else []))
    return markdown(
        (*header, *(f"{count:,} tokens" for count in tokens)),
        [
            (*key[: len(header)], *(cells.get(count, "") for count in tokens))
            for key, cells in lines.items()
        ],
    )


def _order(r: dict[str, Any]) -> tuple:
    return r["in"] * r["out"], r["in"], r["out"], r["epilogue"], r["dtype"], r["tokens"]


def _is_sparse(r: dict[str, Any]) -> bool:
    return not r["path"].startswith("xla")


def _size(r: dict[str, Any]) -> str:
    return f"{r['in']} x {r['out']}"


def _shape(r: dict[str, Any]) -> str:
    return f"{r['tokens']} x {_size(r)}"


def _layers(r: dict[str, Any]) -> str:
    return ", ".join(r["names"])


def _us(r: dict[str, Any], what: str = "sparse") -> str:
    value = r[f"{what}_us"]
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
