"""The keys and values of earlier tokens, kept so that a new token costs one token."""

from typing import Any

import jax.numpy as jnp

from slope_jax.models.config import TransformerConfig

CACHE = "cache"


def init_cache(config: TransformerConfig, batch: int, length: int) -> dict[str, Any]:
    """The empty collection `cache` of a decoder, for sequences of up to `length` tokens.

    Slot i holds the token at position i. A call without `positions` fills the slots from 0 on; one
    with `positions` writes those, and sees what lies at or before each. What lies behind is never
    seen, so rows of different lengths need no mask: padding is overwritten before its turn comes.

    >>> from slope_jax.models import build
    >>> model = build("llama-nano", vocab_size=64)
    >>> cache = init_cache(model.config, batch=2, length=16)
    >>> cache["layers_1_to_3"]["attention"]["key"].shape  # layers, batch, heads, slots, width
    (3, 2, 2, 16, 32)

    Returns:
      Arrays of the compute dtype, for
      `model.apply({**variables, "cache": cache}, ids, mutable=["cache"])`.
    """
    slots = (batch, config.num_kv_heads, length, config.head_dim)
    cache = {}
    for segment in config.segments:
        count = segment.stop - segment.start
        shape = slots if count == 1 else (count, *slots)
        cache[segment.name] = {
            "attention": {name: jnp.zeros(shape, config.dtype) for name in ("key", "value")}
        }
    return cache
