"""The linear layers of known models, from their public configurations: (in, out) and names."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Model:
    """What the sizes of its linear layers follow from.

    `kv` is the number of heads that keys and values have, where fewer than the queries'. `gated`
    models have two projections up, fused into one, and no biases.
    """

    width: int
    mlp: int
    heads: int
    activation: str
    kv: int | None = None
    gated: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) by the linear layer's name."""
        kv_width = self.width // self.heads * (self.kv or self.heads)
        up = ("gate_up", 2 * self.mlp) if self.gated else ("up", self.mlp)
        return {
            "qkv": (self.width, self.width + 2 * kv_width),
            "out": (self.width, self.width),
            up[0]: (self.width, up[1]),
            "down": (self.mlp, self.width),
        }

    def epilogue(self, linear: str) -> str:
        """What follows the product: "" for nothing, "bias", "bias+<activation>", or "gate+<activation>"."""
        if self.gated:
            return f"gate+{self.activation}" if linear == "gate_up" else ""
        return f"bias+{self.activation}" if linear == "up" else "bias"


def _opt(width: int, heads: int) -> Model:
    return Model(width, 4 * width, heads, "relu")


MODELS = {
    "bert-base": Model(768, 3072, 12, "gelu"),
    "bert-large": Model(1024, 4096, 16, "gelu"),
    "gpt2-small": Model(768, 3072, 12, "gelu_tanh"),
    "gpt2-medium": Model(1024, 4096, 16, "gelu_tanh"),
    "gpt2-large": Model(1280, 5120, 20, "gelu_tanh"),
    "gpt2-xl": Model(1600, 6400, 25, "gelu_tanh"),
    "opt-2.7b": _opt(2560, 32),
    "opt-6.7b": _opt(4096, 32),
    "opt-13b": _opt(5120, 40),
    "opt-30b": _opt(7168, 56),
    "opt-66b": _opt(9216, 72),
    "llama-3-8b": Model(4096, 14336, 32, "silu", kv=8, gated=True),
    "mistral-7b": Model(4096, 14336, 32, "silu", kv=8, gated=True),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An (in, out) product and who needs it: "bert-base qkv", or "bert-base qkv dx"."""

    size: tuple[int, int]
    names: tuple[str, ...]

    @property
    def forward(self) -> bool:
        """Whether it is some layer's forward product, not dx alone."""
        return any(not name.endswith(" dx") for name in self.names)


def unique(models: Iterable[str] = MODELS, *, dx: bool = True) -> list[Shape]:
    """Every (in, out) once, smallest product first.

    `dx` adds dx = dy @ w_rc.T, which contracts the outputs: (in, out) of that product is the
    layer's (out, in).

    Raises:
      ValueError: a model is not known.

    >>> [shape.size for shape in unique(["bert-base"], dx=False)]
    [(768, 768), (768, 2304), (768, 3072), (3072, 768)]
    """
    names: dict[tuple[int, int], list[str]] = {}
    for model in models:
        if model not in MODELS:
            raise ValueError(f"model {model!r} is not one of {', '.join(MODELS)}")
        for linear, (k, f) in MODELS[model].linears().items():
            names.setdefault((k, f), []).append(f"{model} {linear}")
            if dx:
                names.setdefault((f, k), []).append(f"{model} {linear} dx")
    order = sorted(names, key=lambda size: (size[0] * size[1], size))
    return [Shape(size, tuple(names[size])) for size in order]


def epilogues(models: Iterable[str] = MODELS) -> list[tuple[Shape, str]]:
    """Every (in, out) of a forward product with each epilogue that models follow it by."""
    names: dict[tuple[tuple[int, int], str], list[str]] = {}
    for model in models:
        for linear, size in MODELS[model].linears().items():
            if epilogue := MODELS[model].epilogue(linear):
                names.setdefault((size, epilogue), []).append(f"{model} {linear}")
    order = sorted(names, key=lambda key: (key[0][0] * key[0][1], key))
    return [(Shape(key[0], tuple(names[key])), key[1]) for key in order]
