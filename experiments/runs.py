"""The runs of each group: what differs from the group's common settings.

A group is a question; its runs answer it. They are runs of the training jobs and nothing else, so
each can be repeated alone by ``python -m train.pretrain`` (those of a task by ``train.finetune``) with
the fields of its record.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SEEDS = (0, 1, 2)
MORE_SEEDS = range(6)
# Small adapters as the paper sizes them (SLoPe, section 3), and four times as large.
RANKS = (0.0156, 0.0625)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: `fields` of `train.config.Config` besides those of its group.

    Attributes:
      variant: what it is called in tables; runs of one variant differ in their seed alone.
      seed: of initialisation, masks, data order.
      after: variant of the run of the same seed that must have ended; its folder is `init_from`,
        if `branch` does not say otherwise.
      branch: steps that are those of the run `after`: this one goes on from its checkpoint.
      tuned_as: method of the family's group of learning rates ("gpt2-lr") whose best one it takes;
        None: its own `lr`.
      task: of `train.finetune`, from the run `after` in the group of the family's methods; `fields`
        are then those of `train.tasks.config.FinetuneConfig`.
    """

    variant: str
    fields: Mapping[str, Any]
    seed: int = 0
    after: str | None = None
    branch: int | None = None
    tuned_as: str | None = None
    task: str | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}-seed-{self.seed}"


# About 10.6 million parameters besides the embeddings, and six tokens for each: three epochs of the books.
GPT2 = {
    "model": "gpt2-mini",
    "vocab_size": 8192,
    "seq_len": 512,
    "batch_size": 32,
    "steps": 3840,
    "warmup": 0.1,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "eps": 1e-8,
    "adapter_rank": 0,
    "eval_every": 480,
    "eval_batches": 8,
    "checkpoint_every": 0,
    "log_every": 10,
    "tensorboard": False,
}
# About 12.8 million parameters besides the embeddings, three epochs. No phase of longer sequences.
BERT = GPT2 | {
    "model": "bert-small",
    "seq_len": 128,
    "max_predictions": 20,
    "batch_size": 128,
    "weight_decay": 0.01,
    "beta2": 0.98,
    "eps": 1e-6,
    "steps": 3840,
    "eval_every": 480,
    "eval_batches": 16,
}
# 0.8 million parameters besides the embeddings, eighty tokens for each: what it can hold is what bounds it.
NANO = GPT2 | {"model": "gpt2-nano"}
# A small BERT learns a task at higher rates than one of the usual size; 3e-4 is too high for all.
TASK_RATES = {"glue/cola": (1e-4,), "glue/rte": (1e-4,), "glue/sst2": (1e-4, 3e-4)}
FINETUNED = ("dense", "slope", "slope, adapters 6.25 %", "slope, adapters 6.25 %, from the start")
FINETUNED += ("half the blocks", "extended SR-STE")
SLOPE_LR, DENSE_LR, CHANGING_LR = "slope", "dense", "sr-ste"


def _adapters_of(rank: float, start: float, **fields) -> dict[str, Any]:
    return {"method": "slope", "adapter_rank": rank, "adapter_start": start} | fields


METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "slope": {"method": "slope"},
    "slope, adapters 1.56 %": _adapters_of(RANKS[0], 0.99),
    "slope, adapters 6.25 %": _adapters_of(RANKS[1], 0.99),
    "slope, adapters 6.25 %, from the start": _adapters_of(RANKS[1], 0.0),
    "half the blocks": {"method": "half"},
    "extended SR-STE": {"method": "extended-sr-ste"},
    "wanda": {"method": "wanda", "steps": 0},
    "SR-STE": {"method": "sr-ste"},
    "FST": {"method": "fst"},
    "extended SR-STE, dY pruned": {"method": "extended-sr-ste", "prune_dy": True},
}


def _tuned_as(fields: Mapping[str, Any]) -> str:
    method = fields["method"]
    if method in ("dense", "half", "wanda"):
        return DENSE_LR
    return SLOPE_LR if method == "slope" else CHANGING_LR


