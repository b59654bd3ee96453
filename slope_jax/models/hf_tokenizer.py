"""The tokenizer in a Hugging Face folder, and the special ids that its other files name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pallas_kernels.files import write_atomically
from slope_jax.models.config import TransformerConfig
from slope_jax.models.hf_files import listed, read_json

ROLES = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "cls_token",
    "sep_token",
    "mask_token",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in config.json
_TOKENIZER, _SETTINGS, _GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
_VOCABULARIES = (  # one of these makes a tokenizer
    _TOKENIZER,
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
_BESIDE = (
    _SETTINGS,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def write_tokenizer(
    folder: Path,
    tokenizer: Any,
    special_tokens: Mapping[str, str] | None,
    config: TransformerConfig,
    *,
    causal: bool,
) -> dict[str, Any]:
    """Writes a tokenizer as `export_hf` describes, and generation_config.json.

    Args:
      folder: exists.
      tokenizer, special_tokens: as for `export_hf`.
      config: of the model.
      causal: whether the model generates.

    Returns:
      Special ids for config.json. Unknown ones are None: left out, they would be those of the
      family's first model, which mean something else here.
    """
    if special_tokens and not isinstance(tokenizer, tokenizers.Tokenizer):
        raise ValueError("special_tokens are for a tokenizers.Tokenizer; others name theirs")
    if tokenizer is None:
        return dict.fromkeys(IDS)
    if isinstance(tokenizer, str | Path):
        return _copy(folder, Path(tokenizer).expanduser(), config, causal)
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _write(folder, tokenizer, special_tokens or {}, config, causal)
    if hasattr(tokenizer, "save_pretrained"):
        _check_ids(tokenizer.get_vocab().values(), config)
        tokenizer.save_pretrained(folder)
        ids = {name: getattr(tokenizer, name, None) for name in IDS}
        _write_generation(folder, ids, causal)
        return ids
    raise ValueError(
        f"tokenizer is a {type(tokenizer).__name__}; give a folder, a tokenizers.Tokenizer or a"
        " tokenizer of Transformers"
    )


def _write(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str],
    config: TransformerConfig,
    causal: bool,
) -> dict[str, Any]:
    _check_ids(tokenizer.get_vocab(with_added_tokens=True).values(), config)
    ids = _ids(special_tokens, tokenizer.token_to_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }
    # Token types are on by default before version 5 and off since; only a BERT takes them.
    types = [] if causal else ["token_type_ids"]
    settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    generation = ids
    if causal:
        settings["padding_side"] = "left"
        if ids["pad_token_id"] is None and ids["eos_token_id"] is not None:
            # Not in config.json, which would keep gradients from the row of the end in the table.
            settings["pad_token"] = special_tokens["eos_token"]
            generation = ids | {"pad_token_id": ids["eos_token_id"]}
    write_atomically(folder / _TOKENIZER, tokenizer.to_str(pretty=True))
    write_atomically(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")
    _write_generation(folder, generation, causal)
    return ids


def _copy(folder: Path, source: Path, config: TransformerConfig, causal: bool) -> dict[str, Any]:
    """The files of another folder, and the ids in its config.json."""
    names = [name for name in (*_VOCABULARIES, *_BESIDE) if (source / name).is_file()]
    if not set(names) & set(_VOCABULARIES):
        raise ValueError(
            f"tokenizer {source}: not a folder with one of {', '.join(_VOCABULARIES)}; give the one"
            " that save_pretrained of a tokenizer wrote"
        )
    known = None
    if _TOKENIZER in names:
        try:
            known = tokenizers.Tokenizer.from_file(str(source / _TOKENIZER))
        except Exception as error:  # the library raises no other
            raise ValueError(f"{source / _TOKENIZER} cannot be read ({error})") from error
        _check_ids(known.get_vocab(with_added_tokens=True).values(), config)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    if (source / "config.json").is_file():
        raw = read_json(source / "config.json")
        ids = {name: raw[name] for name in IDS if name in raw}
    else:
        settings = read_json(source / _SETTINGS) if _SETTINGS in names else {}
        named = {role: settings[role] for role in ROLES if settings.get(role)}
        named = {role: t["content"] if isinstance(t, dict) else t for role, t in named.items()}
        ids = _ids(named, known.token_to_id) if known else dict.fromkeys(IDS)
    if causal and (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)
    else:
        _write_generation(folder, ids, causal)
    return ids


def _ids(
    special_tokens: Mapping[str, str], token_to_id: Callable[[str], int | None]
) -> dict[str, Any]:
    if unknown := [role for role in special_tokens if role not in ROLES]:
        raise ValueError(f"special_tokens: no role {listed(unknown)}; there are {', '.join(ROLES)}")
    found = {role: token_to_id(token) for role, token in special_tokens.items()}
    if missing := [repr(special_tokens[role]) for role in found if found[role] is None]:
        raise ValueError(f"special_tokens: the tokenizer has no token {listed(missing)}")
    return {name: found.get(name.removesuffix("_id")) for name in IDS}


def _check_ids(ids, config: TransformerConfig) -> None:
    if (last := max(ids)) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {last}, but the model vocab_size={config.vocab_size}; give"
            " the tokenizer that the model was trained with"
        )


def _write_generation(folder: Path, ids: Mapping[str, Any], causal: bool) -> None:
    if causal:
        given = {name: ids[name] for name in IDS if ids.get(name) is not None}
        write_atomically(folder / _GENERATION, json.dumps(given, indent=2) + "\n")
