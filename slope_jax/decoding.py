"""The programs of generation: one pass over the prompts, then several steps at a time."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device import current
from slope_jax.dense import MASKS
from slope_jax.models.cache import CACHE, init_cache
from slope_jax.models.decoder import Decoder
from slope_jax.sampling import draw, likely

STEPS = 8  # of a program that makes all its steps, at most
# What a program costs the host, some 100 to 400 arguments each, in microseconds; and the bytes of weights
# that a step reads in one, at the most.
LAUNCH, RATE = 1400, 3e6


class How(NamedTuple):
    """What is compiled for."""

    model: Decoder
    slots: int  # of the cache, and columns for new tokens
    end_tokens: tuple[int, ...]
    greedy: bool
    top_k: int | None


class Given(NamedTuple):
    variables: Mapping[str, Any]
    lengths: jax.Array | np.ndarray
    # None where nothing is sampled: what is given goes to the device with every call.
    key: jax.Array | None
    temperature: np.float32 | None
    top_p: np.float32 | None


class Loop(NamedTuple):
    step: jax.Array  # tokens made so far
    cache: Any
    tokens: jax.Array
    lengths: jax.Array
    ended: jax.Array  # (B,) bool


@functools.partial(jax.jit, static_argnums=0)
def start(how: How, given: Given, prompts: jax.Array) -> tuple[Loop, tuple[jax.Array, jax.Array]]:
    """After the pass over the prompts, which gives the first token; that (B, 1), and whether it ended all.

    The caller waits for these alone: to take them out of the loop would be a program of its own.
    """
    batch = len(prompts)
    zeros = jnp.zeros((batch,), jnp.int32)
    # Of as many columns as the cache, so that one program goes on behind prompts of any width.
    tokens = jnp.full((batch, how.slots), (*how.end_tokens, 0)[0], jnp.int32)
    cache = init_cache(how.model.config, batch, how.slots)
    logits, cache = _run(how, given, cache, prompts, logits_at=(given.lengths - 1)[:, None])
    loop = Loop(jnp.int32(0), cache, tokens, zeros, zeros > 0)
    loop = _add(how, given, loop, logits, cache)
    return loop, (loop.tokens[:, :1], loop.ended.all())


def _advance(
    how: How, given: Given, loop: Loop, until: jax.Array, size: int, through: bool
) -> tuple[Loop, tuple[jax.Array, jax.Array]]:
    """On to `until` tokens, or until all rows have ended; with it, what the host looks at: the `size`
    tokens from the first new one on, how many there are in all, and whether all rows have ended.

    `through` makes `size` steps, needed or not: of a loop whose end only the device knows, the host
    learns the end before it may go on. Those that are not needed leave nothing: what they write is
    where the next step writes.
    """

    def goes_on(loop: Loop) -> jax.Array:
        return (loop.step < until) & ~loop.ended.all()

    def step(loop: Loop) -> Loop:
        last = jax.lax.dynamic_slice_in_dim(loop.tokens, loop.step - 1, 1, axis=1)
        # A step that is not needed may be behind the last place.
        positions = jnp.minimum(given.lengths + loop.step - 1, how.slots - 1)[:, None]
        return _add(how, given, loop, *_run(how, given, loop.cache, last, positions=positions))

    def step_if_needed(_, loop: Loop) -> Loop:
        needed, longer = goes_on(loop), step(loop)
        return longer._replace(
            step=jnp.where(needed, longer.step, loop.step),
            lengths=jnp.where(needed, longer.lengths, loop.lengths),
            ended=jnp.where(needed, longer.ended, loop.ended),
        )

    first = jnp.minimum(loop.step, how.slots - size)
    if through:
        loop = jax.lax.fori_loop(0, size, step_if_needed, loop)
    else:
        loop = jax.lax.while_loop(goes_on, step, loop)
    tokens = jax.lax.dynamic_slice_in_dim(loop.tokens, first, size, axis=1)
    return loop, (tokens, jnp.stack([loop.step, loop.ended.all().astype(jnp.int32)]))


advance = jax.jit(_advance, static_argnums=(0, 4, 5), donate_argnums=2)
# Under vmap alone, what is given away may have fewer axes than what comes back.
_advance_traced = jax.jit(_advance, static_argnums=(0, 4, 5))


def finish(how: How, given: Given, loop: Loop, count: int) -> Loop:
    """On to `count` tokens, or until all rows have ended."""
    size = min(STEPS, how.slots)
    if count == 1:
        return loop
    if not _runs_through(given, loop, count - 1, size):
        run = _advance_traced if _is_traced(loop) else advance
        return run(how, given, loop, np.int32(count), size, False)[0]
    state = None
    for until in (*range(1 + size, count, size), count):
        before = state
        loop, (_, state) = advance(how, given, loop, np.int32(until), size, True)
        if how.end_tokens and before is not None and jax.device_get(before)[1]:
            break
    return loop


def pieces(how: How, given: Given, loop: Loop, count: int, chunk: int) -> Iterator[np.ndarray]:
    """Tokens of all rows behind the first ones, int32 (B, n), as they are made; n is at most `chunk`.

    The host is one program ahead of what it looks at, so that the device does not wait for it.
    """
    size = min(chunk, STEPS, how.slots)
    if not (through := _runs_through(given, loop, count - 1, size)):
        size = min(chunk, how.slots)
    done, until = 1, min(1 + size, count)
    loop, made = advance(how, given, loop, np.int32(until), size, through)
    while True:
        if until < count:  # where all rows have ended, it leaves nothing
            until = min(until + size, count)
            loop, following = advance(how, given, loop, np.int32(until), size, through)
        first = min(done, how.slots - size)
        tokens, (step, ended) = jax.device_get(made)
        yield tokens[:, done - first : step - first]
        done = int(step)
        if done >= count or ended:
            return
        made = following


def _runs_through(given: Given, loop: Loop, steps: int, size: int) -> bool:
    """Whether programs make all their steps: a GPU does not wait for the host then, unless its own time
    for those that are not needed is longer."""
    if current().platform == "cpu" or _is_traced(loop):
        return False
    if (idle := -steps % size) == 0:
        return True
    weights = jax.tree.leaves([given.variables.get(name) for name in ("params", MASKS)])
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in weights)  # theirs takes thrice as long
    return idle * nbytes / RATE <= -(-steps // size) * LAUNCH


def _is_traced(loop: Loop) -> bool:
    """Whether anything is that tokens are made of."""
    return isinstance(loop.tokens, jax.core.Tracer)


def _run(how: How, given: Given, cache, ids, **options):
    """Float32 logits (B, V) of one position of each row, and the cache with these tokens."""
    variables = {**given.variables, CACHE: cache}
    logits, updated = how.model.apply(variables, ids, mutable=[CACHE], **options)
    return logits[:, 0].astype(jnp.float32), updated[CACHE]


def _add(how: How, given: Given, loop: Loop, logits, cache) -> Loop:
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
    return Loop(loop.step + 1, cache, loop.tokens.at[:, loop.step].set(token), grown, ended)
