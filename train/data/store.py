"""Token stores: the flat files on disk that batches are cut from.

A corpus is one directory with a ``meta.json`` and three raw little-endian files per split:

- ``tokens``: token ids, uint16 where the vocabulary fits, uint32 otherwise;
- ``documents``: int64 offsets into tokens, one more than there are documents;
- ``sentences``: int64 offsets into tokens, a refinement of ``documents``.

``meta.json`` holds each file's size and CRC-32 and is written last, into a directory that gets
its final name only when everything in it is on disk. A directory that opens is therefore whole.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallas_kernels.files import FULL, sync_directory

FILES = ("tokens", "documents", "sentences")
DTYPES = ("<u2", "<u4")
_CHUNK = 1 << 24


class DamagedStoreError(Exception):
    """The directory is not a whole store: a file is missing, short, or not what was written."""


@dataclass(frozen=True)
class Specials:
    """Ids of the special tokens an objective needs; None where the objective has no use for it.

    ``all`` lists every id that is not ordinary text: those are never masked and never drawn as
    random replacements.
    """

    all: tuple[int, ...]
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    end_of_text: int | None = None


class TokenStore:
    """One split of a tokenised corpus, memory-mapped and read-only.

    Attributes:
      tokens: (num_tokens,) uint16 or uint32.
      documents: (num_documents + 1,) int64 offsets into ``tokens``.
      sentences: (num_sentences + 1,) int64 offsets into ``tokens``; contains ``documents``.
      vocab_size: ids are below this.
      specials: the special token ids.

    Stores pickle as their path, so data workers map the same pages and copy nothing.
    """

    def __init__(self, directory: Path | str, split: str):
        self.directory, self.split = Path(directory), split
        meta = json.loads((self.directory / "meta.json").read_text())
        self.objective: str = meta["objective"]
        self.vocab_size: int = meta["vocab_size"]
        self.specials = Specials(**{**meta["specials"], "all": tuple(meta["specials"]["all"])})
        self.stats: dict = meta["splits"][split]["stats"]
        self.tokens = _map(self._file("tokens"), meta["dtype"])
        self.documents = _map(self._file("documents"), "<i8")
        self.sentences = _map(self._file("sentences"), "<i8")

    def _file(self, name: str) -> Path:
        return self.directory / f"{self.split}.{name}"

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def __reduce__(self):
        return TokenStore, (self.directory, self.split)

    def __repr__(self) -> str:
        return f"TokenStore({self.split}: {self.num_documents:,} documents, {self.num_tokens:,} tokens)"


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    # A plain ndarray view: the memmap subclass makes every small slice several times slower.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def token_dtype(vocab_size: int) -> str:
    return DTYPES[vocab_size > 1 << 16]


class SplitWriter:
    """Appends documents to the three files of a split; memory stays bounded by one document.

    ``close`` makes them durable; leaving the ``with`` block by an exception only closes them.
    """

    def __init__(self, directory: Path, split: str, dtype: str, *, offsets_from_zero: bool = True):
        self._files = {name: (directory / f"{split}.{name}").open("wb") for name in FILES}
        self._dtype, self._position, self.documents = np.dtype(dtype), 0, 0
        self._offsets_from_zero = offsets_from_zero
        if offsets_from_zero:
            for name in ("documents", "sentences"):
                self._files[name].write(np.zeros(1, "<i8").tobytes())

    @property
    def tokens(self) -> int:
        return self._position

    def add(self, tokens: np.ndarray, sentence_ends: np.ndarray) -> None:
        """Appends one document; ``sentence_ends`` are offsets into it, the last one its length."""
        self._files["tokens"].write(tokens.astype(self._dtype).tobytes())
        self._files["sentences"].write((sentence_ends + self._position).astype("<i8").tobytes())
        self._position += len(tokens)
        self._files["documents"].write(np.array([self._position], "<i8").tobytes())
        self.documents += 1

    def append_part(self, directory: Path, split: str) -> None:
        """Appends what another writer wrote with ``offsets_from_zero=False``."""
        before = self._position
        for name in ("documents", "sentences"):
            offsets = np.fromfile(directory / f"{split}.{name}", "<i8")
            self._files[name].write((offsets + before).tobytes())
            self.documents += len(offsets) if name == "documents" else 0
        with (directory / f"{split}.tokens").open("rb") as part:
            shutil.copyfileobj(part, self._files["tokens"], _CHUNK)
            self._position += part.tell() // self._dtype.itemsize

    def close(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        if kind is None:
            self.close()
        for file in self._files.values():
            with contextlib.suppress(OSError):  # What is buffered can't be written to a full disk.
                file.close()


def checksum(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def verify(directory: Path) -> dict:
    """Returns the store's meta data, or raises DamagedStoreError saying what is wrong."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        if meta["dtype"] not in DTYPES or set(meta["splits"]) != {"train", "valid"}:
            raise DamagedStoreError("meta.json is not that of a token store")
        for split, entry in meta["splits"].items():
            for name in FILES:
                expected, path = entry["files"][name], directory / f"{split}.{name}"
                size = path.stat().st_size
                if size != expected["bytes"]:
                    raise DamagedStoreError(
                        f"{path.name} has {size} bytes, {expected['bytes']} were written"
                    )
                if checksum(path) != expected:
                    raise DamagedStoreError(f"{path.name} does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedStoreError(f"{type(error).__name__}: {error}") from error
    return meta


def digest(*parts: object) -> str:
    """A short name for content: the same parts give the same name on every machine."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``final`` if the block succeeds, else vanishes.

    Call it under ``locked(final)``: whatever temporary directory an earlier, killed build left
    behind is then certainly dead and is removed first.
    """
    for stale in final.parent.glob(f".{final.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds an exclusive lock for building ``target``; the lock dies with the process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{file.name} cannot be locked ({error.strerror}): put the data cache on a file"
                " system that has flock with --cache-dir",
            ) from error
        yield


@contextlib.contextmanager
def explained_os_errors(directory: Path) -> Iterator[None]:
    """Turns a full disk or an unwritable cache directory into a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            message = (
                f"no space left on the device that holds the data cache {directory}: free some "
                "space, or put the cache elsewhere with --cache-dir. Nothing half-written was kept"
            )
        elif error.errno in _UNWRITABLE and _concerns(directory, error.filename):
            message = (
                f"the data cache {directory} cannot be written ({error.strerror}: "
                f"{error.filename}): make it writable or name another with --cache-dir"
            )
        else:
            raise
        raise OSError(error.errno, message) from error


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def _concerns(directory: Path, filename: object) -> bool:
    """Whether a failing path lies in the directory or on the way to it."""
    return isinstance(filename, str) and (
        Path(filename).is_relative_to(directory) or directory.is_relative_to(filename)
    )
