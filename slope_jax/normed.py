"""Norms that whoever multiplies them makes, where that is faster than to make them first."""

from typing import Any, NamedTuple

import jax

from pallas_kernels.epilogue import Norm


class Normed(NamedTuple):
    """The norm of an array, not made yet: `SparseDense` takes it in the place of an array.

    It is for products that are not differentiated: for few tokens, as in decoding, the kernel makes
    the norm while its weights arrive.

    Attributes:
      x: (..., features), what the norm is of.
      norm: of the last axis.
    """

    x: jax.Array
    norm: Norm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def made(self) -> jax.Array:
        """The norm itself, in x's dtype."""
        return self.norm(self.x)


class Stream(NamedTuple):
    """A residual stream: an array, and what the product that made it knows for a norm of it.

    `SparseDense` takes it in the place of a residual, and then returns one.

    Attributes:
      x: (..., features).
      moments: of x, as of `pallas_kernels.epilogue.moments`; None: not known.
    """

    x: jax.Array
    moments: jax.Array | None = None
