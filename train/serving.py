"""Trained models ready to be used: from a run's checkpoint, or a folder of their own.

    FOLDER/served.json      configuration of the run, size of the vocabulary, whether adapters joined
    FOLDER/tokenizer.json   the tokenizer
    FOLDER/variables        weights by Orbax: values (bfloat16, see `save`), metadata, adapters

No masters, no transposed copies, no optimizer state.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import linen as nn

from pallas_kernels.files import new_folder, write_atomically
from slope_jax import TrainState
from slope_jax.generate import (
    cast_weights,
    inference_variables,
    with_layers_apart,
    with_padded_ranks,
)
from train import integrity
from train.checkpoint import Checkpoints, placed
from train.config import from_json, to_json
from train.data.tokenizer import Vocabulary, vocabulary_from_json
from train.state import abstract_state, make_setup

SERVED_FILE, TOKENIZER_FILE, VARIABLES = "served.json", "tokenizer.json", "variables"


class Served(NamedTuple):
    """A model for inference.

    Attributes:
      model: layers apart (`slope_jax.generate.inference_variables`), adapters where they joined.
      variables: {"params": ..., "masks": ...} in the compute dtype; norms and biases as trained.
      vocabulary: the run's tokenizer.
      about: what `served.json` holds.
    """

    model: nn.Module
    variables: dict[str, Any]
    vocabulary: Vocabulary
    about: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and metadata."""
        return sum(x.nbytes for x in jax.tree.leaves(self.variables))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences that the model was trained on.

        Its table of positions may go on, but behind these it is as it was initialised.
        """
        return min(max(self.about["config"]["seq_len"]), self.model.config.max_positions)


class Trained(NamedTuple):
    """A model as training left it, to go on with.

    Attributes:
      model: as it was trained, its layers in stacks, adapters where they joined.
      variables: {"params": ..., "masks": ...} in the dtype of the parameters.
      vocabulary: the run's tokenizer.
      about: what `served.json` would hold: configuration, step, adapters.
    """

    model: nn.Module
    variables: dict[str, Any]
    vocabulary: Vocabulary
    about: dict[str, Any]


def load(path: pathlib.Path | str, *, step: int | None = None) -> Served:
    """A trained model from a run's folder, one of its checkpoints, or what `save` wrote.

    Args:
      path: RUN, RUN/checkpoints/STEP, or the folder given to `save`.
      step: which checkpoint of a RUN; None: the latest.

    Raises:
      ValueError: there is no run, no checkpoint, or not this one; says what there is.
      DamagedError: files are not what was written.
    """
    path = pathlib.Path(path).expanduser()
    if (path / SERVED_FILE).is_file():
        if step is not None:
            raise ValueError(
                f"{path} holds one model, not the steps of a run: leave out step={step}, or give the"
                " --run-dir of the run"
            )
        return _load_served(path)
    trained = load_trained(path, step=step)
    model, variables = inference_variables(trained.model, trained.variables)
    return Served(model, variables, trained.vocabulary, _about(trained.about, model))


def load_trained(path: pathlib.Path | str, *, step: int | None = None) -> Trained:
    """The weights of a run's checkpoint in full precision, without the optimizer's state.

    Args:
      path: RUN or RUN/checkpoints/STEP.
      step: which checkpoint of a run; None: the latest.

    Raises:
      ValueError: there is no run, no checkpoint, or not this one; says what there is.
      DamagedError: files are not what was written.
    """
    path = pathlib.Path(path).expanduser()
    if path.parent.name == "checkpoints" and path.name.isdigit():
        if step not in (None, int(path.name)):
            raise ValueError(
                f"{path} is one step: leave out step={step}, or give {path.parents[1]}"
            )
        path, step = path.parent.parent, int(path.name)
    if not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} holds no checkpoints; give the --run-dir of a run, one of its"
            f" checkpoints/STEP, or a folder with {SERVED_FILE}"
        )
    return _from_run(path, step)


def trained_shapes(about: dict[str, Any], vocabulary: Vocabulary) -> Trained:
    """What `load_trained` gives for a run of this kind, with shapes in place of the weights."""
    return Trained(*_shaped(about, lambda *trained: trained), vocabulary, about)


def save(
    served: Served, folder: pathlib.Path | str, *, dtype: jax.typing.DTypeLike | None = None
) -> pathlib.Path:
    """Writes a folder that `load` reads: whole or not at all.

    Args:
      served: what `load` gives.
      folder: a new one.
      dtype: of kernels, tables and adapters in the folder. None: float32 if the run was given
        dtype="float32", else bfloat16, on whatever device: where "auto" computes in float32, as on a
        CPU, `load` makes that of them again.

    Raises:
      ValueError: the folder exists already.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    dtype = jnp.dtype(dtype or saved_dtype(served.about))
    variables = served.variables
    with new_folder(folder) as staging:
        variables = variables | {"params": cast_weights(variables["params"], dtype)}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging / VARIABLES, variables)
        served.vocabulary.save(staging / TOKENIZER_FILE)
        write_atomically(staging / SERVED_FILE, json.dumps(served.about, indent=1) + "\n")
        integrity.write_manifest(staging)
    return folder


