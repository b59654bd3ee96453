"""Text from a decoder: one pass over the prompts, then a compiled loop over new tokens."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.epilogue import RANK_MULTIPLE, padded_rank
from slope_jax import decoding
from slope_jax.decoding import Given, How
from slope_jax.dense import ADAPTER_L, ADAPTER_R
from slope_jax.models.bert import Bert
from slope_jax.models.cache import cache_slots, prompt_width
from slope_jax.models.casting import is_cast
from slope_jax.models.decoder import Decoder
from slope_jax.models.stack import Path, unstack_layers
from slope_jax.models.variables import check_variables
from slope_jax.prompts import checked_prompts, is_integer
from slope_jax.sampling import check_sampling, checked_key


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 (B, max_new_tokens); behind the end of a row, the first `end_token`.
      lengths: int32 (B,), new tokens of each row, its end token included.
    """

    tokens: jax.Array
    lengths: jax.Array


def inference_variables(
    model: Decoder, variables: Mapping[str, Any]
) -> tuple[Decoder, dict[str, Any]]:
    """The same function in the form that generates fastest: (model, variables).

    Kernels, tables and adapters in the compute dtype, as the layers would cast them for each token;
    layers apart, as slices of a stack would be copied for each token; and adapters with zeros up to a
    rank of eights, as kernels would pad them for each token. Masks, norms and biases stay as they are.

    Raises:
      ValueError: the variables are not the model's.
    """
    check_variables(model, variables, any_stack=True)
    return with_padded_ranks(*with_layers_apart(model, variables))


def with_layers_apart(
    model: Decoder, variables: Mapping[str, Any], place: Callable[[Path, Any], Any] | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """`inference_variables`, the adapters of the rank that they have.

    `place` gets each leaf of the result with its path, collection first, as soon as it is made, and
    gives what stands there: of variables in NumPy, so that a device never holds more than it keeps.
    """

    def converted(path: Path, leaf: Any) -> Any:
        if path[0] == "params" and is_cast(path[-1]):
            leaf = leaf.astype(model.config.dtype)
        return leaf if place is None else place(path, leaf)

    single = type(model)(dataclasses.replace(model.config, scan=False, remat=False))
    return single, unstack_layers(variables, converted)


def with_padded_ranks(
    model: Decoder, variables: Mapping[str, Any]
) -> tuple[Decoder, dict[str, Any]]:
    """The same function with adapters whose rank the kernels take."""
    rank = model.config.rank
    if rank % RANK_MULTIPLE == 0:
        return model, dict(variables)
    axes = {ADAPTER_L: -1, ADAPTER_R: -2}
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: padded_rank(leaf, axes[path[-1].key]) if path[-1].key in axes else leaf,
        variables["params"],
    )
    rank += -rank % RANK_MULTIPLE
    padded = type(model)(dataclasses.replace(model.config, adapter_rank=rank))
    return padded, {**variables, "params": params}


