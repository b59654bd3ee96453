"""Model, optimizer and training state of a run, concrete or as shapes only."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from slope_jax import TrainState, add_adapters, models
from slope_jax.sharding import active_mesh, state_specs
from train.config import Config
from train.methods import METHODS, Method
from train.optimizer import adapter_rate, make_optimizer, make_schedule

STACKED = re.compile(r"layers_\d+_to_\d+")  # names that the models give to scanned layers


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What is fixed before the first step. `adapted` is `model` with adapters, None without."""

    model: nn.Module
    adapted: nn.Module | None
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    key: jax.Array
    method: Method

    @functools.cached_property
    def init(self) -> Callable[[jax.Array], TrainState]:
        """The state of a key. One function, so that JAX traces it once, for the plan and the run."""
        return functools.partial(_init, self)


def make_setup(config: Config, *, vocab_size: int | None = None) -> Setup:
    """Build everything that needs no data but the vocabulary size (entries of the tokenizer).

    Raises:
      ValueError: sequences longer than the model's positions, a rank above a layer's size, sizes
        that the pattern doesn't divide.
    """
    method = METHODS[config.method](config)
    options = {
        "vocab_size": vocab_size or config.vocab_size,
        "dtype": compute_dtype(config),
        "dropout": config.dropout,
        "remat": config.remat,
        "scan": config.scan,
        "implementation": None if config.implementation == "auto" else config.implementation,
        **method.options(),
    }
    model = models.build(config.model, **options)
    positions, longest = model.config.max_positions, max(config.seq_len)
    if longest > positions:
        raise ValueError(
            f"seq_len {longest} is longer than the {positions} positions of {config.model}; "
            f"use at most {positions}"
        )
    adapted = None
    if config.adapter_step is not None:
        adapters = {
            "adapter_rank": config.adapter_rank,
            "adapter_scale": config.adapter_init_scale,
        }
        adapted = models.build(config.model, **adapters, **options)
    schedule = make_schedule(config.phases, config.schedule)
    rate = None if adapted is None else adapter_rate(config, schedule)
    tx = make_optimizer(config, schedule, is_stacked, method.after_update(), rate)
    return Setup(model, adapted, schedule, tx, jax.random.key(config.seed), method)


def compute_dtype(config: Config) -> Any:
    """The dtype of the computation."""
    return named_dtype(config.dtype)


def named_dtype(name: str) -> Any:
    """What "auto" is, which is bfloat16 where the hardware multiplies it faster, or any other name."""
    if name != "auto":
        return jnp.dtype(name)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def is_stacked(path: tuple) -> bool:
    """Whether the parameter at a key path holds many layers, along its leading axis."""
    return any(STACKED.fullmatch(str(getattr(part, "key", ""))) for part in path)


def init_state(setup: Setup) -> TrainState:
    """The state before the first step, compiled as one function, on the mesh if one is set."""
    key = jax.random.fold_in(setup.key, 0)
    return jax.jit(setup.init, out_shardings=_placed(setup.init, key))(key)


def join_adapters(setup: Setup, state: TrainState) -> tuple[TrainState, int]:
    """The state with newborn adapters, which leave the function unchanged, and their number.

    Takes over the buffers of `state`.
    """
    counts = []

    def join(state: TrainState) -> TrainState:
        state, count = _join(setup, state)
        counts.append(count)
        return state

    # Compiled, so that the fresh optimizer state of existing parameters is never allocated.
    out_shardings = _placed(join, state)
    return jax.jit(join, donate_argnums=0, out_shardings=out_shardings)(state), counts[0]


def _join(setup: Setup, state: TrainState) -> tuple[TrainState, int]:
    return add_adapters(state, setup.adapted, jax.random.fold_in(setup.key, 1))


def _placed(make: Callable[[Any], TrainState], argument: Any) -> Any:
    """Where the leaves of what `make` gives lie on the mesh, or on the device where runs go on: arrays
    without a place make other programs, which a run that goes on would compile anew."""
    if active_mesh() is None:
        return SingleDeviceSharding(jax.devices()[0])
    return state_specs(jax.eval_shape(make, argument))


def as_called(setup: Setup, state: TrainState) -> TrainState:
    """The state with the parameters and masks that the model is called with."""
    if not setup.method.kernels:
        return state
    used = _variables(setup.method, state.params, state.masks)
    return state.replace(params=used["params"], masks=used["masks"])


@functools.partial(jax.jit, static_argnums=0)
def _variables(method: Method, params: Any, masks: Any) -> dict[str, Any]:
    return method.variables(params, masks)


def abstract_state(setup: Setup, *, adapters: bool) -> TrainState:
    """Shapes and dtypes of the state, before or after the adapters join; no memory, no compute."""
    state = jax.eval_shape(setup.init, setup.key)
    if adapters:
        state = jax.eval_shape(lambda s: _join(setup, s)[0], state)
    return state


def step_key(setup: Setup) -> jax.Array:
    """The key from which every step derives its own (dropout)."""
    return jax.random.fold_in(setup.key, 2)


def _init(setup: Setup, key: jax.Array) -> TrainState:
    inputs = setup.model.example_inputs()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args, kwargs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (args, kwargs))
    variables = setup.model.init(key, *args, **kwargs)
    return TrainState.create(
        apply_fn=setup.model.apply,
        params=variables["params"],
        masks=setup.method.initial_masks(variables["params"], variables.get("masks", {})),
        tx=setup.tx,
    )
