"""The products that the kernel benchmark times: each against dense, on the same numbers.

A `Case` is a problem made ready on the device: for each variant the function, the operands of
every call, and how it is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from benchmarks import shapes
from pallas_kernels import Pattern, Query, decompress, nm_matmul, nm_sddmm, nm_transpose
from pallas_kernels.epilogue import ACTIVATIONS, gate
from pallas_kernels.samples import CUBLAS, MOST_COPIES, adapter_rank, copies, normal, weights

KINDS = ("matmul", "epilogue", "adapters", "sddmm", "transpose", "few")
OPS = {"sddmm": "nm_sddmm", "transpose": "nm_transpose"}  # nm_matmul for the others
TRAINED = ("gelu", "gelu_tanh", "silu")  # their backward pass needs what enters them
EXACT = jax.lax.Precision.HIGHEST
SAMPLE = 256  # rows or columns whose error is measured
PATTERN = Pattern(2, 4)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is timed: `kind` of product, tokens, (in, out), who needs it, and what joins it."""

    kind: str
    tokens: int
    size: tuple[int, int]
    names: tuple[str, ...] = ()
    epilogue: str = ""
    rank: int = 0
    source: str = "bfloat16"  # dtype of the weight that is transposed

    @property
    def op(self) -> str:
        return OPS.get(self.kind, "nm_matmul")

    @property
    def activation(self) -> str | None:
        return self.epilogue.partition("+")[2] or None

    @property
    def gated(self) -> bool:
        return self.epilogue.startswith("gate")

    @property
    def query(self) -> Query:
        tokens = self.tokens or None
        return Query(self.op, self.size, PATTERN, self.source, tokens)

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.size[0] * self.size[1]

    @property
    def nbytes(self) -> int:
        """About what it takes on the device while it is timed."""
        k, f = self.size
        if self.kind == "transpose":
            return 20 * k * f
        if self.kind == "few":
            return 250_000_000 + 8 * k * f
        return 2 * self.tokens * (2 * k + 4 * f) + 100_000_000


@dataclasses.dataclass(frozen=True)
class Variant:
    """A function, the operands of each call, and whether compiling it times kernels itself."""

    function: Callable
    operands: Sequence[tuple]
    options: dict | None = None

    @property
    def tries_kernels(self) -> bool:
        return self.options is not None


@dataclasses.dataclass(frozen=True)
class Case:
    """The variants by name, and what tells the largest errors of the first results: a function of
    (results by name, *operands) -> errors by name, and its operands."""

    variants: dict[str, Variant]
    error: Callable[..., dict[str, jax.Array]] | None = None
    exact: tuple = ()


def listed(kind: str, models: Iterable[str], tokens: Sequence[int]) -> list[Problem]:
    """The problems of a kind, in the order they are to be timed."""
    models = list(models)
    if kind == "transpose":
        return [
            Problem(kind, 0, shape.size, shape.names, source=source)
            for shape in shapes.unique(models, dx=False)
            for source in ("float32", "bfloat16")
        ]
    if kind == "matmul":
        found = [(shape, {}) for shape in shapes.unique(models)]
    elif kind == "epilogue":
        found = [(shape, {"epilogue": name}) for shape, name in shapes.epilogues(models)]
    elif kind == "adapters":
        forward = shapes.unique(models, dx=False)
        # the model's width is the smaller side of each of its matrices
        found = [(shape, {"rank": adapter_rank(min(shape.size))}) for shape in forward]
    else:
        found = [(shape, {}) for shape in shapes.unique(models, dx=False)]
    return [
        Problem(kind, count, shape.size, shape.names, **more)
        for count in tokens
        for shape, more in found
    ]


def make(problem: Problem, implementation: str = "mosaic") -> Case:
    """The case of a problem: random operands on the device, more sets than the cache holds."""
    return MAKERS[problem.kind](problem, implementation)


