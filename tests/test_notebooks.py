"""The notebooks run from top to bottom, and are their scripts with outputs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from test_readme import CONFIG_FILE, OVERRIDE, anchors

from minigpt5_jax.config import get_config, keys_of

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]_*.py"))
KILOBYTES = 300  # of a notebook with its pictures
PUBLIC = {"minigpt5_jax"}
"""Modules of the package that a reader of the notebooks meets; a part is written against its contracts."""
LINK = re.compile(r"\]\((\.\./[^)\s#]+)(?:#([\w-]+))?\)")
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def cells(notebook) -> list[tuple[str, str]]:
    """(kind, text) of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_five():
    assert [script.stem[0] for script in SCRIPTS] == list("12345")
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [script.stem for script in SCRIPTS]


@by_script
def test_a_notebook_is_its_script_with_outputs(script):
    """``python notebooks/execute.py`` is the remedy."""
    path = script.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    assert cells(notebook) == cells(jupytext.read(script))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not run in one go"
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds and kinds & {"display_data", "execute_result", "stream"}
    assert path.stat().st_size < KILOBYTES * 1000


@by_script
def test_it_begins_with_what_a_reader_must_know(script):
    first = jupytext.read(script).cells[0].source
    assert first.startswith(f"# {script.stem[0]}. ")
    assert all(word in first for word in ("**Shows**", "**Takes**", "**Needs**"))


@by_script
def test_links_commands_and_imports_exist(script):
    text = script.read_text(encoding="utf-8")
    for name, anchor in LINK.findall(text):
        target = (FOLDER / name).resolve()
        assert target.exists() and (not anchor or anchor in anchors(target)), name
    assert all((ROOT / path).is_file() for path in CONFIG_FILE.findall(text))
    named = {path.rstrip(".") for path in OVERRIDE.findall(text)}
    own = {"model.mapper.width"}  # of the mapper that is written there
    assert not named - keys_of(get_config()).keys() - own
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.startswith("minigpt5_jax")} <= PUBLIC


@pytest.mark.slow
def test_all_of_them_run(tmp_path, monkeypatch):
    """In order, in kernels of their own, with the compiler's usual settings; they share one trained run."""
    monkeypatch.setenv("NOTEBOOK_RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS")
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seconds = {}
    for script in SCRIPTS:
        before = time.time()
        notebook = module.execute(script)  # raises where a cell fails
        seconds[script.stem] = round(time.time() - before)
        assert all(
            cell.outputs for cell in notebook.cells if "show(" in cell.source and "def" not in cell.source
        )
    print(seconds, sum(seconds.values()), "s in all; on two free cores 12 minutes are the goal")
