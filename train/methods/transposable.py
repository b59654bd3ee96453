"""Transposable 2:4 masks: 2:4 along both axes, so that a weight's transpose is sparse as well."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 4


def _patterns() -> np.ndarray:
    """The 90 4 x 4 masks with two ones in each row and column, those first that keep low indices."""
    rows = [row for row in itertools.product((1, 0), repeat=SIDE) if sum(row) == 2]
    squares = (np.array(square) for square in itertools.product(rows, repeat=SIDE))
    return np.array([square for square in squares if (square.sum(0) == 2).all()], bool)


PATTERNS = _patterns()  # (90, 4, 4)


def transposable_mask(w: jax.Array) -> jax.Array:
    """Of each 4 x 4 block the pattern that keeps most magnitude, in float32 sums.

    Of equal ones the first in lexical order, rows from the top, where keeping comes ahead of pruning:
    the rule of N:M masks, that of equal magnitudes the lower index stays.

    Args:
      w: (..., in, out), both multiples of 4; leading axes are done one after another.

    Returns:
      bool, shape of `w`; two True in every row and column of each block.
    """
    if w.ndim > 2:
        return jax.lax.map(transposable_mask, w)
    rows, columns = w.shape
    if rows % SIDE or columns % SIDE:
        raise ValueError(
            f"transposable masks are of 4 x 4 blocks; both sides of {w.shape} must be multiples of 4"
        )
    blocks = jnp.abs(w.astype(jnp.float32)).reshape(rows // SIDE, SIDE, columns // SIDE, SIDE)
    blocks = blocks.swapaxes(1, 2).reshape(-1, SIDE * SIDE)
    patterns = jnp.asarray(PATTERNS.reshape(len(PATTERNS), -1))
    kept = jnp.matmul(blocks, patterns.T.astype(jnp.float32), precision="highest")
    best = patterns[kept.argmax(-1)]
    best = best.reshape(rows // SIDE, columns // SIDE, SIDE, SIDE).swapaxes(1, 2)
    return best.reshape(w.shape)
