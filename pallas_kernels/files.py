"""Files that are on disk whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file that is either the old one or the whole new one, whatever happens.

    Text is written as UTF-8; missing folders are made.
    """
    with explained_errors(path):
        _write(path, data)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk, met while `path` is written, into a message that says so."""
    try:
        yield
    except OSError as error:
        if isinstance(error.strerror, str) and str(path) in error.strerror:
            raise
        if error.errno in FULL:
            raise OSError(error.errno, _no_room(path, error.strerror)) from error
        if error.errno in UNWRITABLE:
            raise OSError(
                error.errno,
                f"{path} cannot be written ({error.strerror}): make its folder writable, or name "
                f"another place",
            ) from error
        raise
    except Exception as error:  # such as safetensors', which has errors of its own
        if not any(os.strerror(number) in str(error) for number in FULL):
            raise
        raise OSError(errno.ENOSPC, _no_room(path, str(error))) from error


def _no_room(path: Path, reason: str) -> str:
    return (
        f"there is no room to write {path} ({reason}): free some space or name another place. "
        f"Nothing half-written was kept"
    )


def _write(path: Path, data: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Puts the names in a directory on disk, as a rename alone does not."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when all went well and vanishes when not.

    Raises:
      ValueError: `path` exists already.
    """
    if path.exists():
        raise ValueError(f"{path} exists already; name a new folder")
    with explained_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            os.chmod(staging, 0o755)
            yield staging
            sync_directory(staging)
            os.rename(staging, path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_directory(path.parent)
