"""Every notebook is a script that says what it asks and answers, and runs from top to bottom."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_first_cell_states_question_and_answer(script):
    first = script.read_text(encoding="utf-8").split("\n# %%")[1]
    assert first.startswith(" [markdown]")
    assert "**Question" in first
    assert "**Answer" in first


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_nothing_is_defined_that_another_notebook_could_need(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [node.name for node in ast.walk(tree) if isinstance(node, defined)]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(script, tmp_path, monkeypatch):
    jupytext = pytest.importorskip("jupytext", reason="needs the extra notebooks")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebooks")
    pytest.importorskip("ipykernel", reason="needs the extra notebooks")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = jupytext.read(script)
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert not list(tmp_path.iterdir()), "the notebook wrote into its working directory"
