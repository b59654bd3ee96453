"""Where documents come from: a spec such as "docs", "tfds:NAME" or "text:GLOB" becomes units.

A unit is a picklable piece of a source that a worker process reads on its own. Units come in a
fixed order and give the same documents however many workers there are.
"""

import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from train.data.store import digest

KINDS = {
    "docs": "docs[:MB]: the documentation of Python and of the installed packages, read from at "
    "most MB megabytes of their files (160)",
    "tfds": "tfds:NAME[/CONFIG]: a TensorFlow Datasets data set",
    "text": "text:GLOB: .txt or .jsonl files, plain, .gz or .xz",
}
_RANGE_BYTES = 16 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot.
MAX_DOCUMENT_BYTES = 32 << 20  # longer ones are cut, so that memory stays bounded
MAX_RECORD_BYTES = 256 << 20  # of a line of .jsonl, which is read as a whole
MAX_EXPANSION = 500  # bytes for each one of a compressed file; text has 2 to 100
_XZ_MEMORY = 256 << 20  # xz -9 takes 65 MiB; a file can ask for 4 GiB
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}


class Unit(Protocol):
    """A part of a source: ``size`` (about its bytes, for progress) and its documents."""

    size: int

    def documents(self) -> Iterator[str]: ...


class Source(Protocol):
    """``fingerprint`` changes when the documents may have changed."""

    fingerprint: str

    def units(self, cache_dir: Path, workers: int) -> list[Unit]: ...


def split_spec(spec: str) -> list[tuple[str, str]]:
    """Parses "docs,text:a/*.txt" to [("docs", ""), ("text", "a/*.txt")].

    Sources are joined with a comma or a plus; either may also occur inside a path.

    Raises:
      ValueError: an unknown kind, or one without the argument it needs.
    """
    parts = []
    for part in re.split(r"[,+](?=\s*(?:docs\s*(?:$|[,+])|[a-z]+:))", spec):
        kind, _, argument = part.strip().partition(":")
        if kind not in KINDS:
            raise ValueError(
                f"data source {part.strip()!r} in {spec!r} is unknown. Choose from:\n  "
                + "\n  ".join(KINDS.values())
                + "\nSeveral are joined with a comma: docs,text:GLOB"
            )
        if kind != "docs" and not argument:
            raise ValueError(f"data source {part.strip()!r} needs an argument: {KINDS[kind]}")
        if kind == "docs" and argument and not re.fullmatch(r"[1-9]\d*", argument):
            raise ValueError(
                f"data source {part.strip()!r}: the megabytes to read must be a positive integer, "
                "for example docs:50"
            )
        parts.append((kind, argument))
    return parts


