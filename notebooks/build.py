"""Run quickstart.py and write it, with what it prints and draws, as quickstart.ipynb.

    python notebooks/build.py [OUTPUT]

quickstart.py is the source: edit it, and build again.
"""

import pathlib
import sys
import tempfile

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parent
SOURCE = FOLDER / "quickstart.py"


def build(output: pathlib.Path) -> None:
    """Run the notebook in a kernel of this interpreter and write it to `output`.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(SOURCE)
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
    build(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.with_suffix(".ipynb"))
