"""Text from a decoder: one pass over the prompts, then a compiled loop over new tokens."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device import current
from pallas_kernels.epilogue import RANK_MULTIPLE, padded_rank
from slope_jax.dense import ADAPTER_L, ADAPTER_R
from slope_jax.models.cache import CACHE, cache_slots, init_cache, prompt_width
from slope_jax.models.casting import is_cast
from slope_jax.models.decoder import Decoder
from slope_jax.models.stack import Path, unstack_layers
from slope_jax.prompts import checked_prompts, is_integer
from slope_jax.sampling import check_sampling, checked_key, draw, likely

BURST = 8  # most steps that a GPU makes before the host asks whether to go on


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
    """
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
        be by itself.

    Raises:
      ValueError: a value or an id out of range, or prompts and new tokens together exceed
        max_positions.

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
    loop, _ = _start(how, given, prompts)
    loop = _advance(how, given, loop, np.int32(max_new_tokens), _burst(BURST, max_new_tokens))
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

    The device makes a chunk in one compiled loop, and goes on with the next one while this one is
    looked at. Behind the end of a row follows `end_token`; the last chunk may be shorter. Arguments
    and errors are those of `generate`, raised at the call.

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
        loop, (tokens, ended) = _start(how, given, prompts)
        yield np.asarray(tokens)  # before the program of the others is compiled
        if max_new_tokens == 1 or bool(ended):
            return
        size, done, until = min(chunk, how.slots), 1, min(1 + chunk, max_new_tokens)
        burst = _burst(chunk, max_new_tokens)
        loop = _advance(how, given, loop, np.int32(until), burst)
        while True:
            first = min(done, how.slots - size)
            made = _made(loop, np.int32(first), size)
            if until < max_new_tokens:  # where all rows have ended, it does nothing
                until = min(until + chunk, max_new_tokens)
                loop = _advance(how, given, loop, np.int32(until), burst)
            tokens, (step, ended) = jax.device_get(made)
            yield tokens[:, done - first : step - first]
            done = int(step)
            if done >= max_new_tokens or ended:
                return

    return pieces()


class _How(NamedTuple):
    """What is compiled for."""

    model: Decoder
    slots: int  # of the cache, and columns for new tokens
    end_tokens: tuple[int, ...]
    greedy: bool
    top_k: int | None


class _Given(NamedTuple):
    variables: Mapping[str, Any]
    lengths: jax.Array | np.ndarray
    # None where nothing is sampled: what is given goes to the device with every call.
    key: jax.Array | None
    temperature: np.float32 | None
    top_p: np.float32 | None


class _Loop(NamedTuple):
    step: jax.Array  # tokens made so far
    cache: Any
    tokens: jax.Array
    lengths: jax.Array
    ended: jax.Array  # (B,) bool


def _prepared(
    model, variables, prompts, max_new_tokens, lengths, end_token, temperature, top_k, top_p, key
) -> tuple[_How, _Given, jax.Array]:
    if not isinstance(model, Decoder):
        raise ValueError(f"{type(model).__name__} does not generate; use a GPT-2, OPT or LLaMA")
    config = model.config
    prompts, lengths = checked_prompts(prompts, lengths, config.vocab_size)
    batch, width = prompts.shape
    _check_room(width, max_new_tokens, config.max_positions)
    ends = _checked_ends(end_token, config.vocab_size)
    check_sampling(temperature, top_k, top_p, vocab_size=config.vocab_size)
    if temperature and key is None:
        raise ValueError(f"temperature={temperature} samples; pass key=jax.random.key(seed)")
    key = None if key is None else checked_key(key, batch)
    given = _Given(
        variables,
        lengths,
        key if temperature else None,
        np.float32(temperature) if temperature else None,
        None if top_p is None else np.float32(top_p),
    )
    slots = cache_slots(config, batch, width + max_new_tokens)
    xp = np if isinstance(prompts, np.ndarray) else jnp
    prompts = xp.pad(prompts, ((0, 0), (0, prompt_width(config, width) - width)))
    return _How(model, slots, ends, not temperature, top_k), given, prompts


