"""Optimizers from optax pieces, outermost first:

    clip by global norm → [base | adapters] moments, decay, trust ratio → learning rate

Clipping and the learning rate stand outside `lazy_adapters`, so that adapters that join late are
clipped with everything else; what keeps per-parameter state stands inside, where newborn leaves get
their own bias correction. So does what makes the rate of adapters another one: the schedule of the
others has come near zero when they join, and would leave them where they are.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from slope_jax import lazy_adapters
from train.config import Config, Phase
from train.moments import scale_by_adam

POLYNOMIAL_POWER = 0.5
DECAYED = ("kernel", "embedding", "adapter_l", "adapter_r")


def make_schedule(phases: tuple[Phase, ...], kind: str) -> optax.Schedule:
    """Learning rate by global step; every phase warms up and decays to zero anew.

    Within a phase of T steps with W of warm-up and peak `lr`, step t (from 0) has

        lr (t + 1) / W                        t < W
        lr (1 - (t - W) / (T - W)) ** power   otherwise; power is 1 (linear) or 0.5 (polynomial)

    so that no step is spent at zero and the first step after the warm-up has the peak.
    """
    power = 1.0 if kind == "linear" else POLYNOMIAL_POWER
    parts, boundaries = [], []
    for phase in phases:
        warm = phase.warmup_steps
        if warm:
            parts.append(optax.linear_schedule(phase.lr / warm, phase.lr, max(warm - 1, 1)))
            boundaries.append(phase.start + warm)
        parts.append(optax.polynomial_schedule(phase.lr, 0.0, power, phase.steps - warm))
        boundaries.append(phase.end)
    return optax.join_schedules(parts, boundaries[:-1])


def adapter_rate(config: Config, schedule: optax.Schedule) -> optax.Schedule:
    """Learning rate of the adapters relative to `schedule`, by steps since they joined.

    The steps that are left to them are a phase of their own, that warms up and decays to zero as
    the last phase does, from `adapter_lr_scale` times its peak. Adapters that are there from the
    last phase's start have its rate at every step, times the scale.
    """
    last, joined = config.phases[-1], config.adapter_step
    steps = last.end - joined
    scale = config.adapter_lr_scale
    scale = steps / last.steps if scale is None else scale
    own = dataclasses.replace(last, start=0, steps=steps, lr=last.lr * scale)
    rate = make_schedule((own,), config.schedule)
    return lambda step: rate(step) / schedule(joined + step)


def make_optimizer(
    config: Config,
    schedule: optax.Schedule,
    is_stacked: Callable[[tuple], bool],
    after_update: optax.GradientTransformation | None = None,
    adapter_rate: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """AdamW or LAMB with everything around it.

    Args:
      config: the run.
      schedule: learning rate by step.
      is_stacked: tells from a parameter's key path whether its leading axis counts layers.
      after_update: joins the update ahead of the learning rate, see `train.methods`. None: nothing.
      adapter_rate: learning rate of the adapters relative to `schedule`, by steps since they joined.
        None: the same rate.
    """
    return optax.chain(
        clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        lazy_adapters(_base(config, is_stacked), _adapters(config, adapter_rate)),
        *(() if after_update is None else (after_update,)),
        optax.scale_by_learning_rate(schedule),
    )


def _base(config: Config, is_stacked: Callable[[tuple], bool]) -> optax.GradientTransformation:
    adamw = optax.chain(
        _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
    if config.optimizer == "adamw":
        return adamw
    # As in the reference implementations of LAMB, what isn't decayed isn't adapted either.
    trust = optax.masked(scale_by_layer_trust_ratio(is_stacked), mask=decayed)
    return optax.chain(adamw, trust)


def _adapters(config: Config, rate: optax.Schedule | None) -> optax.GradientTransformation:
    # No trust ratio: one adapter starts at zero, where a step in proportion to its norm would
    # leave it for the few steps that remain.
    return optax.chain(
        _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_schedule(rate or optax.constant_schedule(1.0)),
    )


def _adam(config: Config) -> optax.GradientTransformation:
    return scale_by_adam(config.beta1, config.beta2, config.eps, config.moments)


def decayed(params: optax.Params) -> optax.Params:
    """Which leaves weight decay touches: kernels, embeddings, adapters; not biases, not norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in DECAYED, params)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one factor, which joins the pass that updates the moments.

    Optax's divides every entry by the norm; compilers keep the quotients as another gradient.
    """

    def update_fn(updates, state, params=None):
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def scale_by_layer_trust_ratio(
    is_stacked: Callable[[tuple], bool],
) -> optax.GradientTransformation:
    """`optax.scale_by_trust_ratio` by layer, also where layers are stacked along a leading axis.

    LAMB (You et al., arXiv 1904.00962) scales each layer's update by |w| / |u|. Layers under
    `nn.scan` share one array; taken as one leaf they would share one ratio.
    """
    trust = optax.scale_by_trust_ratio()

    def scale(path, update, param):
        def one(u, p):
            return trust.update(u, optax.EmptyState(), p)[0]

        return (jax.vmap(one) if is_stacked(path) else one)(update, param)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "the trust ratio needs the parameters: call update(grads, state, params)"
            )
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def _name(path: tuple) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1])))