def _matmul(problem: Problem, implementation: str) -> Case:
    tokens, (k, f) = problem.tokens, problem.size
    if problem.kind == "few":
        found = weights(0, copies(2 * k * f / 2, most=MOST_COPIES), (k, f))
        xs = normal(1, 1, (tokens, k)) * len(found)
    else:
        xs = normal(1, copies(2 * tokens * (k + f)), (tokens, k))
        found = weights(0, 1, (k, f)) * len(xs)
    pairs = list(zip(xs, found, strict=True))
    sparse = functools.partial(nm_matmul, implementation=implementation)
    variants = {
        "sparse": Variant(sparse, [(x, w.sparse) for x, w in pairs]),
        "dense": Variant(jnp.matmul, [(x, w.dense) for x, w in pairs], CUBLAS),
    }
    if problem.kind == "few":  # of which XLA has kernels that are often faster
        variants["dense_xla"] = dataclasses.replace(variants["dense"], options={})
    return Case(variants, _error_of_rows, (xs[0], found[0].dense))


def _gate(problem: Problem, implementation: str) -> Case:
    """As where nothing is trained, so that the halves of the product are not needed later."""
    tokens, (k, f) = problem.tokens, problem.size
    xs = normal(1, copies(2 * tokens * (k + f)), (tokens, k))
    (w,), name = weights(0, 1, (k, f)), problem.activation

    def sparse(x, w):
        return nm_matmul(x, w, activation=name, gated=True, implementation=implementation)

    def dense(x, w):
        return gate(jnp.matmul(x, w), name)

    variants = {
        "sparse": Variant(sparse, [(x, w.sparse) for x in xs]),
        "dense": Variant(dense, [(x, w.dense) for x in xs], CUBLAS),
    }
    error = functools.partial(_error_of_rows, finish=functools.partial(gate, activation=name))
    return Case(variants, error, (xs[0], w.dense))


def _epilogue(problem: Problem, implementation: str) -> Case:
    if problem.gated:
        return _gate(problem, implementation)
    tokens, (k, f) = problem.tokens, problem.size
    xs = normal(1, copies(2 * tokens * (k + f)), (tokens, k))
    (w,), (bias,) = weights(0, 1, (k, f)), normal(2, 1, (f,))
    name, saved = problem.activation, problem.activation in TRAINED
    activation = ACTIVATIONS[name] if name else lambda z: z

    def sparse(x, w, bias):
        return nm_matmul(
            x,
            w,
            bias=bias,
            activation=name,
            save_preactivation=saved,
            implementation=implementation,
        )

    def dense(x, w, bias):
        z = jnp.matmul(x, w) + bias.reshape(1, -1)
        return (activation(z), z) if saved else activation(z)

    variants = {
        # Parameters are float32, which the kernel adds as they are; cuBLAS takes them in 16 bits.
        "sparse": Variant(sparse, [(x, w.sparse, bias.astype(jnp.float32)) for x in xs]),
        "dense": Variant(dense, [(x, w.dense, bias) for x in xs], CUBLAS),
    }
    error = functools.partial(_error_of_rows, finish=activation)
    return Case(variants, error, (xs[0], w.dense, bias))


def _adapters(problem: Problem, implementation: str) -> Case:
    tokens, (k, f) = problem.tokens, problem.size
    xs = normal(1, copies(2 * tokens * (k + f)), (tokens, k))
    (w,) = weights(0, 1, (k, f))
    scale = jnp.asarray(k**-0.5, xs[0].dtype)
    (left,), (right,) = normal(2, 1, (k, problem.rank)), normal(3, 1, (problem.rank, f))
    left, right = left * scale, right * scale
    ts = [jnp.matmul(x, left) for x in xs]

    def bare(x, w):
        return nm_matmul(x, w, implementation=implementation)

    def fused(x, w, t, right):
        return nm_matmul(x, w, low_rank=(t, right), implementation=implementation)

    def whole(x, w, left, right):  # x @ l by what is chosen for it
        return nm_matmul(x, w, adapter=(left, right), implementation=implementation)

    def dense(x, w, left, right):
        return jnp.matmul(x, w) + jnp.matmul(jnp.matmul(x, left), right)

    variants = {
        "bare": Variant(bare, [(x, w.sparse) for x in xs]),
        "sparse": Variant(fused, [(x, w.sparse, t, right) for x, t in zip(xs, ts, strict=True)]),
        "whole": Variant(whole, [(x, w.sparse, left, right) for x in xs], CUBLAS),
        "dense": Variant(dense, [(x, w.dense, left, right) for x in xs], CUBLAS),
    }
    return Case(variants, _error_with_adapters, (xs[0], w.dense, left, right))


