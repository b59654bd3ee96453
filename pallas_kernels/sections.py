"""Arrays side by side, for products that would otherwise wait for them to be joined."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sections:
    """Arrays (..., size) with the same leading axes, which stand for one (..., sum of sizes).

    >>> Sections((jnp.ones((2, 3)), jnp.ones((2, 5)))).shape
    (2, 8)
    """

    parts: tuple[jax.Array, ...]

    def check(self, name: str) -> None:
        """Raises a ValueError unless the parts go together. Not when made: `jax.vmap` makes some of flags."""
        first = self.parts[0] if self.parts else None
        if first is None or any(
            (part.shape[:-1], part.dtype) != (first.shape[:-1], first.dtype) for part in self.parts
        ):
            found = ", ".join(f"{part.dtype}{list(part.shape)}" for part in self.parts)
            raise ValueError(
                f"{name} has the sections {found or 'none'}; they must have the same leading axes and"
                " dtype"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(part.shape[-1] for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.parts[0].shape[:-1], sum(self.sizes))

    @property
    def ndim(self) -> int:
        return self.parts[0].ndim

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def astype(self, dtype) -> "Sections":
        return Sections(tuple(part.astype(dtype) for part in self.parts))

    def reshape(self, *leading: int) -> "Sections":
        """With other leading axes."""
        return Sections(tuple(part.reshape(*leading, part.shape[-1]) for part in self.parts))

    def whole(self) -> jax.Array:
        return jnp.concatenate(self.parts, axis=-1)


def whole(x: jax.Array | Sections) -> jax.Array:
    return x.whole() if isinstance(x, Sections) else x


def fit(x: jax.Array | Sections, multiple: int) -> bool:
    """Whether a kernel can read x in blocks of so many columns."""
    return not isinstance(x, Sections) or all(size % multiple == 0 for size in x.sizes)


def check_sizes(sizes: Any, out: int, what: str) -> None:
    """Raises a ValueError unless these are positive integers that add up to `out` outputs of `what`."""
    fits = all(isinstance(size, int | np.integer) and size >= 1 for size in sizes)
    if not fits or sum(sizes) != out:
        raise ValueError(
            f"sections={tuple(sizes)} must be positive integers that add up to the {out} outputs of {what}"
        )
