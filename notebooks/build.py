"""Run the notebooks' sources and write them, with what they print and draw, as .ipynb.

    python notebooks/build.py [NAME [OUTPUT]]

NAME.py (quickstart.py, results.py) is the source: edit it, and build again.
"""

import pathlib
import sys
import tempfile

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = ("quickstart", "results")


def build(name: str, output: pathlib.Path | None = None) -> None:
    """Run the notebook `name` in a kernel of this interpreter and write it to `output`.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    output = output or FOLDER / f"{name}.ipynb"
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"  # random ids would differ in every build
    client = NotebookClient(notebook, timeout=600, record_timing=False)
    kernel = client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as sockets:  # rather than open ports
        kernel.transport, kernel.ip = "ipc", f"{sockets}/kernel"
        client.execute(cwd=str(FOLDER.parent))
    notebook.metadata.pop("language_info", None)
    temporary = output.with_name(output.name + ".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(output)


if __name__ == "__main__":
    for name in sys.argv[1:2] or NAMES:
        build(name, pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None)
