"""Training steps of known models at a depth that fits on one device, or on a mesh, made ready to be run.

The step is that of the job (`train.step` with `train.optimizer`'s AdamW): float32 parameters and
gradients, bfloat16 products, buffers donated. Parameters and tokens are random.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Pattern, compress
from pallas_kernels.samples import CUBLAS, adapter_rank
from slope_jax import TrainState, explain, find_layers, models
from slope_jax.sharding import BATCH, batch_spec, shardings
from train.config import Config
from train.mesh import make_mesh, parse_mesh, set_mesh
from train.methods import METHODS
from train.optimizer import make_optimizer, make_schedule
from train.state import Setup, abstract_state, is_stacked
from train.step import make_train_step

ADAPTERS = 0.0156  # of the width, the middle one of the paper's ranks
PREDICTIONS = 80 / 512  # masked positions of BERT's recipe, of the sequence
AUTOTUNE_OFF = {"xla_gpu_autotune_level": 0}
WEIGHT_STD = 0.02
# Dense TFLOP/s in bfloat16, as NVIDIA's data sheets say.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989}


class Setting(NamedTuple):
    """How a model is measured: tokens in a sequence, sequences in a step, two depths, and so on."""

    length: int
    sequences: int
    depths: tuple[int, int]
    remat: bool = False
    moments: str = "float32"


# What the dense model can hold in 78 GiB: all layers if possible. Three and more, because a lone
# sparse layer beside the first, which is not quite sparse, is not scanned and so off the line.
MODELS = {
    "bert-base": Setting(512, 32, (4, 12)),
    "bert-large": Setting(512, 32, (6, 24)),
    "gpt2-small": Setting(1024, 16, (4, 12)),
    "gpt2-medium": Setting(1024, 16, (6, 24)),
    "gpt2-large": Setting(1024, 16, (6, 36)),
    "gpt2-xl": Setting(1024, 8, (6, 24)),
    "opt-2.7b": Setting(2048, 4, (4, 16)),
    "opt-6.7b": Setting(2048, 4, (3, 9)),
    "opt-13b": Setting(2048, 4, (3, 7)),
    "opt-30b": Setting(2048, 2, (3, 5)),
    "opt-66b": Setting(2048, 4, (3, 4), remat=True, moments="bfloat16"),
    "llama-3-8b": Setting(2048, 4, (3, 7)),
    "mistral-7b": Setting(2048, 4, (3, 9)),
}


def setting(model: str) -> Setting:
    """That of `MODELS`, or one for any other model.

    Raises:
      ValueError: no such model.
    """
    if model in MODELS:
        return MODELS[model]
    config = models.variant_config(model)
    depths = (max(1, config.num_layers // 2), config.num_layers)
    return Setting(min(1024, config.max_positions), 8, depths)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: a model cut to `depth` layers, dense or sparse, and what a step trains on.

    `mesh` is written as `--mesh` is, such as "fsdp:8", and cut from the first devices; empty, nothing
    runs through `slope_jax.sharded`. Each share of its batches has `sequences`. `rank` is that of the
    adapters, below 1 a fraction of the width, to the next multiple of 8. `scan` is whether layers are
    stacked, so that they share a program.
    """

    model: str
    depth: int
    sequences: int
    length: int
    sparsity: str = "2:4"
    rank: float = 0
    accumulation: int = 1
    remat: bool | str = False
    dropout: float = 0.0
    moments: str = "float32"
    implementation: str | None = None
    dtype: str = "bfloat16"
    mesh: str = ""
    scan: bool = True

    @property
    def name(self) -> str:
        """ "dense", "sparse", or "adapters"."""
        return "dense" if self.sparsity == "dense" else "adapters" if self.rank else "sparse"

    @property
    def tokens(self) -> int:
        """Of each share of a batch."""
        return self.sequences * self.length

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis of the mesh; without one, of one device."""
        return parse_mesh(self.mesh or "data:1")

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def shares(self) -> int:
        """Parts of a batch that devices do not have in common."""
        return math.prod(self.sizes[axis] for axis in BATCH)

    @functools.cached_property
    def config(self) -> models.TransformerConfig:
        return self.build().config

    def build(self, **overrides):
        """The model; `overrides` of its configuration."""
        width = models.variant_config(self.model).hidden_size
        rank = adapter_rank(width, self.rank) if 0 < self.rank < 1 else int(self.rank)
        options = {
            "num_layers": self.depth,
            "sparsity": self.sparsity,
            "adapter_rank": rank,
            "remat": self.remat,
            "dropout": self.dropout,
            "implementation": self.implementation,
            "dtype": self.dtype,
            "scan": self.scan,
        }
        return models.build(self.model, **(options | overrides))

    @property
    def job(self) -> Config:
        """What the job would be told."""
        return Config(
            model=self.model,
            optimizer="adamw",
            weight_decay=0.1,
            beta2=0.95,
            eps=1e-8,
            moments=self.moments,
            mesh=self.mesh,
        )

    def setup(self) -> Setup:
        """Model and optimizer, as the job makes them."""
        config = self.job
        schedule = make_schedule(config.phases, config.schedule)
        tx = make_optimizer(config, schedule, is_stacked)
        method = METHODS[config.method](config)
        return Setup(self.build(), None, schedule, tx, jax.random.key(0), method)


@dataclasses.dataclass
class Lowered:
    """A case traced and lowered: no device was used."""

    case: Case
    step: Any
    make: Any
    paths: dict[str, int]
    mesh: Mesh | None = None

    def compile(self, *, autotune: bool = True, options: dict | None = None) -> "Program":
        """Compiles; with `autotune`, XLA times products of its own on the device."""
        step = self.step.compile(compiler_options=compiler_options(autotune, options))
        return Program(self.case, step, self.make.compile(), self.paths, self.mesh)


@dataclasses.dataclass
class Program:
    """A compiled step, and what makes its state.

    `paths` counts the sparse linears by what runs and why.
    """

    case: Case
    step: Any
    make: Any
    paths: dict[str, int]
    mesh: Mesh | None = None

    @functools.cached_property
    def xla_bytes(self) -> dict[str, int]:
        """XLA's own account of the step on a device: arguments, temporaries, what is not donated."""
        found = self.step.memory_analysis()
        return {
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        }

    @property
    def nbytes(self) -> int:
        """Most bytes at once on a device, by XLA's account."""
        return sum(self.xla_bytes.values())

    def start(self, data: dict[str, jax.Array] | None = None) -> "Run":
        """Puts a random state on the devices, to be trained on `data`: else on random tokens."""
        return Run(self, batch(self.case) if data is None else data)


