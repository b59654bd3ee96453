"""From a data spec to a corpus on disk: sources, split, tokenizer, token store."""

import functools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.files import write_atomically
from train.data import build, store
from train.data.docs_corpus import DocsSource
from train.data.sources import Source, TextSource, Unit, split_spec
from train.data.store import DamagedStoreError, TokenStore
from train.data.tfds_source import TfdsSource
from train.data.tokenizer import (
    DEFAULT_VOCAB_SIZE,
    SPECIALS,
    Vocabulary,
    load_tokenizer,
    train_tokenizer,
)

VALID_FRACTION = 0.02
# Enough to settle the merges of a vocabulary of this kind; more only takes longer.
TOKENIZER_SAMPLE_CHARS = 24_000_000
KEPT = "kept from this run"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
      train, valid: the token stores of the two splits.
      tokenizer: the vocabulary that made them (``.size``, ``.specials``, ``.encode``, ``.decode``).
      fingerprint: changes if and only if a token, a document border or the tokenizer changes.
      stats: per split ``documents``, ``tokens``, ``characters``, ``bytes``.
      directory: where the stores lie.
    """

    train: TokenStore
    valid: TokenStore
    tokenizer: Vocabulary
    fingerprint: str
    stats: dict[str, dict[str, int]]
    directory: Path

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.size


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/slope_jax``, by default ``~/.cache/slope_jax``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slope_jax"


def prepare(
    spec: str = "docs",
    *,
    objective: str,
    tokenizer: str | Path | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    valid_fraction: float = VALID_FRACTION,
    cache_dir: str | Path | None = None,
    run_dir: str | Path | None = None,
    record: str = "corpus.json",
    workers: int | None = None,
) -> Corpus:
    """Makes a corpus ready for ``make_dataset``, from the cache where it can.

    Documents are held out by a hash of their content, so the split depends neither on their order
    nor on what else is in the corpus. The tokenizer is trained on a bounded sample of the training
    documents. Everything is kept in ``cache_dir`` under a name made from the state of the source
    files, the tokenizer, the split and this code, and built under a lock: processes that start
    together build once. A damaged store is noticed by its checksums and built again.

    Args:
      spec: "docs[:MB]", "text:GLOB", "tfds:NAME[/CONFIG][:VERSION][#FEATURE]", or several joined
        with a comma.
      objective: "mlm" or "clm"; decides the special tokens and whether documents end with one.
      tokenizer: a tokenizer.json or a BERT vocab.txt; None takes the one in ``run_dir`` if there
        is one, and else trains a byte-level BPE of ``vocab_size`` tokens.
      vocab_size: size of a trained vocabulary; a tiny corpus may yield fewer tokens.
      valid_fraction: share of the documents to hold out for evaluation.
      cache_dir: default ``default_cache_dir()``.
      run_dir: the tokenizer is saved there as ``tokenizer.json``, and ``record`` names the
        token store. Called again with the same arguments, a run goes on with the tokens it began
        with, even if source files (an upgraded package, say) have changed since.
      record: processes with caches of their own need records of their own.
      workers: processes; default one per core.

    Returns:
      A Corpus. Trained on the same files, it is the same to the bit.

    Raises:
      ValueError: unknown or empty sources, unusable tokenizer, a split without documents.
      OSError: the cache cannot be written or its disk is full; nothing half-written stays.

    Example:
      >>> corpus = prepare("text:books/*.txt.gz", objective="clm", vocab_size=4096)
      >>> corpus.train.num_tokens
    """
    if objective not in SPECIALS:
        raise ValueError(f"objective={objective!r} is not one of {', '.join(SPECIALS)}")
    if not 0 < valid_fraction < 1:
        raise ValueError(
            f"valid_fraction={valid_fraction} must lie between 0 and 1, for example {VALID_FRACTION}"
        )
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    workers = workers or build.usable_cores()
    parts = split_spec(spec)
    if tokenizer is not None:
        load_tokenizer(tokenizer, objective)  # A bad file is reported before any other work.
    with store.explained_os_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        preparation = _Preparation(
            [_source(kind, argument) for kind, argument in parts],
            objective,
            valid_fraction,
            cache,
            workers,
        )
        run = Path(run_dir).expanduser() if run_dir else None
        vocabulary = preparation.vocabulary(tokenizer, vocab_size, run)
        arguments = [spec, objective, valid_fraction, vocabulary.fingerprint]
        return preparation.corpus(vocabulary, run / record if run else None, arguments)


def read_documents(spec: str, *, cache_dir: Path | str | None = None) -> Iterator[str]:
    """The documents of a source, one after the other, as `prepare` reads them.

    Raises:
      ValueError: unknown or empty sources, at the call.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    sources = [_source(kind, argument) for kind, argument in split_spec(spec)]
    units = [u for source in sources for u in source.units(cache, build.usable_cores())]
    return (text for unit in units for text in unit.documents())


def _source(kind: str, argument: str) -> Source:
    if kind == "docs":
        return DocsSource(int(argument)) if argument else DocsSource()
    return TextSource(argument) if kind == "text" else TfdsSource(argument)


