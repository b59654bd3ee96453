"""The next token of each row, drawn from its logits, and the options that say how."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slope_jax.prompts import is_integer

_COLDEST, _HOTTEST = 1e-30, 1e30  # temperatures by which float32 logits divide to finite numbers
_UNSORTED = 16  # of so many, XLA finds the largest on a GPU without sorting all


def check_sampling(
    temperature: Any,
    top_k: Any = None,
    top_p: Any = None,
    *,
    vocab_size: int | None = None,
    named: Callable[[str], str] = str,
) -> None:
    """Raises a ValueError unless these are options of sampling, as of `slope_jax.generate.generate`.

    `vocab_size`, where it is known, bounds `top_k`; `named` is how messages spell an option.
    """
    hot, several, share = map(named, ("temperature", "top_k", "top_p"))
    if not _is_number(temperature):
        raise ValueError(f"{hot}={temperature!r} must be a number; 0 is greedy")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{hot}={temperature} must not be negative or infinite; 0 is greedy")
    if temperature and not _COLDEST <= temperature <= _HOTTEST:
        raise ValueError(
            f"{hot}={temperature} divides logits in float32, so it must be 0, which is greedy, or"
            f" lie between {_COLDEST:g} and {_HOTTEST:g}"
        )
    most = math.inf if vocab_size is None else vocab_size
    if top_k is not None and not (is_integer(top_k) and 1 <= top_k <= most):
        raise ValueError(f"{several}={top_k!r} must be an integer between 1 and {most} tokens")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"{share}={top_p!r} must be a probability in (0, 1]")
    if not temperature and (top_k is not None or top_p is not None):
        raise ValueError(f"{several} and {share} choose what is sampled; set a {hot} above 0")


def checked_key(key: Any, batch: int) -> jax.Array:
    """A key of JAX's key types, one () or one of each row (batch,), of that or of its raw numbers.

    Raises:
      ValueError: it is no key, or they are of another number.
    """
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key={key!r} is no key; pass key=jax.random.key({key!r})")
    given = f"{key.dtype}{list(key.shape)}"
    try:
        typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        key = key if typed else jax.random.wrap_key_data(key)
    except (TypeError, ValueError) as error:
        raise ValueError(f"key is {given}, which is no key; pass jax.random.key(seed)") from error
    if key.shape not in ((), (batch,)):
        raise ValueError(
            f"key is {given}, {math.prod(key.shape)} keys; pass one, jax.random.key(seed), or one for"
            f" each of the {batch} rows"
        )
    return key


def draw(key: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
    """Tokens int32 (B,) of logits (B, V), by what the key is at this step.

    With a key of each row, a row's token is what it would be in a batch of its own.
    """

    def drawn(key, logits):
        return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)

    if key.ndim == 0:
        return drawn(key, logits)
    if jax.random.key_impl(key) == "threefry2x32":
        return jax.vmap(drawn)(key, logits[:, None])[:, 0]
    # Under vmap, keys of other kinds do not give what each gives alone.
    return jax.lax.map(lambda row: drawn(*row), (key, logits[:, None]))[:, 0]


def likely(logits: jax.Array, top_k: int | None, top_p: jax.Array | None) -> jax.Array:
    """Logits (B, V) with those of unlikely tokens at -inf: beyond top_k, then beyond top_p.

    Of equally likely tokens, which 16-bit logits often have, those ahead in the vocabulary stay.
    """
    if top_k is None and top_p is None:
        return logits
    falling, tokens = _top(logits, top_k or logits.shape[-1])
    if top_p is not None:
        shares = jax.nn.softmax(falling, axis=-1)
        needed = jnp.cumsum(shares, axis=-1) - shares < top_p  # those ahead do not reach top_p
        needed = needed.at[:, 0].set(True)  # also where float32 makes a zero of top_p
        falling = jnp.where(needed, falling, -jnp.inf)
    rows = jnp.arange(len(logits))[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, tokens].set(falling, unique_indices=True)


def _top(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, which sorts all of a vocabulary on a GPU, of the groups that hold the k largest.

    Groups are runs of tokens, so that k groups ahead of another one, by their largest and then by their
    place, hold k tokens ahead of all of its own.
    """
    rows, size = logits.shape
    groups = 2 ** round(math.log2(size * k) / 2)  # two sorts of about as many
    if k <= _UNSORTED or size < 4 * groups:
        return jax.lax.top_k(logits, k)
    width = -(-size // groups)
    fill = ((0, 0), (0, groups * width - size))
    grouped = jnp.pad(logits, fill, constant_values=-jnp.inf).reshape(rows, groups, width)
    best = jnp.sort(jax.lax.top_k(grouped.max(-1), k)[1], axis=-1)
    some = jnp.take_along_axis(grouped, best[:, :, None], axis=1).reshape(rows, -1)
    falling, at = jax.lax.top_k(some, k)
    return falling, jnp.take_along_axis(best, at // width, axis=1) * width + at % width


def _is_number(value: Any) -> bool:
    """A real number of Python or NumPy, or an array of one."""
    kinds = float | int | np.number | np.ndarray | jax.Array
    if isinstance(value, bool) or not isinstance(value, kinds) or np.ndim(value):
        return False
    dtype = getattr(value, "dtype", np.dtype(float))
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
