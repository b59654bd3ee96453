"""Files of a Hugging Face folder: config.json, and tensors that are read when they are asked for."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from slope_jax.models import hf_names

# Files of `export_semi_structured`; not "model": Transformers would fill what it misses there at random.
SEMI_STRUCTURED = "semi_structured"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONVERT = (
    "Weights in another format become safetensors by from_pretrained and save_pretrained of"
    " Transformers"
)
_FLOATS = ("F32", "F16", "BF16")


class Tensor:
    """One tensor of a file: its shape and dtype; `read` gives its content."""

    def __init__(self, file: Any, name: str):
        self._file, self.name = file, name  # as the file spells it
        described = file.get_slice(name)
        self.shape = tuple(described.get_shape())
        self.dtype = described.get_dtype()  # as the format spells it, such as "BF16"

    @property
    def is_float(self) -> bool:
        """Whether it holds floats of 16 or 32 bits."""
        return self.dtype in _FLOATS

    def read(self) -> np.ndarray:
        return self._file.get_tensor(self.name)


def checked_folder(folder: str | Path) -> Path:
    """The folder, if it is one, and none that `export_semi_structured` wrote."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds config.json")
    weights = (folder / _SINGLE).exists() or (folder / _INDEX).exists()
    if not weights and any(folder.glob(f"{SEMI_STRUCTURED}*.safetensors")):
        raise ValueError(
            f"{folder} holds 2:4 tensors for PyTorch, as train.export --semi-structured writes them,"
            " which are not read back. Give what they were exported from, or export that again"
            " without --semi-structured"
        )
    return folder


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; save the model with save_pretrained") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds a {type(data).__name__}, not an object; copy or download it again"
        )
    return data


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by the names that `hf_families` uses, buffers left out.

    Of a folder with model.safetensors and an index of shards the first is read, as Transformers does.
    """
    if (folder / _SINGLE).is_file() or not (folder / _INDEX).exists():
        _warn_of_both(folder)
        opened = open_files(folder, [_SINGLE])
    else:
        opened = _open_shards(folder)
    tensors: dict[str, Tensor] = {}
    twice = []
    for name, tensor in opened:
        known = hf_names.canonical(name)
        if hf_names.is_buffer(name):
            continue
        if known in tensors:
            twice.append(f"{tensors[known].name} and {name}")
        tensors[known] = tensor
    if twice:
        raise ValueError(
            f"{folder} holds tensors more than once: {listed(sorted(twice))}; save it again with"
            " save_pretrained, so that one of each is left"
        )
    return tensors


def _warn_of_both(folder: Path) -> None:
    if not (folder / _INDEX).exists():
        return
    shards = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or any(file != _SINGLE for file in shards.values()):
        warnings.warn(
            f"{folder} holds {_SINGLE} and {_INDEX}: the first is read, as Transformers does, and the"
            f" shards are not. Remove {_INDEX}, or {_SINGLE} if the shards are newer",
            stacklevel=2,
        )


def _open_shards(folder: Path) -> list[tuple[str, Tensor]]:
    shards = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / _INDEX} has no 'weight_map'; copy or download it again")
    outside = [str(f) for f in shards.values() if not isinstance(f, str) or f != Path(f).name]
    if outside:
        raise ValueError(
            f"{folder / _INDEX} names files that are not in the folder: {listed(outside)}; copy or"
            " download it again"
        )
    remedy = f"{_INDEX} names all shards of the model: copy or download the missing again"
    opened = open_files(folder, sorted(set(shards.values())), remedy)
    lost = sorted(set(shards) - {name for name, _ in opened})
    if lost:
        raise ValueError(
            f"{folder / _INDEX} names tensors that no shard holds: {listed(lost)}; copy or download"
            " the folder again"
        )
    return opened


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes one file, with the permissions that any new file has."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library makes files that nobody else may read


def open_files(folder: Path, files: list[str], remedy: str = _CONVERT) -> list[tuple[str, Tensor]]:
    """All names and tensors; what is wrong with any file is said of all of them, a remedy if missing."""
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "reading Hugging Face folders needs safetensors: pip install 'slope-jax[hf]'"
        ) from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        present = listed(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(
            f"{folder}: {listed(missing)} {'is' if len(missing) == 1 else 'are'} missing; the"
            f" folder holds {present}. {remedy}"
        )
    opened, damaged = [], []
    for name in files:
        try:
            file = safetensors.safe_open(folder / name, framework="numpy")
            opened += [(key, Tensor(file, key)) for key in file.keys()]  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            damaged.append(f"{name} ({error})")
    if damaged:
        raise ValueError(f"{folder}: damaged or cut off: {listed(damaged)}; copy or download again")
    return opened


def all_of(names: list[str]) -> str:
    """Every name, those of numbered layers together.

    >>> all_of(["h.0.up", "h.1.up", "h.2.up", "h.0.down", "h.2.down", "head"])
    'h.{0..2}.up, h.{0,2}.down, head'
    """
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        start, number, end = found.groups() if found else (name, "-1", "")
        layers.setdefault((start, end), []).append(int(number))
    return ", ".join(f"{start}{_numbers(found)}{end}" for (start, end), found in layers.items())


def _numbers(found: list[int]) -> str:
    if len(found) == 1:
        return "" if found == [-1] else str(found[0])
    found = sorted(found)
    whole = found == list(range(found[0], found[-1] + 1))
    return f"{{{found[0]}..{found[-1]}}}" if whole else f"{{{','.join(map(str, found))}}}"


def listed(items: list[str], limit: int = 12) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
