"""Recipes: one table of field defaults by (recipe, model family).

`paper` follows the SLoPe paper (arXiv 2405.16325, experiment section and appendix): BERT in two
phases with LAMB, GPT-2 with AdamW. OPT follows its own paper (arXiv 2205.01068, section 2 and
table 1), LLaMA its own (arXiv 2407.21783, section 3 and table 3) and, where that is silent, LLaMA-2's
(arXiv 2307.09288, section 2.2). How Mistral-7B was trained is not public: it takes LLaMA-2's. All of
them end at a tenth of the peak learning rate, ours at zero. `quickstart` is small enough for two CPU
cores.
"""

from typing import Any

from train.config import Config, choices
from train.config_checks import PER_PHASE, check_given

PAPER_ADAPTERS = {"adapter_rank": 0.0156, "adapter_start": 0.99}

QUICKSTART = {
    "vocab_size": 8192,
    "seq_len": (64,),
    "batch_size": (8,),
    "steps": (100,),
    "warmup": (0.1,),
    "eval_every": 25,
    "eval_batches": 4,
    "checkpoint_every": 50,
}

QUICKSTART_DECODER = QUICKSTART | {"lr": (1e-3,), "weight_decay": 0.1, "eps": 1e-8, "beta2": 0.95}

PAPER_DECODER = {
    "valid_fraction": 0.0005,
    "optimizer": "adamw",
    "schedule": "linear",
    "weight_decay": 0.1,
    **PAPER_ADAPTERS,
    "eval_every": 1000,
    "eval_batches": 64,
    "log_every": 10,
    "checkpoint_every": 1000,
}

# Beyond GPT-2's sizes layers are recomputed in the backward pass, and a micro-batch is one sequence.
PAPER_LLAMA = PAPER_DECODER | {
    "data": "tfds:c4/en",
    "seq_len": (8192,),
    "batch_size": (512,),
    "accumulation": (512,),
    "lr": (3e-4,),
    "beta2": 0.95,
    "eps": 1e-5,
    "remat": True,
}

RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("quickstart", "bert"): QUICKSTART
    | {"lr": (3e-4,), "max_predictions": (10,), "weight_decay": 0.01},
    ("quickstart", "gpt2"): QUICKSTART_DECODER,
    ("quickstart", "opt"): QUICKSTART_DECODER,
    ("quickstart", "llama"): QUICKSTART_DECODER,
    ("quickstart", "mistral"): QUICKSTART_DECODER,
    ("paper", "bert"): {
        "data": "tfds:wikipedia/20230601.en",
        "vocab_size": 30522,
        "valid_fraction": 0.001,
        "seq_len": (128, 512),
        "max_predictions": (20, 80),
        "batch_size": (65536, 32768),
        "accumulation": (512, 1024),
        "steps": (7038, 1563),
        "optimizer": "lamb",
        "lr": (6e-3, 4e-3),
        "schedule": "polynomial",
        "warmup": (0.2843, 0.128),
        "weight_decay": 0.01,
        "eps": 1e-6,
        "dropout": 0.1,
        **PAPER_ADAPTERS,
        "eval_every": 100,
        "eval_batches": 64,
        "checkpoint_every": 100,
    },
    ("paper", "gpt2"): PAPER_DECODER
    | {
        "data": "tfds:c4/webtextlike",
        "vocab_size": 50257,
        "seq_len": (1024,),
        "batch_size": (512,),
        "accumulation": (32,),
        "steps": (400_000,),
        "lr": (6e-4,),
        "warmup": (0.01,),
        "eps": 1e-4,
    },
    # 300 billion tokens, the first 375 million to warm up.
    ("paper", "opt"): PAPER_DECODER
    | {
        "data": "tfds:c4/en",
        "vocab_size": 50272,
        "seq_len": (2048,),
        "warmup": (0.00125,),
        "beta2": 0.95,
        "eps": 1e-8,
        "dropout": 0.1,
    },
    # 15 trillion tokens, the first 2000 steps to warm up. Of LLaMA-3.2 no such numbers are published.
    ("paper", "llama"): PAPER_LLAMA
    | {"vocab_size": 128_256, "steps": (3_576_279,), "warmup": (2000 / 3_576_279,)},
    # 2 trillion tokens.
    ("paper", "mistral"): PAPER_LLAMA
    | {"vocab_size": 32_000, "steps": (476_837,), "warmup": (2000 / 476_837,)},
}


def _opt(lr: float, sequences: int, *, micro: int = 8, remat: bool = False) -> dict[str, Any]:
    return {
        "lr": (lr,),
        "batch_size": (sequences,),
        "accumulation": (sequences // micro,),
        "steps": (round(300e9 / (2048 * sequences)),),
        "remat": remat,
    }


# What differs within a family. Of GPT-2 the paper gives small and large; medium and xl follow their
# neighbours.
PAPER_MODELS: dict[str, dict[str, Any]] = {
    "gpt2-medium": {"lr": (3e-4,)},
    "gpt2-large": {"lr": (1.5e-4,)},
    "gpt2-xl": {"lr": (1.5e-4,)},
    "opt-nano": _opt(6e-4, 256),
    "opt-125m": _opt(6e-4, 256),
    "opt-1.3b": _opt(2e-4, 512),
    "opt-2.7b": _opt(1.6e-4, 512, micro=1, remat=True),
    "opt-6.7b": _opt(1.2e-4, 1024, micro=1, remat=True),
    "opt-13b": _opt(1e-4, 2048, micro=1, remat=True),
    "opt-30b": _opt(1e-4, 2048, micro=1, remat=True),
    "opt-66b": _opt(0.8e-4, 1024, micro=1, remat=True),
}


def defaults(recipe: str, model: str, *, phases: int | None = None) -> dict[str, Any]:
    """Field values that a recipe sets for a model.

    Args:
      recipe: "quickstart" or "paper".
      model: a name in `slope_jax.models.VARIANTS`.
      phases: keep only the recipe's first so many phases (when the user gives fewer sequence
        lengths than the recipe has).

    Raises:
      ValueError: for an unknown recipe or model; the message lists the choices.
    """
    from slope_jax.models import VARIANTS

    if recipe not in choices("recipe"):
        allowed = ", ".join(choices("recipe"))
        raise ValueError(f"unknown recipe {recipe!r}; choose one of: {allowed}")
    if model not in VARIANTS:
        raise ValueError(f"unknown model {model!r}; choose one of: {', '.join(VARIANTS)}")
    fields = {"recipe": recipe, "model": model, **RECIPES[recipe, model.split("-")[0]]}
    if recipe == "paper":
        fields |= PAPER_MODELS.get(model, {})
    if phases is not None:
        for name in PER_PHASE:
            values = fields.get(name, ())
            # More phases than the recipe has: its first value then serves for all of them.
            if values:
                fields[name] = values[:phases] if len(values) >= phases else values[:1]
    return fields


def make_config(model: str = "bert-base", recipe: str = "quickstart", **explicit: Any) -> Config:
    """The configuration of a run: the recipe's defaults, then whatever is given explicitly.

    Example:
      >>> make_config("bert-base", "paper", seq_len=128, steps=1000).total_steps
      1000

    Raises:
      ValueError: for any value out of range, naming the field, the rule and the remedy.
    """
    lengths = explicit.get("seq_len")
    phases = None if lengths is None else 1 if isinstance(lengths, int) else len(lengths)
    config = Config(**{**defaults(recipe, model, phases=phases), **explicit})
    check_given(config, explicit.keys())
    return config
