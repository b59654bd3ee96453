"""Trained models ready to be used: from a run's checkpoint, from Hugging Face, or a folder of their own.

    FOLDER/served.json      what the model is and comes from, whether adapters joined
    FOLDER/tokenizer.json   the tokenizer
    FOLDER/variables        weights by Orbax: values (bfloat16, see `save`), metadata, adapters
    FOLDER/manifest.json    digests of all these files, see `train.integrity`

No masters, no transposed copies, no optimizer state.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import linen as nn

from pallas_kernels.files import new_folder, write_atomically
from slope_jax import TrainState
from slope_jax.generate import (
    with_layers_apart,
    with_padded_ranks,
)
from slope_jax.models.casting import cast_weights
from slope_jax.models.hf_export import checked_dtype
from slope_jax.prompts import is_integer
from train import imported, integrity
from train.checkpoint import Checkpoints, placed, to_device
from train.config import from_json, to_json
from train.data.tokenizer import Vocabulary, vocabulary_from_json
from train.state import abstract_state, make_setup, named_dtype

SERVED_FILE, TOKENIZER_FILE, VARIABLES = "served.json", "tokenizer.json", "variables"
DTYPES = ("auto", "bfloat16", "float16", "float32")  # of computations
_AGAIN = "Copy it again, or save it again from the run"


def title(about: dict[str, Any]) -> str:
    """Of what `Served.about` tells of."""
    name = about["config"]["model"]
    if "imported" in about:
        return f"{name} of {about['imported']['source']}"
    return f"{name} of step {about['step']}"


class Served(NamedTuple):
    """A model for inference.

    Attributes:
      model: layers apart (`slope_jax.generate.inference_variables`), adapters where they joined.
      variables: {"params": ..., "masks": ...} in the compute dtype; norms and biases as trained.
      vocabulary: the tokenizer of the run, or of the Hugging Face folder.
      about: what `served.json` holds: configuration, step (None without a run), adapters, and for a
        model from Hugging Face "imported", its folder and sizes.
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
    def title(self) -> str:
        """What it is, for people: "gpt2-nano of step 100", or "gpt2 of FOLDER"."""
        return title(self.about)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a text: the vocabulary's, and others that a Hugging Face folder names."""
        others = self.about.get("imported", {}).get("other_ends", ())
        return (self.vocabulary.specials.end_of_text, *others)

    @property
    def beginning(self) -> list[int]:
        """Ids that stood ahead of every text that the model was trained on, such as LLaMA's <s>."""
        return list(self.about.get("imported", {}).get("beginning", ()))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences that the model was trained on.

        Its table of positions may go on, but behind these it is as it was initialised.
        """
        return min(max(self.about["config"]["seq_len"]), self.model.config.max_positions)


def check_served(given: Any) -> None:
    """Raises a TypeError unless it is what `load` gives, such as for the path of a run."""
    if isinstance(given, Served):
        return
    path = given if isinstance(given, str | pathlib.Path) else None
    what = f"a {type(given).__name__}" if path is None else repr(str(path))
    load = "load(RUN or FOLDER)" if path is None else f"load({str(path)!r})"
    raise TypeError(f"{what} is no served model; pass what train.serving.{load} gives")


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


def is_apart(path: pathlib.Path) -> bool:
    """Whether a folder has a model by itself: what `save` wrote, or one of Hugging Face."""
    if (path / SERVED_FILE).is_file():
        return True
    return not (path / "checkpoints").is_dir() and imported.is_folder(path)


def is_imported(path: pathlib.Path) -> bool:
    """Whether a folder is one of Hugging Face."""
    return is_apart(path) and not (path / SERVED_FILE).is_file()


def load(path: pathlib.Path | str, *, step: int | None = None, dtype: str | None = None) -> Served:
    """A trained model from a run's folder, one of its checkpoints, what `save` wrote, or Hugging Face.

    The device never has more than the result and one parameter of one layer; a run's float32 weights
    are in host memory meanwhile.

    Args:
      path: RUN, RUN/checkpoints/STEP, the folder given to `save`, or one of Hugging Face, whose
        weights stay as they are (see `from_hf`).
      step: which checkpoint of a RUN; None: the latest.
      dtype: of the computation, "bfloat16", "float16", "float32" or "auto", which is bfloat16 on GPU and
        TPU, and float32 on CPU; None: the run's, or of Hugging Face "auto".

    Raises:
      ValueError: there is no run, no checkpoint, or not this one; says what there is. Or another dtype.
      DamagedError: files are not what was written, or some are missing.
    """
    if dtype is not None:
        _check_dtype(dtype, ", or None for the run's")
    path = _resolved(path, step)
    if is_apart(path):
        if step is not None:
            raise ValueError(
                f"{path} holds one model, not the steps of a run: leave out step={step}, or give the"
                " --run-dir of the run"
            )
        if (path / SERVED_FILE).is_file():
            return _load_served(path, dtype)
        return from_hf(path, dtype=dtype or "auto")
    trained = _trained(path, step, on_host=True)
    about = _in_dtype(trained.about, dtype)
    model = _computing(trained.model, about)
    model, variables = with_layers_apart(model, trained.variables, to_device)
    model, variables = with_padded_ranks(model, variables)
    return Served(model, variables, trained.vocabulary, _about(about, model))


def from_hf(
    folder: pathlib.Path | str,
    *,
    sparsity: Any = None,
    calibration: Iterable[Any] | None = None,
    dtype: str = "auto",
) -> Served:
    """A model from a Hugging Face folder, with its tokenizer, as `load` gives one of a run.

    Texts end with any eos_token_id of the folder, else with the tokenizer's usual end of text. Prompts
    begin with what the tokenizer puts ahead of a text (`Served.beginning`), and so does a text that is
    evaluated, and what a task of the LM Evaluation Harness gives as context.
    Tensors are read, pruned and cast one after the other; what Wanda holds besides, says `prune_wanda`.

    >>> served = from_hf("~/models/gpt2", sparsity="2:4")  # doctest: +SKIP
    >>> save(served, "gpt2-2to4")  # doctest: +SKIP

    Args:
      folder: config.json and safetensors, as for `slope_jax.models.from_hf`, and tokenizer.json;
        adapters in its folder "adapter" stay apart.
      sparsity: pruned to that, in all the forms of a model's configuration. None: the weights as they
        are. Where they are 2:4 already, in all linears that "2:4" prunes, they are kept so, with half
        the bytes; else they are dense. The function is that of the folder.
      calibration: batches of tokens to prune by Wanda, as for `slope_jax.models.load_hf`; None: by
        magnitude.
      dtype: of the computation, as of `load`.

    Raises:
      ValueError: files are missing or damaged, the model or its tokenizer is none of ours, or an
        argument does not fit.
    """
    _check_dtype(dtype)
    _check_imported(pathlib.Path(folder).expanduser().resolve())
    model, variables, vocabulary, about = imported.read(folder, sparsity, calibration, dtype)
    model, variables = with_padded_ranks(model, variables)
    return Served(model, variables, vocabulary, _about(about, model))


def _check_imported(path: pathlib.Path) -> None:
    """Raises a ValueError for a folder of ours, which `load` reads."""
    if (path / SERVED_FILE).is_file():
        kind = f"a saved model with {SERVED_FILE}"
    elif imported.is_folder(path):  # which may well lie in a folder "checkpoints"
        return
    elif path.parent.name == "checkpoints" and path.name.isdigit():
        kind = "a checkpoint of a run"
    elif (path / "checkpoints").is_dir():
        kind = "a run"
    else:
        return
    raise ValueError(f"{path} is {kind}, and none of Hugging Face; give it to train.serving.load")


def load_trained(path: pathlib.Path | str, *, step: int | None = None) -> Trained:
    """The weights of a run's checkpoint in full precision, without the optimizer's state.

    Args:
      path: RUN or RUN/checkpoints/STEP.
      step: which checkpoint of a run; None: the latest.

    Raises:
      ValueError: there is no run, no checkpoint, or not this one; says what there is.
      DamagedError: files are not what was written, or some are missing.
    """
    return _trained(_resolved(path, step), step)


def _trained(path: pathlib.Path, step: int | None, *, on_host: bool = False) -> Trained:
    """`load_trained`; `on_host` in NumPy arrays."""
    if path.parent.name == "checkpoints" and path.name.isdigit():
        if step not in (None, int(path.name)):
            raise ValueError(
                f"{path} is one step: leave out step={step}, or give {path.parents[1]}"
            )
        path, step = path.parent.parent, int(path.name)
    if path.name == "checkpoints" and any(p.name.isdigit() for p in path.iterdir()):
        raise ValueError(f"{path} holds the steps of a run: give the run, {path.parent}")
    if is_apart(path):
        kind = "of Hugging Face" if is_imported(path) else f"with {SERVED_FILE}"
        raise ValueError(
            f"{path} is a folder {kind}: a model to use, without what training goes on from. Give the"
            " --run-dir of a run of train.pretrain, or one of its checkpoints/STEP; train.generate,"
            " train.evaluate and train.export take this folder, and the last prunes one of Hugging"
            " Face with --sparsity"
        )
    if imported.is_adapter(path):
        raise ValueError(
            f"{path} holds adapters alone; give the folder of their model, which has them in a folder"
            " of the name 'adapter'"
        )
    if not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} holds no checkpoints; give the --run-dir of a run or one of its"
            f" checkpoints/STEP, or, to use a model and not to train it, a folder with {SERVED_FILE}"
            " or of Hugging Face"
        )
    return _from_run(path, step, on_host)


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
      dtype: of kernels, tables and adapters in the folder: float32, bfloat16 or float16. None: float32
        or float16 if the run (or `load`, or `from_hf`) was given that, else bfloat16, on whatever device:
        where "auto" computes in float32, as on a CPU, `load` makes that of them again.

    Raises:
      ValueError: the folder exists already, or weights are not saved in that dtype.
      TypeError: it is no served model.
    """
    check_served(served)
    folder = pathlib.Path(folder).expanduser().resolve()
    dtype = checked_dtype(saved_dtype(served.about) if dtype is None else dtype)
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
    dtype = about["config"]["dtype"]
    return "bfloat16" if dtype == "auto" else dtype


