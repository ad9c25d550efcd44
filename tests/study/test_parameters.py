"""The notebooks' parameters as papermill hands them over: listed, read as they were meant, and never a surprise."""

import ast
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from shared import ONE_STEP

from basics import machine, paths
from basics.errors import ConfigError
from study import explore
from study import run as study_run
from study.run import open_stage

NOTEBOOKS = sorted(path for path in paths.NOTEBOOKS.glob("*.ipynb") if path.stem != "colab")  # that one has none


def parameters_cell(notebook) -> str:
    (cell,) = (c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", ()))
    return cell.source


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_lists_every_parameter(notebook):
    source = parameters_cell(notebook)
    assigned = [target.id for statement in ast.parse(source).body for target in statement.targets]
    assert not [line for line in source.splitlines() if "=" in line.partition("#")[2]], "papermill parses no such line"
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  (\w+): Unknown type \(default", done.stdout, re.MULTILINE)
    assert listed == assigned and "Unable to parse" not in done.stdout + done.stderr
    for line in source.splitlines():
        assert " ".join(line.partition("# ")[2].split()) in " ".join(done.stdout.split())


@pytest.fixture
def project(tmp_path, monkeypatch):
    sizes = "[model]\nn_layer = 1\nd_model = 16\nn_head = 2\nd_ff = 32\ncontext = 32\n[tokenizer]\nvocab_size = 265\n"
    (tmp_path / "tiny.toml").write_text(sizes + ONE_STEP)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["001", "1e3", "1_000", "+7", "True", "-0", "1.50", "inf"])
@pytest.mark.parametrize("name", ["run", "data_dir", "preset"])
def test_a_text_that_papermill_reads_as_a_number_is_refused_with_the_way_out(project, monkeypatch, name, text):
    from papermill.cli import _resolve_type

    monkeypatch.setattr(study_run, "passed_to_papermill", {name: text}.get)
    with pytest.raises(ConfigError, match=re.escape(f"`-r {name} {text}`")) as caught:
        open_stage("data", **{"preset": "tiny.toml", name: _resolve_type(text)})
    assert "\n" not in str(caught.value) and not (project / "runs").exists()
    if name == "run":
        with pytest.raises(ConfigError, match=re.escape(f"`-r run {text}`")):
            explore.open_run(_resolve_type(text))


def test_a_number_that_tells_its_text_is_a_name(project, monkeypatch):
    monkeypatch.setattr(study_run, "passed_to_papermill", {"run": "2024"}.get)
    assert open_stage("data", preset="tiny.toml", run=2024).run.name == "2024"
    monkeypatch.undo()
    assert study_run.text_parameter("run", 2024) == "2024"  # of a script that calls papermill


@pytest.mark.slow
def test_papermill_itself_with_a_run_of_digits(tmp_path):
    out = tmp_path / "001" / "notebooks" / "00_data.ipynb"
    out.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "papermill", str(paths.NOTEBOOKS / "00_data.ipynb"), str(out), "-p", "run", "001"]
    environment = os.environ | {"THREEFOLD_RUNS": str(tmp_path), "PYTHONPATH": str(paths.PACKAGES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "use `-r run 001`" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["001"]


def finished(stage: str, **parameters):
    opened = open_stage(stage, preset="tiny.toml", **parameters)
    (opened.begin() / "x.txt").write_text("x")
    opened.finish(tokens=1)
    return opened.run


def test_other_settings_than_those_of_a_finished_stage_are_asked_about(project):
    for stage in ("data", "pretrain", "sft"):
        run = finished(stage)
    config = (run.path / "config.toml").read_text()
    for stage, changed in (
        ("sft", {"steps": 10}),
        ("dpo", {"overrides": "sft.steps=10"}),
        ("data", {"overrides": "seed=3"}),
    ):
        with pytest.raises(ConfigError) as caught:
            open_stage(stage, preset="tiny.toml", **changed)
        for part in ("of run tiny is finished", "`-p run NAME`", "-p preset ''", "`-p overwrite true`"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value) and (run.path / "config.toml").read_text() == config
    with pytest.raises(ConfigError, match=r"sft\.steps 1 -> 10"):
        open_stage("sft", preset="tiny.toml", steps=10)

    assert open_stage("sft", preset="tiny.toml").config.steps == 1, "the same settings are no question"
    assert open_stage("dpo", preset="tiny.toml", steps=7).config.steps == 7, "dpo is not finished"
    assert open_stage("sft", preset="", run="tiny").preset.dpo.steps == 7, "the run's own settings"
    assert open_stage("sft", preset="tiny.toml", run="other", steps=10).config.steps == 10
    for yes in (True, "true"):
        assert open_stage("sft", preset="tiny.toml", steps=11, overwrite=yes).config.steps == 11
    with pytest.raises(ConfigError, match="parameter overwrite = 'yes': expected true or false"):
        open_stage("sft", preset="tiny.toml", overwrite="yes")


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "idle", "stage", "threads", "said"),
    [
        (8, 8, "pretrain", 4, "pretrain: 4 threads (as in threefold run, of 8 cores); OMP_NUM_THREADS sets"),
        (
            8,
            2,
            "pretrain",
            2,
            "pretrain: 2 threads (threefold run would take 4, but 2 of 8 cores are idle; last digits",
        ),
        (2, 1, "pretrain", 1, "pretrain: 1 thread (as in threefold run, of 2 cores)"),
        (8, 8, "speed", 8, "speed: 8 threads (as in threefold run"),
        (8, 8, "data", None, ""),
    ],
)
def test_a_bare_notebook_takes_the_threads_that_are_idle_and_says_so(
    project, monkeypatch, capsys, cores, idle, stage, threads, said
):
    monkeypatch.setattr("papertrail.plan.cores", lambda: cores)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "free_cores", lambda: idle)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    open_stage(stage, preset="tiny.toml")
    assert chosen == [] and capsys.readouterr().out == ""  # whoever set it has chosen
    monkeypatch.delenv("OMP_NUM_THREADS")
    open_stage(stage, preset="tiny.toml")
    assert chosen == ([threads] if threads else []) and capsys.readouterr().out.startswith(said)


def test_idle_cores_are_counted_within_those_of_the_process(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    for idle, expected in ((100, 4), (20, 3), (8, 1), (0, 1)):
        monkeypatch.setattr(psutil, "cpu_times_percent", lambda _, idle=idle: SimpleNamespace(idle=idle))
        assert machine.free_cores() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the processes of other users count on Linux")
def test_the_load_of_other_processes_is_seen(monkeypatch):
    """A child that computes for half a second or more of the processor; this process alone counts nothing."""
    load, began, mine = machine.OtherLoad(), time.perf_counter(), time.process_time()
    subprocess.run([sys.executable, "-c", "while __import__('time').process_time() < 0.5: pass"], check=True)
    wall = time.perf_counter() - began
    assert load.cores() * wall > 0.4 and time.process_time() - mine < 0.3
