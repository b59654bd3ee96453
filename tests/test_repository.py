"""What holds for the repository as a whole: layers, documentation, pins, nothing that is private."""

import ast
import importlib
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("pallas_kernels", "slope_jax", "train")  # imports point to the left only
PUBLIC = ("pallas_kernels", "slope_jax", "slope_jax.models")
BELOW_FLAX = ("flax", "optax", "orbax")
PRIVATE = re.compile(r"/(root|work)/\w|pypi\.(org|python)|pythonhosted\.org|127\.0\.0\.1")
FOLDERS = re.compile(r"/(home|tmp|Users)/\w")  # tests may speak of such


def tracked() -> list[pathlib.Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a git checkout")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in paths if path.exists()]


def imports(path: pathlib.Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down_only(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"benchmarks", "tests"}
    above |= set(BELOW_FLAX) if layer == "pallas_kernels" else set()
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports(path)
        if module.split(".")[0] in above or module.startswith((".", "jax._src"))
    }
    assert not wrong


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_documented(package):
    module = importlib.import_module(package)
    assert inspect.getdoc(module)
    bare = []
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.ismodule(value) or inspect.isclass(value) or callable(value)):
            continue  # a constant
        text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
        if len(text.split()) < 4 or text.startswith(f"{name}("):  # dataclasses write their own
            bare.append(name)
    assert not bare


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert report.updated(text, report.PAGES[page], page.name) == text, "run: make report"


def test_readme_needs_the_markers_of_every_table():
    with pytest.raises(ValueError, match="markers for"):
        report.updated("<!-- results:memory -->\n<!-- /results:memory -->")


def test_example_of_the_readme_runs(capsys):
    text = report.README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["layers"] == 2
    assert "SparseDense_1" in capsys.readouterr().out


def test_links_of_the_readme_lead_somewhere():
    text = report.README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_records_name_a_commit():
    for path in report.RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), path.name
        assert record["dirty"] is False, path.name


def test_nothing_private_is_tracked():
    found = []
    for path in tracked():
        name = str(path.relative_to(ROOT))
        assert path.name != "uv.lock"
        assert path.stat().st_size < 1_000_000, f"{name} is over 1 MB"
        content = path.read_bytes()
        assert b"\0" not in content, f"{name} is not text"
        for pattern in (PRIVATE,) if name.startswith("tests/") else (PRIVATE, FOLDERS):
            found += [f"{name}: {m[0]}" for m in pattern.finditer(content.decode("utf-8"))]
    assert not found


def test_constraints_are_plain_pins():
    pin = re.compile(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.12")?')
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in lines if not pin.fullmatch(line)]
    for minor in (11, 12):
        environment = {"python_version": f"3.{minor}"}
        pins = [r for r in map(Requirement, lines) if _applies(r, environment)]
        names = [canonicalize_name(r.name) for r in pins]
        assert len(names) == len(set(names))
        versions = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in pins}
        for wanted in _requirements():
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted


def _applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_pretrain_runs_the_job():
    command = [
        "make",
        "-n",
        "--no-print-directory",
        "pretrain",
        f"PYTHON={sys.executable}",
        "ARGS=--steps=3",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["-m", "train.pretrain", "--model=bert-base", "--steps=3"]


def test_what_needs_a_newer_jax_is_run_with_one():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    listed = re.search(r"for name in (.*?); do", script, re.DOTALL)[1].replace("\\", " ").split()
    needing = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"^@needs_jax", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert needing <= set(listed)
