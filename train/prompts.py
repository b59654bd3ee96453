"""Ids of the texts that a served model is asked to continue or to fill."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tokenizers

    from train.data.tokenizer import Vocabulary
    from train.serving import Served


def encoded(
    served: "Served", prompts: Sequence[str], *, special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each prompt; of an empty one, what is ahead of a text, or the end of another.

    Args:
      special_tokens: as of `train.texts.continuations`.
    """
    if special_tokens:
        rows = (with_special_tokens(served, text, served.beginning) for text in prompts)
    else:
        rows = ([*served.beginning, *served.vocabulary.encode(text)] for text in prompts)
    return [row or [served.ends[0]] for row in rows]


def padded_rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 (B, P) with 0 behind each row, and lengths (B,), as `slope_jax.generate` takes them."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids, lengths


def with_special_tokens(served: "Served", text: str, beginning: Sequence[int]) -> list[int]:
    """Ids of a text in which what spells a special token is that token.

    They are behind `beginning`, unless the text spells the token that begins one by itself.
    """
    tokenizer = served.vocabulary.with_special_tokens
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    first = tokenizer.decode([start_token(served)], skip_special_tokens=False)
    return ids if first and text.startswith(first) else [*beginning, *ids]


def start_token(served: "Served") -> int:
    """What a text begins with where something must: its first token by name, else what ends texts."""
    named = served.about.get("imported", {}).get("bos")
    if named is not None:
        return named
    return [*served.beginning, served.vocabulary.specials.end_of_text][0]


def masked_ids(vocabulary: "Vocabulary", text: str) -> list[int]:
    """A text's ids as a BERT reads it, each [MASK] in the place of a word and the space it carries.

    Raises:
      ValueError: no [MASK] is there.
    """
    specials = vocabulary.specials
    mask = vocabulary.tokenizer.id_to_token(specials.mask)
    *pieces, last = text.split(mask)  # in a text, the name of a special token is just text
    if not pieces:
        raise ValueError(f"{text!r} has no {mask}; a BERT fills masks and does not continue")
    space = " " if carries_space(vocabulary.tokenizer) else ""
    ids = [specials.cls]
    for piece in pieces:
        ids += [*vocabulary.encode(piece.removesuffix(space)), specials.mask]
    return [*ids, *vocabulary.encode(last), specials.sep]


def carries_space(tokenizer: "tokenizers.Tokenizer") -> bool:
    """Whether a word's tokens hold the space ahead of it: in byte-level BPE, not in WordPiece."""
    splits = tokenizer.pre_tokenizer
    return splits is not None and splits.pre_tokenize_str("a b")[-1][0] != "b"


def utf8_fault(text: str) -> str | None:
    """What keeps a text from being UTF-8, such as half of a character; None: nothing does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = f"{text[error.start]!a} at character {error.start}"
        return f"not UTF-8, {at}; give text in UTF-8"
    return None
