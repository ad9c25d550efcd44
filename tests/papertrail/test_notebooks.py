"""Notebook files: what an executed notebook may hold, and the pairs of percent scripts and notebooks."""

import json
from pathlib import Path

import nbformat
import pytest
from report_fixtures import output as display

from basics import paths
from basics.errors import RecordError
from papertrail import notebooks, records, scrub
from papertrail.notebook_files import read_notebook, write_notebook

PROJECT_ROOTS = {f"{paths.PROJECT}/": "", str(paths.PROJECT): ".", str(paths.RUNS): "runs"}


def cleaned(notebook: dict, roots: dict | None = None, **options) -> dict:
    """The scrubbed notebook; with `scrub`'s options."""
    return scrub.scrub(notebook, {**PROJECT_ROOTS, **(roots or {})}, **options)


# Cleaning -----------------------------------------------------------------------------------------------------------


def cell(*outputs: dict, **more) -> dict:
    return {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": "",
        "execution_count": 1,
        "outputs": list(outputs),
        **more,
    }


def book(*cells: dict, **metadata) -> dict:
    return {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def shown(notebook: dict, index: int = 0) -> str:
    return "".join("".join(output["text"]) for output in notebook["cells"][index]["outputs"])


def test_carriage_returns_are_applied_and_progress_bars_dropped():
    found = cleaned(
        book(
            cell(
                stream("a\rb\rstep 3\n"),
                stream("  7%|▋  | 3/40 [00:01<00:12,  2.94it/s]\r100%|██| 40/40 [00:09<00:00, 4.1it/s]\n", "stderr"),
                stream("\x1b[31mred\x1b[0m\r\n", "stdout"),
            )
        )
    )
    assert shown(found) == "step 3\nred\n"


def test_scrubbing_keeps_head_and_tail_of_a_flood():
    found = shown(cleaned(book(cell(*[stream(f"line {number}\n") for number in range(1000)])))).splitlines()
    assert found[0] == "line 0" and found[-1] == "line 999"
    assert len(found) == scrub.STREAM_HEAD + scrub.STREAM_TAIL + 1
    assert "... 960 lines left out ..." in found


def test_no_path_user_or_host_is_left(monkeypatch):
    monkeypatch.setattr(scrub.socket, "gethostname", lambda: "box-17.example")
    home, project = str(Path.home()), str(paths.PROJECT)
    values = {"name": "x", "version": 1, "values": {"file": f"{project}/runs/smoke/sft", "ratio": "3/4 of a/b"}}
    shown_output = {
        "output_type": "display_data",
        "metadata": {},
        "data": {records.MIME: values, "image/png": "/9j/4A/x"},
    }
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["\x1b[31mFile /usr/lib/python3/json.py"]}
    found = cleaned(
        book(
            cell(stream(f"{project}/runs/x {home}/y me@box-17.example /opt/thing/lib.so:3\n"), shown_output, error),
            cell(id="9f", metadata={"tags": ["injected-parameters"]}, source=f'data_dir = "{project}/d"\n'),
            papermill={
                "input_path": f"{project}/n.ipynb",
                "output_path": "/tmp/x.ipynb",
                "environment_variables": {"A": "b"},
                "duration": 1.5,
            },
        ),
        {"/data/mine": "$THREEFOLD_DATA"},
    )
    outputs = found["cells"][0]["outputs"]
    assert outputs[0]["text"] == "runs/x …/y me@… …/lib.so:3\n"
    assert outputs[1]["data"][records.MIME]["values"] == {"file": "runs/smoke/sft", "ratio": "3/4 of a/b"}
    assert outputs[1]["data"]["image/png"] == "/9j/4A/x"
    assert outputs[2]["traceback"] == ["File …/json.py"]
    assert found["cells"][1]["source"] == 'data_dir = "d"\n' and found["cells"][1]["id"] == "injected-parameters"
    assert found["metadata"]["papermill"] == {"duration": 1.5}


def test_a_host_named_like_a_word_stays(monkeypatch):
    monkeypatch.setattr(scrub.socket, "gethostname", lambda: "laptop")
    assert shown(cleaned(book(cell(stream("preset laptop\n"))))) == "preset laptop\n"


@pytest.mark.parametrize("publish", [False, True])
def test_scrubbing_twice_changes_nothing(publish):
    notebook = book(cell(stream("a\rb\n\x1b[1mc\n"), stream(f"{paths.PROJECT}/x\n", "stderr")), papermill={})
    once = cleaned(notebook, publish=publish)
    assert cleaned(once, publish=publish) == once


def test_texts_are_lists_of_lines_on_disk_and_joined_when_read(tmp_path):
    notebook = book(cell(stream("a\nb\n"), source="x = 1\ny = 2"))
    write_notebook(tmp_path / "x.ipynb", notebook)
    on_disk = json.loads((tmp_path / "x.ipynb").read_text())["cells"][0]
    assert on_disk["source"] == ["x = 1\n", "y = 2"] and on_disk["outputs"][0]["text"] == ["a\n", "b\n"]
    assert read_notebook(tmp_path / "x.ipynb", schema=True) == notebook


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "cells": [1]}', "\xff"]
)
def test_a_file_that_is_no_notebook_is_refused(tmp_path, text):
    file = tmp_path / "x.ipynb"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=r"x\.ipynb"):
        read_notebook(file)


