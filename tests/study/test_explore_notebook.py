"""notebooks/explore.ipynb as it is used: through papermill, with controls moved in its kernel, in a real JupyterLab.

The last one opens a browser and is asked for: THREEFOLD_BROWSER=1 pytest tests/study/test_explore_notebook.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupyterlab_page
import nbformat
import pytest
from explore_fixtures import made_runs
from nbclient import NotebookClient

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOK = PROJECT / "notebooks" / "explore.ipynb"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with made_runs(tmp_path_factory.mktemp("explore")) as folder:
        return folder


def environment(runs: Path) -> dict[str, str]:
    return {**os.environ, "THREEFOLD_RUNS": str(runs)}


def outputs(notebook: dict, source: str) -> str:
    """All text that the cell with this source shows."""
    (cell,) = (one for one in notebook["cells"] if one["cell_type"] == "code" and source in "".join(one["source"]))
    return json.dumps([out.get("data", out.get("text")) for out in cell["outputs"]], ensure_ascii=False)


def test_papermill_runs_it_without_controls_and_it_says_what_is_missing(runs, tmp_path):
    parameters = ["-p", "run", "little", "-p", "controls", "False", "-p", "first", "pretrain", "-p", "second", "sft"]
    out = tmp_path / "out.ipynb"
    words = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(out), "--no-progress-bar", *parameters]
    done = subprocess.run(words, env=environment(runs), cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    notebook = json.loads(out.read_text(encoding="utf-8"))
    assert "stage dpo of run little is not there yet" in outputs(notebook, "view.overview")
    assert "pretrain: The old miller" in outputs(notebook, "view.continuations")
    assert "items: both right" in outputs(notebook, "view.items")
    assert "widget" not in out.read_text(encoding="utf-8").replace("no widgets, plain outputs", "")


def test_a_control_that_is_moved_replaces_what_its_cell_shows(runs, monkeypatch):
    monkeypatch.setenv("THREEFOLD_RUNS", str(runs))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[1].source += '\nrun, first, second = "little", "pretrain", "sft"'
    at = next(place for place, cell in enumerate(notebook.cells) if "view.continuations" in cell.source and place > 1)
    moved = 'show.widgets["prompt"].value = "A ladder <b>"\nshow.widgets["new_tokens"].value = 3'
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(moved))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = outputs(notebook, "show(view.continuations")
    assert "pretrain: A ladder <b>" in shown and "The old miller" not in shown.partition("pretrain: ")[2]
    assert shown.count("text/html") == 1  # replaced, not added
    (cell,) = (one for one in notebook.cells if one.source.startswith("show(view.continuations"))
    (page,) = (out["data"]["text/html"] for out in cell.outputs if "text/html" in out["data"])
    assert "&lt;" in page and "<b>" not in page


def test_in_a_real_jupyterlab(runs, tmp_path):
    if os.environ.get("THREEFOLD_BROWSER") != "1" or jupyterlab_page.browser() is None:
        pytest.skip("JupyterLab NOT CHECKED: install Chromium and set THREEFOLD_BROWSER=1")
    notebook = jupyterlab_page.on_run(NOTEBOOK, "little", tmp_path)
    with jupyterlab_page.lab(notebook, runs) as page:
        page.run_all()
        assert page.errors() == []
        assert "stage dpo of run little is not there yet" in page.shown("view.overview")
        page.type_into("show(view.continuations", "Over <script>document.title = 'taken'</script> the river")
        page.wait_for("show(view.continuations", "Over <script>")  # as text, in the view
        assert page.run("document.title") != "taken"
        page.choose("show(view.items", "second", "sft")
        page.choose("show(view.items", "first", "pretrain")
        page.wait_for("show(view.items", "only pretrain")
        page.press("show(view.losses", "span", 50)
        page.wait_for("show(view.losses", "steps 50 to 100")
        page.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
