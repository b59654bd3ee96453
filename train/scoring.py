"""How likely a trained decoder finds given tokens, in windows of a fixed size."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slope_jax.models.decoder import Decoder
from train.loss import cross_entropy

SHORTEST = 16  # windows are padded to this, twice this, ...: few shapes to compile


class Window(NamedTuple):
    """Tokens start .. stop-1 are read; those after each of `scored` .. stop-1 are scored."""

    start: int
    stop: int
    scored: int


class Scores(NamedTuple):
    """Of the tokens that a window scores, in their order.

    Attributes:
      nats: float32, negative log-likelihoods.
      greedy: bool, whether each is the likeliest one.
    """

    nats: np.ndarray
    greedy: np.ndarray


def strided_windows(count: int, window: int, stride: int) -> list[Window]:
    """Windows over `count` tokens that score each but the first exactly once.

    The first window scores all that it can; each later one starts `stride` tokens on, and scores the
    tokens that are new in it, behind up to window - stride others.

    Args:
      count: tokens in all.
      window: most tokens that are read at once.
      stride: 1 .. window; the smaller, the more context, and the more windows.

    Raises:
      ValueError: fewer than two tokens, or a stride out of range.

    >>> strided_windows(8, 4, 2)
    [Window(start=0, stop=4, scored=0), Window(start=2, stop=6, scored=4), Window(start=4, stop=7, scored=6)]
    """
    if count < 2:
        raise ValueError(f"{count} tokens: there must be two or more, for the first is only read")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must lie between 1 and the window of {window} tokens")
    windows = [Window(0, min(window, count - 1), 0)]
    while (done := windows[-1].stop) < count - 1:
        start = windows[-1].start + stride
        windows.append(Window(start, min(start + window, count - 1), done))
    return windows


def batches(items: Sequence[Any], most: int) -> tuple[int, list[Sequence[Any]]]:
    """The rows to which groups are to be filled up, and groups of up to `most` items, of about one size.

    Of rows there are few numbers, so that few programs are compiled: powers of two up to 8, multiples of
    8, and `most`.

    Raises:
      ValueError: `most`, a batch size, is not positive.

    >>> batches("abcdefghi", 5), batches("abcdefg", 100)
    ((5, ['abcde', 'fghi']), (8, ['abcdefg']))
    """
    if most < 1:
        raise ValueError(f"batch_size={most} must be 1 or more")
    if not items:
        return 0, []
    count = -(-len(items) // most)
    size = -(-len(items) // count)
    step = min(8, 1 << (size - 1).bit_length())
    rows = min(most, -(-size // step) * step)
    return rows, [items[i : i + size] for i in range(0, len(items), size)]


def score(
    model: Decoder,
    variables: Mapping[str, Any],
    pieces: Sequence[tuple[np.ndarray, int]],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Scores]:
    """Scores of each piece (tokens, n): of the last n tokens, after all before them in the piece.

    Pieces are sorted and padded to few lengths, each compiled once.

    Args:
      model: a causal decoder; with `variables` best from `inference_variables`.
      pieces: int32 tokens, 2 .. max_positions + 1 of them, and 1 <= n < tokens.
      batch_size: most pieces at a time.
      advance: called with the number of pieces that were just scored.

    Raises:
      ValueError: a piece is too short or too long, or `batch_size` is not positive.
    """
    most = model.config.max_positions
    for tokens, n in pieces:
        if not (1 <= n < len(tokens) <= most + 1):
            raise ValueError(
                f"{len(tokens)} tokens of which the last {n} are to be scored; there must be one"
                f" before them, and at most {most} (max_positions) before the last"
            )
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))
    results: list[Scores | None] = [None] * len(pieces)
    rows, groups = batches(order, batch_size)
    for group in groups:
        longest = len(pieces[group[0]][0]) - 1
        width = min(most, SHORTEST * 2 ** max(0, (longest - 1) // SHORTEST).bit_length())
        ids = np.zeros((rows, width), np.int32)
        labels = np.zeros((rows, width), np.int32)
        for row, i in enumerate(group):
            tokens = pieces[i][0]
            ids[row, : len(tokens) - 1], labels[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        nats, greedy = jax.device_get(_score(model, variables, ids, labels))
        for row, i in enumerate(group):
            tokens, n = pieces[i]
            last = slice(len(tokens) - 1 - n, len(tokens) - 1)
            results[i] = Scores(nats[row, last], greedy[row, last])
        advance(len(group))
    return results


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Decoder, variables, ids: jax.Array, labels: jax.Array):
    # The padding is to the right, where causal attention does not look.
    nats, best = cross_entropy(model.apply(variables, ids), labels)
    return nats, best == labels
