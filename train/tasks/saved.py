"""Finetuned models on disk:

FOLDER/finetuned.json   the pretraining's configuration, the task, the settings
FOLDER/tokenizer.json   the tokenizer
FOLDER/variables        weights by Orbax: values, metadata, adapters, the head
"""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from pallas_kernels.files import new_folder, write_atomically
from slope_jax import TrainState
from train import integrity
from train.checkpoint import check_space, placed
from train.data.tokenizer import Vocabulary, vocabulary_from_json
from train.serving import TOKENIZER_FILE, VARIABLES, Trained, trained_shapes
from train.tasks.config import EARLIER, FinetuneConfig, to_json
from train.tasks.head import TaskModel
from train.tasks.setup import Setup, init_state, make_setup

FINETUNED_FILE = "finetuned.json"


class Finetuned(NamedTuple):
    """A finetuned model, as `load_finetuned` gives it.

    Attributes:
      model: `train.tasks.head.TaskModel`; `model.apply(variables, input_ids, token_type_ids,
        lengths)` gives logits.
      variables: {"params": {"bert", "head"}, "masks": {"bert"}}; parameters in float32.
      vocabulary: the tokenizer.
      config: the finetuning's.
    """

    model: TaskModel
    variables: dict[str, Any]
    vocabulary: Vocabulary
    config: FinetuneConfig


def save_model(
    folder: pathlib.Path,
    config: FinetuneConfig,
    trained: Trained,
    state: TrainState,
) -> None:
    """Write a finetuned model, in the place of an older one.

    Raises:
      OutOfSpace: the disk is full.
    """
    variables = state.variables
    check_space(folder, sum(x.nbytes for x in jax.tree.leaves(variables)))
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder.resolve()) as staging:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging / VARIABLES, variables)
        trained.vocabulary.save(staging / TOKENIZER_FILE)
        about = {"run": trained.about, "finetuning": to_json(config)}
        write_atomically(staging / FINETUNED_FILE, json.dumps(about, indent=1) + "\n")
        integrity.write_manifest(staging)


def load_finetuned(folder: pathlib.Path | str) -> Finetuned:
    """Read what `--save-model` wrote: OUT/seed-N/model.

    Raises:
      ValueError: there is no finetuned model.
      DamagedError: files are not what was written.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    if not (folder / FINETUNED_FILE).is_file():
        raise ValueError(f"{folder} has no {FINETUNED_FILE}; give OUT/seed-N/model")
    integrity.check(folder, "Copy it again, or finetune again with --save-model")
    about = json.loads((folder / FINETUNED_FILE).read_text(encoding="utf-8"))
    config = FinetuneConfig(**EARLIER | about["finetuning"])
    tokenizer = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    vocabulary = vocabulary_from_json(tokenizer, "mlm")
    trained = trained_shapes(about["run"], vocabulary)
    setup = make_setup(config, trained, sequences=1)
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(folder / VARIABLES, placed(_shapes(setup, trained)))
    return Finetuned(setup.model, variables, vocabulary, config)


def _shapes(setup: Setup, trained: Trained) -> dict[str, Any]:
    def init(variables: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        return init_state(setup, trained._replace(variables=variables), key).variables

    return jax.eval_shape(init, trained.variables, jax.eval_shape(lambda: jax.random.key(0)))
