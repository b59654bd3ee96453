"""The notebooks run, and each .ipynb that is shown is the .py that is edited."""

import pathlib
import subprocess
import sys

import pytest

jupytext = pytest.importorskip("jupytext", reason="install the extra notebooks")
pytest.importorskip("nbclient", reason="install the extra notebooks")

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
SAYS = {"quickstart": "logits unchanged to the bit", "results": "slope"}


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
    built = tmp_path / f"{name}.ipynb"
    command = [sys.executable, "-W", "default", str(FOLDER / "build.py"), name, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook, shown = jupytext.read(built), jupytext.read(FOLDER / f"{name}.ipynb")
    assert not outputs(notebook, "stderr")
    assert len(outputs(notebook, "pictures")) == len(outputs(shown, "pictures"))
    text = "".join(output["text"] for output in outputs(notebook, "stdout"))
    assert SAYS[name] in text
