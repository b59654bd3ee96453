"""What a run will do, worked out from shapes alone: no memory, no computation."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from slope_jax import Explanation, TrainState, explain
from slope_jax.sharding import active_mesh, state_specs
from train.config import Config
from train.display import size
from train.mesh import abstract_mesh, check_mesh, parse_mesh, set_mesh
from train.methods import FIELDS, METHODS
from train.state import Setup, abstract_state, compute_dtype, make_setup

ROWS = (
    "embeddings",
    "dense kernels",
    "pruned kernels: values",
    "pruned kernels: metadata",
    "biases and norms",
    "adapters",
    "gradients",
    "optimizer",
)


class Amount(NamedTuple):
    """One part of the training state, here and in the dense control."""

    count: int
    dense_count: int
    nbytes: int
    dense_nbytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run; printing it is what `--dry-run` shows.

    Attributes:
      config: the run.
      amounts: parts of the state at its largest (adapters present), by name. `gradients` live
        during a step; activations are not counted.
      adapters: linear layers that get adapters.
      explanation: what each linear stores and what runs, at the last phase's micro-batch.
      device_bytes: the state on each device of the mesh; None without a mesh.
    """

    config: Config
    amounts: dict[str, Amount]
    adapters: int
    rank: int
    explanation: Explanation
    device_bytes: int | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters stored here (survivors, adapters) and in the dense model."""
        parts = [a for name, a in self.amounts.items() if name in ROWS[:3] + ROWS[4:6]]
        return sum(a.count for a in parts), sum(a.dense_count for a in parts)

    @property
    def density(self) -> float:
        """Share of the pruned kernels' entries that is kept; 1.0 if nothing is pruned."""
        values = self.amounts["pruned kernels: values"]
        return values.count / values.dense_count if values.dense_count else 1.0

    @property
    def checkpoint_bytes(self) -> int:
        return sum(a.nbytes for name, a in self.amounts.items() if name != "gradients")

    def __str__(self) -> str:
        return "\n\n".join(
            (_run_text(self), _state_text(self), _phases_text(self), f"linears\n{self.explanation}")
        )


def make_plan(config: Config, setup: Setup | None = None) -> Plan:
    """Work out the plan of a run.

    Args:
      config: the run.
      setup: of `make_setup`, to use the real vocabulary size; None takes `config.vocab_size`.

    Raises:
      ValueError: whatever is wrong with the configuration, the model or the method.
    """
    mesh = abstract_mesh(config) if active_mesh() is None else None
    with set_mesh(mesh):
        return _plan(config, setup or make_setup(config))


