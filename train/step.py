"""The compiled functions of the job: one training step, one evaluation step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from slope_jax import WORKING, TrainState, find_layers, working_copies
from slope_jax.models.stack import GRADIENT
from slope_jax.sharding import batch_spec, constrain, constrain_state
from train.loss import cross_entropy
from train.methods import Method

Batch = dict[str, jax.Array]


class Sums(NamedTuple):
    """Sums over the predictions of a batch, float32; means are taken over whole batches only."""

    nll: jax.Array  # nats
    correct: jax.Array
    tokens: jax.Array  # predictions counted, their weights summed
    nsp_nll: jax.Array  # zero without next-sentence prediction
    nsp_correct: jax.Array
    sequences: jax.Array


def loss_sums(
    apply_fn: Callable,
    variables: dict,
    batch: Batch,
    key: jax.Array | None,
    *,
    noisy: bool = False,
) -> Sums:
    """Negative log-likelihoods and hits of a batch, in float32.

    A batch with `mlm_labels` is BERT's (masked words and next sentence), one with `labels` is
    causal. Padded vocabulary columns carry the lowest logit (see the models), hence no probability.

    Args:
      apply_fn: the model's `apply`.
      variables: {"params": ..., "masks": ...}, and "working" if there are copies.
      batch: arrays as `train.data` gives them.
      key: of the dropout; None evaluates without dropout.
      noisy: whether the backward pass draws random numbers too, see `train.methods`.
    """
    rngs = {} if key is None else {"dropout": key}
    if noisy:
        rngs[GRADIENT] = jax.random.fold_in(key, 1)
    options = {"deterministic": key is None, "rngs": rngs}
    if "mlm_labels" not in batch:
        logits = apply_fn(variables, batch["input_ids"], **options)
        weights = jnp.ones(batch["labels"].shape, jnp.float32)
        nll, correct, tokens = _weighted(logits, batch["labels"], weights)
        zero = jnp.zeros((), jnp.float32)
        return Sums(nll, correct, tokens, zero, zero, jnp.float32(batch["labels"].shape[0]))
    output = apply_fn(
        variables,
        batch["input_ids"],
        batch["token_type_ids"],
        batch["lengths"],
        mlm_positions=batch["mlm_positions"],
        **options,
    )
    nsp_weights = jnp.ones(batch["nsp_labels"].shape, jnp.float32)
    return Sums(
        *_weighted(output.mlm_logits, batch["mlm_labels"], batch["mlm_weights"]),
        *_weighted(output.nsp_logits, batch["nsp_labels"], nsp_weights),
    )


def make_train_step(
    accumulation: int,
    schedule: optax.Schedule,
    method: Method | None = None,
    *,
    hold_copies: bool | None = None,
    skip_bad: bool = True,
) -> Callable:
    """The jitted step `(state, batch, key) -> (state, metrics)`; it takes over the state's buffers.

    Gradients are those of what the model is called with, which by most methods is `state.params`. A
    batch is split into `accumulation` micro-batches along its first axis, run one after another; the
    loss is the mean over the predictions of the *whole* batch, so the split changes nothing but memory.

    Args:
      accumulation: micro-batches in a batch.
      schedule: learning rate by step, for the metrics.
      method: of `Setup.method.at(step)`; None just trains the parameters.
      hold_copies: whether `slope_jax.working_copies` (of dense kernels: their casts) are made once
        and held for the whole step, or made by each layer anew and dropped; None for the better.
      skip_bad: where the loss or the norm of the gradient is not finite, leave the parameters and
        the optimizer's state as they were, its counters too; only `state.step` moves on.
    """
    hold = _worth_holding(accumulation) if hold_copies is None else hold_copies
    noisy = method is not None and method.noisy

    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        tokens, sequences = _totals(batch)
        micros = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
        micros = jax.tree.map(
            lambda x: constrain(x, PartitionSpec(None, *batch_spec(x.ndim - 1))), micros
        )
        first = jax.tree.map(lambda x: x[0], micros)
        if method is not None:
            masks = method.update_masks(state.params, state.masks, state.step)
            state = state.replace(masks=masks)
        used = state.variables if method is None else method.variables(state.params, state.masks)
        constants = {"masks": used["masks"]}
        if hold:
            constants[WORKING] = _copies(state.apply_fn, used, first)

        def objective(params, micro, index):
            micro_key = jax.random.fold_in(key, index)
            variables = {"params": params, **constants}
            sums = loss_sums(state.apply_fn, variables, micro, micro_key, noisy=noisy)
            return sums.nll / tokens + sums.nsp_nll / sequences, sums

        if accumulation == 1:
            grads, sums = jax.grad(objective, has_aux=True)(used["params"], first, 0)
        else:
            grads, sums = _accumulate(objective, used["params"], micros, accumulation)
        if method is not None:
            grads = method.gradient(grads, state.params, state.masks)
        metrics = _means(sums, pairs="nsp_labels" in batch) | {
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(schedule(_updates(state)), jnp.float32),
        }
        good = None
        if skip_bad:
            good = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"])
        return constrain_state(_updated(state, grads, good)), metrics

    return jax.jit(train_step, donate_argnums=0)


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether every parameter and every piece of optimizer state is finite (bool, scalar)."""
    leaves = jax.tree.leaves((state.params, state.opt_state))
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


