"""What a configuration must get right before a time of it counts: inputs made to break kernels.

Small integers are exact in float32, so that the oracle needs no tolerance. Half of them are zeros
of either sign, so ties and groups of zeros abound. Sizes are ragged, with many tiles per CTA
(`candidates.Kernel.cases`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.compressed import CompressedMatrix, compress, decompress

REPEATS = 5
Run = Callable[[jax.Array, jax.Array, CompressedMatrix], jax.Array]


class WrongResult(Exception):
    """A configuration computes something else than the product."""


def check_matmul(
    run: Callable[[jax.Array, CompressedMatrix], jax.Array],
    tokens: int,
    k: int,
    f: int,
    *,
    dtype=jnp.bfloat16,
) -> None:
    """Raises WrongResult unless run(x, w) is x @ w, in x's dtype, for a 2:4 (in, out) w.

    NaN and Inf in w spread as in the dense product. In x they need only reach the outputs whose
    kept entries meet them, and nothing else: what is pruned is not multiplied.
    """
    x, w = _integers(0, (tokens, k), dtype), _pruned(_integers(1, (k, f), dtype))
    exact = _float32(x) @ _float32(_decompress(w))
    _same(run(x, w), _rounded(exact, dtype), "integers")

    special = w.with_values(_with_specials(w.values))
    with np.errstate(invalid="ignore"):
        expected = _float32(x) @ _float32(_decompress(special))
    _same(run(x, special), _rounded(expected, dtype), "NaN and Inf in w")

    token, others = tokens // 2, np.arange(tokens) != tokens // 2
    y = _float32(run(_with(x, (token, k // 2), np.nan), w))
    _same(y[others], _rounded(exact, dtype)[others], "rows beside one with a NaN")
    if not np.isnan(y[token][_kept(w)[k // 2]]).all():
        raise WrongResult("a NaN in x does not reach the outputs that keep its weight")

    x, w = _normal(2, (tokens, k), dtype), _pruned(_normal(3, (k, f), dtype))
    exact = _float64(x) @ _float64(_decompress(w))
    _close(run(x, w), _product(x, _decompress(w)), exact)
    _repeats(lambda: run(x, w))


def check_with_first(run: Callable, tokens: int, k: int, f: int, rank: int) -> None:
    """Raises WrongResult unless run(x, w, left, right) are y = x @ w + t @ right and t = x @ left, rounded."""
    x, w = _integers(0, (tokens, k), jnp.bfloat16), _pruned(_integers(1, (k, f), jnp.bfloat16))
    left = np.clip(_float32(_integers(2, (k, rank), jnp.bfloat16)), -1, 1)
    left[np.arange(k) % 4 != 3] = 0  # so that t is exact in bfloat16
    right, t = _integers(3, (rank, f), jnp.bfloat16), _float32(x) @ left
    exact = _float32(x) @ _float32(_decompress(w)) + t @ _float32(right)

    def both(x):
        return run(x, w, jnp.asarray(left, jnp.bfloat16), right)

    y, found = both(x)
    _same(found, t, "the first product of integers")
    _same(y, _rounded(exact, jnp.bfloat16), "integers")

    token, others = tokens // 2, np.arange(tokens) != tokens // 2
    y, found = (_float32(each) for each in both(_with(x, (token, 3), np.nan)))
    _same(found[others], t[others], "the first product beside a NaN")
    _same(y[others], _rounded(exact, jnp.bfloat16)[others], "rows beside one with a NaN")
    if not np.isnan(found[token]).all() or not np.isnan(y[token]).all():
        raise WrongResult("a NaN in x does not reach all of its row")
    _repeats(lambda: jnp.concatenate([each.reshape(-1) for each in both(x)]))


def check_sddmm(run: Run, tokens: int, k: int, f: int, *, dtype=jnp.bfloat16) -> None:
    """Raises WrongResult unless run(x, dy, w) are the values of x.T @ dy that w keeps.

    NaN and Inf in x reach all that is kept of their inputs, as in the dense product.
    """
    x, dy = _integers(0, (tokens, k), dtype), _integers(1, (tokens, f), dtype)
    w = _pruned(_integers(2, (k, f), dtype))
    kept = _kept(w)

    def dense(x, dy):
        return _decompress(w.with_values(run(x, dy, w).astype(dtype)))

    exact = np.where(kept, _float32(x).T @ _float32(dy), 0)
    _same(dense(x, dy), _rounded(exact, dtype), "integers")

    special = _with(_with(x, (tokens // 2, k // 2), np.nan), (tokens - 1, 0), np.inf)
    with np.errstate(invalid="ignore"):
        exact = np.where(kept, _float32(special).T @ _float32(dy), 0)
    _same(dense(special, dy), _rounded(exact, dtype), "NaN and Inf in x")

    x, dy = _normal(3, (tokens, k), dtype), _normal(4, (tokens, f), dtype)
    exact = np.where(kept, _float64(x).T @ _float64(dy), 0)
    _close(dense(x, dy), np.where(kept, _float32(_product(x.T, dy)), 0), exact)
    _repeats(lambda: run(x, dy, w))


@jax.jit
def _pruned(dense: jax.Array) -> CompressedMatrix:
    return compress(dense, "2:4")


_decompress = jax.jit(decompress)
_product = jax.jit(jnp.matmul)


def _kept(w: CompressedMatrix) -> np.ndarray:
    return _float32(_decompress(w.with_values(np.ones(w.values.shape, w.dtype)))) != 0


def _with(x: jax.Array, index: tuple[int, int], value: float) -> jax.Array:
    changed = np.array(x)
    changed[index] = value
    return jnp.asarray(changed)


def _integers(seed: int, shape: tuple[int, int], dtype) -> jax.Array:
    """-4 .. 4, and half of all entries zeros, of either sign; some whole groups of them."""
    rng = np.random.default_rng(seed)
    found = rng.integers(-4, 5, shape).astype(np.float32)
    zeros = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    found = np.where(rng.random(shape) < 0.5, zeros, found)
    found[: 4 * (shape[0] // 8)][:, ::3] = -0.0
    return jnp.asarray(found.astype(dtype))


def _normal(seed: int, shape: tuple[int, int], dtype) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))


def _with_specials(values: jax.Array) -> jax.Array:
    """NaN, Inf and -Inf among the stored values: first, last and in the middle."""
    rows, columns = values.shape
    values = _with(values, (0, 0), np.nan)
    values = _with(values, (rows // 2, columns // 2), np.inf)
    return _with(values, (rows - 1, columns - 1), -np.inf)


def _float32(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def _float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _rounded(exact: np.ndarray, dtype) -> np.ndarray:
    return exact.astype(ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype)


def _same(found, expected, what: str) -> None:
    """Equal numbers, NaN equal to NaN; zeros of either sign are equal."""
    found, expected = _float32(found), _float32(expected)
    wrong = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
    if wrong.any():
        first = tuple(map(int, np.argwhere(wrong)[0]))
        raise WrongResult(
            f"{what}: {wrong.sum()} of {wrong.size} results are wrong; at {first}"
            f" {found[first]} instead of {expected[first]}"
        )


def _close(found, dense, exact: np.ndarray) -> None:
    """At most twice the error of the dense product in the same dtype."""
    error, allowed = (np.abs(_float64(y) - exact).max() for y in (found, dense))
    if not error <= 2 * allowed:
        raise WrongResult(f"error {error:.3g}; the dense product's is {allowed:.3g}")


def _repeats(run: Callable[[], jax.Array]) -> None:
    first = np.asarray(run())
    for _ in range(REPEATS):
        if first.tobytes() != np.asarray(run()).tobytes():
            raise WrongResult("repeated runs differ")
