"""Splits documents into sentences that concatenate to the document again."""

import re
from collections.abc import Iterator

import numpy as np

MAX_SENTENCE_CHARS = 2000
MAX_SENTENCE_TOKENS = 64
MIN_SENTENCE_TOKENS = 4

# A sentence ends before the white space that follows closing punctuation and precedes a capital,
# a digit, an opening quote or bracket; or before a blank line.
_BREAK = re.compile(
    r"""(?<=[.!?])(?=\s+["'(\[“‘]*[A-Z0-9À-ÖØ-ÞА-Я])|(?<=[.!?]["')\]”’])(?=\s+["'(\[“‘]*[A-Z0-9])"""
    r"""|(?<=[。！？])|(?<=\S)(?=[ \t]*\n[ \t]*\n)"""
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:e\.g|i\.e|cf|vs|etc|al|Dr|Mr|Mrs|Ms|Prof|St|No|Fig|Eq|Sec|[A-Z])\.$"
)


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text; ``"".join(sentences(text)) == text``.

    White space stays at the head of the sentence that follows it, so a byte-level tokenizer gives
    the same tokens for the pieces as for the whole. Rules, not a model: English is split well,
    other scripts by their full stops or else by length.
    """
    start = 0
    for match in _BREAK.finditer(text):
        stop = match.start()
        if stop == start or _ABBREVIATION.search(text, max(start, stop - 8), stop):
            continue
        yield from _bounded(text, start, stop)
        start = stop
    if start < len(text):
        yield from _bounded(text, start, len(text))


def _bounded(text: str, start: int, stop: int) -> Iterator[str]:
    while stop - start > MAX_SENTENCE_CHARS:
        cut = text.rfind(" ", start + MAX_SENTENCE_CHARS // 2, start + MAX_SENTENCE_CHARS)
        cut = cut if cut > 0 else start + MAX_SENTENCE_CHARS
        yield text[start:cut]
        start = cut
    yield text[start:stop]


def sentence_ends(lengths: np.ndarray) -> np.ndarray:
    """Token offsets at which sentences of these token counts end, within a document.

    Sentences under MIN_SENTENCE_TOKENS join the next one, those over MAX_SENTENCE_TOKENS are cut,
    so that a chunk always has text for both segments of a pair.
    """
    ends, start, total = [], 0, int(lengths.sum())
    for stop in np.cumsum(lengths).tolist():
        if stop - start < MIN_SENTENCE_TOKENS:
            continue
        while stop - start > MAX_SENTENCE_TOKENS + MIN_SENTENCE_TOKENS:
            start += MAX_SENTENCE_TOKENS
            ends.append(start)
        ends.append(stop)
        start = stop
    if ends and ends[-1] != total:
        ends[-1] = total
    return np.array(ends or [total], np.int64)
