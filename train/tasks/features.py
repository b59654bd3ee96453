"""Examples as arrays: tokenised once, one static shape per split.

    [CLS] text [SEP]        or        [CLS] first [SEP] second [SEP]

A pair that is too long loses tokens from the end of the longer text. The second text of a span task
(a context) is cut into overlapping windows instead, each with the whole question.
"""

from typing import NamedTuple

import numpy as np

from train.data.tokenizer import Vocabulary
from train.tasks.examples import Example
from train.tasks.registry import SCORE, SPAN, Task

MOST_QUESTION = 64  # tokens of a question that are read
_CHUNK = 4096  # texts encoded at once, whose tokens Python holds as objects


class Features(NamedTuple):
    """Sequences of a split as arrays; of a span task there are one or more for an example.

    Attributes:
      input_ids: (N, S) int32, right-padded.
      second: (N,) int32, where the second text begins; S or more without one.
      lengths: (N,) int32, valid tokens.
      labels: (N,) int32 classes, (N,) float32 scores, or (N, 2) int32 first and last token of the
        answer, 0 and 0 where it isn't in this window.
      example: (N,) int32, the example that a sequence is of.
      offsets: (N, S, 2) int32, first character and end of each token in the second text, of a span
        task; else None.
    """

    input_ids: np.ndarray
    second: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    example: np.ndarray
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)


class _Row(NamedTuple):
    ids: np.ndarray
    second: int
    label: float | tuple[int, int]
    example: int
    offsets: np.ndarray | None = None  # of the tokens from `second` on


def make_features(
    task: Task,
    examples: list[Example],
    vocabulary: Vocabulary,
    seq_len: int,
    stride: int | None = None,
) -> Features:
    """Tokenise the examples of a split.

    Args:
      task: the task.
      examples: of one split.
      vocabulary: the run's tokenizer.
      seq_len: most tokens of a sequence, the special ones included. Arrays are as long as their
        longest sequence, in eights.
      stride: tokens from one window of a context to the next; None: a third of `seq_len`.

    Raises:
      ValueError: `seq_len` leaves no room for text.
    """
    check_seq_len(task, seq_len)
    make = _windows if task.kind == SPAN else _sequence
    rows: list[_Row] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        columns = [
            vocabulary.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            for texts in zip(*(example.texts for example in chunk), strict=True)
        ]
        for i, encodings in enumerate(zip(*columns, strict=True)):
            rows += make(chunk[i], start + i, encodings, vocabulary, seq_len, stride)
    return _stack(task, rows, seq_len)


def check_seq_len(task: Task, seq_len: int) -> None:
    """Raises a ValueError if `seq_len` leaves no room for text."""
    smallest = MOST_QUESTION + 32 if task.kind == SPAN else 8
    if seq_len < smallest:
        raise ValueError(f"seq_len={seq_len} is too short for {task.name}; give {smallest} or more")


def _sequence(example, index, encodings, vocabulary, seq_len, stride) -> list[_Row]:
    special = vocabulary.specials
    texts = _truncated([e.ids for e in encodings], seq_len - 1 - len(encodings))
    ids = [special.cls]
    for text in texts:
        ids += [*text, special.sep]
    second = len(texts[0]) + 2 if len(texts) > 1 else seq_len
    return [_Row(np.array(ids, np.int32), second, example.label, index)]


def _truncated(texts: list[list[int]], room: int) -> list[list[int]]:
    """Texts that hold `room` tokens together; the longer one is shortened first."""
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = map(len, texts)
    first = min(first, max(room - second, room - room // 2))
    return [texts[0][:first], texts[1][: room - first]]


def _windows(example, index, encodings, vocabulary, seq_len, stride) -> list[_Row]:
    special, (question, context) = vocabulary.specials, encodings
    head = [special.cls, *question.ids[:MOST_QUESTION], special.sep]
    room = seq_len - len(head) - 1
    stride = min(stride or max(1, seq_len // 3), room)
    offsets = np.array(context.offsets, np.int32).reshape(-1, 2)
    answer = _answer_tokens(example, offsets)
    rows, start = [], 0
    while True:
        stop = min(start + room, len(context.ids))
        inside = start <= answer[0] and answer[1] < stop
        shift = len(head) - start
        label = (answer[0] + shift, answer[1] + shift) if inside else (0, 0)
        ids = np.array([*head, *context.ids[start:stop], special.sep], np.int32)
        rows.append(_Row(ids, len(head), label, index, offsets[start:stop]))
        if stop == len(context.ids):
            return rows
        start += stride


def _answer_tokens(example: Example, offsets: np.ndarray) -> tuple[int, int]:
    """First and last token that hold a character of the first answer; (-1, -1): there is none."""
    start, text = example.answers[0]
    (tokens,) = np.nonzero((offsets[:, 0] < start + len(text)) & (offsets[:, 1] > start))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (-1, -1)


def _stack(task: Task, rows: list[_Row], seq_len: int) -> Features:
    longest = max(len(row.ids) for row in rows)
    width = min(-(-longest // 8) * 8, seq_len)
    ids = np.zeros((len(rows), width), np.int32)
    offsets = np.zeros((len(rows), width, 2), np.int32) if task.kind == SPAN else None
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        if offsets is not None:
            offsets[i, row.second : row.second + len(row.offsets)] = row.offsets
    dtype = np.float32 if task.kind == SCORE else np.int32
    return Features(
        input_ids=ids,
        second=np.array([row.second for row in rows], np.int32),
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        labels=np.array([row.label for row in rows], dtype),
        example=np.array([row.example for row in rows], np.int32),
        offsets=offsets,
    )
