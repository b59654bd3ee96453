"""Records and tables, as every report needs them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS


def records(benchmark: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records whose benchmark's name starts so, the oldest first.

    Those of one minute (of one day, where they don't tell the time) by their files' names.
    """
    paths = sorted(folder.glob(f"{benchmark}*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(found, key=lambda record: (record.get("date", ""), record.get("time", "")))


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown; columns of numbers, or of none (–), to the right."""
    right = [all(re.match(r"[\d.–]", row[i]) for row in rows) for i in range(len(header))]
    rule = tuple("---:" if number else "---" for number in right)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def sources(found: Iterable[dict[str, Any]]) -> str:
    """Where and by which command records were made, to follow a table."""
    lines = [
        f"{r['device']}, JAX {r['versions']['jax']}, Python {r['versions']['python']}, {r['date']}, "
        f"commit {r['commit'][:10]}: `{r['command']}`"
        for r in found
    ]
    return "\n\n" + "  \n".join(lines)