class Run:
    """A state on the devices and the step that trains it."""

    def __init__(self, program: Program, data: dict[str, jax.Array]):
        self.program = program
        self.key, self.batch, key = jax.random.key(1), data, jax.random.key(0)
        if (mesh := program.mesh) is not None:
            self.key, key = jax.device_put((self.key, key), _everywhere(mesh))
            self.batch = jax.device_put(data, _shares(data, mesh))
        self.state = jax.block_until_ready(program.make(key))
        self.metrics: dict[str, jax.Array] = {}

    def steps(self, count: int) -> None:
        """So many steps, the last one waited for."""
        for _ in range(count):
            self.state, self.metrics = self.program.step(self.state, self.batch, self.key)
        jax.block_until_ready((self.state, self.metrics))

    def loss(self) -> float:
        """Of the last step.

        Raises:
          RuntimeError: it is not finite, so that times would be those of no training.
        """
        loss = float(self.metrics["loss"])
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {self.program.case.name} is {loss}")
        return loss


def lower(case: Case, platforms: tuple[str, ...] | None = None) -> Lowered:
    """Traces and lowers a case's step and the function that makes its state.

    Args:
      platforms: to lower for, if not for the one that is here.

    Raises:
      ValueError: there are not as many devices as the case's mesh has.
    """
    mesh = make_mesh(case.job)
    with set_mesh(mesh):
        return _lower(case, mesh, platforms)


def _lower(case: Case, mesh: Mesh | None, platforms: tuple[str, ...] | None) -> Lowered:
    setup = case.setup()
    state = abstract_state(setup, adapters=False)
    rows = case.sequences * case.shares // case.accumulation
    inputs = setup.model.example_inputs(rows, case.length)
    explanation = explain(setup.model, state.variables, **inputs)
    paths: dict[str, int] = {}
    for row in explanation.rows:
        if row.pattern != "dense":
            way = f"{row.implementation}: {row.reason}"
            paths[way] = paths.get(way, 0) + row.layers
    patterns = {
        path: layer.pattern
        for path, layer in find_layers(setup.model.apply, state.variables, **inputs).items()
    }
    data = jax.eval_shape(functools.partial(batch, case))
    key = jax.eval_shape(lambda: jax.random.key(0))
    places = None
    if mesh is not None:
        places = shardings(state, mesh)
        state, data = _placed(state, places), _placed(data, _shares(data, mesh))
        key = _placed(key, _everywhere(mesh))
    make = functools.partial(_random_state, setup, state, patterns)
    step = make_train_step(case.accumulation, setup.schedule).trace(state, data, key)
    make = jax.jit(make, out_shardings=places).trace(key)
    lowered = (traced.lower(lowering_platforms=platforms) for traced in (step, make))
    return Lowered(case, *lowered, paths, mesh)


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _shares(data: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh, batch_spec(x.ndim)) for name, x in data.items()}


def _placed(tree: Any, places: Any) -> Any:
    """Shapes that lie on the mesh where `places` says."""
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)  # noqa: E731
    return jax.tree.map(place, tree, places)