# Pairs --------------------------------------------------------------------------------------------------------------

SCRIPT = """# %% [markdown]
# # A title

# %% tags=["parameters"]
preset = "smoke"

# %%
# | a comment
x = 1

# %%
#| label: tbl-one
#| tbl-cap: One
x

# %%
x = 1

# %%
x = 1
"""


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "percent").mkdir()
    (tmp_path / "percent" / "one.py").write_text(SCRIPT)
    return tmp_path


def test_sync_writes_a_runnable_notebook_once(pair):
    assert notebooks.check(pair) == ["percent/one.py: no one.ipynb beside it"]
    assert notebooks.sync(pair) == [pair / "one.ipynb"]
    made = nbformat.read(pair / "one.ipynb", 4)
    nbformat.validate(made)
    assert made.metadata.kernelspec.name == "python3"
    assert made.cells[1].metadata.tags == ["parameters"]
    assert made.cells[3].id == "tbl-one" and made.cells[3].source.startswith("#| label: tbl-one")
    assert made.cells[5].id == made.cells[4].id + "-2"
    assert notebooks.sync(pair) == [] and notebooks.check(pair) == []


def test_an_inserted_cell_changes_no_other_id(pair):
    notebooks.sync(pair)
    before = [entry["id"] for entry in read_notebook(pair / "one.ipynb")["cells"]]
    (pair / "percent" / "one.py").write_text("# %%\nnew = True\n\n" + SCRIPT)
    notebooks.sync(pair)
    assert [entry["id"] for entry in read_notebook(pair / "one.ipynb")["cells"]][1:] == before


def test_check_names_the_difference_and_the_way_back_keeps_everything(pair):
    notebooks.sync(pair)
    edited = nbformat.read(pair / "one.ipynb", 4)
    edited.cells[2].source = "x = 2"
    edited.cells[2].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(edited, pair / "one.ipynb")
    (problem,) = notebooks.check(pair)
    assert problem.startswith("one.ipynb differs from percent/one.py: ") and "x = 2" not in SCRIPT
    assert set(notebooks.sync(pair, from_notebooks=True)) == {pair / "percent" / "one.py", pair / "one.ipynb"}
    script = (pair / "percent" / "one.py").read_text()
    assert "x = 2" in script and '# %% tags=["parameters"]' in script and "#| label: tbl-one" in script
    assert notebooks.check(pair) == [] and notebooks.sync(pair, from_notebooks=True) == []
    assert not read_notebook(pair / "one.ipynb")["cells"][2]["outputs"]


def test_the_projects_pairs_agree():
    assert notebooks.check() == []


# Publishing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('data_dir = "/srv/someone/data"', 'data_dir = "…/data"'),
        ("File /home/jane/project/lib/x.py, line 3", "File …/x.py, line 3"),
        ("home is /home/jane", "home is ~"),
        ("/proj/threefold/runs/smoke/sft", "./runs/smoke/sft"),
        (r"C:\Users\jane\data\x.txt", "…/x.txt"),
        ("on host-17.example now", "on … now"),
        ("9,000 tokens/s and 1/2, a / b, https://example.org/a/b, runs/smoke/sft, ./x/y", None),
        ("r'[\\w/]+' </td></tr> 3//2", None),
    ],
)
def test_paths_and_hosts_go_and_everything_else_stays(text, clean):
    roots = {"/proj/threefold": "."}
    names = ("host-17.example",)
    made = scrub.scrub(book(cell(source=text)), roots, names=names, publish=True)
    assert made["cells"][0]["source"] == (text if clean is None else clean)
    assert scrub.leaks(made, names) == []


def test_publishing_reaches_metadata_outputs_and_records_but_not_images():
    shown_output = dict(display("a", {"file": "/srv/me/x.parquet", "n": 3}, "see /srv/me/x.parquet"))
    shown_output["data"] = {**shown_output["data"], "image/png": "iVBORw0KGgo/AAAA/BBBB/CCCC"}
    entry = cell(shown_output, metadata={"papermill": {"start_time": "now"}, "tags": ["parameters"]})
    parameters = {"input_path": "/srv/me/in.ipynb", "parameters": {"data_dir": "/srv/me/data"}}
    made = book(entry, papermill=parameters, widgets={"x": 1})
    clean = scrub.scrub(made, {}, publish=True)
    assert scrub.leaks(made, ()) and scrub.leaks(clean, ()) == []
    data = clean["cells"][0]["outputs"][0]["data"]
    assert data[records.MIME]["values"] == {"file": "…/x.parquet", "n": 3}
    assert data["image/png"] == shown_output["data"]["image/png"]
    assert clean["cells"][0]["metadata"] == {"tags": ["parameters"]}
    assert clean["metadata"]["papermill"]["parameters"] == {"data_dir": "…/data"} and "widgets" not in clean["metadata"]
    assert entry["outputs"][0]["data"]["text/markdown"] == "see /srv/me/x.parquet"  # the original is unchanged


def test_progress_bars_leave_no_litter():
    text = "start\n 10%|█         | 1/10 [00:00<00:09, 1.0it/s]\n\r 50%|█████ | 5/10\rdone 10\n\x1b[31mred\x1b[0m\n"
    assert scrub.tidy_stream(text) == "start\ndone 10\nred\n"
