"""Models from Hugging Face folders, in the form that `train.serving` serves.

Such a model has no run. `about["imported"]` says where it came from and which sizes it has, so that
`served.json` describes it as a run's configuration describes a run's; `about["config"]` holds what
commands ask of one.
"""

import pathlib
from collections.abc import Iterable
from typing import Any

import jax
from flax import linen as nn

from slope_jax import models
from slope_jax.generate import with_layers_apart
from slope_jax.models import hf, hf_names
from slope_jax.models.hf_files import checked_folder, read_json
from slope_jax.models.rope import RopeScaling
from slope_jax.policy import DENSE
from slope_jax.prompts import is_integer
from train.data.tokenizer import Vocabulary, load_tokenizer, vocabulary_from_json
from train.state import named_dtype

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
_GENERATION_FILE = "generation_config.json"
_PATTERN = "2:4"  # that stored weights are looked at for


def is_folder(path: pathlib.Path) -> bool:
    """Whether it is a Hugging Face folder: a run has a config.json too, but no model_type in it."""
    file = path / CONFIG_FILE
    return file.is_file() and "model_type" in read_json(file)


def is_adapter(path: pathlib.Path) -> bool:
    """Whether it is a folder of PEFT, which has no model in it."""
    return (path / "adapter_config.json").is_file() and not (path / CONFIG_FILE).exists()


def read(
    folder: pathlib.Path | str,
    sparsity: Any,
    calibration: Iterable[Any] | None,
    dtype: str,
) -> tuple[nn.Module, dict[str, Any], Vocabulary, dict[str, Any]]:
    """What `train.serving.Served` holds, from a folder; arguments and errors as of `from_hf` there.

    But adapters have the rank that they have there, which kernels may not take.
    """
    folder = checked_folder(folder).resolve()
    if calibration is not None and sparsity is None:
        raise ValueError(
            "calibration is for pruning, but sparsity=None leaves the weights as they are: give a"
            " sparsity such as '2:4' as well"
        )
    raw = read_json(folder / CONFIG_FILE)
    known = hf.is_known(raw.get("model_type"))  # if not, `models.from_hf` says which there are
    vocabulary = read_vocabulary(folder, raw) if known else None
    fields = {
        "calibration": calibration,
        "dtype": named_dtype(dtype),
        "scan": False,
        "for_inference": True,
    }
    try:
        if sparsity is None:
            sparsity = _stored_sparsity(folder, raw)
        model, variables = models.from_hf(folder, sparsity=sparsity, **fields)
    except ImportError as error:  # safetensors
        raise ValueError(str(error)) from error
    model, variables = with_layers_apart(model, variables)
    return model, variables, vocabulary, _about(folder, raw, model, vocabulary, dtype)


def described(about: dict[str, Any], tokenizer: str) -> tuple[nn.Module, Any, Vocabulary]:
    """The model that `read` gave, shapes of its variables, and its vocabulary."""
    family, given = about["config"]["model"], about["imported"]
    fields = dict(given["fields"])
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(*fields["rope_scaling"])
    if about["adapters"]:
        fields["adapter_rank"] = about["config"]["adapter_rank"]
    # Any model of the family will do, for the fields say all that differs between them.
    variant = next(name for name in models.VARIANTS if name.split("-")[0] == family)
    dtype = named_dtype(about["config"]["dtype"])
    model = models.build(variant, dtype=dtype, scan=False, **fields)

    def init(key: jax.Array) -> dict[str, Any]:
        return with_layers_apart(model, model.init(key, **model.example_inputs()))[1]

    vocabulary = vocabulary_from_json(tokenizer, _objective(family), given["end_of_text"])
    return model, jax.eval_shape(init, jax.random.key(0)), vocabulary