def learning_rates(
    common: Mapping[str, Any],
    rates: Sequence[float],
    methods: Sequence[str] = (DENSE_LR, SLOPE_LR, CHANGING_LR),
    length: float = 0.5,
    seeds: Sequence[int] = (0,),
) -> list[Run]:
    """Half of the steps or another share: which learning rate for which kind of method."""
    steps = round(length * common["steps"])
    return [
        Run(
            f"{name}, lr {rate:g}",
            {"method": name, "lr": rate, "steps": steps, "eval_every": steps // 2},
            seed,
        )
        for seed in seeds
        for name in methods
        for rate in rates
    ]


def methods() -> list[Run]:
    """All methods, three seeds."""
    return [
        Run(
            name,
            fields,
            seed,
            after="dense" if name == "wanda" else None,
            tuned_as=_tuned_as(fields),
        )
        for seed in SEEDS
        for name, fields in METHODS.items()
    ]


# Whether adapters add anything where a model has too few parameters for its tokens.
JOINED = round(0.9 * NANO["steps"])
CAPACITY: dict[str, dict[str, Any]] = {
    **{name: METHODS[name] for name in ("dense", "half the blocks")},
    "slope": METHODS["slope"] | {"checkpoint_every": JOINED},
    "slope, adapters 6.25 %, last 1 %": _adapters_of(0.0625, 0.99),
    "slope, adapters 6.25 %, last 10 %": _adapters_of(0.0625, 0.9),
    "slope, adapters 6.25 %, from the start": _adapters_of(0.0625, 0.0),
    "slope, adapters 25 %, last 10 %": _adapters_of(0.25, 0.9),
    "slope, adapters 25 %, last 10 %, lr x 1": _adapters_of(0.25, 0.9, adapter_lr_scale=1.0),
    "slope, adapters 25 %, last 50 %": _adapters_of(0.25, 0.5),
    "slope, adapters 25 %, from the start": _adapters_of(0.25, 0.0),
}


def capacity() -> list[Run]:
    """Late adapters join the run without them, so that only they make a difference, and three seeds
    say enough; the others have twice as many."""
    return [
        _with_capacity(name, fields, seed)
        for seed in MORE_SEEDS
        for name, fields in CAPACITY.items()
        if seed in SEEDS or fields.get("adapter_start", 0.0) < 0.9
    ]


def _with_capacity(name: str, fields: Mapping[str, Any], seed: int) -> Run:
    late = fields.get("adapter_start", 0.0) >= 0.9
    return Run(
        name,
        fields,
        seed,
        after="slope" if late else None,
        branch=JOINED if late else None,
        tuned_as=_tuned_as(fields),
    )


# The best rate of slope if all parameters have the same; pruned kernels' own is an ablation.
ONE_RATE = {"lr": 4e-3, "pruned_lr_scale": 1.0}

ABLATIONS: dict[str, dict[str, Any]] = {
    "random mask": {"mask_init": "random"},
    "exact dx": {"backward": "exact"},
    "1:2": {"sparsity": "1:2"},
    "2:8": {"sparsity": "2:8"},
    "2:4 then 2:8": {"sparsity": "2:4,2:8"},
    "2:8 then 2:4": {"sparsity": "2:8,2:4"},
    "first linear sparse": {"sparsity": ".*(qkv|output|up|down)=2:4; .*=dense"},
    "in XLA": {"implementation": "xla"},
    "lr 0.002, as dense": {"lr": 2e-3},
    "lr 0.002, of pruned kernels twice that": {"lr": 2e-3, "pruned_lr_scale": 2.0},
}
# The published decay is for SGD: beside AdamW's weight decay of 0.1 it hardly counts.
STRONGER = Run("SR-STE, decay 0.2", {"method": "sr-ste", "mask_decay": 0.2}, tuned_as=CHANGING_LR)


def ablations() -> list[Run]:
    """One thing changed in slope without adapters (or in what the name says), one seed."""
    changed = [
        Run(name, {"method": "slope"} | ONE_RATE | fields) for name, fields in ABLATIONS.items()
    ]
    return [*changed, STRONGER]


# Peaks of the adapters' learning rate, relative to that of the others.
ADAPTER_RATES = (0.03, 0.1, 0.3, 1.0)
LAST = {"last 1 %": 0.99, "last 5 %": 0.95}
MIDDLE = {"adapter_rank": RANKS[1], "adapter_start": 0.95, "adapter_lr_scale": 0.1}

ADAPTERS: dict[str, dict[str, Any]] = {
    "slope": {},
    **{
        f"rank 6.25 %, {last}, lr x {rate:g}": MIDDLE
        | {"adapter_start": start, "adapter_lr_scale": rate}
        for last, start in LAST.items()
        for rate in ADAPTER_RATES
    },
    "rank 1.56 %, last 1 %, lr x 0.1": MIDDLE | {"adapter_rank": RANKS[0], "adapter_start": 0.99},
    "rank 1.56 %, last 5 %, lr x 0.1": MIDDLE | {"adapter_rank": RANKS[0]},
    "rank 6.25 %, last 0.5 %, lr x 0.1": MIDDLE | {"adapter_start": 0.995},
    "rank 6.25 %, last 5 %, lr x 0.1, scale x 0.1": MIDDLE | {"adapter_init_scale": 0.1},
    "rank 6.25 %, last 5 %, lr x 0.1, scale x 10": MIDDLE | {"adapter_init_scale": 10.0},
}
EARLY_ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 6.25 %, from the start": MIDDLE | {"adapter_start": 0.0, "adapter_lr_scale": 1.0},
    "rank 6.25 %, last 50 %, lr x 0.5": MIDDLE | {"adapter_start": 0.5, "adapter_lr_scale": 0.5},
}