def saved_dtype(about: dict[str, Any]) -> str:
    """In which `save` writes the weights of a run that `Served.about` describes."""
    return "float32" if about["config"]["dtype"] == "float32" else "bfloat16"


def _from_run(folder: pathlib.Path, step: int | None) -> Trained:
    checkpoints = Checkpoints(folder, keep=1, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"{folder} has no finished checkpoint yet; let the run save one")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
            )
        others = ", ".join(str(s) for s in steps if s != step) or "none"
        integrity.check(checkpoints.path(step), f"Give another step; there are: {others}")
        record, tokenizer = checkpoints.read_run(step)
        config = from_json(record["config"])
        vocabulary = vocabulary_from_json(json.dumps(tokenizer), config.objective)
        joined = config.adapter_step is not None and step > config.adapter_step
        about = {
            "config": to_json(config),
            "step": step,
            "vocab_size": vocabulary.size,
            "adapters": joined,
        }
        shapes = _shapes(about)
        params, masks = checkpoints.restore_weights(step, shapes)
        model, variables = _finished(about, shapes.replace(params=params, masks=masks))
        return Trained(model, variables, vocabulary, about)
    finally:
        checkpoints.close()


def _load_served(folder: pathlib.Path) -> Served:
    integrity.check(folder, "Copy it again, or export it again from the run")
    about = json.loads((folder / SERVED_FILE).read_text(encoding="utf-8"))
    config = from_json(about["config"])
    tokenizer = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    vocabulary = vocabulary_from_json(tokenizer, config.objective)
    model, shapes = _shaped(about, with_layers_apart)
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(folder.resolve() / VARIABLES, placed(shapes))
    model, variables = with_padded_ranks(model, variables)
    return Served(model, variables, vocabulary, _about(about, model))


def _about(about: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """With the rank that the adapters have now, filled up for the kernels."""
    if not about["adapters"]:
        return about
    return about | {"config": about["config"] | {"adapter_rank": model.config.rank}}


def _shapes(about: dict[str, Any]) -> TrainState:
    """The training state of a run, as shapes."""
    setup = make_setup(from_json(about["config"]), vocab_size=about["vocab_size"])
    return abstract_state(setup, adapters=about["adapters"])


def _finished(about: dict[str, Any], state: TrainState) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run, and its variables as its method leaves them."""
    setup = make_setup(from_json(about["config"]), vocab_size=about["vocab_size"])
    return setup.method.finished(setup.adapted if about["adapters"] else setup.model, state)


def _shaped(about: dict[str, Any], convert: Callable) -> tuple[nn.Module, Any]:
    """The model and the shapes that `convert(model, variables)` of a finished run gives."""
    made = []

    def run(state):
        model, variables = convert(*_finished(about, state))
        made.append(model)
        return variables

    shapes = jax.eval_shape(run, _shapes(about))
    return made[0], shapes