def _about(
    folder: pathlib.Path,
    raw: dict[str, Any],
    model: nn.Module,
    vocabulary: Vocabulary,
    dtype: str,
) -> dict[str, Any]:
    family, config = raw["model_type"], model.config
    fields = {
        name: getattr(config, name)
        for name in hf_names.read_config(raw, family, folder / CONFIG_FILE)
    }
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = list(fields["rope_scaling"])  # as JSON gives it back
    return {
        "config": {
            "model": family,
            "dtype": dtype,
            "seq_len": _noted(folder, raw).get("seq_len", [config.max_positions]),
            "valid_fraction": 0.0,  # nothing was held out
        }
        | ({"adapter_rank": config.rank} if config.rank else {}),
        "step": None,
        "adapters": bool(config.rank),
        "imported": {
            "source": str(folder),
            "end_of_text": vocabulary.specials.end_of_text,
            "other_ends": _ends_of_text(folder, raw)[1:],
            "beginning": beginning(vocabulary),
            "bos": _bos(folder, vocabulary),
            "fields": fields | {"dropout": config.dropout, "sparsity": str(config.sparsity)},
        },
    }


def _stored_sparsity(folder: pathlib.Path, raw: dict[str, Any]) -> str:
    """What the weights are pruned to already, as an export of ours notes it."""
    noted = _noted(folder, raw).get("sparsity")
    tried = ([noted] if isinstance(noted, str) else []) + [_PATTERN]
    return next((sparsity for sparsity in tried if hf.is_pruned(folder, sparsity)), DENSE)


def _noted(folder: pathlib.Path, raw: dict[str, Any]) -> dict[str, Any]:
    """What an export of ours says beyond what Transformers has fields for."""
    noted = raw.get(hf_names.ABOUT, {})
    lengths = noted.get("seq_len", [1]) if isinstance(noted, dict) else None
    known = isinstance(lengths, list) and lengths
    if not known or not all(is_integer(length) and length > 0 for length in lengths):
        raise ValueError(
            f"{folder / CONFIG_FILE}: {hf_names.ABOUT}={noted!r} is not what an export of ours says"
            " there; copy the folder again, or take that entry out"
        )
    return noted


def read_vocabulary(folder: pathlib.Path, raw: dict[str, Any]) -> Vocabulary:
    """The tokenizer of a folder whose config.json is `raw`.

    Raises:
      ValueError: it is missing or damaged, or not that of the model.
    """
    file, family = folder / TOKENIZER_FILE, raw["model_type"]
    if not file.is_file():
        raise ValueError(
            f"{file} is missing; let Transformers write it, with"
            f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    objective, ends = _objective(family), _ends_of_text(folder, raw)
    end = ends[0] if objective == "clm" and ends and is_integer(ends[0]) else None
    vocabulary = load_tokenizer(file, objective, end)
    size = hf_names.read_config(raw, family, folder / CONFIG_FILE)["vocab_size"]
    if vocabulary.size > size:
        raise ValueError(
            f"{file} has ids up to {vocabulary.size - 1}, but the model vocab_size={size}; copy the"
            " tokenizer that the model was trained with into the folder"
        )
    if objective == "mlm":
        return vocabulary
    if not all(is_integer(end) and 0 <= end < vocabulary.size for end in ends):
        raise ValueError(
            f"{folder}: eos_token_id={ends[0] if len(ends) == 1 else ends!r} is no id of"
            f" {TOKENIZER_FILE}, which has {vocabulary.size}; correct it in {CONFIG_FILE} and"
            f" {_GENERATION_FILE}, or take it out"
        )
    return vocabulary


def _ends_of_text(folder: pathlib.Path, raw: dict[str, Any]) -> list[Any]:
    """The ids that end texts, where Transformers looks for them; the first one is also that of training."""
    file = folder / _GENERATION_FILE
    given = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    given = raw.get("eos_token_id") if given is None else given
    return given if isinstance(given, list) else [] if given is None else [given]


def beginning(vocabulary: Vocabulary) -> list[int]:
    """Ids that the tokenizer puts ahead of every text, such as LLaMA's <s>; none of a BERT's."""
    if vocabulary.objective == "mlm":
        return []
    encode = vocabulary.tokenizer.encode
    plain, whole = (encode("a", add_special_tokens=special).ids for special in (False, True))
    found = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[: next(found, 0)]


def _bos(folder: pathlib.Path, vocabulary: Vocabulary) -> int | None:
    """The id that the folder names as bos_token, whether or not the tokenizer puts it ahead of texts."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        token = (read_json(file) if file.is_file() else {}).get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return vocabulary.tokenizer.token_to_id(token)
    return None


def _objective(family: str) -> str:
    return "mlm" if family == "bert" else "clm"
