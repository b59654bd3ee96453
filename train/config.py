"""What a pretraining run is, in one frozen dataclass.

A run goes through *phases* (BERT: short sequences, then long). The fields `seq_len`,
`batch_size`, `accumulation`, `steps`, `lr`, `warmup` and `max_predictions` hold one value per
phase, or one value for all of them; `seq_len` says how many phases there are.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from train.config_checks import PER_PHASE, check

FREE = {"free": True}  # marks fields that may change when a run is resumed


@dataclass(frozen=True)
class Phase:
    """One stretch of the run with its own shapes and schedule. Steps count from the run's start."""

    index: int
    start: int
    seq_len: int
    batch_size: int
    accumulation: int
    steps: int
    lr: float
    warmup: float
    max_predictions: int

    @property
    def end(self) -> int:
        return self.start + self.steps

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Config:
    """Pretrain a sparse language model, with low-rank adapters if asked for, or its dense control."""

    model: str = "bert-base"
    """Named variant of slope_jax.models, such as bert-tiny, bert-base, gpt2-nano, gpt2-small."""
    recipe: Literal["quickstart", "paper"] = "quickstart"
    """Where the defaults below come from. quickstart: minutes on a CPU. paper: the published
    hyperparameters. Whatever you give explicitly wins over the recipe."""
    method: Literal["slope", "dense", "half", "sr-ste", "extended-sr-ste", "fst", "wanda"] = "slope"
    """slope: N:M sparse with adapters. dense: the same recipe without sparsity; half: with half of
    the blocks. sr-ste, extended-sr-ste, fst: masks that change, by dense products, for comparison.
    wanda: a dense run pruned at once, see --init-from."""

    sparsity: str = "2:4"
    """Patterns of the pruned linears. "2:4": keep 2 of every 4 consecutive inputs. "2:4,2:8": by
    depth, first half and second half. "layers/0/.*=dense; .*=2:4": rules over linear paths.
    Heads, embeddings and the first linear after the input stay dense unless a rule says more."""
    mask_init: Literal["magnitude", "random"] = "magnitude"
    """How the static mask is chosen: by magnitude of the initial weights, or at random."""
    backward: Literal["double-pruned", "exact"] = "double-pruned"
    """Gradient of the pruned linears' inputs: by weights pruned again along the outputs, which runs
    sparse, or exact, by a dense product."""
    pruned_lr_scale: float | None = None
    """Learning rate of the pruned kernels relative to that of the other parameters. None: with AdamW
    M / N, for so many fewer entries move each output (2 for 2:4); with LAMB 1."""
    adapter_rank: int | float = 0
    """Rank of the adapters: an integer, or a fraction (below 1) of the hidden size. 0: none."""
    adapter_start: float = 0.0
    """Fraction of the last phase's steps after which the adapters join, in [0, 1): 0 is from the start,
    0.99 what the paper does. Late ones have added nothing that we could measure (docs/accuracy.md)."""
    adapter_init_scale: float = 1.0
    """Spread of the adapters' first factor at birth, times 1 / rank; the second starts at zero."""
    adapter_lr_scale: float | None = None
    """Peak of the adapters' learning rate relative to that of the last phase. From when they join on,
    theirs warms up and decays as the phase's does. None: the share of the phase's steps that are left to
    them, about where a linear schedule is by then."""

    mask_decay: float | None = None
    """Decay of pruned weights (sr-ste, extended-sr-ste, fst). None: 2e-4, 6e-6, 6e-5."""
    prune_dy: bool = False
    """Prune the gradient of outputs 2:4 along the tokens for that of weights (extended-sr-ste)."""
    mask_every: int = 40
    """Steps between searches for masks (fst)."""
    dense_finish: float = 1 / 6
    """Fraction of all steps, the last ones, that train dense (fst), in [0, 1)."""
    init_from: str = ""
    """Folder of a finished run of --method=dense, or one of its checkpoints/STEP (wanda)."""
    calibration_sequences: int = 128
    """Sequences of training data that weights are pruned by (wanda)."""

    data: str = "docs"
    """docs[:MB] (documentation of Python and the installed packages), tfds:NAME[/CONFIG], or
    text:GLOB (.txt, .jsonl, also .gz and .xz); several joined with a comma."""
    tokenizer: str = ""
    """A tokenizer.json or vocab.txt. Empty: train one on the data and keep it with the run."""
    vocab_size: int = 8192
    """Entries of the tokenizer to train (ignored with --tokenizer)."""
    valid_fraction: float = 0.02
    """Fraction of the documents held out for evaluation, in (0, 0.5]."""
    cache_dir: str = field(default="", metadata=FREE)
    """Where prepared tokens are kept. Empty: a user cache folder."""

    seq_len: tuple[int, ...] = (128,)
    """Tokens per sequence. One value per phase: the number of values is the number of phases."""
    batch_size: tuple[int, ...] = (8,)
    """Sequences per optimizer step. One value per phase or one for all, as for the next five."""
    accumulation: tuple[int, ...] = (1,)
    """Micro-batches that a step's batch is split into, to bound memory."""
    steps: tuple[int, ...] = (100,)
    """Optimizer steps. 0 is possible for wanda: prune and evaluate."""
    lr: tuple[float, ...] = (1e-3,)
    """Peak learning rate."""
    warmup: tuple[float, ...] = (0.1,)
    """Fraction of the phase's steps in which the learning rate rises linearly, in [0, 1)."""
    max_predictions: tuple[int, ...] = (20,)
    """Most masked positions per sequence (BERT only)."""

    optimizer: Literal["adamw", "lamb"] = "adamw"
    """adamw, or lamb (layer-wise trust ratios, for large batches)."""
    schedule: Literal["linear", "polynomial"] = "linear"
    """Decay to zero after the warm-up: linear, or polynomial with power 0.5."""
    weight_decay: float = 0.01
    """Decoupled weight decay; never on biases and norms."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""
    eps: float = 1e-6
    """Added to the square root of the second moment."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type in which both moments are kept. bfloat16: half their memory, rounded without bias."""
    clip: float = 1.0
    """Largest global norm of the gradient. 0: no clipping."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the computation; parameters are float32. auto: bfloat16 on GPU and TPU, float32 on
    CPU, where it is faster."""
    dropout: float = 0.0
    """Dropout rate, in [0, 1)."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    scan: bool = True
    """Stack equal layers and scan over them, which compiles fast. Without, each is compiled by itself,
    and a step takes less time on a GPU: docs/training.md has both."""
    implementation: Literal["auto", "xla", "mosaic"] = "auto"
    """Implementation of the sparse products. auto: the best one on this device."""
    seed: int = 0
    """Seed of the initialisation, the masks, the data order and dropout."""

    eval_every: int = field(default=50, metadata=FREE)
    """Steps between evaluations on held-out data. 0: only at the end."""
    eval_batches: int = field(default=8, metadata=FREE)
    """Held-out micro-batches per evaluation, always the same ones."""
    mesh: str = field(default="", metadata=FREE)
    """Devices by axis, such as data:2,fsdp:2,tensor:2. data: batches are shared. fsdp: batches are
    shared, and parameters, moments and masks too. tensor: products are cut. Empty: one device. A run
    goes on with another mesh or number of processes as well."""
    coordinator: str = field(default="", metadata=FREE)
    """HOST:PORT of process 0, for a run of several processes; auto: as SLURM, Open MPI or Kubernetes
    say."""
    processes: int | None = field(default=None, metadata=FREE)
    """How many processes the run has (with --coordinator=HOST:PORT)."""
    process_id: int | None = field(default=None, metadata=FREE)
    """Which of them this one is, from 0."""
    heartbeat_seconds: int = field(default=100, metadata=FREE)
    """Seconds without a sign of life after which a process counts as lost, and all others end."""
    log_every: int = field(default=1, metadata=FREE)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = field(default=50, metadata=FREE)
    """Steps between checkpoints. 0: only at the end, or when stopped."""
    keep_checkpoints: int = field(default=2, metadata=FREE)
    """Latest checkpoints to keep; the best one by held-out loss stays besides."""
    max_bad_steps: int = field(default=10, metadata=FREE)
    """Steps that may be skipped, in the whole run, because the loss or the gradient is NaN or
    infinite; one more stops the run. Their batches are dropped, weights and moments stay."""
    grace_seconds: float = field(default=0.0, metadata=FREE)
    """Seconds that SIGTERM leaves to save and end, as the scheduler allows. 0: not known."""
    max_minutes: float = field(default=0.0, metadata=FREE)
    """Save and stop after this many minutes; the same command goes on. 0: no limit."""
    tensorboard: bool = field(default=True, metadata=FREE)
    """Write TensorBoard events next to metrics.jsonl."""
    run_dir: str = field(default="", metadata=FREE)
    """Folder of the run. Empty: runs/MODEL-RECIPE-METHOD-HASH, the hash of these settings."""
    dry_run: bool = field(default=False, metadata=FREE)
    """Print the plan (parameters, bytes, schedule, what runs where) and exit."""

    def __post_init__(self):
        for name in PER_PHASE:  # one value may be given bare
            value = getattr(self, name)
            if not isinstance(value, tuple):
                several = isinstance(value, list)
                object.__setattr__(self, name, (*value,) if several else (value,))
        check(self)

    @property
    def family(self) -> str:
        """The model family: the part of the name ahead of the first dash."""
        return self.model.split("-")[0]

    @property
    def objective(self) -> str:
        return "mlm" if self.family == "bert" else "clm"

    @property
    def phases(self) -> tuple[Phase, ...]:
        phases, start = [], 0
        for i in range(len(self.seq_len)):
            values = {name: _phase_value(getattr(self, name), i) for name in PER_PHASE}
            phases.append(Phase(index=i, start=start, **values))
            start = phases[-1].end
        return tuple(phases)

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end

    @property
    def total_tokens(self) -> int:
        return sum(p.steps * p.tokens_per_step for p in self.phases)

    @property
    def adapter_step(self) -> int | None:
        """Steps completed when the adapters join; None without adapters."""
        from train.methods import METHODS

        last = self.phases[-1]
        if not METHODS[self.method].adapts or self.adapter_rank == 0 or last.steps == 0:
            return None
        return last.start + min(round(self.adapter_start * last.steps), last.steps - 1)

    def identity(self) -> dict[str, Any]:
        """The fields that make the run what it is, in JSON types: all but the free ones."""
        return {k: v for k, v in to_json(self).items() if k not in free_fields()}

    def default_run_dir(self) -> str:
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return f"runs/{self.model}-{self.recipe}-{self.method}-{digest[:8]}"


def free_fields() -> frozenset[str]:
    """Names of the fields that may differ between a checkpoint and the command resuming it."""
    return frozenset(f.name for f in dataclasses.fields(Config) if f.metadata.get("free"))


def to_json(config: Config) -> dict[str, Any]:
    """The configuration in JSON types (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(saved: dict[str, Any]) -> Config:
    """The configuration that `to_json` gave, also of an earlier version without some fields.

    Raises:
      ValueError: it has a field that this version does not know.
    """
    saved = {"pruned_lr_scale": 1.0} | saved  # as all runs had before they could choose
    names = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(saved.keys() - names):
        raise ValueError(
            f"the run's configuration has {', '.join(unknown)}, which this version does not know;"
            " use the version that made the run"
        )
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def choices(name: str) -> tuple[str, ...]:
    """The values that a field with fixed choices allows."""
    return get_args(get_type_hints(Config)[name])


def _phase_value(values: tuple, index: int):
    return values[index] if len(values) > 1 else values[0]
