"""Texts of many requests, several at a time, each generated as it would be by itself: with keys of its
own, and but for rounding, by which in 16 bits tokens that are about as likely can change places."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slope_jax.generate import stream
from train.prompts import padded_rows
from train.scoring import batches
from train.serving import Served
from train.texts import CHUNK, continued_text


class Request(NamedTuple):
    """A text to generate.

    Attributes:
      prompt: ids, one or more.
      count: of new tokens.
      sampling: `temperature`, `top_k` and `top_p` of `slope_jax.generate.stream`; empty where it is
        greedy.
      stops: texts that end it.
    """

    prompt: list[int]
    count: int
    sampling: dict[str, Any]
    stops: Sequence[str]


def generated(
    served: Served,
    requests: Sequence[Request],
    *,
    batch_size: int,
    seed: int,
    specials: Mapping[int, str],
) -> list[str]:
    """The new text of each request, ahead of an end of text and of its stops, decoded by itself.

    Args:
      served: a decoder.
      batch_size: most requests at a time, which have equal counts and sampling.
      seed: of the sampling, which depends on it and on the number of the request alone.
      specials: names of tokens that the text of a request does not have, unless a stop of it does.

    Raises:
      ValueError: as `stream`, or `batch_size` is not positive.
    """
    alike: dict[Any, list[int]] = {}
    for number, one in enumerate(requests):
        alike.setdefault((one.count, *one.sampling.items()), []).append(number)
    texts = [""] * len(requests)
    for numbers in alike.values():
        rows, groups = batches(numbers, batch_size)
        for group in groups:
            # What fills it up ends with the last one.
            filled = np.array([*group, *[group[-1]] * (rows - len(group))])
            pieces = _pieces(served, [requests[number] for number in filled], filled, seed)
            some = [requests[number] for number in group]
            for number, text in zip(group, _texts(served, some, pieces, specials), strict=True):
                texts[number] = text
    return texts


def _pieces(
    served: Served, requests: Sequence[Request], numbers: np.ndarray, seed: int
) -> Iterable[np.ndarray]:
    """Tokens of requests that are alike, as they come."""
    ids, lengths = padded_rows([one.prompt for one in requests])
    how = dict(requests[0].sampling)
    if how:
        key = jax.random.key(seed)
        how["key"] = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    return stream(
        served.model,
        served.variables,
        ids,
        lengths=lengths,
        max_new_tokens=requests[0].count,
        chunk=CHUNK,
        end_token=served.ends,
        **how,
    )


def _texts(
    served: Served,
    requests: Sequence[Request],
    pieces: Iterable[np.ndarray],
    specials: Mapping[int, str],
) -> list[str]:
    """Of each request; no more tokens are made than one of them needs."""
    texts, tokens = [""] * len(requests), [[] for _ in requests]
    going = list(range(len(requests)))
    for piece in pieces:
        ended = set()
        for row in going:
            stops = requests[row].stops
            seen = (t for t in piece[row].tolist() if _is_seen(specials.get(t), stops))
            tokens[row].extend(seen)
            texts[row], is_over = continued_text(served, [], tokens[row], stops)
            ended |= {row} if is_over else set()
        going = [row for row in going if row not in ended]
        if not going:
            break
    return texts


def _is_seen(special: str | None, stops: Sequence[str]) -> bool:
    """Whether a token, by its name if it is special, is in the text."""
    return special is None or any(special in stop for stop in stops)