def batch(case: Case, seed: int = 2) -> dict[str, jax.Array]:
    """Random tokens for all shares, as `train.data` shapes its batches."""
    config = case.config
    size = (case.sequences * case.shares, case.length)
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    ids = jax.random.randint(next(keys), size, 0, config.vocab_size)
    if not case.model.startswith("bert"):
        return {"input_ids": ids, "labels": jnp.roll(ids, -1, axis=1)}
    masked = (size[0], predictions(case.length))
    stride = case.length // masked[1]
    return {
        "input_ids": ids,
        "token_type_ids": jnp.broadcast_to((jnp.arange(size[1]) >= size[1] // 2).astype(int), size),
        "lengths": jnp.full((size[0],), size[1], jnp.int32),
        "mlm_positions": jnp.broadcast_to(stride * jnp.arange(masked[1]), masked),
        "mlm_labels": jax.random.randint(next(keys), masked, 0, config.vocab_size),
        "mlm_weights": jnp.ones(masked, jnp.float32),
        "nsp_labels": jax.random.randint(next(keys), size[:1], 0, 2),
    }


def predictions(length: int) -> int:
    """Masked positions in a sequence of BERT's."""
    return max(1, int(PREDICTIONS * length))


def flops(case: Case, *, depth: int | None = None) -> float:
    """Floating-point operations of the dense model's step, nothing recomputed.

    6 for each token and weight of a linear layer that it passes (2 forward, 4 backward), the product
    with the vocabulary among them, and 12 * length * width of attention for each token and layer,
    half of it where attention is causal.

    Args:
      depth: of the model; the case's if not given.
    """
    config = case.build(num_layers=depth or case.depth, sparsity="dense", adapter_rank=0).config
    bert = case.model.startswith("bert")
    rows = {"mlm": case.sequences * predictions(case.length), "nsp": case.sequences}
    rows["pooler"] = case.sequences
    total = 0.0
    for linear in config.linears:
        first = linear.path.split("/")[0]
        total += 6 * rows.get(first, case.tokens) * linear.in_features * linear.out_features
    attention = 12 * case.length * config.num_heads * config.head_width * (1 if bert else 0.5)
    return total + attention * case.tokens * config.num_layers


def layer_share(case: Case) -> float:
    """The share of a step's operations that one layer has."""
    whole = flops(case)
    return (flops(case, depth=case.depth + 1) - whole) / whole


def mfu(flops: float, milliseconds: float, device: str) -> float | None:
    """The share of the device's peak that `flops` in such a time are; None where it is unknown.

    >>> mfu(989e12 * 0.05, 100.0, "NVIDIA H200")
    0.5
    """
    peak = PEAK_TFLOPS.get(device)
    return None if peak is None else round(flops / (milliseconds * 1e-3) / (peak * 1e12), 4)


def line(depths: tuple[int, int], values: tuple[float, float], depth: int) -> float:
    """The value at `depth` of the line through those at two depths.

    >>> line((2, 4), (10.0, 14.0), 40)
    86.0
    """
    slope = (values[1] - values[0]) / (depths[1] - depths[0])
    return values[1] + (depth - depths[1]) * slope


def _random_state(setup: Setup, state: TrainState, patterns: dict, key: jax.Array) -> TrainState:
    """A state of these shapes: quick to compile and to fill, no two numbers in a row alike."""
    seed = jax.random.bits(key, (), jnp.uint32)

    def parameter(path, leaf):
        name = str(path[-1].key)
        if name in ("bias", "scale"):
            return jnp.full(leaf.shape, name == "scale", leaf.dtype)
        return noise(seed, leaf.shape).astype(leaf.dtype)

    def positions(path, leaf):
        pattern = patterns[tuple(str(key.key) for key in path[:-1])]
        return random_metadata(seed, leaf.shape, pattern)

    return TrainState.create(
        apply_fn=setup.model.apply,
        params=jax.tree_util.tree_map_with_path(parameter, state.params),
        masks=jax.tree_util.tree_map_with_path(positions, state.masks),
        tx=setup.tx,
    )


def compiler_options(autotune: bool = True, options: dict | None = None) -> dict | None:
    """For programs to be timed: the dense products by cuBLAS; without `autotune`, not tried out."""
    if jax.default_backend() != "gpu":
        return None
    return CUBLAS | ({} if autotune else AUTOTUNE_OFF) | (options or {})


def random_metadata(seed: jax.Array, shape: tuple[int, ...], pattern: Pattern) -> jax.Array:
    """Metadata of a random weight: that of a small one, again and again."""
    tile = compress(noise(seed, (16 * pattern.m, 256)), pattern).metadata
    repeats = [-(-a // b) for a, b in zip(shape[-2:], tile.shape, strict=True)]
    return jnp.broadcast_to(jnp.tile(tile, repeats)[: shape[-2], : shape[-1]], shape)


def noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform numbers of standard deviation `WEIGHT_STD`, each a hash of its place."""
    place = jnp.broadcast_to(seed, shape)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    for multiplier, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        place = place * jnp.uint32(multiplier)
        place ^= place >> shift
    unit = (place >> 8).astype(jnp.float32) / 2**24  # in [0, 1)
    return (2 * unit - 1) * (WEIGHT_STD * math.sqrt(3))
