"""Nothing that is read can run: no pickle, no eval, no code from files."""

import ast
import json
import pathlib
import pickle

import numpy as np
import pytest

from slope_jax.models import hf_files
from train.data import store

ROOT = pathlib.Path(__file__).parents[1]
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
YAML_MADE_NO_OBJECTS_OF = {"parse", "YAMLError"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("np", "load"),
    ("numpy", "load"),
    ("os", "system"),
    ("AutoTokenizer", "from_pretrained"),
    ("Tokenizer", "from_pretrained"),
}
FORBIDDEN_OPTIONS = {"allow_pickle", "trust_remote_code", "shell"}
PACKAGES = ("pallas_kernels", "slope_jax", "train")


def dangers(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if (a.name, a.asname) != ("yaml", None)]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            unsafe = node.value.id == "yaml" and node.attr not in YAML_MADE_NO_OBJECTS_OF
            found += [f"yaml.{node.attr}"] if unsafe else []
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
                found.append(function.id)
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                pair = (function.value.id, function.attr)
                found += [".".join(pair)] if pair in FORBIDDEN_ATTRIBUTES else []
            found += [k.arg for k in node.keywords if k.arg in FORBIDDEN_OPTIONS]
    return found


def test_the_code_has_no_way_to_run_files():
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if names := dangers(ast.parse(path.read_text(encoding="utf-8"))):
                found[str(path.relative_to(ROOT))] = names
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import load",
        "import yaml; yaml.load(x)",
        "import yaml as y",
        "eval(x)",
        "np.load(f)",
        "f(allow_pickle=True)",
    ],
)
def test_dangers_are_seen(code):
    assert dangers(ast.parse(code))


class Bomb:
    fired = False

    def __reduce__(self):
        return (setattr, (Bomb, "fired", True))


def test_pickles_in_the_place_of_data_do_not_run(tmp_path):
    data = pickle.dumps(Bomb())
    for name in ("model.safetensors", "pytorch_model.bin", "meta.json"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="damaged or cut off"):
        hf_files.open_tensors(tmp_path)
    with pytest.raises(store.DamagedStoreError):
        store.verify(tmp_path)
    assert not Bomb.fired


def test_token_files_are_raw_numbers(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps(Bomb()).ljust(200, b"."))
    assert store._map(tmp_path / "a", "<u2").dtype == np.uint16
    assert not Bomb.fired


@pytest.mark.parametrize("dtype", ["O", "|O", "<U4", None, ["<u2"]])
def test_objects_are_no_tokens(tmp_path, dtype):
    entry = {"files": {}}
    meta = {"dtype": dtype, "splits": {"train": entry, "valid": entry}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(store.DamagedStoreError, match=r"meta\.json is not that of a token store"):
        store.verify(tmp_path)


def test_metadata_of_a_store_names_no_other_files(tmp_path):
    entry = {"files": {name: {"bytes": 0, "crc32": 0} for name in store.FILES}}
    (tmp_path / "x.tokens").write_bytes(b"")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "meta.json").write_text(
        json.dumps({"dtype": "<u2", "splits": {"../x": entry}})
    )
    with pytest.raises(store.DamagedStoreError):
        store.verify(tmp_path / "store")
