"""Rotary position embeddings (Su et al., 2021, arXiv 2104.09864), as LLaMA uses them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(NamedTuple):
    """Ways to read further than a model was trained: frequencies are slowed down.

    All of them by the factor ("linear"; Chen et al., 2023, arXiv 2306.15595), or, with the other three
    fields, the low ones alone ("llama3", since LLaMA-3.1).

    Attributes:
      factor: by which they are divided, at least 1.
      low_frequency, high_frequency: turns within the original positions, below and above which a
        frequency is divided or left alone; between the two it is interpolated.
      original_positions: longest sequence that the model was first trained on.
    """

    factor: float
    low_frequency: float | None = None
    high_frequency: float | None = None
    original_positions: int | None = None

    @property
    def is_linear(self) -> bool:
        """Whether all frequencies are divided."""
        return self[1:] == (None, None, None)


def check_rope(head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
    """Raises a ValueError that names what cannot be rotated."""
    if head_dim % 2:
        raise ValueError(
            f"heads of {head_dim} cannot be rotated in pairs; choose head_dim, or"
            " hidden_size / num_heads, even"
        )
    if not theta > 1:
        raise ValueError(f"rope_theta={theta!r} must be above 1; LLaMA-3 has 500000")
    if scaling is None:
        return
    if not isinstance(scaling, RopeScaling):
        raise ValueError(f"rope_scaling={scaling!r} must be None or a RopeScaling")
    if not all(value is None or _is_finite(value) for value in scaling):
        raise ValueError(f"{scaling}: its fields must be finite numbers, or None but for factor")
    whole = scaling.is_linear or (
        None not in scaling
        and 0 < scaling.low_frequency < scaling.high_frequency
        and scaling.original_positions >= 1
    )
    if not (whole and scaling.factor is not None and scaling.factor >= 1):
        raise ValueError(
            f"{scaling}: it must have factor >= 1, and 0 < low_frequency < high_frequency and"
            " original_positions >= 1, or none of these three"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of every pair, float64 (head_dim / 2,), from 1 down to about 1 / theta.

    >>> frequencies(8, 10_000.0).round(6).tolist()
    [1.0, 0.1, 0.01, 0.001]
    """
    speed = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return speed
    if scaling.is_linear:
        return speed / scaling.factor
    turns = speed * scaling.original_positions / (2 * math.pi)
    low, high = scaling.low_frequency, scaling.high_frequency
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * speed + (1 - keep) * speed / scaling.factor


def rotary_tables(positions: jax.Array, speed: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 (B, S, 1, head_dim / 2), of integer positions (B, S)."""
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(speed, jnp.float32)[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads (B, S, N, head_dim), each pair (i, i + head_dim / 2) turned by its angle.

    The arithmetic is in float32, the result in the dtype of x. The pairs are those of Hugging Face's
    weights; Meta's own files have them side by side.
    """
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
