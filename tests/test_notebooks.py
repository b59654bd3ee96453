"""The notebooks run, and each .ipynb that is shown is the .py that is edited."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

jupytext = pytest.importorskip("jupytext", reason="install the extra notebooks")
pytest.importorskip("nbclient", reason="install the extra notebooks")

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
SAYS = {"quickstart": "logits unchanged to the bit", "results": "slope"}
SHORTER = {"quickstart": {"= 400, 320, 16, 64, 4": "= 45, 42, 2, 64, 4"}}


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs(notebook, kind):
    every = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if kind == "pictures":
        return [output for output in every if "image/png" in output.get("data", {})]
    return [output for output in every if output.get("name") == kind]


@pytest.mark.parametrize("name", SAYS)
def test_notebook_has_the_cells_of_its_source(name):
    shown = jupytext.read(FOLDER / f"{name}.ipynb")
    assert cells(shown) == cells(jupytext.read(FOLDER / f"{name}.py")), "run: make notebook"
    assert outputs(shown, "pictures")
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("name", SAYS)
def test_notebook_runs(tmp_path, name):
    folder, built = tmp_path / "notebooks", tmp_path / f"{name}.ipynb"
    shutil.copytree(FOLDER, folder)
    source = (folder / f"{name}.py").read_text()
    for long, short in SHORTER.get(name, {}).items():  # most of the time, and nothing new
        assert long in source
        source = source.replace(long, short)
    (folder / f"{name}.py").write_text(source)
    command = [sys.executable, "-W", "default", str(folder / "build.py"), name, str(built)]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notebook, shown = jupytext.read(built), jupytext.read(FOLDER / f"{name}.ipynb")
    assert not outputs(notebook, "stderr")
    assert len(outputs(notebook, "pictures")) == len(outputs(shown, "pictures"))
    text = "".join(output["text"] for output in outputs(notebook, "stdout"))
    assert SAYS[name] in text
