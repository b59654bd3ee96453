"""Prompts of generation: rows of ids, right-padded, checked before a program reads them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checked_prompts(
    prompts: Any, lengths: Any, vocab_size: int, name: str = "prompts"
) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]:
    """Ids (B, P) with 0 behind each prompt, and lengths (B,), both int32; NumPy's where values are known.

    Values that are being traced are not looked at.

    Args:
      prompts: (B, P) integers, right-padded with anything.
      lengths: (B,) integers in 1 .. P; None: all P.
      vocab_size: one more than the largest id.
      name: of the ids in messages.

    Raises:
      ValueError: another shape or dtype, or a length or an id out of range.

    >>> checked_prompts([[3, 1, 4], [2, -1, -1]], [3, 1], 5)[0].tolist()
    [[3, 1, 4], [2, 0, 0]]
    """
    prompts = prompts if isinstance(prompts, jax.Array) else _array(prompts, name)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer) or not prompts.size:
        raise ValueError(
            f"{name} are {prompts.dtype}{list(prompts.shape)}; they must be integers"
            " (batch, tokens), at least one of each"
        )
    lengths = _checked_lengths(prompts.shape, lengths, name)
    xp = jnp
    if _known(prompts) and _known(lengths):
        # The host's arrays go to the device with the call; each of its own would be a launch.
        xp, prompts = np, np.asarray(prompts)
        _check_ids(prompts, lengths, vocab_size, name)
    prompts, lengths = (xp.asarray(array, np.int32) for array in (prompts, lengths))
    # An id that has no row in the table would become NaN, and attention 0 * NaN.
    valid = xp.arange(prompts.shape[1], dtype=np.int32)[None] < lengths[:, None]
    return xp.where(valid, prompts, np.int32(0)), lengths


def _array(rows: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(rows)
    except ValueError as error:  # NumPy's, of rows of different lengths
        raise ValueError(
            f"{name} have rows of different lengths; pad them on the right, and give their lengths"
        ) from error


def is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _known(values: Any) -> bool:
    """False while tracing, and where other processes hold a part."""
    return not isinstance(values, jax.core.Tracer) and getattr(values, "is_fully_addressable", True)


def _checked_lengths(shape: tuple[int, int], lengths: Any, name: str) -> Any:
    batch, width = shape
    if lengths is None:
        return np.full(batch, width, np.int32)
    if not _known(lengths):
        return lengths
    given = np.asarray(lengths)
    fits = given.shape == (batch,) and np.issubdtype(given.dtype, np.integer)
    if not fits or not ((given >= 1) & (given <= width)).all():
        raise ValueError(
            f"lengths={given.tolist()}; for {name} of {[batch, width]} they must be {batch}"
            f" integers in 1 .. {width}"
        )
    return given


def _check_ids(prompts: np.ndarray, lengths: np.ndarray, vocab_size: int, name: str) -> None:
    valid = np.arange(prompts.shape[1]) < lengths[:, None]
    wrong = np.argwhere(valid & ((prompts < 0) | (prompts >= vocab_size)))
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f"{name}[{row}, {place}]={prompts[row, place]} is no token: ids must lie between 0 and"
            f" {vocab_size - 1} (vocab_size-1). Encode with the model's tokenizer, and give the"
            " lengths of padded rows"
        )
