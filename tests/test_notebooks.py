"""The notebooks run, keep their outputs, and use only what is public."""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import cka_probe as cp

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 900_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in code_cells(notebook):
        yield from cell.outputs


def parsed(notebook: Any) -> ast.Module:
    """All code cells as one module, without IPython's magics and shell commands."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 3


@pytest.mark.full
def test_it_runs_and_leaves_no_file(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # the kernel must see this package, wherever it runs
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_kept(notebook: Any) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


def test_it_is_small_and_tells_nothing_of_the_machine(notebook: Any) -> None:
    text = nbformat.writes(notebook)
    assert len(text) < MAX_BYTES
    assert "execution" not in {key for cell in notebook.cells for key in cell.metadata}  # the times of day
    assert notebook.metadata.kernelspec.name == "python3"
    for place in ("/home/", "/root/", "/Users/", tempfile.gettempdir(), str(ROOT), "site-packages"):
        assert place not in text


def test_it_uses_public_names_only(notebook: Any) -> None:
    for node in ast.walk(parsed(notebook)):
        if isinstance(node, ast.Import):
            own = [alias for alias in node.names if alias.name.partition(".")[0] == "cka_probe"]
            assert all((alias.name, alias.asname) == ("cka_probe", "cp") for alias in own)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] != "cka_probe"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cp":
            assert node.attr in cp.__all__
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.startswith("__")
