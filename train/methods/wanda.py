"""Wanda: a trained dense model, pruned once by |w| * ||x|| (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn

from slope_jax import TrainState
from slope_jax.models import prune_wanda
from train.config import Config
from train.folder import TOKENIZER_FILE
from train.methods.slope import Slope

if TYPE_CHECKING:
    from train.serving import Trained


_INPUTS = ("input_ids", "token_type_ids", "lengths")  # of a batch, what a model reads


class Wanda(Slope):
    """Starts from the weights of a dense run, then trains on like SLoPe, for zero or more steps."""

    fields = (Slope.fields - {"mask_init"}) | {"init_from", "calibration_sequences"}
    about = "a dense run pruned by |w| * ||x||, then static masks, kernels stored compressed"

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if not config.init_from:
            raise ValueError(
                "--method=wanda prunes a trained model; name the run folder of a dense one with"
                " --init-from"
            )
        if config.tokenizer:
            raise ValueError(
                f"--tokenizer={config.tokenizer} does not go with --init-from: the tokenizer is that"
                " of the run it names; leave it out"
            )

    def options(self) -> dict[str, Any]:
        return super().options() | {"mask_init": "magnitude"}

    def start(
        self, state: TrainState, model: nn.Module, batches: Any, say: Callable[[str], None]
    ) -> TrainState:
        began, sequences = time.monotonic(), self.config.calibration_sequences
        source = load_source(self.config)
        rows = self.config.phases[0].batch_size
        found = [
            {name: x for name, x in batches[i].items() if name in _INPUTS}
            for i in range(-(-sequences // rows))
        ]
        found[-1] = {name: x[: (sequences - 1) % rows + 1] for name, x in found[-1].items()}
        pruned = prune_wanda(model, source.variables, found)
        say(
            f"Pruned {self.config.init_from} after its step {source.about['step']} by Wanda on"
            f" {_told(found, sequences)}, in {time.monotonic() - began:.0f} s"
        )
        # Moments of a new optimizer are zeros, whatever the weights.
        state = state.replace(params=_like(state.params, pruned["params"]), masks=pruned["masks"])
        # Weights that were read from a disk are bound to their device; were the moments not, the
        # second step would be compiled anew.
        return jax.device_put(state, jax.devices()[0])


def _told(batches: list[dict[str, Any]], sequences: int) -> str:
    """How much text they are; a small corpus is read again and again."""
    rows = [row for batch in batches for row in batch["input_ids"]]
    different = len({row.tobytes() for row in rows})
    few = "" if different == sequences else f" (only {different:,} different ones: little text)"
    return f"{sequences:,} sequences{few} of {len(rows[0]):,} tokens"


def take_tokenizer(config: Config, folder: pathlib.Path) -> None:
    """Write the tokenizer of the run that `config.init_from` names into a new run's folder.

    Raises:
      ValueError: there is no such run, or it is not a dense one of the same model.
    """
    load_source(config).vocabulary.save(folder / TOKENIZER_FILE)


def load_source(config: Config) -> Trained:
    """The run that `config.init_from` names, its weights included; raises as `take_tokenizer`."""
    from train.serving import load_trained  # which needs the methods

    source = load_trained(config.init_from)
    theirs = source.about["config"]
    for name, wanted in (("model", config.model), ("method", "dense")):
        if theirs[name] != wanted:
            raise ValueError(
                f"{config.init_from} is a run of --{name}={theirs[name]}; --method=wanda needs a"
                f" dense run of the same model, with --{name}={wanted}"
            )
    return source


def _like(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: b.astype(a.dtype), old, new)
