"""What the tuner may vary: each kernel's configurations, as dicts of integers, and how to run one.

Kernels are imported when they are asked for: older JAX lacks what they need.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Config = dict[str, int]
FEW_TOKENS = (1, 4, 16, 64)  # classes of tokens: each stands for half to twice as many
MANY_TOKENS = (128, 512, 2048, 8192, 16384, 65536)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One op's kernel.

    * `tokens`: the classes of tokens that are tuned.
    * `configs(tokens, k, f)`: configurations that fit, the likeliest first.
    * `run(config, *operands, **options)`: x, values, metadata, or x, dy, metadata for nm_sddmm.
      `processors` may be among the options where the kernel takes it.
    * `cases(config, tokens)`: small ragged shapes (tokens, in, out, options) that it must be right
      on before a time of it is trusted with so many tokens.
    """

    tokens: tuple[int, ...]
    configs: Callable[[int, int, int], list[Config]]
    run: Callable[..., jax.Array]
    cases: Callable[[Config, int], list[tuple[int, int, int, dict[str, Any]]]]


def kernel(op: str) -> Kernel:
    """The kernel of "nm_matmul", "few_tokens" or "nm_sddmm".

    Raises:
      ValueError: there is no such op.
    """
    if op not in KERNELS:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(KERNELS)}")
    return KERNELS[op]()


def _nm_matmul() -> Kernel:
    from pallas_kernels.mosaic import matmul

    def configs(tokens: int, k: int, f: int) -> list[Config]:
        return [dataclasses.asdict(tile) for tile in matmul.candidates(tokens, k, f)]

    def run(config: Config, x, values, metadata, **options):
        return matmul.nm_matmul(x, values, metadata, matmul.Tile(**config), **options)

    def cases(config: Config, tokens: int):
        tile = matmul.Tile(**config)
        return [
            (1, 8, 8, {}),
            # partial tiles in every direction, three tiles for each of 4 CTAs
            (3 * tile.tokens + 8, 200, 2 * tile.rows + 8, {"processors": 4}),
            # whole tiles and an odd number of stages
            (2 * tile.tokens, 320, 3 * tile.rows, {"processors": 4}),
        ]

    return Kernel(MANY_TOKENS, configs, run, cases)


def _few_tokens() -> Kernel:
    from pallas_kernels.mosaic import few_tokens

    def configs(tokens: int, k: int, f: int) -> list[Config]:
        return [dataclasses.asdict(config) for config in few_tokens.candidates(tokens, k, f)]

    def run(config: Config, x, values, metadata, **options):
        return few_tokens.nm_matmul(x, values, metadata, few_tokens.Config(**config), **options)

    def cases(config: Config, tokens: int):
        most = min(2 * tokens, few_tokens.FEW_TOKENS)
        return [
            (tokens, 8, 8, {}),
            (tokens // 2 + 1, 136, 72, {}),
            (tokens, 2056, 1032, {}),
            (most, 1024, 520, {}),
        ]

    return Kernel(FEW_TOKENS, configs, run, cases)


def _nm_sddmm() -> Kernel:
    from pallas_kernels.mosaic import sddmm

    def configs(tokens: int, k: int, f: int) -> list[Config]:
        return [dataclasses.asdict(tile) for tile in sddmm.candidates(tokens, k, f)]

    def run(config: Config, x, dy, metadata, **options):
        options = {"out_dtype": x.dtype, **options}
        return sddmm.nm_sddmm(x, dy, metadata, sddmm.Tile(**config), **options)

    def cases(config: Config, tokens: int):
        tile = sddmm.Tile(**config)
        few = max(4, tile.splits)  # processors; one tile more than twice as many leaves one over
        return [
            # one tile left over, shared by `splits` processors, and partial tiles
            (65 * few, tile.columns - 8, 2 * few * tile.rows + 8, {"processors": few}),
            (64 * few + 1, tile.columns + 8, few * tile.rows + 8, {"processors": 2 * few + 1}),
        ]

    return Kernel(MANY_TOKENS, configs, run, cases)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "nm_matmul": _nm_matmul,
    "few_tokens": _few_tokens,
    "nm_sddmm": _nm_sddmm,
}