def _sddmm(problem: Problem, implementation: str) -> Case:
    tokens, (k, f) = problem.tokens, problem.size
    count = copies(2 * tokens * (k + f))
    xs, dys = normal(1, count, (tokens, k)), normal(2, count, (tokens, f))
    (w,) = weights(0, 1, (k, f))

    def sparse(x, dy, w):
        return nm_sddmm(x, dy, w, out_dtype=x.dtype, implementation=implementation)

    def float32(x, dy, w):
        return nm_sddmm(x, dy, w, out_dtype=jnp.float32, implementation=implementation)

    def dense(x, dy):
        return jnp.matmul(x.T, dy)

    pairs = list(zip(xs, dys, strict=True))
    variants = {
        "sparse": Variant(sparse, [(x, dy, w.sparse) for x, dy in pairs]),
        "float32": Variant(float32, [(x, dy, w.sparse) for x, dy in pairs]),
        "dense": Variant(dense, pairs, CUBLAS),
    }
    return Case(variants, _error_of_gradient, (xs[0], dys[0], w.sparse))


def _transpose(problem: Problem, implementation: str) -> Case:
    k, f = problem.size
    source = jnp.dtype(problem.source)
    stored = k * f // 2 * source.itemsize + k * f // 8
    written = k * f // 2 * 2 + k * f // 8
    count = copies(stored + written)
    found = [w.sparse for w in weights(0, count, (k, f), source)]
    words = (stored + written) // 8  # a copy reads a half of the bytes and writes a half
    copied = [jnp.full((words,), i, jnp.uint32) for i in range(count)]

    def sparse(w):
        return nm_transpose(w, dtype=jnp.bfloat16, implementation=implementation)

    variants = {
        "sparse": Variant(sparse, [(w,) for w in found]),
        "copy": Variant(lambda words: words ^ 1, [(words,) for words in copied]),
    }
    return Case(variants)


def _error_with_adapters(results, x, w, left, right):
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    joined = w.astype(jnp.float32) + jnp.matmul(left, right, precision=EXACT)
    return _error_of_rows(results, x, joined)


def _error_of_rows(results, x, w, bias=None, finish=None):
    """Largest error of y = finish(x @ w + bias), over a sample of tokens."""
    rows = _sample(x.shape[0])
    z = jnp.matmul(x[rows].astype(jnp.float32), w.astype(jnp.float32), precision=EXACT)
    if bias is not None:
        z = z + bias.astype(jnp.float32).reshape(1, -1)
    exact = z if finish is None else finish(z)

    def error(result):
        y = result[0] if isinstance(result, tuple | list) else result
        return jnp.abs(y[rows].astype(jnp.float32) - exact).max()

    return {name: error(results[name]) for name in ("sparse", "dense")}


def _error_of_gradient(results, x, dy, w):
    """Largest error of the kept x.T @ dy, over a sample of groups of inputs and of outputs."""
    k, f = w.shape
    groups, columns = _sample(k // 8, SAMPLE // 8), _sample(f)
    inputs = (8 * groups[:, None] + jnp.arange(8)[None]).reshape(-1)
    halves = (4 * groups[:, None] + jnp.arange(4)[None]).reshape(-1)
    exact = jnp.matmul(
        x[:, inputs].astype(jnp.float32).T, dy[:, columns].astype(jnp.float32), precision=EXACT
    )

    def part(values):  # of w's form
        return dataclasses.replace(
            w,
            values=values[halves][:, columns],
            metadata=w.metadata[groups][:, columns],
            shape=exact.shape,
        )

    kept = decompress(part(jnp.ones_like(w.values))) != 0
    sparse = decompress(part(results["sparse"])).astype(jnp.float32)
    dense = results["dense"][inputs][:, columns].astype(jnp.float32)
    return {
        "sparse": jnp.abs(sparse - jnp.where(kept, exact, 0)).max(),
        "dense": jnp.where(kept, jnp.abs(dense - exact), 0).max(),
    }


def _sample(size: int, count: int = SAMPLE) -> jax.Array:
    """Indices spread over the whole size, the first and the last among them."""
    return jnp.linspace(0, size - 1, min(size, count)).astype(jnp.int32)


MAKERS: dict[str, Callable[[Problem, str], Case]] = {
    "matmul": _matmul,
    "epilogue": _epilogue,
    "adapters": _adapters,
    "sddmm": _sddmm,
    "transpose": _transpose,
    "few": _matmul,
}
