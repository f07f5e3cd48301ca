"""Notebooks: committed with their output, restricted to public names, and runnable."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import rwkv_jax

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = {"rwkv_jax", "configs", "experiments"}
OTHERS = {"IPython", "PIL", "jax", "matplotlib", "numpy"}
SECONDS = 1200  # a cell that takes longer hangs; beside other tests the time of a cell varies
ids = lambda path: path.stem


def outputs(notebook, kind=None):
    return [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind is None or output.output_type == kind
    ]


def text_of(notebook) -> str:
    """All text of a notebook, including the output of its cells."""
    texts = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        data = output.get("data", {})
        texts += [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text"))]
    return "\n".join(texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_is_committed_with_its_output(path):
    assert path.stat().st_size < 600_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not outputs(notebook, "error")
    assert len([x for x in outputs(notebook) if "image/png" in x.get("data", {})]) >= 2
    assert not re.search(r"/(home|root|tmp|Users|usr|var)/", text_of(notebook))
    assert "warning" not in text_of(notebook).lower()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_uses_public_names_only(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for node in ast.walk(ast.parse("\n".join(cells))):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr in ("__file__", "_replace")
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in (alias.name for alias in node.names):
                full = f"{module}.{name}" if module else name
                assert full.split(".")[0] in OURS | OTHERS | set(sys.stdlib_module_names), full
                assert not re.search(r"(^|\.)_", full), full
                if (module or "").startswith("rwkv_jax"):
                    told = {*getattr(importlib.import_module(module), "__all__", []), *dir(rwkv_jax)}
                    is_module = importlib.util.find_spec(full) is not None
                    assert name in told or is_module, f"{module} does not tell of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_runs_in_an_empty_folder(path, tmp_path, monkeypatch):
    """Runs with JAX's default options; the other tests compile without optimisations."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the second notebook loads runs that it finds in this folder
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert not outputs(notebook, "error")
    assert "warning" not in "".join(output.text for output in outputs(notebook, "stream")).lower()