@jax.jit
def eval_step(state: TrainState, batch: Batch) -> Sums:
    """Sums over one held-out batch, without dropout."""
    return loss_sums(state.apply_fn, {"params": state.params, "masks": state.masks}, batch, None)


def evaluate(state: TrainState, batches: list[Batch]) -> dict[str, float]:
    """Held-out loss, perplexity and accuracy: means over all predictions of all batches."""
    parts = jax.device_get([eval_step(state, batch) for batch in batches])
    total = Sums(*(float(sum(float(x) for x in column)) for column in zip(*parts, strict=True)))
    word = "mlm" if "mlm_labels" in batches[0] else "token"
    loss = total.nll / total.tokens
    metrics = {
        "eval_loss": loss,
        "eval_perplexity": float(jnp.exp(jnp.float32(loss))),
        f"eval_{word}_accuracy": total.correct / total.tokens,
    }
    if word == "mlm":
        metrics["eval_nsp_loss"] = total.nsp_nll / total.sequences
        metrics["eval_nsp_accuracy"] = total.nsp_correct / total.sequences
    return metrics


def _updated(state: TrainState, grads: Any, good: jax.Array | None) -> TrainState:
    """The state after an update, or where not `good` the state before, but for its step.

    One more select in the pass that updates, which waits for the norm anyway: to clip.
    """
    if good is None:
        return state.apply_gradients(grads=grads)
    tx = optax.with_extra_args_support(state.tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, good=good)
    params = optax.apply_updates(state.params, updates)

    def keep(after, before):
        if isinstance(after, optax.ScaleByAdamState):  # which keeps its moments itself
            return after._replace(count=keep(after.count, before.count))
        return jnp.where(good, after, before)

    params, opt_state = jax.tree.map(
        keep,
        (params, opt_state),
        (state.params, state.opt_state),
        is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState),
    )
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def _updates(state: TrainState) -> jax.Array:
    """The step by which the optimizer reads the schedule: skipped ones don't count."""
    kind = optax.ScaleByScheduleState
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next((x.count for x in leaves if isinstance(x, kind)), state.step)


def _worth_holding(accumulation: int) -> bool:
    """Micro-batches share the copies. A single batch uses each once forward and once backward:

    holding them would save nothing but the casts of rematerialised layers, and cost their memory.
    """
    return accumulation > 1


def _copies(apply_fn: Callable, variables: dict, batch: Batch) -> dict:
    layers = find_layers(functools.partial(loss_sums, apply_fn), variables, batch, None)
    return working_copies(variables, layers)


def _accumulate(objective: Callable, params, micros: Batch, accumulation: int):
    """Gradients and sums over the micro-batches.

    Backward passes add into one set of buffers, layer by layer: a micro-batch's own gradients are
    never there as a whole.
    """
    totals = jax.tree.map(jax.new_ref, constrain_state(jax.tree.map(jnp.zeros_like, params)))

    def body(sums, inputs):
        index, micro = inputs
        _, back, more = jax.vjp(lambda p: objective(p, micro, index), params, has_aux=True)
        back.with_refs(totals)(jnp.float32(1))
        return jax.tree.map(jnp.add, sums, more), None

    zeros = Sums(*[jnp.zeros((), jnp.float32)] * len(Sums._fields))
    sums, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulation), micros))
    return jax.tree.map(jax.freeze, totals), sums


def _totals(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Predictions (weights summed) and sequences of a batch."""
    sequences = jnp.float32(batch["input_ids"].shape[0])
    if "mlm_weights" in batch:
        return jnp.maximum(batch["mlm_weights"].sum(), 1.0), sequences
    return jnp.float32(batch["labels"].size), sequences


def _means(sums: Sums, pairs: bool) -> dict[str, jax.Array]:
    tokens = jnp.maximum(sums.tokens, 1.0)
    means = {"loss": sums.nll / tokens, "accuracy": sums.correct / tokens}
    return means | ({"nsp_loss": sums.nsp_nll / sums.sequences} if pairs else {})


def _weighted(logits: jax.Array, labels: jax.Array, weights: jax.Array):
    """Summed negative log-likelihood, hits and weights; logits (..., V), the others (...)."""
    nll, best = cross_entropy(logits, labels)
    hits = (best == labels).astype(jnp.float32)
    return (nll * weights).sum(), (hits * weights).sum(), weights.sum()