def _resolved(path: pathlib.Path | str, step: Any) -> pathlib.Path:
    """The whole path, so that one into a run is seen to be one."""
    if step is not None and not is_integer(step):
        raise ValueError(
            f"step={step!r} must be an integer, the steps of a run after which it saved"
        )
    path = pathlib.Path(path).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the --run-dir of a run, or a saved model")
    return path


def _from_run(folder: pathlib.Path, step: int | None, on_host: bool) -> Trained:
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
        checkpoints.check(step, warn=_warn)
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
        params, masks = checkpoints.restore_weights(step, shapes, on_host=on_host)
        model, variables = _finished(about, shapes.replace(params=params, masks=masks))
        return Trained(model, variables, vocabulary, about)
    finally:
        checkpoints.close()


def _load_served(folder: pathlib.Path, dtype: str | None) -> Served:
    integrity.check(folder, _AGAIN)
    about = _in_dtype(_read_about(folder / SERVED_FILE), dtype)
    tokenizer = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    if "imported" in about:
        model, shapes, vocabulary = imported.described(about, tokenizer)
    else:
        run = _in_dtype(about, "auto")  # no run is trained in float16
        vocabulary = vocabulary_from_json(tokenizer, from_json(run["config"]).objective)
        model, shapes = _shaped(run, lambda m, v: with_layers_apart(_computing(m, about), v))
    with (
        integrity.explained(f"{folder / VARIABLES} does not fit {SERVED_FILE}", _AGAIN),
        ocp.StandardCheckpointer() as checkpointer,
    ):
        variables = checkpointer.restore(folder / VARIABLES, placed(shapes))
    model, variables = with_padded_ranks(model, variables)
    return Served(model, variables, vocabulary, _about(about, model))


def _read_about(file: pathlib.Path) -> dict[str, Any]:
    with integrity.explained(f"{file} does not describe a model", _AGAIN):
        about = json.loads(file.read_text(encoding="utf-8"))
        for name in ("config", "step", "adapters"):
            about[name]
    return about


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _check_dtype(dtype: Any, more: str = "") -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}{more}")


def _computing(model: nn.Module, about: dict[str, Any]) -> nn.Module:
    """The model in the dtype that it is served in."""
    dtype = named_dtype(about["config"]["dtype"])
    return type(model)(dataclasses.replace(model.config, dtype=dtype))


def _in_dtype(about: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Of a model that computes in another dtype than the run; None: as it did."""
    return about if dtype is None else about | {"config": about["config"] | {"dtype": dtype}}


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
