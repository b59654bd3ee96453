"""Builds the token store of a corpus: units in worker processes, parts joined in order."""

import contextlib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.files import write_atomically
from train.data import segment, store
from train.data.sources import Unit
from train.data.tokenizer import Vocabulary, vocabulary_from_json

SPLITS = ("train", "valid")
# Below this a pool of fresh interpreters costs more than it saves.
IN_PROCESS_BYTES = 4 << 20
_ENCODE_CHARS = 1 << 20
log = logging.getLogger(__name__)


def held_out_score(text: str) -> float:
    """A uniform number in [0, 1) from the content alone: below the fraction means held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def build_store(
    directory: Path,
    units: Sequence[Unit],
    vocabulary: Vocabulary,
    *,
    valid_fraction: float,
    workers: int,
    key: str,
) -> dict:
    """Tokenises the units into ``directory`` and returns the meta data written there.

    Raises:
      ValueError: no documents at all, or none in one of the splits.
    """
    tasks = [
        _Task(
            index, unit, str(directory), vocabulary.to_json(), vocabulary.objective, valid_fraction
        )
        for index, unit in enumerate(units)
    ]
    dtype = store.token_dtype(vocabulary.size)
    totals = {split: dict.fromkeys(("characters", "bytes"), 0) for split in SPLITS}
    scores: list[float] = []
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(store.SplitWriter(directory, split, dtype))
            for split in SPLITS
        }
        for result in parallel(_tokenise, tasks, [u.size for u in units], workers, "tokenising"):
            part = directory / f"part-{result['index']}"
            for split, writer in writers.items():
                writer.append_part(part, split)
                for name in totals[split]:
                    totals[split][name] += result[split][name]
            scores = sorted([*scores, *result["scores"]])[:2]
            shutil.rmtree(part)
    for split, writer in writers.items():
        totals[split] |= {"documents": writer.documents, "tokens": writer.tokens}
    _check_splits(totals, scores, vocabulary.objective, valid_fraction)
    meta = {
        "key": key,
        "objective": vocabulary.objective,
        "vocab_size": vocabulary.size,
        "specials": asdict(vocabulary.specials),
        "dtype": dtype,
        "splits": {
            split: {
                "stats": totals[split],
                "files": {
                    name: store.checksum(directory / f"{split}.{name}") for name in store.FILES
                },
            }
            for split in SPLITS
        },
    }
    write_atomically(directory / "meta.json", json.dumps(meta, indent=1))
    return meta


def _check_splits(totals, scores, objective, fraction) -> None:
    train, valid = totals["train"]["documents"], totals["valid"]["documents"]
    if train + valid == 0:
        raise ValueError(
            "the data holds no documents: every file is blank or has only fragments of fewer than "
            f"{segment.MIN_SENTENCE_TOKENS} tokens"
        )
    needed = 2 if objective == "mlm" else 1
    rule = f"objective {objective} needs at least {needed} document{'s' * (needed > 1)} in each"
    if valid < needed:
        least = [*scores, 1.0, 1.0][needed - 1]
        remedy = (
            f"--valid-fraction={min(least * 1.01 + 1e-4, 1):.4g} would do"
            if least < 0.5
            else "give more documents (in .txt a blank line starts a new one)"
        )
        raise ValueError(
            f"valid_fraction={fraction} holds out {valid} of {train + valid} documents; {rule} "
            f"split: {remedy}"
        )
    if train < needed:
        raise ValueError(
            f"valid_fraction={fraction} leaves {train} of {train + valid} documents for training; "
            f"{rule} split: lower --valid-fraction or give more documents"
        )


class _Task:
    def __init__(self, index, unit, directory, tokenizer, objective, valid_fraction):
        self.index, self.unit, self.directory = index, unit, directory
        self.tokenizer, self.objective, self.valid_fraction = tokenizer, objective, valid_fraction


def _tokenise(task: _Task) -> dict[str, Any]:
    """Writes one unit as a part: the three files of each split, offsets without the leading 0."""
    vocabulary = _vocabulary(task.tokenizer, task.objective)
    part = Path(task.directory) / f"part-{task.index}"
    part.mkdir()
    dtype = store.token_dtype(vocabulary.size)
    result: dict[str, Any] = {split: {"characters": 0, "bytes": 0} for split in SPLITS}
    scores: list[float] = []
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                store.SplitWriter(part, split, dtype, offsets_from_zero=False)
            )
            for split in SPLITS
        }
        for text in task.unit.documents():
            tokens, ends = encode_document(text, vocabulary)
            if len(tokens) < segment.MIN_SENTENCE_TOKENS:
                continue
            score = held_out_score(text)
            split = "valid" if score < task.valid_fraction else "train"
            writers[split].add(tokens, ends)
            result[split]["characters"] += len(text)
            result[split]["bytes"] += len(text.encode())
            scores = sorted([*scores, score])[:2]
    return result | {"index": task.index, "scores": scores}


@functools.lru_cache(maxsize=1)
def _vocabulary(text: str, objective: str) -> Vocabulary:
    return vocabulary_from_json(text, objective)


def encode_document(text: str, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a document and the offsets at which its sentences end.

    A causal document ends with the end-of-text token, which belongs to its last sentence.
    """
    pieces, lengths = [], []
    for batch in _batches(segment.sentences(text), _ENCODE_CHARS):
        for encoding in vocabulary.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids = encoding.ids
            pieces.append(np.array(ids, np.uint32))
            lengths.append(len(ids))
    if not sum(lengths):
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    if vocabulary.objective == "clm":
        pieces.append(np.array([vocabulary.specials.end_of_text], np.uint32))
        lengths.append(1)
    return np.concatenate(pieces), segment.sentence_ends(np.array(lengths))


def _batches(pieces: Iterable[str], chars: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parallel(
    function: Callable, tasks: Sequence, sizes: Sequence[int], workers: int, description: str
) -> Iterator:
    """Yields ``function(task)`` in the order of the tasks, with a progress bar over their sizes.

    Workers are fresh interpreters (spawn): a fork of a process that runs JAX's threads can hang.
    Small jobs run in this process. At most a few results wait for their turn.
    """
    with _progress(description, sum(sizes)) as advance, contextlib.ExitStack() as stack:
        if workers <= 1 or len(tasks) == 1 or sum(sizes) < IN_PROCESS_BYTES:
            results = map(function, tasks)
        else:
            context = multiprocessing.get_context("spawn")
            count = min(workers, len(tasks))
            pool = ProcessPoolExecutor(count, context, initializer=_start_worker)
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            results = _ordered(pool, function, tasks, ahead=4 * count)
        try:
            for result, size in zip(results, sizes, strict=True):
                yield result
                advance(size)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker process died while {description}, perhaps for lack of memory: free some "
                "or use fewer workers. Nothing half-written was kept"
            ) from error


def _ordered(pool, function, tasks, ahead: int) -> Iterator:
    waiting, remaining = [], iter(tasks)
    for task in remaining:
        waiting.append(pool.submit(function, task))
        if len(waiting) >= ahead:
            break
    while waiting:
        result = waiting.pop(0).result()
        for task in remaining:
            waiting.append(pool.submit(function, task))
            break
        yield result


def _start_worker() -> None:
    # One process per core already: the tokenizer's own threads would fight over them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that was killed can't stop its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=max(total, 1))
        yield lambda size: bar.advance(task, size)


def usable_cores() -> int:
    """Cores this process may run on; not every system can tell them from those it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


@functools.cache
def code_version() -> str:
    """Hash of this package's source: a change in how text is read or cut makes new caches."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(f.read_bytes() for f in files), digest_size=8).hexdigest()