@dataclass(frozen=True)
class TextUnit:
    """The documents of a file that begin in the byte range [start, stop).

    A range owns a document when the line end (.jsonl) or the last blank line (.txt) before it lies
    in the range, so neighbouring ranges share nothing and lose nothing. Bytes that are not UTF-8
    are read as U+FFFD, the replacement character; a byte order mark is dropped. Documents of more
    than MAX_DOCUMENT_BYTES are cut into several.
    """

    path: str
    start: int = 0
    stop: int | None = None
    size: int = 0

    def documents(self) -> Iterator[str]:
        base, compression = _kinds(self.path)
        try:
            with _COMPRESSED.get(compression, open)(self.path, "rb") as file:
                if compression == ".xz":
                    self._check_xz()
                file = file if compression == "" else io.BufferedReader(file, 1 << 20)
                lines = self._lines(file, MAX_RECORD_BYTES if base == ".jsonl" else 1 << 20)
                yield from self._records(lines) if base == ".jsonl" else self._blocks(lines)
        except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{self.path} is not a whole {compression} file ({error}): make it again"
            ) from error

    def _check_xz(self) -> None:
        with open(self.path, "rb") as file:
            lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(file.read(1 << 16), 1)

    def _lines(self, file, longest: int) -> Iterator[tuple[int, bytes]]:
        """Positions and lines; a line over `longest` bytes comes in pieces."""
        most = sys.maxsize
        if _kinds(self.path)[1]:
            most = os.path.getsize(self.path) * MAX_EXPANSION + MAX_DOCUMENT_BYTES
        position = self.start
        if self.start:
            file.seek(self.start - 1)
            position -= 1
            while piece := file.readline(1 << 20):
                position += len(piece)
                if piece.endswith(b"\n"):
                    break
        while line := file.readline(longest):
            yield position, line
            position += len(line)
            if position > most:
                raise ValueError(
                    f"{self.path} expands to over {MAX_EXPANSION} times its size, which text does "
                    "not: if it is meant, unpack it and name the unpacked file"
                )

    def _records(self, lines) -> Iterator[str]:
        for position, line in lines:
            if self.stop is not None and position >= self.stop:
                return
            if len(line) == MAX_RECORD_BYTES:
                raise ValueError(
                    f"{self.path}, line {self._line_number(position)}: the record is longer than "
                    f"{MAX_RECORD_BYTES >> 20} MiB; split its text into several"
                )
            if line.strip():
                text = self._text_of(line, position)
                for start in range(0, max(len(text), 1), MAX_DOCUMENT_BYTES):
                    yield text[start : start + MAX_DOCUMENT_BYTES]

    def _text_of(self, line: bytes, position: int) -> str:
        try:
            record = json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"))
            if isinstance(record, dict) and isinstance(record.get("text"), str):
                return _LONE_SURROGATE.sub("\ufffd", record["text"])
            it = type(record).__name__
            if isinstance(record, dict):
                it = ", ".join(map(repr, record)) or "no keys"
            problem = f'has no string under the key "text" ({it})'
        except RecursionError:
            problem = "is nested too deeply"
        except ValueError as error:
            problem = f"is not JSON ({error})"
        raise ValueError(
            f"{self.path}, line {self._line_number(position)}: the record {problem}. "
            'Each line must be an object such as {"text": "..."}'
        )

    def _line_number(self, position: int) -> int:
        number, left = 1, position
        with _COMPRESSED.get(_kinds(self.path)[1], open)(self.path, "rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                number, left = number + block.count(b"\n"), left - len(block)
        return number

    def _blocks(self, lines) -> Iterator[str]:
        owned, block, size = self.start == 0, [], 0
        for position, line in lines:
            if not line.isspace():
                if owned:
                    block.append(line)
                    size += len(line)
                    if size >= MAX_DOCUMENT_BYTES:
                        yield _decoded(block)
                        block, size = [], 0
                elif self.stop is not None and position >= self.stop:
                    return
                continue
            if block:
                yield _decoded(block)
                block, size = [], 0
            if self.stop is not None and position >= self.stop:
                return
            owned = True
        if block:
            yield _decoded(block)


class TextSource:
    """Files that match a glob: .txt (documents separated by blank lines) and .jsonl (key "text")."""

    def __init__(self, pattern: str):
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        paths = [path for path in found if os.path.isfile(path)]
        if not paths:
            raise ValueError(
                f"text:{pattern} matches no file: check the path (quote the pattern in the shell; "
                "** crosses folders)"
            )
        unknown = [path for path in paths if _kinds(path)[0] not in (".txt", ".jsonl")]
        if unknown:
            raise ValueError(
                f"text:{pattern} matches {unknown[0]}, which is neither .txt nor .jsonl (also with "
                ".gz or .xz): narrow the pattern or rename the file"
            )
        empty = [path for path in paths if os.path.getsize(path) == 0]
        if empty:
            raise ValueError(
                f"text:{pattern} matches {empty[0]}, which is empty: remove it or narrow the pattern"
            )
        self._paths = paths
        stats = [os.stat(path) for path in paths]
        self.fingerprint = digest(
            [
                (str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)
                for path, stat in zip(paths, stats, strict=True)
            ]
        )

    def units(self, cache_dir: Path, workers: int) -> list[Unit]:
        del cache_dir, workers
        return [unit for path in self._paths for unit in text_units(path)]


def text_units(path: str, range_bytes: int = _RANGE_BYTES) -> list[Unit]:
    """Cuts a plain file into ranges that workers read in parallel; a compressed one is one unit."""
    size = os.path.getsize(path)
    if _kinds(path)[1]:
        return [TextUnit(path, size=size)]
    starts = range(0, size, range_bytes)
    return [
        TextUnit(path, start, min(start + range_bytes, size), min(range_bytes, size - start))
        for start in starts
    ]


def _decoded(block: list[bytes]) -> str:
    return b"".join(block).decode("utf-8", "replace").removeprefix("\ufeff").strip()


def _kinds(path: str) -> tuple[str, str]:
    """("notes.txt.gz") -> (".txt", ".gz")."""
    stem, last = os.path.splitext(path)
    if last in _COMPRESSED:
        return os.path.splitext(stem)[1], last
    return last, ""
