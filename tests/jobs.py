"""The training job as tests run it, and checkpoints without a job."""

import json
import os

import jax
import jax.numpy as jnp
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import Config, to_json
from train.data.tokenizer import train_tokenizer
from train.job import pretrain
from train.recipes import make_config
from train.state import init_state, join_adapters, make_setup


def on_small_text(folder, **fields):
    """Fields of a run on `folder`/text, a copy of the fixture `small_text`, but for these."""
    return {
        "data": f"text:{folder / 'text' / '*.txt'}",
        "cache_dir": str(folder / "cache"),
        "vocab_size": 300,
        "valid_fraction": 0.2,
        "seq_len": 16,
        "eval_batches": 2,
        "tensorboard": False,
        **fields,
    }


def run(config: Config, stop_at: int | None = None) -> tuple[int, str]:
    """The exit code of a run, and what it said."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=200)
        code = pretrain(config, console=console, stop_at=stop_at)
    return code, console.export_text()


def save_run(folder, texts, model, step, **fields):
    """A run's checkpoint without the run: its first state, after `step` steps in name."""
    given = {"seq_len": (16,), "steps": (10,), "dtype": "bfloat16"}
    given |= {} if "method" in fields else {"adapter_rank": 0.0156, "adapter_start": 0.5}
    config = make_config(model, vocab_size=300, **given | fields)
    vocabulary = train_tokenizer(texts, config.objective, 300)
    setup = make_setup(config, vocab_size=vocabulary.size)
    state, adapted = init_state(setup), config.adapter_step is not None
    if adapted and step > config.adapter_step:
        state, _ = join_adapters(setup, state)
    # Far from the birth of a model, where all logits are alike and adapters add nothing.
    larger = jax.jit(lambda params: jax.tree.map(lambda x: 4 * x + 0.01, params))
    state = state.replace(step=jnp.int32(step), params=larger(state.params))
    checkpoints = Checkpoints(folder, keep=2)
    tokenizer = json.loads(vocabulary.to_json())
    checkpoints.save(state, setup.key, {"config": to_json(config)}, tokenizer, None)
    checkpoints.wait()
    checkpoints.close()
    return setup.adapted if adapted and step > config.adapter_step else setup.model, state
