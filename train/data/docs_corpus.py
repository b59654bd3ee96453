"""The ``docs`` source: English that is already here, the documentation of installed Python code.

Docstrings are read with ``ast``: no package is imported and nothing of it runs. To them come the
topics of Python's own reference (``pydoc_data``), the descriptions in package metadata, and
.rst, .md and .txt files that packages ship. A document is a module, a topic or a file.
"""

import ast
import email
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.data import build, store
from train.data.prose import prose
from train.data.sources import Unit, text_units

DEFAULT_MEGABYTES = 160
MIN_DOCUMENT_CHARS = 200
_MAX_FILE_BYTES = 2 << 20
_UNIT_FILES = 64
_SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "test",
        "tests",
        "testing",
        "testdata",
        "test_data",
        "data",
        "site-packages",
        "dist-packages",
        "_vendor",
        "vendor",
        "vendored",
        "_vendored",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "node_modules",
        "licenses",
        "_distutils",
    ]
)
_NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|contributors|maintainers|requirements|^record$|top_level|"
    r"entry_points|sources|installed-files|cmakelists|third.?party|grammar|words|vocab",
    re.IGNORECASE,
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    """A file to read: ``name`` says where it lies among the roots, whatever the machine."""

    name: str
    path: str
    size: int
    changed: int


class DocsSource:
    """Documentation on this machine; at most ``megabytes`` of source files are read for it."""

    def __init__(self, megabytes: float = DEFAULT_MEGABYTES):
        self._files = _bounded(_find_files(), int(megabytes * 1e6))
        self.fingerprint = store.digest([(f.name, f.size, f.changed) for f in self._files])

    def units(self, cache_dir: Path, workers: int) -> list[Unit]:
        """Cleans the files once into one .jsonl in the cache, which is then read as any other."""
        directory = cache_dir / f"docs-{store.digest(build.code_version(), self.fingerprint)}"
        with store.locked(directory):
            if not directory.exists():
                with store.new_directory(directory) as temporary:
                    self._write(temporary / "documents.jsonl", workers)
        return text_units(str(directory / "documents.jsonl"), range_bytes=1 << 20)

    def _write(self, path: Path, workers: int) -> None:
        started = time.perf_counter()
        groups = [self._files[i : i + _UNIT_FILES] for i in range(0, len(self._files), _UNIT_FILES)]
        sizes = [sum(f.size for f in group) for group in groups]
        seen: set[bytes] = set()
        documents = characters = 0
        with path.open("w", encoding="utf-8") as file:
            for found in build.parallel(_read_files, groups, sizes, workers, "reading docs"):
                for name, paragraphs in found:
                    text = "\n\n".join(p for p in paragraphs if _is_new(p, seen))
                    if len(text) < MIN_DOCUMENT_CHARS:
                        continue
                    file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
                    documents, characters = documents + 1, characters + len(text)
            file.flush()
            os.fsync(file.fileno())
        log.info(
            "docs: %s documents, %.1f M characters, cleaned from %s files of %.0f MB in %s",
            *(f"{documents:,}", characters / 1e6, f"{len(self._files):,}", sum(sizes) / 1e6),
            build.seconds_since(started),
        )


def _is_new(paragraph: str, seen: set[bytes]) -> bool:
    """False for what was there before, up to case, digits and punctuation."""
    letters = re.sub(r"[^a-z]+", " ", paragraph.lower())
    key = hashlib.blake2b(letters.encode(), digest_size=8).digest()
    return not (key in seen or seen.add(key))


def _find_files() -> list[_File]:
    roots = {"python": sysconfig.get_path("stdlib")}
    for entry in sys.path:
        if Path(entry).name in ("site-packages", "dist-packages"):
            roots.setdefault(f"packages-{len(roots)}", entry)
    files = []
    for label, root in roots.items():
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if _is_wanted_folder(name))
            for name in sorted(names):
                path = os.path.join(folder, name)
                if _is_wanted_file(name, in_metadata=folder.endswith(".dist-info")):
                    stat = os.stat(path)
                    if 0 < stat.st_size <= _MAX_FILE_BYTES:
                        relative = f"{label}/{os.path.relpath(path, root)}"
                        files.append(_File(relative, path, stat.st_size, stat.st_mtime_ns))
    return files


def _is_wanted_folder(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.endswith((".libs", ".egg-info"))


def _is_wanted_file(name: str, in_metadata: bool) -> bool:
    stem, suffix = os.path.splitext(name)
    if in_metadata:
        return name == "METADATA"
    if suffix == ".py":
        return not (stem.startswith("test_") or stem.endswith(("_test", "_pb2", "_pb2_grpc")))
    return suffix in (".rst", ".md", ".txt") and not _NOT_PROSE.search(stem)


def _bounded(files: list[_File], limit: int) -> list[_File]:
    """An even, repeatable choice of files, by a hash of the name, up to ``limit`` bytes."""
    if sum(f.size for f in files) > limit:
        chosen, total = set(), 0
        for file in sorted(files, key=lambda f: hashlib.blake2b(f.name.encode()).digest()):
            total += file.size
            if total > limit:
                break
            chosen.add(file)
        files = [f for f in files if f in chosen]
    return files


def _read_files(files: list[_File]) -> list[tuple[str, list[str]]]:
    return [found for file in files for found in _documents(file)]


def _documents(file: _File) -> Iterator[tuple[str, list[str]]]:
    text = Path(file.path).read_text(encoding="utf-8", errors="replace")
    if file.name.endswith("pydoc_data/topics.py"):
        for topic, body in _topics(text).items():
            yield f"{file.name}#{topic}", prose(body)
    elif file.name.endswith(".py"):
        paragraphs = [p for docstring in _docstrings(text) for p in prose(docstring)]
        yield file.name, paragraphs
    elif file.name.endswith("METADATA"):
        yield file.name, prose(email.message_from_string(text).get_payload())
    else:
        yield file.name, prose(text)


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as invalid escapes: somebody else's code.
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # Templates and code for another Python; there is nothing to document.


def _topics(source: str) -> dict[str, str]:
    tree = _parse(source)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings in the order of the file, and texts given to calls such as ``add_newdoc``."""
    if '"""' not in source and "'''" not in source:
        return
    tree = _parse(source)
    stack: list[ast.AST] = [tree] if tree else []
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                yield docstring
            stack.extend(reversed(node.body))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if "doc" in ast.unparse(node.value.func).rpartition(".")[2].lower():
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield inspect.cleandoc(part.value)
        elif isinstance(node, (ast.If, ast.Try)):
            stack.extend(reversed(node.body + node.orelse))
