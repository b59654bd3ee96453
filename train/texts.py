"""Text in, text out: what a served model continues, in words instead of ids."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from train.prompts import encoded, padded_rows, utf8_fault

if TYPE_CHECKING:
    from train.data.tokenizer import Vocabulary
    from train.serving import Served

CHUNK = 8  # tokens that are made between two looks at them
NEW_TOKENS = 64  # where none are asked for, and so many fit
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token that is a byte, in vocabularies such as LLaMA 2's


class Continuation(NamedTuple):
    """What was made of a text so far.

    Attributes:
      text: what follows the prompt, ahead of an end of text and of any stop.
      settled: its characters that no later token can change.
      ended: whether an end of text or a stop was there.
      tokens: how many were made.
    """

    text: str
    settled: int
    ended: bool
    tokens: int


def complete(served: "Served", prompts: str | Sequence[str], **options) -> list[str]:
    """What follows each prompt, up to an end of text or a stop.

    >>> from train import serving
    >>> served = serving.load("runs/NAME")  # doctest: +SKIP
    >>> complete(served, ["The kernel", "A mask"], max_new_tokens=32)  # doctest: +SKIP

    Args:
      served, prompts, **options: as for `continuations`.

    Raises:
      ValueError, TypeError: as `continuations`.
    """
    *_, last = continuations(served, prompts, **options)
    return [row.text for row in last]


def continuations(
    served: "Served",
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stops: str | Sequence[str] | None = (),
    seed: int = 0,
    special_tokens: bool = False,
) -> Iterator[list[Continuation]]:
    """Texts as they grow: of each prompt, the first token, then a few more at a time.

    Args:
      served: a GPT-2, OPT, LLaMA or Mistral, from `serving.load`.
      prompts: a text, or several, which are continued together.
      max_new_tokens: of each prompt; None: 64, or as many as the model has positions for.
      temperature, top_k, top_p: as for `slope_jax.generate.generate`.
      stops: a text that ends a continuation, ahead of `max_new_tokens`, or several; None: no text does.
      seed: of the sampling, an integer in [0, 2**31).
      special_tokens: whether what spells a special token in a prompt, such as "</s>", is that token, as
        what a chat template writes means it; else it is text like any other.

    Raises:
      ValueError: no prompt, an empty stop, text that is not UTF-8, a model that does not generate, or an
        option out of range.
      TypeError: `served` is something else, such as the path of a run.
    """
    import jax

    from slope_jax.generate import stream
    from slope_jax.prompts import is_integer
    from train.serving import check_served

    check_served(served)
    prompts, stops = _texts("prompts", prompts), _texts("stops", () if stops is None else stops)
    if not prompts or "" in stops:
        raise ValueError("give at least one prompt, and no empty text to stop at")
    if not is_integer(seed) or not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed!r} must be an integer in [0, 2**31)")
    vocabulary = served.vocabulary
    rows = encoded(served, prompts, special_tokens=special_tokens)
    ids, lengths = padded_rows(rows)
    if max_new_tokens is None:
        max_new_tokens = fitting_tokens(served, ids.shape[1])
    pieces = stream(
        served.model,
        served.variables,
        ids,
        lengths=lengths,
        max_new_tokens=max_new_tokens,
        chunk=CHUNK,
        end_token=served.ends,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(seed) if temperature else None,
    )
    return _grown(served, rows, pieces, stop_texts(vocabulary, stops))


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    texts = list(texts) if isinstance(texts, Iterable) else [texts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={given!r} must be a text or several")
    for number, text in enumerate(texts):
        if fault := utf8_fault(text):
            raise ValueError(f"{name}, number {number}: {fault}")
    return texts


def fitting_tokens(served: "Served", longest: int) -> int:
    """New tokens behind a prompt of `longest` tokens where none are asked for.

    Raises:
      ValueError: there is no room for one.
      TypeError: `served` is something else.
    """
    from train.serving import check_served

    check_served(served)
    room = served.model.config.max_positions - longest
    if room < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room for another: the model has"
            f" {longest + room} positions; shorten it"
        )
    return min(NEW_TOKENS, room)


def _grown(served, prompts, pieces, stops) -> Iterator[list[Continuation]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for piece in pieces:
        found = []
        for prompt, row, tokens in zip(prompts, rows, piece.tolist(), strict=True):
            row.extend(tokens)
            text, ended = continued_text(served, prompt, row, stops)
            settled = len(text) if ended else _settled(served, prompt, row, stops)
            found.append(Continuation(text, settled, ended, len(row)))
        yield found
        if all(row.ended for row in found):
            return


def continued_text(
    served: "Served", prompt: list[int], tokens: list[int], stops: Sequence[str]
) -> tuple[str, bool]:
    """The text that `tokens` add to a prompt's, ahead of an end of text and of any stop.

    Decoded behind the prompt, for some tokenizers write no space ahead of a first word.

    Returns:
      The text, and whether an end or a stop was there.

    Raises:
      TypeError: `served` is something else.
    """
    from train.serving import check_served

    check_served(served)
    decode, ends = served.vocabulary.decode, served.ends
    places = [place for place, token in enumerate(tokens) if token in ends]
    ended = bool(places)
    tokens = tokens[: places[0]] if ended else tokens
    prompt = [token for token in prompt if token not in ends]
    first = len(decode(prompt))
    for count in [*(_unspoiled(served, tokens) if stops else ()), len(tokens)]:
        grown = _grown_prompt(served, prompt, tokens[:count])
        text = decode([*prompt, *tokens[:count]])[first + grown :]
        found = [text.index(stop) for stop in stops if stop and stop in text]
        if found:
            return text[: min(found)], True
    return text, ended


def _grown_prompt(served: "Served", prompt: list[int], tokens: Sequence[int]) -> int:
    """Characters by which a prompt's text is longer with the tokens behind it.

    Bytes in a row are decoded together: where the tokens' first ones are wrong, each of the prompt's last
    ones becomes a character, and where they end a character that the prompt began, it becomes fewer.
    """
    run = _first_bytes(served, reversed(prompt))[::-1]
    return _characters(run, run + _first_bytes(served, tokens)) - _characters(run, run)


def _first_bytes(served: "Served", tokens: Iterable[int]) -> bytes:
    """Those of the first tokens that are a byte each."""
    name = served.vocabulary.tokenizer.id_to_token
    values = (_BYTE.fullmatch(name(token) or "") for token in tokens)
    return bytes(int(value[1], 16) for value in itertools.takewhile(bool, values))


def _characters(begin: bytes, run: bytes) -> int:
    """Of the text of a run of bytes, how many whole ones its first bytes give."""
    return len(begin.decode(errors="ignore")) if _is_text(run) else len(begin)


def _unspoiled(served: "Served", tokens: Sequence[int]) -> Iterator[int]:
    """After how many tokens there were whole characters that are not to be seen in the text of all.

    Of tokens that are a byte each, those in a row are decoded together: none of their characters are
    there if one byte is wrong, not even a newline ahead of it, which may have been a stop.
    """
    for start, run in _byte_runs(served, tokens):
        if _is_text(run):
            continue
        yield from (start + n for n in range(1, len(run)) if _is_text(run[:n]))


def _byte_runs(served: "Served", tokens: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Bytes that stand for themselves, as those in a row, and where these begin."""
    name = served.vocabulary.tokenizer.id_to_token
    values = [_BYTE.fullmatch(name(token) or "") for token in tokens]
    places = itertools.groupby(range(len(tokens)), lambda place: values[place] is not None)
    for is_run, run in places:
        if is_run:
            run = list(run)
            yield run[0], bytes(int(values[place][1], 16) for place in run)


def _is_text(run: bytes) -> bool:
    try:
        run.decode()
    except UnicodeDecodeError:
        return False
    return True


def stop_texts(vocabulary: "Vocabulary", stops: Sequence[str]) -> list[str]:
    """Stops as they are given and as the tokenizer spells them: ours joins accents to letters."""
    normalizer = vocabulary.tokenizer.normalizer
    spelled = [normalizer.normalize_str(stop) for stop in stops] if normalizer else []
    return list(dict.fromkeys([*stops, *spelled]))


def _settled(served: "Served", prompt: list[int], tokens: list[int], stops: Sequence[str]) -> int:
    """Characters ahead of what may yet become another character, or turn out to begin a stop.

    Bytes in a row are decoded together, so that each of the last ones hangs on the next token.
    """
    for start, run in _byte_runs(served, tokens):
        if start + len(run) == len(tokens):
            tokens = tokens[:start]
    text = continued_text(served, prompt, tokens, ())[0].rstrip("\ufffd")
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return len(text) - max(begun, default=0)
