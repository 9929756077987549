"""The notebooks run from a clean kernel, are committed with their outputs, and hold nothing of the machine that ran them."""

import re
import tempfile

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from benchmarks.report import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_numbered():
    assert [int(path.name.split("_")[0]) for path in NOTEBOOKS] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_runs(path):
    """Every cell, without an error, and with as many outputs of the same kinds as are committed."""
    notebook = nbformat.read(path, as_version=4)
    kinds = [_kinds(cell) for cell in notebook.cells]
    with tempfile.TemporaryDirectory() as folder:  # sockets of its own, that no other kernel takes
        config = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})
        NotebookClient(notebook, config=config, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert [_kinds(cell) for cell in notebook.cells] == kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_committed_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= 4
    assert not re.search(r"/tmp/|/home/|/root/|site-packages", path.read_text())


def _kinds(cell) -> set[str]:
    """The kinds of a cell's outputs: text, tables, pictures."""
    outputs = cell.get("outputs", ())
    return {kind for output in outputs for kind in (*output.get("data", {}), *((output.name,) if "name" in output else ()))}
