"""A trained model as a Hugging Face folder, tokenizer included:

    python -m train.export --checkpoint=runs/NAME --output=FOLDER
    python -m train.export --checkpoint=runs/NAME --output=FOLDER --adapters=lora --dtype=bfloat16
    python -m train.export --checkpoint=HF-FOLDER --output=FOLDER --sparsity=2:4 --calibration='text:*.txt'

AutoTokenizer and AutoModelForCausalLM (AutoModelForPreTraining of a BERT) load it. Weights are dense,
with zeros where ours are pruned; `--semi-structured` writes 2:4 tensors for PyTorch instead. The last
one prunes a model of Hugging Face, by Wanda, or without `--calibration` by the weights' magnitude.
"""

import argparse
import contextlib
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from train.command import check_new, exit_code, option
from train.prompts import carries_space

if TYPE_CHECKING:
    import tokenizers

    from train.data.tokenizer import Vocabulary
    from train.serving import Served, Trained

_LESS_MEMORY = (
    "run it where there is more memory, or give a lower --calibration-length with --calibration"
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it is done, 1 if files or the memory failed, 2 for bad input."""
    return exit_code(_run, _arguments(args), less_memory=_LESS_MEMORY)


def export_run(
    folder: pathlib.Path | str,
    run: "Trained | Served",
    *,
    adapters: Literal["merge", "lora"] = "merge",
    dtype: Any = None,
) -> pathlib.Path:
    """`slope_jax.models.export_hf` of a run, with its tokenizer.

    The tokenizer gives the ids that the model was trained on: of a text alone for a decoder, and with
    [CLS] and [SEP] for a BERT, whose [MASK] takes the white space ahead of it if words carry theirs. But
    where a text spells a special token, it means that token, as is usual with Transformers
    (`split_special_tokens=True` takes it for text, as our commands do). A model that came from Hugging Face
    keeps the tokenizer of its folder, with all that ends and begins a text.

    Args:
      folder: a new one.
      run: what `train.serving.load_trained` or `load` gives.
      adapters, dtype: as for `export_hf`; merged adapters leave no zeros in the weights.

    Raises:
      ValueError: the folder exists already.
      ImportError: safetensors is not installed.
    """
    from slope_jax.models import export_hf

    lengths = run.about.get("config", {}).get("seq_len", ())
    short = max(lengths, default=math.inf) < run.model.config.max_positions
    about = {"seq_len": list(lengths)} if short else None
    options = {"adapters": adapters, "dtype": dtype, "about": about}
    with _tokenizer_of(run) as tokenizer:
        return export_hf(folder, run.model, run.variables, **options, **tokenizer)


@contextlib.contextmanager
def _tokenizer_of(run: "Trained | Served") -> Iterator[dict[str, Any]]:
    """`tokenizer` and `special_tokens` as exports take them."""
    given = run.about.get("imported")
    if given is None:
        tokenizer, special = hf_tokenizer(run.vocabulary)
        yield {"tokenizer": tokenizer, "special_tokens": special}
        return
    source = pathlib.Path(given["source"])
    if _has_tokenizer(source, run.vocabulary):
        yield {"tokenizer": source}
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_imported(pathlib.Path(folder), run, given)
        yield {"tokenizer": folder}


def _has_tokenizer(folder: pathlib.Path, vocabulary: "Vocabulary") -> bool:
    """Whether a model's folder still has this tokenizer."""
    from train.data.tokenizer import load_tokenizer

    end = vocabulary.specials.end_of_text
    try:
        found = load_tokenizer(folder / "tokenizer.json", vocabulary.objective, end)
    except ValueError:
        return False
    return found.to_json() == vocabulary.to_json()


def _write_imported(folder: pathlib.Path, run: "Served", given: dict[str, Any]) -> None:
    """The tokenizer of an import whose folder is gone, as that folder had it."""
    from slope_jax.models.hf_tokenizer import write_tokenizer

    tokenizer, special = hf_tokenizer(run.vocabulary)
    causal = run.vocabulary.objective == "clm"
    if causal:
        tokenizer = run.vocabulary.copy()
        first = given.get("bos")  # older ones do not have it
        if first is None:
            first = next(iter(given["beginning"]), None)
        if first is not None:
            special["bos_token"] = tokenizer.id_to_token(first)
    ids = write_tokenizer(folder, tokenizer, special, run.model.config, causal=causal)
    (folder / "config.json").write_text(json.dumps(ids))
    if causal and given["other_ends"]:
        file = folder / "generation_config.json"
        ends = {"eos_token_id": [ids["eos_token_id"], *given["other_ends"]]}
        file.write_text(json.dumps(json.loads(file.read_text()) | ends))


def hf_tokenizer(vocabulary: "Vocabulary") -> tuple["tokenizers.Tokenizer", dict[str, str]]:
    """A run's tokenizer that adds what its training adds, and the roles of its special tokens."""
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    from train.data.tokenizer import ALIASES

    made = vocabulary.copy()
    specials = vocabulary.specials
    if vocabulary.objective == "mlm":
        ids = {"pad_token": specials.pad, "cls_token": specials.cls}
        ids |= {"sep_token": specials.sep, "mask_token": specials.mask}
        cls, sep = (made.id_to_token(i) for i in (specials.cls, specials.sep))
        if carries_space(made):  # a masked word took its space along
            mask = made.id_to_token(specials.mask)
            made.add_special_tokens([tokenizers.AddedToken(mask, lstrip=True, normalized=False)])
        made.post_processor = TemplateProcessing(
            single=[cls, "$A", sep],
            pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
            special_tokens=[(cls, specials.cls), (sep, specials.sep)],
        )
    else:
        ids = dict.fromkeys(("bos_token", "eos_token"), specials.end_of_text)
        made.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    for role in ("pad", "unk"):
        known = (i for name in ALIASES[role] if (i := made.token_to_id(name)) is not None)
        ids.setdefault(f"{role}_token", next(known, None))
    return made, {role: made.id_to_token(i) for role, i in ids.items() if i is not None}


def _run(arguments: argparse.Namespace) -> None:
    import importlib.util

    from slope_jax.models import export_semi_structured
    from train import serving

    if arguments.semi_structured and arguments.adapters is not None:
        raise ValueError(
            f"--semi-structured writes adapters apart, always; leave out --adapters="
            f"{arguments.adapters} or --semi-structured"
        )
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError("export needs safetensors: pip install 'slope-jax[hf]'")
    check_new(arguments.output.expanduser())
    _check_pruning(arguments)
    _check_model(arguments)
    run, stored = _loaded(arguments)
    _check_adapters(arguments, has=bool(run.model.config.rank))
    if arguments.semi_structured:
        _check_semi_structured(run.model)
        with _tokenizer_of(run) as tokenizer:
            folder = export_semi_structured(
                arguments.output,
                run.model,
                run.variables,
                dtype=arguments.dtype or "bfloat16",
                **tokenizer,
            )
    else:
        folder = export_run(
            arguments.output,
            run,
            adapters=arguments.adapters or "merge",
            dtype=arguments.dtype or stored,
        )
    said = f"{serving.title(run.about)}: exported to {folder}"
    if run.model.config.rank and not arguments.semi_structured and arguments.adapters != "lora":
        said += ", adapters added to the weights, which have no zeros then; --adapters=lora keeps both apart"
    print(said)


def _check_model(arguments: argparse.Namespace) -> None:
    """What does not fit a model of Hugging Face, as its folder describes it."""
    from slope_jax.models import hf, hf_adapter, wanda
    from slope_jax.models.torch_export import checked_dtype
    from slope_jax.policy import DENSE
    from train import serving

    if arguments.semi_structured:
        checked_dtype(arguments.dtype or "bfloat16")
    path = arguments.checkpoint.expanduser()
    if arguments.adapters == "lora" and serving.is_imported(path):
        _check_adapters(arguments, has=hf_adapter.read_adapter(path) is not None)
    if arguments.sparsity is None:
        return
    model = hf.described(arguments.checkpoint, sparsity=arguments.sparsity)
    if arguments.calibration is not None:
        hf_adapter.check_alone(path)
        wanda.check_model(model)
    if arguments.semi_structured:
        _check_semi_structured(model)
        return
    adapter = hf_adapter.read_adapter(path)
    prunes = set(model.config.patterns.values()) != {DENSE}
    if adapter is not None and prunes and arguments.adapters != "lora":
        raise ValueError(
            f"--sparsity={arguments.sparsity}: {adapter.path} has adapters, and added to the pruned"
            " weights they would leave no zeros. Give --adapters=lora, which writes them beside these"
        )


def _check_adapters(arguments: argparse.Namespace, *, has: bool) -> None:
    if arguments.adapters == "lora" and not has:
        raise ValueError(
            f"--adapters=lora: {arguments.checkpoint} has no adapters to write apart; leave it out"
        )


def _check_semi_structured(model: Any) -> None:
    from slope_jax.models.torch_export import check_model
    from slope_jax.policy import DENSE

    if set(model.config.patterns.values()) == {DENSE}:
        raise ValueError(
            "the model prunes nothing, its weights are dense; leave out --semi-structured"
        )
    check_model(model)


def _check_pruning(arguments: argparse.Namespace) -> None:
    """What is wrong with the options of pruning, before anything is read."""
    from train import serving

    of_calibration = ("calibration", "calibration_sequences", "calibration_length", "cache_dir")
    given = [option(name) for name in of_calibration if getattr(arguments, name) is not None]
    if given and arguments.sparsity is None:
        raise ValueError(
            f"{', '.join(given)} without --sparsity: give what to prune to, such as 2:4"
        )
    if given and arguments.calibration is None:
        raise ValueError(f"{', '.join(given)} without --calibration: give text for Wanda")
    for name in ("calibration_sequences", "calibration_length"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"{option(name)}={value} must be 1 or more")
    path = arguments.checkpoint.expanduser()
    if arguments.sparsity is not None and not serving.is_imported(path):
        raise ValueError(
            f"--sparsity prunes a Hugging Face folder, and {path} is none. A run is as its own"
            " --sparsity made it; to prune a dense run, export it first, and then its folder"
        )


def _calibration(arguments: argparse.Namespace, raw: dict[str, Any]) -> Any:
    """Batches of text for Wanda, as long as the model reads."""
    from slope_jax.models import hf, hf_names
    from train import calibration, imported

    if arguments.calibration is None or not hf.is_known(raw["model_type"]):
        return None
    file = arguments.checkpoint.expanduser() / imported.CONFIG_FILE
    most = hf_names.read_config(raw, raw["model_type"], file)["max_positions"]
    length = arguments.calibration_length or min(most, calibration.LONGEST)
    if not 3 <= length <= most:  # a BERT's has [CLS] and [SEP]
        raise ValueError(
            f"--calibration-length={length} must lie between 3 and the model's {most} positions"
        )
    vocabulary = imported.read_vocabulary(arguments.checkpoint.expanduser(), raw)
    return calibration.calibration_batches(
        arguments.calibration,
        vocabulary,
        length,
        beginning=imported.beginning(vocabulary),
        sequences=arguments.calibration_sequences or calibration.SEQUENCES,
        cache_dir=arguments.cache_dir,
    )


def _loaded(arguments: argparse.Namespace) -> tuple["Trained | Served", str | None]:
    """What is exported, with all the digits that it has, and the dtype of a Hugging Face folder's tensors."""
    from slope_jax.models.hf_files import read_json
    from train import imported, serving

    path, step = arguments.checkpoint.expanduser(), arguments.step
    if not serving.is_apart(path):
        return serving.load_trained(path, step=step), None
    if step is not None or not serving.is_imported(path):
        return serving.load(path, step=step), None
    raw = read_json(path / imported.CONFIG_FILE)
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    calibration = _calibration(arguments, raw)
    # Adapters keep the rank that they have, as those of a run do.
    return serving.Trained(*imported.read(path, arguments.sparsity, calibration, "float32")), dtype


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        required=True,
        help="folder of a run, one of its checkpoints/STEP, what train.generate --save wrote, or a"
        " Hugging Face folder",
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run; the latest if not given")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument(
        "--adapters",
        choices=("merge", "lora"),
        help="add them to the weights, the default, or write LoRA files for PEFT beside sparse ones",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors; if not given, that of a Hugging Face folder, float32 of all else",
    )
    parser.add_argument(
        "--semi-structured",
        action="store_true",
        help="2:4 tensors of PyTorch, bfloat16 or float16, adapters apart",
    )
    parser.add_argument(
        "--sparsity", help="prune a Hugging Face folder to that, such as 2:4; as it is if not given"
    )
    parser.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="prune by Wanda on this text, as --data of train.pretrain; by magnitude if not given",
    )
    parser.add_argument("--calibration-sequences", type=int, help="of text; 128 if not given")
    parser.add_argument(
        "--calibration-length", type=int, help="tokens of each; what the model reads, at most 2048"
    )
    parser.add_argument("--cache-dir", type=pathlib.Path, help="of that text, as of train.pretrain")
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
