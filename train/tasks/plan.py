"""What a finetuning job will do, worked out before it starts."""

import dataclasses
import functools

import jax

from slope_jax import Explanation, explain
from train.config import from_json
from train.plan import path_lines
from train.serving import Trained
from train.state import compute_dtype
from train.tasks.config import FinetuneConfig
from train.tasks.examples import TRAIN
from train.tasks.setup import Setup, init_state, pruned_lr_scale


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a job; printing it is what `--dry-run` shows.

    Attributes:
      summary: what is finetuned, on what and how.
      parameters: trained ones.
      explanation: what each linear stores and what runs.
    """

    summary: str
    parameters: int
    explanation: Explanation

    def __str__(self) -> str:
        return f"{self.summary}\n\nlinears\n{self.explanation}"


def make_plan(
    config: FinetuneConfig, trained: Trained, setup: Setup, counts: dict[str, int] | None
) -> Plan:
    """Work out the plan of a job.

    Args:
      config, trained, setup: the job.
      counts: examples by split; None: not read yet.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(init_state, setup, trained), key)
    inputs = setup.model.example_inputs(config.batch_size, setup.seq_len)
    explanation = explain(setup.model, state.variables, **inputs)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    lines = [*_lines(config, trained, setup, counts), f"{parameters:,} parameters stored"]
    return Plan("\n".join(lines + path_lines(explanation)), parameters, explanation)


def _lines(config, trained, setup, counts) -> list[str]:
    about, task = trained.about, config.chosen
    run = from_json(about["config"])
    sparsity = f", sparsity {run.sparsity}" if trained.variables["masks"] else ""
    rank = trained.model.config.rank
    adapters = f"adapters of rank {rank}, which are trained on" if rank else "no adapters"
    lines = [
        f"{config.task} from step {about['step']} of {config.checkpoint}: {run.model}, method"
        f" {run.method}{sparsity}, {adapters}",
    ]
    if counts is None:
        lines.append("data from TensorFlow Datasets, not read yet")
    else:
        held_out = ", ".join(f"{n:,} of {k}" for k, n in counts.items() if k != TRAIN)
        lines.append(f"{counts[TRAIN]:,} training examples, {held_out}")
    longest = max(run.seq_len)
    untrained = f", of which {longest} were seen in pretraining" if setup.seq_len > longest else ""
    rates = {p: pruned_lr_scale(config, p) for p in dict.fromkeys(setup.pruned.values())}
    told = ", ".join(f"{rate:g} times that of others ({p})" for p, rate in rates.items())
    lines += [f"learning rate of pruned kernels: {told}"] if told else []
    lines += [
        f"sequences of at most {setup.seq_len} tokens{untrained}, {config.batch_size} a step, in"
        f" {compute_dtype(config)}",
        f"{setup.epochs} epochs; adamw, peak lr {setup.lr:g}, warm-up {config.warmup:g}, weight"
        f" decay {config.weight_decay:g}, clip {config.clip or 'none'}, dropout {config.dropout:g}",
        f"metrics {', '.join(task.metrics)}; seeds {', '.join(map(str, config.seeds))}; results in"
        f" {config.folder()}",
    ]
    return lines