@functools.partial(jax.jit, static_argnums=0)
def _start(
    how: _How, given: _Given, prompts: jax.Array
) -> tuple[_Loop, tuple[jax.Array, jax.Array]]:
    """After the pass over the prompts, which gives the first token; that (B, 1), and whether it ended all.

    The caller waits for these alone: to take them out of the loop would be a program of its own.
    """
    batch = len(prompts)
    zeros = jnp.zeros((batch,), jnp.int32)
    # Of as many columns as the cache, so that one program goes on behind prompts of any width.
    tokens = jnp.full((batch, how.slots), (*how.end_tokens, 0)[0], jnp.int32)
    cache = init_cache(how.model.config, batch, how.slots)
    logits, cache = _run(how, given, cache, prompts, logits_at=(given.lengths - 1)[:, None])
    loop = _Loop(jnp.int32(0), cache, tokens, zeros, zeros > 0)
    loop = _add(how, given, loop, logits, cache)
    return loop, (loop.tokens[:, :1], loop.ended.all())


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _advance(how: _How, given: _Given, loop: _Loop, until: jax.Array, burst: int) -> _Loop:
    """On to `until` tokens, or until all rows have ended, which is asked after every `burst` steps.

    Those of a burst that are not needed leave nothing: what they write is where the next step writes.
    """

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.step < until) & ~loop.ended.all()

    def step(_, loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(loop.tokens, loop.step - 1, 1, axis=1)
        positions = (given.lengths + loop.step - 1)[:, None]
        longer = _add(how, given, loop, *_run(how, given, loop.cache, last, positions=positions))
        if burst == 1:
            return longer
        needed = goes_on(loop)
        return longer._replace(
            step=jnp.where(needed, longer.step, loop.step),
            lengths=jnp.where(needed, longer.lengths, loop.lengths),
            ended=jnp.where(needed, longer.ended, loop.ended),
        )

    return jax.lax.while_loop(goes_on, lambda loop: jax.lax.fori_loop(0, burst, step, loop), loop)


def _burst(chunk: int, max_new_tokens: int) -> int:
    """Steps at a time, of about equal bursts that are a chunk; 1 where too many would be for nothing.

    Between two steps of a loop whose end the host does not know, a GPU waits for the host as long as a
    step of a small model takes.
    """
    if current().platform == "cpu":
        return 1
    burst = -(-chunk // -(-chunk // BURST))
    steps = max_new_tokens - 1
    rest = steps % chunk
    idle = steps // chunk * (-chunk % burst) + -rest % burst
    return burst if steps >= 8 * idle else 1


@functools.partial(jax.jit, static_argnums=2)
def _made(loop: _Loop, first: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `first` .. `first` + size - 1, how many there are in all, and whether all rows ended.

    Copies, for the loop itself is given away to go on.
    """
    tokens = jax.lax.dynamic_slice_in_dim(loop.tokens, first, size, axis=1)
    return tokens, jnp.stack([loop.step, loop.ended.all().astype(jnp.int32)])


def _run(how: _How, given: _Given, cache, ids, **options):
    """Float32 logits (B, V) of one position of each row, and the cache with these tokens."""
    variables = {**given.variables, CACHE: cache}
    logits, updated = how.model.apply(variables, ids, mutable=[CACHE], **options)
    return logits[:, 0].astype(jnp.float32), updated[CACHE]


def _add(how: _How, given: _Given, loop: _Loop, logits, cache) -> _Loop:
    """With one more token in each row."""
    if how.greedy:
        token = logits.argmax(-1).astype(jnp.int32)
    else:
        kept = likely(logits / given.temperature, how.top_k, given.top_p)
        token = draw(given.key, loop.step, kept)
    ended = loop.ended
    if how.end_tokens:
        token = jnp.where(ended, jnp.int32(how.end_tokens[0]), token)
        ended = ended | jnp.isin(token, jnp.array(how.end_tokens, jnp.int32))
    grown = loop.lengths + (~loop.ended).astype(jnp.int32)
    return _Loop(loop.step + 1, cache, loop.tokens.at[:, loop.step].set(token), grown, ended)


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
