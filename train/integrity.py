"""Digests of a checkpoint's files: damage is noticed before anything is restored, and said.

    STEP/manifest.json   SHA-256 and bytes of every file of the checkpoint

The manifest is written into the folder while it has its temporary name, so a checkpoint that has its
final name has its manifest. Orbax's own notes, which it may write again, are left out.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

from pallas_kernels.files import write_atomically

MANIFEST = "manifest.json"
DAMAGED = "damaged"  # folder of the run that damaged checkpoints are moved to
SMALL = 1 << 20  # bytes up to which a file is read in a quick check
_NOTES = frozenset({MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"})


class DamagedError(OSError):
    """Files are not what was written; the message names one, and says what to do."""


def write_manifest(folder: pathlib.Path) -> None:
    """Note the digests of all files in a folder that is complete."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _NOTES)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        digests = list(pool.map(_digest, files))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")


def has_manifest(folder: pathlib.Path) -> bool:
    """False for what was written before there were manifests."""
    return (folder / MANIFEST).exists()


def fingerprint(folder: pathlib.Path) -> str | None:
    """One digest of all files, as the manifest has them; None without a manifest."""
    if not has_manifest(folder):
        return None
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def problems(folder: pathlib.Path, *, quick: bool = False) -> list[str]:
    """What is wrong with the files of a folder that has a manifest; nothing if all is well.

    Args:
      quick: read small files only; of large ones just the sizes are looked at.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {
            pathlib.PurePosixPath(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    if outside := [str(name) for name in entries if name.is_absolute() or ".." in name.parts]:
        return [f"{MANIFEST} names {outside[0]}, which is outside of the folder"]

    def look(item: tuple[pathlib.PurePosixPath, tuple[int, str]]) -> str | None:
        name, (size, digest) = item
        try:
            there = (folder / name).stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes, {size:,} were written"
            if (size <= SMALL or not quick) and _digest(folder / name) != digest:
                return f"{name} does not match its SHA-256"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [found for found in pool.map(look, entries.items()) if found]


def check(folder: pathlib.Path, remedy: str, *, warn: Callable[[str], None] | None = None) -> None:
    """Refuse to read a damaged folder.

    Args:
      remedy: what to do then, a sentence.
      warn: is told of a checkpoint without a manifest, which passes, for those of earlier versions
        have none. None: the folder must have one.

    Raises:
      DamagedError: names the first file that is not what was written, and `remedy`.
    """
    if not has_manifest(folder):
        if warn is None:
            raise DamagedError(f"{folder} is damaged: {MANIFEST} is missing. {remedy}")
        warn(_unchecked(folder))
    elif found := problems(folder):
        raise DamagedError(f"{folder} is damaged: {_first(found)}. {remedy}")


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Says in a line what reading damaged files raises, which may be a page.

    Raises:
      DamagedError: in the place of an error about files or their content.
    """
    try:
        yield
    except DamagedError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:200]}"
        raise DamagedError(f"{what} ({reason}). {remedy}") from error


def set_aside_damaged(checkpoints: pathlib.Path, say: Callable[[str], None]) -> None:
    """Leave only checkpoints that a run can go on from; damaged ones move to RUN/damaged.

    The latest whole one is read entirely; of those before it, which keep their place, small files
    alone.

    Args:
      checkpoints: RUN/checkpoints, which no other process writes to.
      say: is told about every checkpoint that is moved, and what is used in its place.

    Raises:
      DamagedError: there are checkpoints, but none is whole. All stay where they are.
    """
    steps = sorted((int(p.name) for p in _folders(checkpoints) if p.name.isdigit()), reverse=True)
    whole, damaged = [], {}
    for step in steps:
        folder = checkpoints / str(step)
        if not has_manifest(folder):
            if not whole:
                say(_unchecked(folder))
            whole.append(step)
        elif found := problems(folder, quick=bool(whole)):
            damaged[step] = _first(found)
        else:
            whole.append(step)
    if damaged and not whole:
        (step, problem), *_ = damaged.items()
        raise DamagedError(
            f"no checkpoint of {checkpoints} is whole (of step {step}: {problem}). Restore one from "
            f"a copy, or start anew with another --run-dir"
        )
    for step, problem in damaged.items():
        place = _move(checkpoints / str(step), checkpoints.parent / DAMAGED)
        instead = f"step {whole[0]} is used instead" if step > whole[0] else "it is not needed"
        say(
            f"warning: checkpoint {checkpoints / str(step)} is damaged: {problem}. {instead}; the "
            f"damaged one was moved to {place} and can be removed"
        )


def _unchecked(folder: pathlib.Path) -> str:
    return (
        f"warning: checkpoint {folder} has no {MANIFEST}, as those of earlier versions: "
        f"it is used without a check of its files"
    )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _move(folder: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
    into.mkdir(exist_ok=True)
    place = into / folder.name
    shutil.rmtree(place, ignore_errors=True)
    return folder.rename(place)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first(found: list[str]) -> str:
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
