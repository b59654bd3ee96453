"""Tiles for the Triton kernel, and its call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.device import current

SMALL_SHARED_MEMORY = ("8.6", "8.9", "12.0", "12.1")  # 100 KiB per processor


@dataclasses.dataclass(frozen=True)
class Processors:
    """The multiprocessors of a device: how many, and whether two programs of 4 stages fit on one.

    The defaults are those of an A100.
    """

    count: int = 108
    roomy: bool = True

    @classmethod
    def here(cls) -> "Processors":
        device = current()
        if device.platform != "gpu":
            return cls()
        return cls(device.core_count, device.compute_capability not in SMALL_SHARED_MEMORY)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program computes: tokens x outputs, over `lines` of 8 input features per step."""

    tokens: int = 16
    outputs: int = 128
    lines: int = 16
    warps: int = 4
    stages: int = 4
    phased: bool = False  # XLA takes x apart into x[:, j::8] first

    def __post_init__(self):
        for name in ("tokens", "outputs", "lines", "warps"):
            value = getattr(self, name)
            least = 1 if name == "warps" else 16
            if value < least or value & (value - 1):
                raise ValueError(f"{name} is {value}; it must be a power of two, at least {least}")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; it must be at least 2")


def choose_tile(tokens: int, k: int, f: int, device: Processors) -> Tile:
    """By class of tokens, as measured on an H100 (see NOTES.md); narrower for small weights."""
    stages = 4 if device.roomy else 3
    if tokens <= 32:
        tile = Tile(tokens=16 if tokens <= 16 else 32, stages=stages)
    else:
        tile = Tile(tokens=64, stages=3, phased=True)
    if _programs(tile, tokens, f) * _most_splits(tile, k) < device.count:
        return dataclasses.replace(tile, outputs=64, stages=stages)
    return tile


def choose_splits(tile: Tile, tokens: int, k: int, f: int, device: Processors) -> int:
    """Parts of the input axis: about one program per processor, each of two steps or more."""
    wanted = round(device.count / _programs(tile, tokens, f))
    return max(1, min(wanted, _most_splits(tile, k)))


def _programs(tile: Tile, tokens: int, f: int) -> int:
    return -(-tokens // tile.tokens) * -(-f // tile.outputs)


def _most_splits(tile: Tile, k: int) -> int:
    return max(1, -(-k // (8 * tile.lines)) // 2)


@functools.partial(jax.jit, static_argnames=("tile", "splits", "out_dtype", "capability"))
def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    metadata: jax.Array,
    *,
    tile: Tile,
    splits: int,
    out_dtype,
    capability: int | None = None,
) -> jax.Array:
    """(splits, tokens, out), whose sum over the splits is x @ w.

    Args:
      x: (tokens, in), bfloat16 or float16; in is a multiple of 8, tokens are any number > 0.
      values: (in / 2, out) in x's dtype, metadata: uint8 (in / 8, out); out a multiple of 8.
      splits: parts of the input axis, at most; parts without steps are left out.
      capability: of the device to compile for, 80 or more; None for this one.
    """
    import jax_triton

    from pallas_kernels.triton import kernel

    tokens, k = x.shape
    f = values.shape[1]
    steps = -(-k // (8 * tile.lines))
    steps_each = -(-steps // splits)
    splits = -(-steps // steps_each)

    return jax_triton.triton_call(
        by_phase(x) if tile.phased else x,
        values,
        metadata,
        kernel=kernel.nm_matmul,
        out_shape=jax.ShapeDtypeStruct((splits, tokens, f), out_dtype),
        grid=(-(-f // tile.outputs), -(-tokens // tile.tokens), splits),
        name="nm_matmul",
        num_warps=tile.warps,
        num_stages=tile.stages,
        compute_capability=capability,
        **constants(tile, tokens, k, f, steps_each),
    )


def by_phase(x: jax.Array) -> jax.Array:
    """(tokens, in) to (8, tokens, lines): x[:, j::8], padded so that rows are whole 16 bytes."""
    tokens, k = x.shape
    phases = x.reshape(tokens, k // 8, 8).transpose(2, 0, 1)
    return jnp.pad(phases, ((0, 0), (0, 0), (0, padded_lines(k) - k // 8)))


def padded_lines(k: int) -> int:
    return -(-k // 64) * 8


def constants(tile: Tile, tokens: int, k: int, f: int, steps: int) -> dict[str, int]:
    """What the program is compiled for."""
    return {
        "TOKENS": tokens,
        "IN": k,
        "OUT": f,
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_OUT": tile.outputs,
        "BLOCK_LINES": tile.lines,
        "STEPS": steps,
        "PHASED": tile.phased,
        "X_LINES": padded_lines(k) if tile.phased else k // 8,
    }