def generate(
    model: Decoder,
    variables: Mapping[str, Any],
    prompts: jax.Array,
    *,
    max_new_tokens: int,
    lengths: jax.Array | None = None,
    end_token: int | Sequence[int] | jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> Generation:
    """Continues prompts, greedily or by sampling.

    The model's programs are compiled for few sizes of prompts and caches (`prompt_width` and
    `cache_slots` of `slope_jax.models.cache`), and serve all numbers of new tokens that have room in
    them; what cuts the result to its number takes some 30 ms for a new one, and `stream` has none.

    Args:
      model: GPT-2, OPT, LLaMA or Mistral.
      variables: its {"params": ..., "masks": ...}; best both from `inference_variables`.
      prompts: (B, P) integers, right-padded with anything.
      max_new_tokens: tokens to add to each row.
      lengths: (B,) integers in 1 .. P, valid tokens of each prompt; None: all P.
      end_token: an id, or several, any of which ends a row, and the loop as soon as all rows have
        ended; None: nothing does.
      temperature: 0 takes the likeliest token; from 1e-30 to 1e30, logits are divided by it and sampled.
      top_k: sample from the k likeliest tokens only.
      top_p: sample from the fewest tokens that hold this probability together, in (0, 1].
      key: PRNG key, needed for sampling; or one of each row (B,), which then is continued as it would
        be by itself, but for rounding: in 16 bits tokens that are about as likely can change places.

    Raises:
      ValueError: a value or an id out of range, prompts and new tokens together exceed max_positions, or
        the variables are not the model's.

    >>> from slope_jax.models import build
    >>> model = build("gpt2-nano", vocab_size=64, num_layers=1, hidden_size=32, mlp_size=64)
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> prompts = jnp.array([[3, 1, 4, 1], [2, 7, 0, 0]])
    >>> generate(model, variables, prompts, lengths=jnp.array([4, 2]), max_new_tokens=5).tokens.shape
    (2, 5)
    """
    how, given, prompts = _prepared(
        model,
        variables,
        prompts,
        max_new_tokens,
        lengths,
        end_token,
        temperature,
        top_k,
        top_p,
        key,
    )
    loop, _ = decoding.start(how, given, prompts)
    loop = decoding.finish(how, given, loop, max_new_tokens)
    return Generation(loop.tokens[:, :max_new_tokens], loop.lengths)


def stream(
    model: Decoder,
    variables: Mapping[str, Any],
    prompts: jax.Array,
    *,
    max_new_tokens: int,
    chunk: int = 8,
    lengths: jax.Array | None = None,
    end_token: int | Sequence[int] | jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, as they come: int32 (B, n), the first alone, then `chunk` at once.

    The device goes on with the next ones while these are looked at. Behind the end of a row follows
    `end_token`; the last chunk may be shorter. Arguments and errors are those of `generate`, raised at
    the call.

    >>> from slope_jax.models import build
    >>> model = build("gpt2-nano", vocab_size=64, num_layers=1, hidden_size=32, mlp_size=64)
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> pieces = stream(model, variables, jnp.array([[3, 1, 4]]), max_new_tokens=6, chunk=4)
    >>> [piece.shape for piece in pieces]
    [(1, 1), (1, 4), (1, 1)]
    """
    if not is_integer(chunk) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a positive integer, tokens made at once")
    how, given, prompts = _prepared(
        model,
        variables,
        prompts,
        max_new_tokens,
        lengths,
        end_token,
        temperature,
        top_k,
        top_p,
        key,
    )

    def pieces():
        loop, (tokens, ended) = decoding.start(how, given, prompts)
        yield np.asarray(tokens)  # before the program of the others is compiled
        if max_new_tokens > 1 and not bool(ended):
            found = decoding.pieces(how, given, loop, max_new_tokens, chunk)
            yield from _regrouped(found, chunk)

    return pieces()


def _regrouped(pieces: Iterable[np.ndarray], chunk: int) -> Iterator[np.ndarray]:
    """Of `chunk` columns each, the last one of what is left."""
    held = None
    for piece in pieces:
        held = piece if held is None else np.concatenate([held, piece], axis=1)
        while held is not None and held.shape[1] >= chunk:
            yield held[:, :chunk]
            held = held[:, chunk:] if held.shape[1] > chunk else None
    if held is not None:
        yield held


def _prepared(
    model, variables, prompts, max_new_tokens, lengths, end_token, temperature, top_k, top_p, key
) -> tuple[How, Given, jax.Array]:
    if not isinstance(model, Decoder):
        other = "; fill_masks gives words for its masks" if isinstance(model, Bert) else ""
        raise ValueError(
            f"{type(model).__name__} does not generate{other}; use a GPT-2, OPT, LLaMA or Mistral"
        )
    config = model.config
    prompts, lengths = checked_prompts(prompts, lengths, config.vocab_size)
    batch, width = prompts.shape
    _check_room(width, max_new_tokens, config.max_positions)
    ends = _checked_ends(end_token, config.vocab_size)
    check_sampling(temperature, top_k, top_p, vocab_size=config.vocab_size)
    if temperature and key is None:
        raise ValueError(f"temperature={temperature} samples; pass key=jax.random.key(seed)")
    key = None if key is None else checked_key(key, batch)
    check_variables(model, variables)
    given = Given(
        variables,
        lengths,
        key if temperature else None,
        np.float32(temperature) if temperature else None,
        None if top_p is None else np.float32(top_p),
    )
    slots = cache_slots(config, batch, width + max_new_tokens)
    xp = np if isinstance(prompts, np.ndarray) else jnp
    prompts = xp.pad(prompts, ((0, 0), (0, prompt_width(config, width) - width)))
    return How(model, slots, ends, not temperature, top_k), given, prompts


def _checked_ends(end_token: Any, vocab_size: int) -> tuple[int, ...]:
    if isinstance(end_token, np.ndarray | jax.Array):
        end_token = np.asarray(end_token).tolist()
    several = isinstance(end_token, Sequence) and not isinstance(end_token, str)
    ends = tuple(end_token) if several else () if end_token is None else (end_token,)
    if (several and not ends) or not all(is_integer(e) and 0 <= e < vocab_size for e in ends):
        raise ValueError(
            f"end_token={end_token!r} must be an integer between 0 and {vocab_size - 1}"
            " (vocab_size-1), several of them, or None"
        )
    return tuple(int(end) for end in ends)


def _check_room(width: int, max_new_tokens, most: int) -> None:
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a positive integer")
    if (total := width + max_new_tokens) > most:
        raise ValueError(
            f"prompts of {width} tokens and {max_new_tokens} new ones are {total}, more than"
            f" max_positions={most}; shorten one of them"
        )
