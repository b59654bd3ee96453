"""Prefill and decode of known models, cut to a depth, made ready to be timed.

The weights are those of `slope_jax.generate.inference_variables`, random, made in their own dtypes:
nothing is ever held in float32 that inference holds in 16 bits. A program is one compiled loop of
several steps, so that no launch by Python is timed: a decode step is one greedy token for each row, a
prefill is the pass over prompts that fills the cache and gives the first token. What a step makes is
what the next one reads.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import steps
from pallas_kernels.samples import CACHE_BYTES, adapter_rank
from slope_jax import explain, find_layers, models
from slope_jax.generate import inference_variables
from slope_jax.models.cache import CACHE, cache_slots, init_cache
from slope_jax.models.config import TransformerConfig

PREFILL, DECODE = "prefill", "decode"
TABLES = ("embeddings", "norm", "lm_head")
ITERATIONS = {PREFILL: 2, DECODE: 16}  # of a program


class Work(NamedTuple):
    """Prompts of so many tokens: passed over, or already in the cache and continued."""

    phase: str
    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.prompt}"

    @property
    def ids(self) -> tuple[int, int]:
        """Shape of the tokens that a step reads."""
        return self.batch, self.prompt if self.phase == PREFILL else 1

    def slots(self, config: TransformerConfig) -> int:
        """Of the cache, as generation has them behind this prompt and the steps' tokens."""
        made = ITERATIONS[self.phase] * (self.phase == DECODE)
        return cache_slots(config, self.batch, self.prompt + made + 1)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model cut to `depth` layers, in the form that generates.

    `rank` is that of the adapters, below 1 a fraction of the width, to the next multiple of 8.
    """

    model: str
    depth: int
    sparsity: str = "2:4"
    rank: float = 0
    dtype: str = "bfloat16"
    implementation: str | None = None

    @property
    def dense(self) -> bool:
        return self.sparsity == "dense"

    @property
    def name(self) -> str:
        """ "dense", or "2:4, rank 0"."""
        return self.sparsity if self.dense else f"{self.sparsity}, rank {self.columns}"

    @property
    def columns(self) -> int:
        """The rank as a number."""
        width = models.variant_config(self.model).hidden_size
        return adapter_rank(width, self.rank) if 0 < self.rank < 1 else int(self.rank)

    @functools.cached_property
    def ready(self) -> tuple[Any, dict[str, Any]]:
        """The model for inference, and the shapes of its variables."""
        trained = models.build(
            self.model,
            num_layers=self.depth,
            sparsity=self.sparsity,
            adapter_rank=self.columns,
            implementation=self.implementation,
            dtype=self.dtype,
        )
        made = []

        def convert(key):
            variables = trained.init(key, **trained.example_inputs())
            model, variables = inference_variables(trained, variables)
            made.append(model)
            return variables

        variables = jax.eval_shape(convert, jax.random.key(0))
        return made[0], variables

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and metadata, from shapes."""
        return _nbytes(self.ready[1])

    @property
    def layer_bytes(self) -> int:
        """Those of the layers alone, without tables and head."""
        return sum(
            _nbytes({n: tree for n, tree in collection.items() if n not in TABLES})
            for collection in self.ready[1].values()
        )

    def paths(self, work: Work) -> dict[str, int]:
        """The sparse linears by what runs and why."""
        ids = jax.ShapeDtypeStruct(work.ids, jnp.int32)
        return explain(*self.ready, input_ids=ids).forward_paths


