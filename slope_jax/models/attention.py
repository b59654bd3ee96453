"""Multi-head self-attention, and the choice of the program that computes it."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from pallas_kernels import batching
from pallas_kernels.device import current
from pallas_kernels.mosaic import support
from slope_jax.models.cache import CACHE
from slope_jax.models.config import TransformerConfig
from slope_jax.models.layers import linear
from slope_jax.models.rope import rotate
from slope_jax.normed import Normed, Stream
from slope_jax.sharding import BATCH, TENSOR, active_mesh

IN_ORDER = Layout((0, 1, 2, 3))


class AttentionPath(NamedTuple):
    """What computes attention ("cudnn", "xla", or "mosaic" in decode) and why."""

    implementation: str
    reason: str


def attention_path(dtype, head_dim: int, *, device: jax.Device | None = None) -> AttentionPath:
    """The best implementation of `jax.nn.dot_product_attention` (whose own default is XLA's).

    Decided while tracing, from the device that JAX would run on, so that a model can be lowered on
    a CPU. cuDNN's fused attention needs an NVIDIA GPU of compute capability 8.0 or more, 16-bit
    operands, and heads of a multiple of 8, at most 128 (256 from 9.0 on).

    Args:
      dtype: of queries, keys and values.
      head_dim: width of one head.
      device: None is the default device.

    >>> attention_path(jnp.float32, 64, device=jax.devices("cpu")[0])
    AttentionPath(implementation='xla', reason='cuDNN attention needs an NVIDIA GPU, this is cpu')
    """
    device = device or current()
    # "9.0" on NVIDIA GPUs; AMD's are spelled like "gfx90a", and a CPU has none.
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if device.platform == "cpu" or not version:
        return AttentionPath(
            "xla", f"cuDNN attention needs an NVIDIA GPU, this is {device.platform}"
        )
    capability = int(version[1]), int(version[2])
    if capability < (8, 0):
        return AttentionPath(
            "xla", f"cuDNN attention needs compute capability 8.0, this GPU has {version[0]}"
        )
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        return AttentionPath("xla", f"cuDNN attention needs bfloat16 or float16, not {name}")
    widest = 256 if capability >= (9, 0) else 128
    if head_dim % 8 or head_dim > widest:
        return AttentionPath(
            "xla",
            f"cuDNN attention needs heads of a multiple of 8 up to {widest}, not {head_dim}",
        )
    return AttentionPath(
        "cudnn", f"fused attention: {name}, heads of {head_dim}, {device.device_kind}"
    )


class Context(NamedTuple):
    """What a call of a model tells the attention of every layer; None where it does not apply.

    Attributes:
      lengths: int32 (B,), valid tokens of right-padded rows.
      rotary: `rope.rotary_tables` of the tokens' positions.
      positions: integers (B, S), where the tokens stand in the cache; None: at its start.
    """

    lengths: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    positions: jax.Array | None = None


def decode_path(config: TransformerConfig, *, device: jax.Device | None = None) -> AttentionPath:
    """What computes the attention of one new token of each sequence to the cache, and why.

    The kernel of `pallas_kernels` on Hopper, unless `config.attention` is "xla"; else XLA.

    Args:
      config: of a decoder.
      device: None is the default device.

    >>> from slope_jax.models import build
    >>> decode_path(build("llama-nano").config, device=jax.devices("cpu")[0]).implementation
    'xla'
    """
    if config.attention == "xla":
        return AttentionPath("xla", "attention='xla'")
    if active_mesh() is not None:
        return AttentionPath(
            "xla", "the kernel of a decode step runs on one device, without a mesh"
        )
    name, queries = jnp.dtype(config.dtype).name, config.num_heads // config.num_kv_heads
    why = support.device_obstacle(device or current(), "kernels for attention")
    why = why or support.attention_obstacle(name, config.head_width, queries)
    if why:
        return AttentionPath("xla", why)
    return AttentionPath("mosaic", f"one kernel: {name}, heads of {config.head_width}")


def _attend_once(config: TransformerConfig, query, new, cache, positions):
    """Attention of one new token of each sequence, and the cache with it.

    Args:
      query: (B, 1, heads, width), or None where `new` has them ahead of keys and values.
      new: keys and values, (B, 1, heads, width) both, or one array (B, 1, columns) of all.
      cache: of keys and values, (B, heads, slots, width).
      positions: integers (B,).
    """
    from pallas_kernels.mosaic import decode_attention  # needs a newer JAX than the package does

    slots, width = cache[0].shape[2:]
    sizes = [heads * width for heads in (config.num_heads, config.num_kv_heads)]
    narrow = config.window is not None and config.window < slots
    attend = functools.partial(
        decode_attention.attend,
        columns=(0, sizes[0], sum(sizes)) if query is None else (0, 0, 0),
        queries=config.num_heads // config.num_kv_heads,
        window=config.window if narrow else None,
    )
    rows = (new, new, new) if query is None else (query, *new)
    rows = (array.reshape(array.shape[0], -1) for array in rows)
    mixed, *cache = batching.one_by_one(attend)(*rows, *cache, positions.astype(jnp.int32))
    return mixed, cache


def _attend(config: TransformerConfig, query, key, value, causal: bool, context: Context):
    device = current()
    best = attention_path(query.dtype, config.head_width, device=device)
    if config.attention == "cudnn" and best.implementation != "cudnn":
        raise NotImplementedError(f"attention='cudnn': {best.reason}; use attention=None")
    dtype = query.dtype
    if device.platform == "cpu":
        # A CPU multiplies 16-bit numbers in float32 anyway, and the gradient of JAX's XLA attention
        # mixes 16 and 32 bits, which jax_numpy_dtype_promotion="strict" forbids.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    if context.positions is not None:
        mask = _seen(config, context.positions, key.shape[1])
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
        return mixed.astype(dtype)
    # A window as long as the sequence is none. JAX counts the tokens to the left, without one's own.
    narrow = config.window is not None and config.window < key.shape[1]
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=causal,
        local_window_size=(config.window - 1, 0) if narrow else None,
        implementation=config.attention or best.implementation,
    )
    return _by_heads(attend, query, key, value, context.lengths).astype(dtype)


def _by_heads(attend, query, key, value, lengths: jax.Array | None) -> jax.Array:
    """`attend`, on a mesh of whole sequences and heads on every device."""
    if active_mesh() is None or query.shape[0] == 1:
        return attend(query, key, value, key_value_seq_lengths=lengths)

    def local(query, key, value, lengths):
        return attend(query, key, value, key_value_seq_lengths=lengths)

    heads, rows = PartitionSpec(BATCH, None, TENSOR, None), PartitionSpec(BATCH)
    specs = (heads, heads, heads, rows)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(query, key, value, lengths)


def _seen(config: TransformerConfig, positions: jax.Array, slots: int) -> jax.Array:
    """(B, 1, S, slots): which slots of the cache the tokens at `positions` see."""
    behind = (
        positions[:, None, :, None] - jnp.arange(slots, dtype=positions.dtype)[None, None, None]
    )
    return (behind >= 0) & (behind < (config.window or slots))


class Attention(nn.Module):
    """Self-attention with one fused linear for queries, keys and values.

    The columns of `qkv` are [queries | keys | values], each (heads, head_dim); keys and values have
    `num_kv_heads`. No dropout acts on the attention probabilities, because fused attention never
    forms them.

    Attributes:
      config: the model's.
      patterns: (path inside the layer, pattern) pairs.
      causal: whether a token sees only itself and those before it.
      output_init: initialiser of the output projection.
    """

    config: TransformerConfig
    patterns: tuple[tuple[str, str], ...]
    causal: bool
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self,
        x: jax.Array | Normed,
        context: Context,
        residual: jax.Array | Stream | None = None,
    ) -> jax.Array | Stream:
        """(B, S, hidden) to (B, S, hidden), added to the residual if one is given."""
        config, patterns = self.config, dict(self.patterns)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        sections = tuple(n * config.head_width for n in (heads, kv_heads, kv_heads))
        qkv = linear(
            config, patterns["attention/qkv"], sum(sections), sections=sections, name="qkv"
        )
        single = self._is_single(x, context)
        if single and context.rotary is None:  # the kernel takes them in one piece
            return self._output(
                self._attend_once(None, qkv(x), context.positions[:, 0]), x, residual
            )
        query, key, value = (
            part.reshape(*part.shape[:2], -1, config.head_width) for part in qkv(x, apart=True)
        )
        if context.rotary is not None:
            query, key = (rotate(part, context.rotary) for part in (query, key))
        if single:
            mixed = self._attend_once(query, (key, value), context.positions[:, 0])
        else:
            key, value = self._remember(key, value, context.positions)
            mixed = _attend(config, query, key, value, self.causal, context)
        return self._output(mixed, x, residual)

    def _output(self, mixed: jax.Array, x, residual) -> jax.Array | Stream:
        output = linear(
            self.config,
            dict(self.patterns)["attention/output"],
            self.config.hidden_size,
            kernel_init=self.output_init,
            name="output",
        )
        return output(mixed.reshape(*x.shape[:2], -1), residual)

    def _is_single(self, x: jax.Array | Normed, context: Context) -> bool:
        """Whether this is one new token of each sequence, for the kernel."""
        if context.positions is None or x.shape[1] != 1 or self.is_initializing():
            return False
        return decode_path(self.config).implementation == "mosaic"

    def _attend_once(self, query, new, positions: jax.Array) -> jax.Array:
        slots = self._slots()
        cache = [slot.value for slot in slots]
        mixed, cache = _attend_once(self.config, query, new, cache, positions)
        for slot, array in zip(slots, cache, strict=True):
            slot.value = array
        return mixed

    def _remember(self, key: jax.Array, value: jax.Array, positions: jax.Array | None):
        """The keys and values to attend to: all that the cache holds, if tokens join it later."""
        if positions is None and not self.has_variable(CACHE, "key"):
            return key, value
        slots = self._slots()
        for slot, new in zip(slots, (key, value), strict=True):
            slot.value = _placed(slot.value, new, positions)
        if positions is None:
            return key, value
        # Left to itself, XLA turns whole caches around for its attention, and back.
        held = (with_layout_constraint(slot.value, IN_ORDER) for slot in slots)
        return tuple(x.swapaxes(1, 2) for x in held)

    def _slots(self) -> list[nn.Variable]:
        """The cache's keys and values."""
        if not self.has_variable(CACHE, "key"):
            raise ValueError(
                "positions are given without a cache to stand in; add the collection 'cache' of"
                " slope_jax.models.init_cache to the variables, and mutable=['cache']"
            )
        return [self.variable(CACHE, name) for name in ("key", "value")]


def _placed(cache: jax.Array, new: jax.Array, positions: jax.Array | None) -> jax.Array:
    """The cache (B, heads, slots, width) with new (B, S, heads, width) at its positions (B, S).

    Without checks of the positions: each would be a launch in a GPU's decode.
    """
    if positions is None:
        return jax.lax.dynamic_update_slice(cache, new.swapaxes(1, 2), (0,) * 4)
    if positions.size == 1:
        place = positions[0, 0]
        zero = jnp.zeros_like(place)  # indices are of one dtype, also where JAX counts in 64 bits
        start = (zero, zero, place, zero)
        return jax.lax.dynamic_update_slice(
            cache, new.swapaxes(1, 2), start, allow_negative_indices=False
        )
    rows = jnp.arange(cache.shape[0], dtype=positions.dtype)[:, None]
    return cache.at[rows, :, positions].set(new, mode="promise_in_bounds", unique_indices=True)
