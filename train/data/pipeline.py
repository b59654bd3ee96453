"""From a token store to batches: a Grain dataset in which batch i is a function of (seed, i)."""

import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from train.data.objectives import CausalBlocks, MaskedPairs
from train.data.store import TokenStore

OBJECTIVES = ("mlm", "clm")
EVAL_SEED = 0
log = logging.getLogger(__name__)


def make_dataset(
    store: TokenStore,
    *,
    objective: str,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    max_predictions: int | None = None,
    train: bool = True,
    multiple: int = 1,
) -> Any:
    """Batches of a token store as a ``grain.MapDataset`` of dicts of numpy arrays.

    ``dataset[i]`` is batch i: random access, no state, so a run resumes from one integer. The
    global batch i is examples i·B..(i+1)·B of a stream that passes over the split again and again,
    in a new order each time, with new masks; process p holds rows p·B/P..(p+1)·B/P of it. The
    global batch does not depend on the number of processes.

    Args:
      store: one split of a corpus from ``prepare``.
      objective: "mlm" (BERT) or "clm" (GPT-2), the one the corpus was prepared for.
      seq_len: tokens per sequence.
      batch_size: rows of the *global* batch; a multiple of ``process_count``.
      seed: decides order, pairs and masks. Ignored with ``train=False``.
      process_index, process_count: this process among those that share a global batch.
      max_predictions: mlm, at most this many masked tokens per row; default 15 % of ``seq_len``.
      train: False gives the evaluation set: one pass in a fixed order with fixed masks, whole
        batches only, no example twice. A split with fewer examples than ``batch_size`` gives one
        smaller batch.
      multiple: of which that smaller batch has a multiple of rows; of ``process_count`` anyway.

    Returns:
      A ``grain.MapDataset``. mlm: ``input_ids``, ``token_type_ids`` (B, S), ``lengths``,
      ``nsp_labels`` (B,), ``mlm_positions``, ``mlm_labels`` (B, P), all int32, ``mlm_weights``
      (B, P) float32. clm: ``input_ids``, ``labels`` (B, S) int32.

    Raises:
      ValueError: a split too small for ``seq_len`` or for pairs, or arguments out of range.

    Example:
      >>> dataset = make_dataset(corpus.train, objective="clm", seq_len=128, batch_size=8, seed=1)
      >>> dataset[1000]["input_ids"].shape
      (8, 128)
    """
    import grain

    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}")
    if objective != store.objective:
        raise ValueError(
            f"objective={objective!r}, but the corpus was prepared for {store.objective!r}: "
            "call prepare with the same objective"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of process_count={process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    seed = seed if train else EVAL_SEED
    if objective == "mlm":
        source = MaskedPairs(store, seq_len, max_predictions, seed)
    else:
        source = CausalBlocks(store, seq_len)
    order_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    order = grain.MapDataset.range(source.num_examples).seed(order_seed).shuffle()
    length = sys.maxsize
    if train:
        order = order.repeat()
    else:
        unit = math.lcm(process_count, multiple)
        batch_size = min(batch_size, _round_down(source.num_examples, unit))
        if batch_size == 0:
            raise ValueError(
                f"the {store.split} split has {source.num_examples} examples of {seq_len} tokens, "
                f"too few to be shared by {unit} devices or processes: raise --valid-fraction"
            )
        length = source.num_examples // batch_size
    batches = _Batches(source, order, batch_size, process_index, process_count, length)
    return grain.MapDataset.source(batches)


def batches_from(
    dataset: Any, start: int = 0, *, threads: int = 2, buffer: int = 8
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over ``dataset[start]``, ``dataset[start + 1]``, ..., read ahead in threads.

    Args:
      dataset: from ``make_dataset``.
      start: the first batch; a resumed run gives the number of batches it has used.
      threads: background threads (numpy releases the interpreter for most of the work).
      buffer: batches to hold ready.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    return iter(dataset[start:].to_iter_dataset(options))


class _Batches:
    """Whole batches as the elements, so that numpy sees a batch at a time and not an example."""

    def __init__(self, source, order, batch_size, process_index, process_count, length):
        self._source, self._order, self._length = source, order, length
        self._batch_size, self._rows = batch_size, batch_size // process_count
        self._offset = process_index * self._rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._batch_size + self._offset
        order = self._order
        examples = np.fromiter((order[start + row] for row in range(self._rows)), np.int64)
        return self._source.batch(examples, start)

    def __repr__(self) -> str:
        return f"{type(self._source).__name__}(batch_size={self._batch_size})"


def _round_down(value: int, multiple: int) -> int:
    return value // multiple * multiple
