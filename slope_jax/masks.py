"""N:M masks. True keeps, always; `axis` 0 is the input axis, 1 the output axis of (in, out)."""

import math

import jax
import numpy as np

from pallas_kernels import Pattern, compressed_shapes
from pallas_kernels.compressed import (
    check_array,
    check_dtype,
    join_groups,
    largest,
    magnitude_key,
    split_groups,
    to_bits,
)


def magnitude_mask(w: jax.Array, pattern: Pattern | str, *, axis: int = 0) -> jax.Array:
    """Keeps the n largest magnitudes of every m consecutive entries of `w` along `axis`.

    Of equal magnitudes (-0.0 and 0.0 included) the lower index is kept; NaN counts as largest.

    Args:
      w: (..., in, out), float32, bfloat16 or float16.
      pattern: "n:m"; m divides the axis.
      axis: 0 (input) or 1 (output).

    Returns:
      bool, shape of `w`, exactly n True per group.

    >>> import jax.numpy as jnp
    >>> magnitude_mask(jnp.array([[3.0], [-4.0], [0.0], [1.0]]), "2:4")[:, 0].tolist()
    [True, True, False, False]
    """
    check_array(w, "w")
    check_dtype(w.dtype, "w")
    return score_mask(magnitude_key(to_bits(w), w.dtype), pattern, axis=axis)


def score_mask(scores: jax.Array, pattern: Pattern | str, *, axis: int = 0) -> jax.Array:
    """Keeps the n highest scores (signed: -1 is below 0) of every m consecutive entries.

    Args as in `magnitude_mask`; `scores` are finite. Of equal scores the lower index is kept.
    """
    pattern = Pattern.parse(pattern)
    compressed_shapes(scores.shape[-2:], pattern, axis)
    groups = split_groups(scores, pattern.m, axis)
    return join_groups(largest(groups, pattern.n, axis=-2), axis)


def random_mask(
    key: jax.Array, shape: tuple[int, int], pattern: Pattern | str, *, axis: int = 0
) -> jax.Array:
    """A uniformly random n:m mask: every choice of n of the m positions is equally likely.

    Args:
      key: a JAX PRNG key.
      shape: (in, out).
      pattern, axis: as in `magnitude_mask`.
    """
    return score_mask(jax.random.uniform(key, shape), pattern, axis=axis)


def double_prune(w: jax.Array, pattern: Pattern | str) -> jax.Array:
    """mask_rc of a weight that is n:m along its input axis (SLoPe, section 2.1).

    In each group of m consecutive outputs of a row the n largest |w| are kept, and zeros are not:
    mask_rc is contained in `w != 0`, so groups with n survivors or fewer lose nothing.

    Args:
      w: (in, out), pruned already (kernel * mask_r).
      pattern: "n:m"; m divides out.

    Returns:
      bool (in, out); w * mask_rc is what the backward pass multiplies by.
    """
    return magnitude_mask(w, pattern, axis=1) & (w != 0)


def extra_sparsity(pattern: Pattern | str) -> float:
    """Share of all entries that the second pruning removes from a random n:m mask.

    With s = n / m:  sum over j = n+1 .. m of  C(m, j) s^j (1 - s)^(m - j) (j - n) / m.

    >>> extra_sparsity("2:4")
    0.09375
    """
    pattern = Pattern.parse(pattern)
    n, m, s = pattern.n, pattern.m, pattern.density
    return sum(
        math.comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1)
    )


def is_nm(mask: jax.Array | np.ndarray, pattern: Pattern | str, *, axis: int = 0) -> bool:
    """Whether every m consecutive entries along `axis` keep at most n. `mask`: (..., in, out)."""
    pattern = Pattern.parse(pattern)
    mask = np.asarray(mask)
    pattern.check_divides(mask.shape[axis - 2], ("input axis", "output axis")[axis])
    if mask.dtype != np.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool, True keeps")
    lines = np.moveaxis(mask, axis - 2, -1)
    counts = lines.reshape(*lines.shape[:-1], -1, pattern.m).sum(-1)
    return bool((counts <= pattern.n).all())