def _plan(config: Config, setup: Setup) -> Plan:
    check_mesh(config, (setup.adapted or setup.model).config, simulated=setup.method.simulated)
    control = _control(config)
    dense = abstract_state(
        make_setup(control, vocab_size=setup.model.config.vocab_size), adapters=False
    )
    state = abstract_state(setup, adapters=setup.adapted is not None)
    model = setup.adapted or setup.model
    last = config.phases[-1]
    inputs = model.example_inputs(last.batch_size // last.accumulation, last.seq_len)
    variables = {"params": state.params, "masks": state.masks}
    explanation = explain(model, variables, **inputs)
    adapters = sum(row.layers for row in explanation.rows if row.pattern != "dense")
    return Plan(
        config=config,
        amounts=_amounts(state, dense),
        adapters=adapters if setup.adapted else 0,
        rank=model.config.rank,
        explanation=explanation,
        device_bytes=_device_bytes(state, config),
    )


def _control(config: Config) -> Config:
    """The same run, dense."""
    fields = {f.name: f.default for f in dataclasses.fields(Config) if f.name in FIELDS}
    steps = tuple(max(count, 1) for count in config.steps)
    return dataclasses.replace(config, method="dense", steps=steps, **fields)


def _amounts(state: TrainState, dense: TrainState) -> dict[str, Amount]:
    ours, theirs = _parts(state), _parts(dense)
    if state.masks:
        kept = ours["dense kernels"]
        # The control's kernels at the places pruned here: all of them less those kept dense.
        theirs["pruned kernels: values"] = tuple(
            all_ - kept_ for all_, kept_ in zip(theirs["dense kernels"], kept, strict=True)
        )
        theirs["dense kernels"] = kept
    return {
        name: Amount(ours[name][0], theirs[name][0], ours[name][1], theirs[name][1])
        for name in ROWS
    }


def _device_bytes(state: TrainState, config: Config) -> int | None:
    """Parameters, masks, optimizer state and gradients on one device."""
    if not config.mesh:
        return None
    sizes = parse_mesh(config.mesh)
    total = 0
    for tree in (state.params, state.masks, state.opt_state, state.params):
        for leaf, spec in zip(*map(jax.tree.leaves, (tree, state_specs(tree))), strict=True):
            cut = [axes for axes in spec if axes is not None]
            names = [a for axes in cut for a in (axes if isinstance(axes, tuple) else (axes,))]
            count = math.prod(sizes[name] for name in names)
            total += math.prod(leaf.shape) * leaf.dtype.itemsize // count
    return total


def _parts(state: TrainState) -> dict[str, tuple[int, int]]:
    leaves: dict[str, list[Any]] = {name: [] for name in ROWS}
    pruned = set(traverse_util.flatten_dict(state.masks))
    for path, leaf in traverse_util.flatten_dict(state.params).items():
        leaves[_part(path, pruned)].append(leaf)
    leaves["pruned kernels: metadata"] = jax.tree.leaves(state.masks)
    leaves["gradients"] = jax.tree.leaves(state.params)
    leaves["optimizer"] = jax.tree.leaves(state.opt_state)
    return {name: _total(parts) for name, parts in leaves.items()}


def _part(path: tuple[str, ...], pruned: set[tuple[str, ...]]) -> str:
    if path in pruned:
        return "pruned kernels: values"
    names = {"kernel": "dense kernels", "embedding": "embeddings"}
    names |= {"adapter_l": "adapters", "adapter_r": "adapters"}
    return names.get(path[-1], "biases and norms")


def _total(leaves: Iterable[Any]) -> tuple[int, int]:
    sizes = [(math.prod(x.shape), x.dtype.itemsize) for x in leaves]
    return sum(n for n, _ in sizes), sum(n * width for n, width in sizes)


def _run_text(plan: Plan) -> str:
    config = plan.config
    stored, dense = plan.parameters
    method = METHODS[config.method]
    how = f"sparsity {config.sparsity}, " if "sparsity" in method.fields else ""
    lines = [
        f"{config.model}, recipe {config.recipe}, method {config.method}, {how}data {config.data}",
        f"method {config.method}: {method.about}",
        f"parameters {stored:,} stored, {dense:,} in the dense model; density of the pruned "
        f"kernels {plan.density:.3f}",
        f"{config.optimizer}, {config.schedule} schedule, weight decay {config.weight_decay}, clip "
        f"{config.clip or 'none'}; computed in {compute_dtype(config)} on {_devices(config)}",
    ]
    if "pruned_lr_scale" in method.fields:
        made = method(config)
        rates = {pattern: made.lr_scale(pattern) for pattern in made.kernels.values()}
        told = ", ".join(f"{rate:g} times that of others ({p})" for p, rate in rates.items())
        lines.append(f"learning rate of pruned kernels: {told}")
    if plan.device_bytes is not None:
        lines.append(f"mesh {config.mesh}: {size(plan.device_bytes)} of state on each device")
    if plan.adapters:
        left = config.total_steps - config.adapter_step
        lines.append(
            f"adapters of rank {plan.rank} join {plan.adapters} linears after step "
            f"{config.adapter_step:,}, for the last {left:,} of {config.total_steps:,} steps"
        )
    else:
        lines.append("no adapters")
    lines += path_lines(plan.explanation)
    return "\n".join(lines)


def _devices(config: Config) -> str:
    kind, found = jax.devices()[0].device_kind, jax.device_count()
    if not config.mesh:
        return f"{kind}, one of {found} device(s)"
    count = math.prod(parse_mesh(config.mesh).values())
    return f"{count} x {kind}, of {found} in {jax.process_count()} process(es)"


def path_lines(explanation: Explanation) -> list[str]:
    """One line per way in which sparse products run, with its reason: nothing falls back unsaid."""
    ways: dict[tuple[str, str], int] = {}
    for row in explanation.rows:
        if row.pattern != "dense":
            way = (row.implementation, row.reason)
            ways[way] = ways.get(way, 0) + row.layers
    return [f"sparse products of {n} linears: {path}, {why}" for (path, why), n in ways.items()]


def _state_text(plan: Plan) -> str:
    rows = [("state", "count", "bytes", "dense bytes", "of dense")]
    rows += [(name, *_cells(amount)) for name, amount in plan.amounts.items()]
    columns = list(zip(*plan.amounts.values(), strict=True))
    rows.append(("all (activations not counted)", *_cells(Amount(*map(sum, columns)))))
    return _table(rows)


def _cells(amount: Amount) -> tuple[str, ...]:
    share = f"{amount.nbytes / amount.dense_nbytes:.3f}" if amount.dense_nbytes else "-"
    return f"{amount.count:,}", size(amount.nbytes), size(amount.dense_nbytes), share


def _phases_text(plan: Plan) -> str:
    rows = [
        ("phase", "steps", "tokens", "sequences", "length", "micro-batch", "lr", "warm-up steps")
    ]
    for p in plan.config.phases:
        rows.append(
            (
                f"{p.index + 1}",
                f"{p.start + 1:,}-{p.end:,}",
                f"{p.steps * p.tokens_per_step:,}",
                f"{p.batch_size:,}",
                f"{p.seq_len:,}",
                f"{p.batch_size // p.accumulation:,} x {p.accumulation:,}",
                f"{p.lr:g}",
                f"{p.warmup_steps:,}",
            )
        )
    rows.append(("all", f"{plan.config.total_steps:,}", f"{plan.config.total_tokens:,}", *[""] * 5))
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