class _Preparation:
    def __init__(self, sources, objective, valid_fraction, cache: Path, workers: int):
        self._sources: list[Source] = sources
        self._objective, self._valid_fraction = objective, valid_fraction
        self._cache, self._workers = cache, workers
        self._key = store.digest(
            build.code_version(), [s.fingerprint for s in sources], objective, valid_fraction
        )

    @functools.cached_property
    def _units(self) -> list[Unit]:
        """Read only when something has to be built: a warm start touches no source file."""
        return [u for source in self._sources for u in source.units(self._cache, self._workers)]

    def vocabulary(self, given, vocab_size: int, run_dir: Path | None) -> Vocabulary:
        saved = run_dir / "tokenizer.json" if run_dir else None
        if given is not None:
            vocabulary, origin = load_tokenizer(given, self._objective), f"read from {given}"
        elif saved and saved.exists():
            vocabulary, origin = load_tokenizer(saved, self._objective), KEPT
        else:
            vocabulary, origin = self._trained(vocab_size)
        log.info("tokenizer: %s tokens, %s", f"{vocabulary.size:,}", origin)
        if saved and origin != KEPT and (given is None or Path(given) != saved):
            vocabulary.save(saved)
        return vocabulary

    def _trained(self, vocab_size: int) -> tuple[Vocabulary, str]:
        path = self._cache / f"tokenizer-{store.digest(self._key, vocab_size)}.json"
        with store.locked(path):
            try:
                return load_tokenizer(path, self._objective), "from the cache"
            except ValueError as error:
                if path.exists():
                    log.warning("tokenizer cache is damaged, training again: %s", error)
            sample = _Sample(self._units, self._valid_fraction)
            started = time.perf_counter()
            vocabulary = train_tokenizer(sample, self._objective, vocab_size)
            vocabulary.save(path)
        origin = (
            f"byte-level BPE trained on {sample.characters / 1e6:.1f} M characters of the training "
            f"documents (at most {TOKENIZER_SAMPLE_CHARS / 1e6:.0f} M) in "
            f"{build.seconds_since(started)}"
        )
        return vocabulary, origin

    def corpus(self, vocabulary: Vocabulary, record: Path | None, arguments: list) -> Corpus:
        started = time.perf_counter()
        key = store.digest(self._key, vocabulary.fingerprint)
        directory, meta, how = self._cache / f"tokens-{key}", None, "read from the cache"
        kept = self._kept(record, arguments)
        if kept and kept != directory:
            with store.locked(kept):
                meta = self._opened(kept)
            if meta:
                log.warning("the source files have changed; this run keeps the tokens it has")
                directory = kept
        if meta is None:
            with store.locked(directory):
                meta = self._opened(directory)
                if meta is None:
                    meta, how = self._build(directory, vocabulary, key), "built"
        if record:
            entry = {"arguments": arguments, "store": directory.name}
            write_atomically(record, json.dumps(entry, indent=1))
        stats = {split: entry["stats"] for split, entry in meta["splits"].items()}
        _log_stats(stats, f"{how} in {build.seconds_since(started)}, {directory}")
        return Corpus(
            TokenStore(directory, "train"),
            TokenStore(directory, "valid"),
            vocabulary,
            store.digest({k: meta[k] for k in ("splits", "specials")}, vocabulary.fingerprint),
            stats,
            directory,
        )

    def _build(self, directory: Path, vocabulary: Vocabulary, key: str) -> dict:
        with store.new_directory(directory) as temporary:
            return build.build_store(
                temporary,
                self._units,
                vocabulary,
                valid_fraction=self._valid_fraction,
                workers=self._workers,
                key=key,
            )

    def _kept(self, record: Path | None, arguments: list) -> Path | None:
        """The store that the run began with, if it was made from these arguments and is there."""
        try:
            entry = json.loads(record.read_text()) if record else {}
        except (OSError, ValueError, RecursionError):
            return None
        name = entry.get("store") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"tokens-\w+", name):
            return None
        directory = self._cache / name
        return directory if entry.get("arguments") == arguments and directory.is_dir() else None

    def _opened(self, directory: Path) -> dict | None:
        if not directory.exists():
            return None
        try:
            return store.verify(directory)
        except DamagedStoreError as error:
            log.warning("token cache %s is damaged, building it again: %s", directory, error)
            return None


class _Sample:
    """A bounded sample of the training documents: the first ones of every unit, in order."""

    def __init__(self, units: list[Unit], valid_fraction: float):
        self._units, self._valid_fraction, self.characters = units, valid_fraction, 0

    def __iter__(self) -> Iterator[str]:
        share = TOKENIZER_SAMPLE_CHARS / max(sum(unit.size for unit in self._units), 1)
        for unit in self._units:
            left = unit.size if share >= 1 else int(unit.size * share)
            for text in unit.documents():
                if left <= 0 or self.characters >= TOKENIZER_SAMPLE_CHARS:
                    break
                if build.held_out_score(text) >= self._valid_fraction:
                    text = text[: max(left, 1)]
                    left -= len(text)
                    self.characters += len(text)
                    yield text


def _log_stats(stats: dict[str, dict[str, int]], how: str) -> None:
    for split, s in stats.items():
        log.info(
            "%s split: %s documents, %s tokens, %s characters, %.2f bytes per token",
            *(split, f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['characters']:,}"),
            s["bytes"] / s["tokens"],
        )
    share = stats["valid"]["tokens"] / sum(s["tokens"] for s in stats.values())
    log.info("token cache: %.1f %% of the tokens held out, %s", 100 * share, how)
