"""Recipes: one table of field defaults by (recipe, model family).

`paper` follows the SLoPe paper (arXiv 2405.16325, experiment section and appendix): BERT in two
phases with LAMB, GPT-2 with AdamW. `quickstart` is small enough for two CPU cores.
"""

from typing import Any

from train.config import PER_PHASE, Config, choices

QUICKSTART = {
    "vocab_size": 8192,
    "seq_len": (64,),
    "batch_size": (8,),
    "steps": (100,),
    "warmup": (0.1,),
    "adapter_start": 0.9,
    "eval_every": 25,
    "eval_batches": 4,
    "checkpoint_every": 50,
}

RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("quickstart", "bert"): QUICKSTART
    | {"lr": (3e-4,), "max_predictions": (10,), "weight_decay": 0.01},
    ("quickstart", "gpt2"): QUICKSTART
    | {"lr": (1e-3,), "weight_decay": 0.1, "eps": 1e-8, "beta2": 0.95},
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
        "adapter_start": 0.99,
        "eval_every": 100,
        "eval_batches": 64,
        "checkpoint_every": 100,
    },
    ("paper", "gpt2"): {
        "data": "tfds:c4/webtextlike",
        "vocab_size": 50257,
        "valid_fraction": 0.0005,
        "seq_len": (1024,),
        "batch_size": (512,),
        "accumulation": (32,),
        "steps": (400_000,),
        "optimizer": "adamw",
        "lr": (6e-4,),
        "schedule": "linear",
        "warmup": (0.01,),
        "weight_decay": 0.1,
        "eps": 1e-4,
        "adapter_start": 0.99,
        "eval_every": 1000,
        "eval_batches": 64,
        "log_every": 10,
        "checkpoint_every": 1000,
    },
}

# The paper gives small and large; medium and xl follow their neighbours.
PAPER_LR = {"gpt2-medium": (3e-4,), "gpt2-large": (1.5e-4,), "gpt2-xl": (1.5e-4,)}


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
    if recipe == "paper" and model in PAPER_LR:
        fields["lr"] = PAPER_LR[model]
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
    return Config(**{**defaults(recipe, model, phases=phases), **explicit})
