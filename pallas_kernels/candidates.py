"""What the tuner may vary: each kernel's configurations, as dicts of integers, and how to run one.

Kernels are imported when they are asked for: older JAX lacks what they need.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.samples import adapter_rank

Config = dict[str, int]
FEW_TOKENS = (1, 4, 16, 64)  # classes of tokens: each stands for half to twice as many
MANY_TOKENS = (128, 512, 2048, 8192, 16384, 65536)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One op's kernel.

    * `tokens`: the classes of tokens that are tuned.
    * `make(**config)`: the kernel's own form of a configuration; ValueError if it cannot be.
    * `configs(tokens, k, f)`: configurations that fit, the likeliest first.
    * `run(config, *operands, **options)`: x, values, metadata, or x, dy, metadata for nm_sddmm, or x, values,
      metadata and an adapter's two matrices for with_first.
      `processors` may be among the options where the kernel takes it.
    * `cases(config, tokens)`: small ragged shapes (tokens, in, out, options) that it must be right
      on before a time of it is trusted with so many tokens. The same for all configurations, as
      far as they can be: what they are held against is then compiled only once.
    """

    tokens: tuple[int, ...]
    make: Callable[..., Any]
    configs: Callable[[int, int, int], list[Config]]
    run: Callable[..., jax.Array]
    cases: Callable[[Config, int], list[tuple[int, int, int, dict[str, Any]]]]


def kernel(op: str) -> Kernel:
    """The kernel of "nm_matmul", "few_tokens", "nm_sddmm" or "with_first".

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
        if config.get("along", 1) > 1:  # for few tiles, of many stages
            return [(1, 1032, 8, {}), (70, 2056, 264, {})]
        return [
            (1, 8, 8, {}),
            # partial tiles in every direction, many for each of 4 CTAs
            (776, 200, 520, {"processors": 4}),
            # few tiles, which all CTAs may share, and an odd number of stages
            (512, 320, 768, {}),
        ]

    return Kernel((max(FEW_TOKENS), *MANY_TOKENS), matmul.Tile, configs, run, cases)


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

    return Kernel(FEW_TOKENS, few_tokens.Config, configs, run, cases)


def _nm_sddmm() -> Kernel:
    from pallas_kernels.mosaic import sddmm

    def configs(tokens: int, k: int, f: int) -> list[Config]:
        return [dataclasses.asdict(tile) for tile in sddmm.candidates(tokens, k, f)]

    def run(config: Config, x, dy, metadata, **options):
        return sddmm.nm_sddmm(x, dy, metadata, sddmm.Tile(**config), **options)

    def cases(config: Config, tokens: int):
        return [
            # partial tiles in every direction, many for each of 4 CTAs
            (520, 248, 2056, {"processors": 4}),
            # few tiles, which all CTAs may share
            (257, 136, 520, {}),
        ]

    return Kernel(MANY_TOKENS, sddmm.Tile, configs, run, cases)


def _with_first() -> Kernel:
    """nm_matmul with an adapter, both of whose products it makes."""
    from pallas_kernels.mosaic import matmul, products

    def configs(tokens: int, k: int, f: int) -> list[Config]:
        tiles = matmul.firsts(tokens, k, f, adapter_rank(min(k, f)))
        alone = products.configuration("nm_matmul", tokens, k, f, "bfloat16")
        size = getattr(alone, "size", None)  # few tokens have no tile
        likely = sorted(tiles, key=lambda tile: tile.size != size)
        return [dataclasses.asdict(tile) for tile in likely]

    def run(config: Config, x, values, metadata, left, right, **options):
        tile, left = matmul.Tile(**config), left.T if options.get("transposed") else left
        return matmul.nm_matmul(x, values, metadata, tile, adapter=(left, right), **options)

    def cases(config: Config, tokens: int):
        # partial tiles in every direction, many for each of 4 CTAs; few of them, and l as on a way back
        return [(776, 200, 520, {"processors": 4}), (512, 328, 768, {"transposed": True})]

    return Kernel(MANY_TOKENS, matmul.Tile, configs, run, cases)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "nm_matmul": _nm_matmul,
    "few_tokens": _few_tokens,
    "nm_sddmm": _nm_sddmm,
    "with_first": _with_first,
}
