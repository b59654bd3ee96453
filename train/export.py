"""A trained model as a Hugging Face folder, tokenizer included:

    python -m train.export --checkpoint=runs/NAME --output=FOLDER
    python -m train.export --checkpoint=runs/NAME --output=FOLDER --adapters=lora --dtype=bfloat16

AutoTokenizer and AutoModelForCausalLM (AutoModelForPreTraining of a BERT) load it. Weights are dense,
with zeros where ours are pruned; `--semi-structured` writes 2:4 tensors for PyTorch instead.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from train.generate import exit_code
from train.texts import carries_space

if TYPE_CHECKING:
    import tokenizers

    from train.data.tokenizer import Vocabulary
    from train.serving import Served, Trained


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it is done, 1 if files failed, 2 for bad input."""
    return exit_code(_run, _arguments(args))


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
      adapters, dtype: as for `export_hf`.

    Raises:
      ValueError: the folder exists already.
      ImportError: safetensors is not installed.
    """
    from slope_jax.models import export_hf

    with _tokenizer_of(run) as tokenizer:
        return export_hf(
            folder, run.model, run.variables, adapters=adapters, dtype=dtype, **tokenizer
        )


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
        if given["beginning"]:
            special["bos_token"] = tokenizer.id_to_token(given["beginning"][0])
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
    from slope_jax.policy import DENSE
    from train import serving

    if arguments.semi_structured and arguments.adapters is not None:
        raise ValueError(
            f"--semi-structured writes adapters apart, always; leave out --adapters="
            f"{arguments.adapters} or --semi-structured"
        )
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError("export needs safetensors: pip install 'slope-jax[hf]'")
    path = arguments.checkpoint.expanduser()
    run, stored = _loaded(path, arguments.step)
    if arguments.semi_structured:
        if set(run.model.config.patterns.values()) == {DENSE}:
            raise ValueError(
                "the model prunes nothing, its weights are dense; leave out --semi-structured"
            )
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
    print(f"{serving.title(run.about)}: exported to {folder}")


def _loaded(path: pathlib.Path, step: int | None) -> tuple["Trained | Served", str | None]:
    """What is exported, with all the digits that it has, and the dtype of a Hugging Face folder's tensors."""
    from slope_jax.models.hf_files import read_json
    from train import imported, serving

    if not serving.is_apart(path):
        return serving.load_trained(path, step=step), None
    if step is not None or (path / serving.SERVED_FILE).is_file():
        return serving.load(path, step=step), None
    raw = read_json(path / imported.CONFIG_FILE)
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    return serving.from_hf(path, dtype="float32"), dtype


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
        help="of the tensors; as they are if not given: float32 of a run, a folder's own",
    )
    parser.add_argument(
        "--semi-structured",
        action="store_true",
        help="2:4 tensors of PyTorch, bfloat16 or float16, adapters apart",
    )
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