def adapters() -> list[Run]:
    """Rank, start, learning rate and scale of adapters.

    Those of a seed that join late are one run with the one without until then, so that three seeds
    say enough. Early ones are other runs; their differences are wider, and they have more seeds.
    """
    late = [_adapted(name, fields, seed) for seed in SEEDS for name, fields in ADAPTERS.items()]
    more = [_adapted("slope", {}, seed) for seed in MORE_SEEDS if seed not in SEEDS]
    early = [_adapted(n, fields, s) for s in MORE_SEEDS for n, fields in EARLY_ADAPTERS.items()]
    return [*late, *more, *early]


def _adapted(name: str, fields: Mapping[str, Any], seed: int) -> Run:
    step = round(0.95 * GPT2["steps"])
    if name == "slope":
        fields = {"checkpoint_every": step}
    late = name in ADAPTERS and name != "slope"
    return Run(
        name,
        {"method": "slope"} | ONE_RATE | fields,
        seed,
        after="slope" if late else None,
        branch=step if late else None,
    )


def gpt2_small() -> list[Run]:
    """GPT-2 small with the kernels on; the training loop's own speed, alone on a GPU."""
    common = {"model": "gpt2-small", "seq_len": 1024, "batch_size": 32}
    common |= {"steps": 1280, "eval_every": 160, "eval_batches": 16}
    sparse = common | _adapters_of(RANKS[0], 0.99)
    return [
        Run(f"{fields['method']}, lr {rate:g}", fields | {"lr": rate})
        for rate in (6e-4, 1.2e-3)
        for fields in (common | {"method": "dense"}, sparse)
    ]


def glue() -> list[Run]:
    """BERTs of some methods, finetuned on three tasks at several rates."""
    return [
        Run(f"{variant}, {task}, lr {rate:g}", {"lr": rate}, seed, after=variant, task=task)
        for task, rates in reversed(TASK_RATES.items())  # from the longest
        for seed in SEEDS
        for rate in rates
        for variant in FINETUNED
    ]


# Common fields by the family that a group's name begins with.
COMMON: dict[str, Mapping[str, Any]] = {"gpt2": GPT2, "nano": NANO, "bert": BERT}
GROUPS: dict[str, Sequence[Run]] = {
    "gpt2-lr": learning_rates(GPT2, (1e-3, 2e-3, 4e-3)),
    "gpt2-methods": methods(),
    "gpt2-adapters": adapters(),
    "gpt2-ablations": ablations(),
    "gpt2-small": gpt2_small(),
    # Above 4e-3 slope's seeds are 10 % apart.
    "nano-lr": learning_rates(NANO, (1e-3, 2e-3, 4e-3), (DENSE_LR, SLOPE_LR)),
    "nano-capacity": capacity(),
    # Half-way a BERT may not have left its first plateau, and one seed leaves it earlier than another.
    "bert-lr": learning_rates(BERT, (5e-4, 1e-3), length=1, seeds=(0, 1)),
    "bert-methods": methods(),
    "bert-glue": glue(),
}
ALONE = frozenset({"gpt2-small"})  # runs whose speed counts


def family_of(group: str) -> str:
    """The family of models of a group, such as "gpt2"."""
    return group.split("-")[0]
