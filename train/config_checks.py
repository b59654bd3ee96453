"""What a configuration must fulfil, found before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from train.config import Config

PER_PHASE = ("seq_len", "batch_size", "accumulation", "steps", "lr", "warmup", "max_predictions")
ADAPTER_OPTIONS = ("adapter_start", "adapter_init_scale", "adapter_lr_scale")
EARLIER = {"adapter_start": 0.9}  # what the recipe quickstart gave before adapters were a choice


def check(config: Config) -> None:
    """Raises a ValueError that names the field, its value, the rule and the remedy."""
    _check_types(config)
    _check_choices(config)
    _check_phases(config)
    _check_ranges(config)
    _check_method(config)
    _check_mesh(config)


def _check_types(config: Config) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        parts = value if name in PER_PHASE else (value,)
        hint = get_args(hint)[0] if name in PER_PHASE else hint
        if get_origin(hint) is Literal:
            hint = str
        kinds = set(get_args(hint) or (hint,))
        kinds |= {int} if float in kinds else set()
        if not all(type(part) in kinds or _scalar(part, kinds) for part in parts):
            names = " or ".join(sorted("none" if k is type(None) else k.__name__ for k in kinds))
            raise ValueError(f"{name} must be {names}, got {value!r}")


def _scalar(value: Any, kinds: set[type]) -> bool:
    """Whether it is one of a subclass, such as a NumPy float; True and False are no numbers."""
    return isinstance(value, tuple(kinds)) and not isinstance(value, bool)


def _check_choices(config: Config) -> None:
    from slope_jax.models import VARIANTS
    from train.data.sources import split_spec

    if config.model not in VARIANTS:
        raise ValueError(f"unknown model {config.model!r}; choose one of: {', '.join(VARIANTS)}")
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            allowed = ", ".join(get_args(hint))
            raise ValueError(f"unknown {name} {value!r}; choose one of: {allowed}")
    split_spec(config.data)


def _check_phases(config: Config) -> None:
    count = len(config.seq_len)
    if count == 0:
        raise ValueError("seq_len is empty; give at least one sequence length")
    for name in PER_PHASE:
        values = getattr(config, name)
        if len(values) not in (1, count):
            raise ValueError(
                f"{name} has {len(values)} values {values} but seq_len sets {count} phase(s); "
                f"give one value, or one per phase"
            )
        whole = name not in ("lr", "warmup")
        for value in values:
            if name == "steps" and value == 0 and config.method == "wanda":
                continue
            if whole and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name} must be a positive integer, got {value}")
    for phase in config.phases:
        if phase.batch_size % phase.accumulation:
            raise ValueError(
                f"batch_size {phase.batch_size} is not divisible by accumulation "
                f"{phase.accumulation}; make it a multiple, so that micro-batches are equal"
            )
        if not 0 < phase.lr < 10:
            raise ValueError(f"lr must be above 0 (and below 10), got {phase.lr}")
        if not 0 <= phase.warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps in [0, 1), got {phase.warmup}")
        if config.objective == "mlm" and phase.max_predictions >= phase.seq_len:
            raise ValueError(
                f"max_predictions {phase.max_predictions} must be below seq_len {phase.seq_len}; "
                f"about 15 % of it is usual"
            )


def _check_ranges(config: Config) -> None:
    rank = config.adapter_rank
    if rank < 0 or (isinstance(rank, float) and rank >= 1 and rank != int(rank)):
        raise ValueError(f"adapter_rank must be an integer >= 0 or a fraction below 1, got {rank}")
    if not 0 <= config.adapter_start < 1:
        raise ValueError(
            f"adapter_start is a fraction of the last phase's steps in [0, 1), got "
            f"{config.adapter_start}; for no adapters set adapter_rank to 0"
        )
    for name in ("beta1", "beta2", "dropout", "dense_finish"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
    names = ("weight_decay", "clip", "eval_every", "checkpoint_every", "max_minutes", "mask_decay")
    for name in (*names, "max_bad_steps", "grace_seconds"):
        if not (getattr(config, name) or 0.0) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")
    for name in (
        "adapter_init_scale",
        "eps",
        "eval_batches",
        "log_every",
        "keep_checkpoints",
        "mask_every",
        "calibration_sequences",
    ):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
    for name in ("pruned_lr_scale", "adapter_lr_scale"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, or None for its default; got {value}")
    if not 0 < config.valid_fraction <= 0.5:
        raise ValueError(f"valid_fraction must lie in (0, 0.5], got {config.valid_fraction}")
    if config.vocab_size < 300:
        raise ValueError(f"vocab_size must be at least 300, got {config.vocab_size}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"seed must lie in [0, 2**31), got {config.seed}")


def _check_mesh(config: Config) -> None:
    from train.mesh import parse_mesh  # which needs this module

    if config.mesh:
        parse_mesh(config.mesh)
    if config.heartbeat_seconds < 1:
        raise ValueError(f"heartbeat_seconds must be at least 1, got {config.heartbeat_seconds}")
    given = (config.processes is not None, config.process_id is not None)
    if config.coordinator in ("", "auto"):
        if any(given):
            raise ValueError(
                "processes and process_id need coordinator=HOST:PORT, the address of process 0;"
                f" got coordinator={config.coordinator!r}"
            )
        return
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator {config.coordinator!r} is no HOST:PORT, such as node0:12345, nor auto"
        )
    if not all(given):
        raise ValueError(
            f"coordinator={config.coordinator} needs processes and process_id as well; under SLURM,"
            " Open MPI or Kubernetes coordinator=auto finds all three"
        )
    if not 0 <= config.process_id < config.processes:
        raise ValueError(
            f"process_id must lie in [0, {config.processes}), as processes says; got"
            f" {config.process_id}"
        )


def check_given(config: Config, given: Collection[str]) -> None:
    """Raises a ValueError for fields that were given and count for nothing beside the others."""
    idle = [name for name in ADAPTER_OPTIONS if name in given]
    if idle and config.adapter_rank == 0 and "adapter_rank" not in given:
        raise ValueError(
            f"{idle[0]} {getattr(config, idle[0])!r} has no meaning without adapters; give their"
            " --adapter-rank as well, such as 16 or 0.0625 (of the hidden size), or leave it out"
        )


def _is_unset(config: Config, option: dataclasses.Field, value: Any) -> bool:
    """Whether a value is nobody's choice, or turns off what the method is without."""
    from train.recipes import RECIPES  # which needs this module

    if value in (option.default, EARLIER.get(option.name)):
        return True
    if option.name == "adapter_rank" and value == 0:
        return True
    if option.name == "sparsity":
        return value == "dense" and config.method in ("dense", "half")
    return any(value == recipe.get(option.name) for recipe in RECIPES.values())


def _check_method(config: Config) -> None:
    from train.methods import METHODS

    method = METHODS[config.method]
    for option in dataclasses.fields(config):
        users = [name for name, other in METHODS.items() if option.name in other.fields]
        value = getattr(config, option.name)
        if users and config.method not in users and not _is_unset(config, option, value):
            raise ValueError(
                f"{option.name} {value!r} has no meaning for --method={config.method}, only for"
                f" {', '.join(users)}; leave it out, or choose one of these methods"
            )
    method.check(config)
