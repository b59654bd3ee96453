"""The run's text: the prepared corpus, and batches for every phase."""

import pathlib
from typing import Any, NamedTuple

import jax

from train.config import Config
from train.data import Corpus, make_dataset, prepare
from train.folder import TOKENIZER_FILE
from train.mesh import ALONE, Share


class PhaseData(NamedTuple):
    """Batches of one phase: an endless stream to train on, and a fixed set held out."""

    train: Any
    held_out: Any


def open_corpus(config: Config, folder: pathlib.Path, expected: str | None) -> Corpus:
    """Prepare the corpus, with the tokenizer that the run has already, if any.

    Args:
      config: the run.
      folder: the run's folder; a new tokenizer is saved there.
      expected: fingerprint of the corpus that the run was started on; None for a new run.

    Raises:
      ValueError: the data can't be used, or isn't what the run was started on.
    """
    kept, index = folder / TOKENIZER_FILE, jax.process_index()
    corpus = prepare(
        config.data,
        objective=config.objective,
        tokenizer=kept if kept.exists() else config.tokenizer or None,
        vocab_size=config.vocab_size,
        valid_fraction=config.valid_fraction,
        cache_dir=config.cache_dir or None,
        run_dir=folder,
        record=f"corpus-{index}.json" if index else "corpus.json",
    )
    if expected not in (None, corpus.fingerprint):
        raise ValueError(
            f"the text behind --data={config.data} has changed since {folder} was started (files "
            f"or packages were added, removed or updated), so the run cannot go on where it was. "
            f"Restore the text, or start anew with another --run-dir."
        )
    return corpus


def make_datasets(
    config: Config, corpus: Corpus, share: Share = ALONE, multiple: int = 1
) -> list[PhaseData]:
    """Batches of every phase; each phase draws its own order and masks.

    Held-out batches have the size of a micro-batch, so that evaluation needs no more memory than
    training.

    Args:
      share: what this process loads of every batch.
      multiple: held-out batches have a multiple of so many sequences, all processes together.
    """
    datasets = []
    for phase in config.phases:
        options = {
            "objective": config.objective,
            "seq_len": phase.seq_len,
            "max_predictions": phase.max_predictions if config.objective == "mlm" else None,
            "process_index": share.index,
            "process_count": share.count,
        }
        seed, micro = config.seed + phase.index, phase.batch_size // phase.accumulation
        datasets.append(
            PhaseData(
                make_dataset(corpus.train, batch_size=phase.batch_size, seed=seed, **options),
                make_dataset(
                    corpus.valid, batch_size=micro, train=False, multiple=multiple, **options
                ),
            )
        )
    return datasets
