"""Model, optimizer and initial state of a finetuning job."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import traverse_util

from slope_jax import TrainState, pruned_rate
from slope_jax.models import Bert
from slope_jax.models.layers import normal_init
from slope_jax.rates import scale_leaves
from train.config import Config, from_json
from train.methods import METHODS
from train.optimizer import make_optimizer, make_schedule
from train.serving import Trained, load_trained
from train.state import compute_dtype, is_stacked
from train.tasks.config import FinetuneConfig
from train.tasks.features import check_seq_len
from train.tasks.head import BERT, TaskModel

PRETRAINING_HEADS = ("mlm", "nsp")
Path = tuple[str, ...]


class Setup(NamedTuple):
    """What is fixed before the first step, the same for every seed."""

    config: FinetuneConfig
    model: TaskModel
    apply_fn: Callable
    seq_len: int
    epochs: int
    lr: float
    pruned: Mapping[Path, str]  # path of every pruned kernel in the parameters -> its pattern
    steps_per_epoch: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def with_sequences(self, count: int) -> "Setup":
        """The setup for `count` training sequences: long contexts give more than one."""
        steps = -(-count // self.config.batch_size)
        if steps == self.steps_per_epoch:
            return self
        schedule, tx = _optimizer(self.config, self.lr, self.pruned, self.epochs * steps)
        return self._replace(steps_per_epoch=steps, schedule=schedule, tx=tx)


def load_run(config: FinetuneConfig) -> Trained:
    """The pretrained weights.

    Raises:
      ValueError: no run, no such checkpoint, or not a BERT.
    """
    trained = load_trained(config.checkpoint, step=config.step)
    if not isinstance(trained.model, Bert):
        raise ValueError(
            f"{config.checkpoint} holds a {type(trained.model).__name__}; finetuning takes a BERT,"
            " which reads a text from both sides: pretrain one with --model=bert-base"
        )
    return trained


def make_setup(config: FinetuneConfig, trained: Trained, sequences: int) -> Setup:
    """Model and optimizer of a job over `sequences` training sequences.

    Raises:
      ValueError: sequences longer than the model's positions, or too short for the task.
    """
    task, pretraining = config.chosen, from_json(trained.about["config"])
    seq_len = config.seq_len or min(task.seq_len, max(pretraining.seq_len))
    check_seq_len(task, seq_len)
    positions = trained.model.config.max_positions
    if seq_len > positions:
        raise ValueError(
            f"seq_len={seq_len} is longer than the model's {positions} positions; use at most those"
        )
    epochs, lr = config.epochs or task.epochs, config.lr or task.lr
    steps = -(-sequences // config.batch_size)
    model = TaskModel(
        dataclasses.replace(
            trained.model.config,
            dropout=config.dropout,
            dtype=compute_dtype(config),
            implementation=None if config.implementation == "auto" else config.implementation,
        ),
        task.kind,
        task.outputs,
    )
    pruned = _pruned(pretraining, trained)
    schedule, tx = _optimizer(config, lr, pruned, epochs * steps)
    return Setup(config, model, model.apply, seq_len, epochs, lr, pruned, steps, schedule, tx)


def init_state(setup: Setup, trained: Trained, key: jax.Array) -> TrainState:
    """The state before the first step: pretrained weights (copied), adapters if any, a new head."""
    head = nn.Dense(setup.model.outputs, kernel_init=normal_init)
    hidden = setup.model.config.hidden_size
    params = {k: v for k, v in trained.variables["params"].items() if k not in PRETRAINING_HEADS}
    masks = {k: v for k, v in trained.variables["masks"].items() if k not in PRETRAINING_HEADS}
    return TrainState.create(
        apply_fn=setup.apply_fn,
        params={
            BERT: jax.tree.map(jnp.copy, params),
            "head": head.init(key, jnp.zeros((1, hidden)))["params"],
        },
        masks={BERT: jax.tree.map(jnp.copy, masks)} if masks else {},
        tx=setup.tx,
    )


def _pruned(pretraining: Config, trained: Trained) -> dict[Path, str]:
    stored = traverse_util.flatten_dict(trained.variables["masks"])
    kernels = METHODS[pretraining.method](pretraining).kernels
    return {(BERT, *path): pattern for path, pattern in kernels.items() if path in stored}


def pruned_lr_scale(config: FinetuneConfig, pattern: str) -> float:
    """Learning rate of a kernel of a pattern, relative to that of the other parameters."""
    return pruned_rate(pattern) if config.pruned_lr_scale is None else config.pruned_lr_scale


def _optimizer(config: FinetuneConfig, lr: float, pruned: Mapping[Path, str], steps: int):
    """AdamW as in pretraining, under a schedule of its own."""
    like = Config(
        batch_size=(config.batch_size,),
        steps=(steps,),
        lr=(lr,),
        warmup=(config.warmup,),
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    schedule = make_schedule(like.phases, like.schedule)
    factors = {path: pruned_lr_scale(config, pattern) for path, pattern in pruned.items()}
    others = {path: factor for path, factor in factors.items() if factor != 1}
    return schedule, make_optimizer(like, schedule, is_stacked, scale_leaves(others))
