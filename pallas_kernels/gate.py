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

from pallas_kernels import xla
from pallas_kernels.compressed import CompressedMatrix, compress, decompress, kept_mask
from pallas_kernels.epilogue import Epilogue

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
    x, dense = _integers(0, (tokens, k), dtype), _integers(1, (k, f), dtype)
    w = compress(dense, "2:4")
    exact = _float32(x) @ _float32(decompress(w))
    _same(run(x, w), _rounded(exact, dtype), "integers")

    special = w.with_values(_with_specials(w.values))
    _same(run(x, special), _xla_matmul(x, special), "NaN and Inf in w")

    token = tokens // 2
    poisoned = x.at[token, k // 2].set(jnp.nan)
    y = _float32(run(poisoned, w))
    others = np.arange(tokens) != token
    _same(y[others], _rounded(exact, dtype)[others], "rows beside one with a NaN")
    if not np.isnan(y[token][np.asarray(kept_mask(w))[k // 2]]).all():
        raise WrongResult("a NaN in x does not reach the outputs that keep its weight")

    x, w = _normal(2, (tokens, k), dtype), compress(_normal(3, (k, f), dtype), "2:4")
    exact = _float64(x) @ _float64(decompress(w))
    _close(run(x, w), _xla_matmul(x, w), exact)
    _repeats(lambda: run(x, w))


def check_sddmm(run: Run, tokens: int, k: int, f: int, *, dtype=jnp.bfloat16) -> None:
    """Raises WrongResult unless run(x, dy, w) are the values of x.T @ dy that w keeps."""
    x, dy = _integers(0, (tokens, k), dtype), _integers(1, (tokens, f), dtype)
    w = compress(_integers(2, (k, f), dtype), "2:4")
    exact = _float32(x).T @ _float32(dy) * np.asarray(kept_mask(w))
    found = decompress(w.with_values(run(x, dy, w).astype(dtype)))
    _same(found, _rounded(exact, dtype), "integers")

    special = x.at[tokens // 2, k // 2].set(jnp.nan).at[tokens - 1, 0].set(jnp.inf)
    _same(run(special, dy, w), _xla_sddmm(special, dy, w), "NaN and Inf in x")

    x, dy = _normal(3, (tokens, k), dtype), _normal(4, (tokens, f), dtype)
    exact = _float64(x).T @ _float64(dy) * np.asarray(kept_mask(w))
    found = decompress(w.with_values(run(x, dy, w).astype(dtype)))
    _close(found, decompress(w.with_values(_xla_sddmm(x, dy, w))), exact)
    _repeats(lambda: run(x, dy, w))


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
    values = values.at[0, 0].set(jnp.nan).at[rows // 2, columns // 2].set(jnp.inf)
    return values.at[rows - 1, columns - 1].set(-jnp.inf)


def _xla_matmul(x: jax.Array, w: CompressedMatrix) -> jax.Array:
    return xla.nm_matmul(x, w, x.dtype, None, Epilogue())


def _xla_sddmm(x: jax.Array, dy: jax.Array, w: CompressedMatrix) -> jax.Array:
    return xla.nm_sddmm(x, dy, w, x.dtype, None)


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
