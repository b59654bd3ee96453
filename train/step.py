"""The compiled functions of the job: one training step, one evaluation step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from slope_jax import TrainState

Batch = dict[str, jax.Array]


class Sums(NamedTuple):
    """Sums over the predictions of a batch, float32; means are taken over whole batches only."""

    nll: jax.Array  # nats
    correct: jax.Array
    tokens: jax.Array  # predictions counted, their weights summed
    nsp_nll: jax.Array  # zero without next-sentence prediction
    nsp_correct: jax.Array
    sequences: jax.Array


def loss_sums(apply_fn: Callable, variables: dict, batch: Batch, key: jax.Array | None) -> Sums:
    """Negative log-likelihoods and hits of a batch, in float32.

    A batch with `mlm_labels` is BERT's (masked words and next sentence), one with `labels` is
    causal. Padded vocabulary columns carry the lowest logit (see the models), hence no probability.

    Args:
      apply_fn: the model's `apply`.
      variables: {"params": ..., "masks": ...}.
      batch: arrays as `train.data` gives them.
      key: of the dropout; None evaluates without dropout.
    """
    options = {"deterministic": key is None, "rngs": {} if key is None else {"dropout": key}}
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


def make_train_step(accumulation: int, schedule: optax.Schedule) -> Callable:
    """The jitted step `(state, batch, key) -> (state, metrics)`; it takes over the state's buffers.

    Only `state.params` are differentiated. A batch is split into `accumulation` micro-batches along
    its first axis, run one after another; the loss is the mean over the predictions of the *whole*
    batch, so the split changes nothing but memory.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        tokens, sequences = _totals(batch)

        def objective(params, micro, micro_key):
            variables = {"params": params, "masks": state.masks}
            sums = loss_sums(state.apply_fn, variables, micro, micro_key)
            return sums.nll / tokens + sums.nsp_nll / sequences, sums

        grad_fn = jax.grad(objective, has_aux=True)
        if accumulation == 1:
            grads, sums = grad_fn(state.params, batch, jax.random.fold_in(key, 0))
        else:
            grads, sums = _accumulate(grad_fn, state.params, batch, key, accumulation)
        metrics = _means(sums, pairs="nsp_labels" in batch) | {
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return state.apply_gradients(grads=grads), metrics

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


def _accumulate(grad_fn: Callable, params, batch: Batch, key: jax.Array, accumulation: int):
    micros = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

    def body(carry, inputs):
        index, micro = inputs
        return jax.tree.map(
            jnp.add, carry, grad_fn(params, micro, jax.random.fold_in(key, index))
        ), None

    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(grad_fn, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(accumulation), micros))[0]


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
    logits = logits.astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = (logits.argmax(-1) == labels).astype(jnp.float32)
    return (nll * weights).sum(), (hits * weights).sum(), weights.sum()
