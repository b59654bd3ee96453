"""What a finetuning job is, in one frozen dataclass."""

import dataclasses
import hashlib
import json
import pathlib
import shlex
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.tasks.registry import SPAN, Task, find_task

EARLIER = {"pruned_lr_scale": 1.0}  # what jobs had before they could choose
FREE = ("out", "dry_run", "seeds", "save_model")  # may differ when a job goes on


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Finetune a pretrained BERT on a task of GLUE or on SQuAD, its sparse weights kept sparse."""

    task: str
    """glue/cola, glue/sst2, glue/mrpc, glue/qqp, glue/stsb, glue/mnli, glue/qnli, glue/rte,
    glue/wnli or squad; cola is glue/cola."""
    checkpoint: str
    """Folder of a run of train.pretrain, or one of its checkpoints/STEP."""
    step: int | None = None
    """Which checkpoint of the run; the latest if not given."""
    data: str = ""
    """Folder with local files, such as DIR/CoLA/train.tsv and dev.tsv. Empty: TensorFlow Datasets."""
    out: str = ""
    """Folder of the results. Empty: RUN/finetune/TASK-HASH, the hash of these settings."""

    seeds: tuple[int, ...] = (0,)
    """One finetuning each: seed of the head, the order of examples and dropout."""
    epochs: int | None = None
    """Passes over the training examples; the task's usual number if not given."""
    batch_size: int = 32
    """Sequences per optimizer step."""
    lr: float | None = None
    """Peak learning rate; the task's usual one if not given."""
    pruned_lr_scale: float | None = None
    """Learning rate of the pruned kernels relative to that of the other parameters. None: M / N of
    their pattern, as in pretraining."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises, in [0, 1); then it falls to zero."""
    seq_len: int | None = None
    """Most tokens of a sequence; if not given the task's usual number, or the pretraining's longest
    sequence if that is less: positions behind it were never trained."""
    stride: int | None = None
    """Tokens from one window of a long context to the next (squad only); a third of seq_len if not
    given."""
    weight_decay: float = 0.01
    """Decoupled weight decay; never on biases and norms."""
    clip: float = 1.0
    """Largest global norm of the gradient. 0: no clipping."""
    dropout: float = 0.1
    """Dropout rate, in [0, 1)."""
    limit: int | None = None
    """Use the first so many training examples only."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the computation, as of train.pretrain; parameters are float32."""
    implementation: Literal["auto", "xla", "mosaic"] = "auto"
    """Implementation of the sparse products. auto: the best one on this device."""

    save_model: bool = False
    """Write the finetuned weights of every seed to OUT/seed-N/model."""
    dry_run: bool = False
    """Print the plan and exit."""

    def __post_init__(self):
        object.__setattr__(self, "task", find_task(self.task).name)
        seeds = (self.seeds,) if isinstance(self.seeds, int) else tuple(self.seeds)
        object.__setattr__(self, "seeds", seeds)
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                allowed = ", ".join(get_args(hint))
                raise ValueError(f"unknown {name} {value!r}; choose one of: {allowed}")
        for name in ("epochs", "batch_size", "seq_len", "stride", "limit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if self.lr is not None and not 0 < self.lr < 10:
            raise ValueError(f"lr must be above 0 (and below 10), got {self.lr}")
        if self.pruned_lr_scale is not None and not self.pruned_lr_scale > 0:
            raise ValueError(
                f"pruned_lr_scale must be above 0, or None for M / N; got {self.pruned_lr_scale}"
            )
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.stride is not None and find_task(self.task).kind != SPAN:
            raise ValueError(f"stride is of tasks with long contexts (squad), not of {self.task}")
        if not seeds or len(set(seeds)) < len(seeds) or any(not 0 <= s < 2**31 for s in seeds):
            raise ValueError(f"seeds must be different integers in [0, 2**31), got {seeds}")

    @property
    def chosen(self) -> Task:
        return find_task(self.task)

    def identity(self) -> dict[str, Any]:
        """The settings that decide each seed's result, in JSON types."""
        return {k: v for k, v in to_json(self).items() if k not in FREE}

    def folder(self) -> pathlib.Path:
        """Where the results go."""
        if self.out:
            return pathlib.Path(self.out).expanduser()
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return self.run() / "finetune" / f"{self.task.replace('/', '-')}-{digest[:8]}"

    def run(self) -> pathlib.Path:
        """Folder of the pretraining run."""
        path = pathlib.Path(self.checkpoint).expanduser()
        return path.parent.parent if path.parent.name == "checkpoints" else path

    def command(self) -> str:
        """The command line that asks for this."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag)
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            else:
                words.append(f"{flag}={value}")
        return shlex.join(["python", "-m", "train.finetune", *words])


def to_json(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration in JSON types (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
