"""Notebooks, records, metrics and run files of any content: read as what they are, or one line that names the file."""

import json

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import as_json, damaged, documented, examples, mutated, values
from report_fixtures import cell, notebook, output

from basics import files, paths
from papertrail import records, run
from papertrail.notebook_files import errors, labelled_cells, read_notebook
from papertrail.scrub import scrub
from study.preset import validate
from study.run import open_stage
from threefold.training import state
from threefold.training.state import curve


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A small executed notebook with a table and a text, as JSON."""
    path = notebook(
        tmp_path_factory.mktemp("whole") / "x.ipynb",
        cell(
            "#| label: tbl-a\n#| tbl-cap: A.\nshow()",
            output("evaluation/sft/sst2", {"n": 872, "accuracy": 0.5}, "| a |\n|---|\n| 1 |"),
        ),
        cell("finish()", output("stage/sft", {"weights_sha256": "ab", "tokens": 10}, "done")),
    )
    return json.loads(path.read_text())


def read(path):
    found = documented(lambda: records.read(path), path.name)
    for name, record in (found or {}).items():
        assert name == record.name and isinstance(record.markdown, str | None)
        assert records.finite(record.values, name) == record.values
    loaded = documented(lambda: read_notebook(path, schema=True), path.name)
    if loaded is not None:
        documented(lambda: labelled_cells(loaded, path.name), path.name)
        documented(lambda: errors(loaded))
        for publish in (False, True):
            nbformat.validate(documented(lambda publish=publish: scrub(loaded, {}, names=(), publish=publish)))


@examples("notebook", 150)
@given(data=st.data())
def test_a_notebook_with_values_of_any_kind(tmp_path_factory, executed, data):
    path = tmp_path_factory.getbasetemp() / "mutated.ipynb"
    path.write_text(as_json(data.draw(mutated(executed))), encoding="utf-8")
    read(path)


@examples("notebook", 150)
@given(data=st.data())
def test_a_damaged_notebook(tmp_path_factory, executed, data):
    path = tmp_path_factory.getbasetemp() / "damaged.ipynb"
    path.write_bytes(data.draw(damaged(json.dumps(executed).encode())))
    read(path)


@examples("notebook", 150)
@given(name=st.text(max_size=10) | st.just("a/b"), published=st.dictionaries(st.text(max_size=4), values, max_size=3))
def test_values_of_any_kind_are_published_as_they_are_or_refused(tmp_path_factory, name, published):
    """A record that was accepted comes back from its notebook as the same values."""
    made = documented(lambda: records.bundle(name, published))
    if made is None:
        return
    path = notebook(
        tmp_path_factory.getbasetemp() / "published.ipynb",
        cell("x", nbformat.v4.new_output("display_data", data=made[0])),
    )
    assert records.read(path)[name].values == published


PARAMETERS = ("preset", "run", "data_dir", "overrides", "model", "replicate", "nproc", "learning_rate", "steps")


@examples("parameter", 300)
@given(
    stage=st.sampled_from(["data", "pretrain", "sft", "evaluate", "compare"]),
    parameters=st.dictionaries(
        st.sampled_from(PARAMETERS) | st.text(max_size=8),
        values | st.sampled_from(["~nobody/x", "a=b;" * 999, "smoke", "sft.steps=1e999", "1" * 5000]),
        max_size=3,
    ),
)
def test_parameters_of_any_kind(tmp_path_factory, stage, parameters):
    """Papermill hands over numbers, texts and YAML of any kind: a stage of such a run, or a line and no run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        opened = documented(lambda: open_stage(stage, **parameters))
        if opened is None:
            assert list(paths.RUNS.iterdir()) == []
        else:
            assert validate(opened.run.preset) == opened.run.preset
            assert opened.folder.resolve().is_relative_to(paths.RUNS.resolve())


RUN = {
    "stage": "sft",
    "fingerprint": {"digest": "ab", "stage": "sft"},
    "outputs": {"model.safetensors": "cd"},
    "tokens": 1,
}
WRITTEN = RUN | {files.SELF: files.sha256_json(RUN)}


@examples("run folder", 150)
@given(data=st.data())
def test_a_run_file_of_any_content(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "stage"
    folder.mkdir(exist_ok=True)
    if data.draw(st.booleans()):
        (folder / "run.json").write_text(as_json(data.draw(mutated(WRITTEN))), encoding="utf-8")
    else:
        (folder / "run.json").write_bytes(data.draw(damaged(json.dumps(WRITTEN).encode())))
    facts = documented(lambda: run.read_run_file(folder), "run.json")
    if facts is not None:
        assert facts == RUN


LINES = [
    {"step": 1, "tokens": 10, "loss": 3.5, "lr": 0.1},
    {"step": 1, "tokens": 10, "heldout_loss": 3.4},
    {"step": 2, "tokens": 20, "loss": 3.25, "lr": 0.1},
    {"resumed_from": 1},
    {"step": 2, "tokens": 20, "loss": 3.25, "lr": 0.1},
]


@examples("run folder", 200)
@given(data=st.data())
def test_metrics_of_any_content(tmp_path_factory, data):
    """Every line counts or is named; only the part of a line that is being written is passed over."""
    folder = tmp_path_factory.getbasetemp() / "metrics"
    folder.mkdir(exist_ok=True)
    whole = "".join(json.dumps(line) + "\n" for line in LINES)
    if data.draw(st.booleans()):
        changed = data.draw(mutated(LINES))
        (folder / "metrics.jsonl").write_text("".join(as_json(line) + "\n" for line in changed), encoding="utf-8")
    else:
        (folder / "metrics.jsonl").write_bytes(data.draw(damaged(whole.encode())))
    documented(lambda: state.read_metrics(folder), "metrics.jsonl:")
    documented(lambda: curve(folder), "metrics.jsonl")


def test_a_line_being_written_is_no_record_yet(tmp_path):
    whole = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "tok')
    assert state.read_metrics(tmp_path) == [*LINES[:2], LINES[4]]
    assert documented(lambda: curve(tmp_path))["loss"] == [3.5, 3.25]