def depths(model: str) -> tuple[int, int]:
    """Two depths: even the sparse layers of the lesser one are more than the cache holds.

    So every step reads them from memory, as it does those of the whole model. They are far apart, since
    what the clock does to either is as much as a tenth of two layers.

    >>> depths("opt-13b"), depths("gpt2-small")
    ((2, 6), (7, 12))
    """
    most = models.variant_config(model).num_layers
    one, two = (Cut(model, depth).layer_bytes for depth in (2, 3))
    first = max(2, 2 + math.ceil((CACHE_BYTES - one) / (two - one)))
    return (first, min(most, 3 * first)) if first < most else (max(1, most // 2), most)


def random_variables(cut: Cut) -> dict[str, Any]:
    """Variables on the device, random: those of fewer layers are among those of more."""
    model, variables = cut.ready
    patterns = {}
    if not cut.dense:
        found = find_layers(model.apply, variables, **model.example_inputs())
        patterns = {path: layer.pattern for path, layer in found.items()}
    numbers = {}

    def fill(path, leaf):
        *place, name = (str(key.key) for key in path)
        numbers[tuple(place)] = seed = jnp.uint32(1_000_003 * (1 + len(numbers)) % 2**32)
        if place[0] == "masks":
            return _metadata(seed, leaf.shape, patterns[tuple(place[1:])])
        if name in ("bias", "scale"):
            return jnp.full(leaf.shape, name == "scale", leaf.dtype)
        return _values(seed, leaf.shape, leaf.dtype)

    return jax.block_until_ready(jax.tree_util.tree_map_with_path(fill, variables))


def first_layers(variables: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The variables of the same model with `depth` layers."""

    def kept(name: str) -> bool:
        match = re.fullmatch(r"layers_(\d+)", name)
        return match is None or int(match[1]) < depth

    return {
        kind: {name: tree for name, tree in collection.items() if kept(name)}
        for kind, collection in variables.items()
    }


@dataclasses.dataclass
class Lowered:
    """A loop traced and lowered: no device was used."""

    cut: Cut
    work: Work
    loop: Any

    def compile(self, *, autotune: bool = True, options: dict | None = None) -> "Program":
        """Compiles as users do; without `autotune`, XLA tries out no products on the device."""
        options = ({} if autotune else steps.AUTOTUNE_OFF) | (options or {})
        return Program(self.cut, self.work, self.loop.compile(compiler_options=options or None))


@dataclasses.dataclass
class Program:
    """A compiled loop."""

    cut: Cut
    work: Work
    loop: Any

    def start(self, variables: Mapping[str, Any]) -> "Run":
        """With random tokens and a cache of zeros; `variables` may have more layers."""
        return Run(self, first_layers(variables, self.cut.depth))


class Run:
    """Weights, tokens and a cache on the device, and the loop that uses them."""

    def __init__(self, program: Program, variables: Mapping[str, Any]):
        cut, work = program.cut, program.work
        config = cut.ready[0].config
        self.program, self.variables = program, variables
        self.ids = jax.random.randint(jax.random.key(2), work.ids, 0, config.vocab_size, jnp.int32)
        self.cache = init_cache(config, work.batch, work.slots(config))
        self.largest = jnp.zeros(())

    def loops(self, count: int) -> None:
        """So many loops, the last one waited for."""
        for _ in range(count):
            self.ids, self.cache, self.largest = self.program.loop(
                self.variables, self.ids, self.cache
            )
        jax.block_until_ready((self.ids, self.cache))

    def check(self) -> None:
        """Raises a RuntimeError if logits are not finite: such times would be those of nothing."""
        if not math.isfinite(float(self.largest)):
            raise RuntimeError(f"the logits of {self.program.cut.name} are not finite")


def lower(cut: Cut, work: Work) -> Lowered:
    """Traces and lowers the loop of a cut model."""
    model, variables = cut.ready
    ids = jax.ShapeDtypeStruct(work.ids, jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(model.config, work.batch, work.slots(model.config)))
    loop = jax.jit(functools.partial(_loop, model, work), donate_argnums=(1, 2))
    return Lowered(cut, work, loop.lower(variables, ids, cache))


def _loop(model, work: Work, variables, ids, cache):
    """Tokens and cache after `ITERATIONS` steps, and the largest logit of the last."""
    prefill = work.phase == PREFILL
    last = jnp.full((work.batch, 1), work.prompt - 1, jnp.int32)

    def step(i, carry):
        ids, cache, _ = carry
        options = {"logits_at": last} if prefill else {"positions": last + 1 + i}
        logits, updated = model.apply({**variables, CACHE: cache}, ids, mutable=[CACHE], **options)
        token = logits.argmax(-1).astype(jnp.int32)
        # A pass over prompts depends on the one before it, or the compiler might make one of all.
        ids = (ids + token) % model.config.vocab_size if prefill else token
        return ids, updated[CACHE], logits.max().astype(jnp.float32)

    # The number of steps is known when it is compiled, so the device is never asked whether to go on.
    return jax.lax.fori_loop(0, ITERATIONS[work.phase], step, (ids, cache, jnp.float32(0)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _values(seed, shape, dtype):
    return steps.noise(seed, shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _metadata(seed, shape, pattern):
    return steps.random_metadata(seed, shape, pattern)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
