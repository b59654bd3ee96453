"""Text to batches: ``prepare`` makes a corpus on disk, ``make_dataset`` cuts batches from it."""

from train.data.corpus import Corpus, default_cache_dir, prepare, read_documents
from train.data.pipeline import batches_from, make_dataset
from train.data.store import TokenStore

__all__ = [
    "Corpus",
    "TokenStore",
    "batches_from",
    "default_cache_dir",
    "make_dataset",
    "prepare",
    "read_documents",
]
