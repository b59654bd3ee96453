"""Text for pruning by Wanda: rows of tokens, as the model was trained on."""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from train.data import read_documents
from train.data.build import encode_document
from train.data.tokenizer import Vocabulary

SEQUENCES = 128  # of the paper
LONGEST = 2048  # likewise; where a model has more positions
LEAST = 1024  # tokens, unless fewer are asked for: the norms of too few are chance
_ROWS = 8  # of a batch


def calibration_batches(
    source: str,
    vocabulary: Vocabulary,
    length: int,
    *,
    beginning: Iterable[int] = (),
    sequences: int = SEQUENCES,
    cache_dir: pathlib.Path | None = None,
    say: Callable[[str], None] = print,
) -> list[np.ndarray]:
    """Batches of `length` tokens in a row, for `slope_jax.models.prune_wanda`.

    Documents are joined and cut; of a BERT, each row stands between [CLS] and [SEP]. Where there is less
    text than a row, that is the only one.

    Args:
      source: as the --data of train.pretrain: text:GLOB, tfds:NAME, docs.
      vocabulary: that of the model.
      length: tokens of a row, special ones included.
      beginning: ids ahead of the text.
      sequences: rows at most; reading ends where there are enough.
      say: gets one line that tells how much was read, and whether it is less than was asked for.

    Returns:
      Integers (B, length), B at most 8.

    Raises:
      ValueError: the source is unknown or has no text, or fewer than 1,024 tokens and than asked for.
    """
    specials = vocabulary.specials
    ends = ([specials.cls], [specials.sep]) if vocabulary.objective == "mlm" else ([], [])
    size = length - sum(map(len, ends))
    if size < 1:
        raise ValueError(
            f"length={length} leaves no room for text between [CLS] and [SEP]; give more"
        )
    texts = read_documents(source, cache_dir=cache_dir)
    tokens = itertools.chain(beginning, _tokens(texts, vocabulary))
    rows = _cut(itertools.islice(tokens, size * sequences), size)
    if not rows:
        raise ValueError(f"calibration {source!r} has no text; give another source")
    say(_read(source, rows, size, sequences))
    full = np.array([[*ends[0], *row, *ends[1]] for row in rows], np.int32)
    return [full[i : i + _ROWS] for i in range(0, len(full), _ROWS)]


def _read(source: str, rows: list[list[int]], size: int, sequences: int) -> str:
    """How much it is, for people; raises a ValueError where it is too little."""
    tokens, asked = sum(map(len, rows)), size * sequences
    found = f"{len(rows):,} of {sequences:,} rows, {tokens:,} of {asked:,} tokens"
    if tokens < min(LEAST, asked):
        raise ValueError(
            f"calibration {source!r} has text for {found}. Wanda needs {min(LEAST, asked):,} or more, or"
            " its choice is chance: give more text, or leave out calibration to prune by magnitude"
        )
    few = "" if tokens == asked else "; warning: the text ends there, and more would choose better"
    return f"calibration: read {found}{few}"


def _tokens(texts: Iterable[str], vocabulary: Vocabulary) -> Iterator[int]:
    for text in texts:
        yield from encode_document(text, vocabulary)[0].tolist()


def _cut(tokens: Iterator[int], size: int) -> list[list[int]]:
    """Whole rows; what is left over only where there is no other."""
    rows = []
    while row := list(itertools.islice(tokens, size)):
        rows.append(row)
    return [row for row in rows if len(row) == size] or rows
