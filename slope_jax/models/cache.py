"""The keys and values of earlier tokens, kept so that a new token costs one token."""

from typing import Any

import jax.numpy as jnp

from slope_jax.models.config import TransformerConfig

CACHE = "cache"
# The coarser, the fewer programs, and the more that is padding: that of many sequences is fine.
WIDTH_STEP, SLOTS_STEP, MANY = 64, 256, 16


def prompt_width(config: TransformerConfig, tokens: int) -> int:
    """To which generation pads prompts of so many tokens: one program reads those of one width.

    >>> from slope_jax.models import build
    >>> config = build("llama-nano", max_positions=400).config
    >>> [prompt_width(config, tokens) for tokens in (1, 64, 65, 390)]
    [64, 64, 128, 400]
    """
    return min(_rounded(tokens, WIDTH_STEP), config.max_positions)


def cache_slots(config: TransformerConfig, batch: int, tokens: int) -> int:
    """Slots of the cache that generation makes for sequences of so many tokens, new ones included.

    >>> from slope_jax.models import build
    >>> config = build("llama-nano", max_positions=400).config
    >>> [cache_slots(config, 1, tokens) for tokens in (1, 257, 258)]
    [256, 256, 400]
    >>> [cache_slots(config, 17, tokens) for tokens in (1, 257, 258)]
    [64, 256, 320]
    """
    read = max(1, tokens - 1)  # the last one never is
    step = WIDTH_STEP if batch > MANY else SLOTS_STEP
    return min(_rounded(read, step), config.max_positions)


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


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
    slots = (batch, config.num_kv_heads, length, config.head_width)
    cache = {}
    for segment in config.segments:
        count = segment.stop - segment.start
        shape = slots if count == 1 else (count, *slots)
        cache[segment.name] = {
            "attention": {name: jnp.zeros(shape, config.dtype) for name in ("key", "value")}
        }
    return cache
