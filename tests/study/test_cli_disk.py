"""Sizes, `threefold status` over all runs, and `threefold clean`: what goes, what stays, what is refused."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from cli_fixtures import sealed_run
from shared import call

from basics import paths
from basics.files import SMALL
from papertrail import scheduler
from papertrail import stage as run_folder
from study.cli import folders
from study.preset import load_preset, to_toml
from study.run import open_run

RESULTS = {
    "config.toml": 0,
    "pretrain/model.safetensors": 3000,
    "pretrain/run.json": 10,
    "evaluation/sft/items/a.parquet": 200,
    "notebooks/02_sft.ipynb": 40,
    ".data_dir": 5,
}
LEFTOVERS = {
    "report/index.html": 1000,
    "tensorboard/sft/events": 60,
    "wandb/offline-run-1/run-1.wandb": 40,
    ".dpo.partial/resume.safetensors": 700,
    ".executing/03_dpo.ipynb": 7,
    "notebooks/03_dpo.failed.ipynb": 30,
    "pretrain/.run.json.12345678.tmp": 2,
    "evaluation/.sft.previous/run.json": 4,  # sft itself is there
}
NEEDED = {"evaluation/.dpo.previous/run.json": 6}  # a crash between two renames: the only evaluation of dpo


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A runs folder with runs `mine` and `other`, a cache and a folder that is no run; beside it something precious."""
    folder = (tmp_path / "runs").resolve()
    monkeypatch.setattr(paths, "RUNS", folder)
    for name in ("THREEFOLD_CACHE", "THREEFOLD_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for path, size in {**RESULTS, **LEFTOVERS, **NEEDED}.items():
        write(folder / "mine" / path, size)
    for name in ("mine", "other"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.toml").write_text(to_toml(load_preset("smoke")))
    write(folder / ".cache" / "tokens" / "abc" / "tokens.bin", 5000)
    write(folder / ".cache" / "hashes" / "x.json", 50)
    write(folder / "stray" / "notes.txt", 1)
    write(tmp_path / "precious" / "weights", 1)
    return folder


def write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (45_249_000, "45.2 MB"), (999_960, "1.0 MB"), (10**15, "1000.0 TB")],
)
def test_size_text(count, text):
    assert folders.size_text(count) == text


def test_sizes_count_links_as_links(runs):
    before = folders.size(runs / "other")
    (runs / "other" / "link").symlink_to(runs / ".cache", target_is_directory=True)
    assert folders.size(runs / "other") < before + 5000
    assert folders.size(runs / ".cache") == 5050


def test_keep_results_takes_only_what_can_be_made_again(runs, capsys):
    status, out, err = call(capsys, "clean", "--run", "mine", "--keep-results", "--yes")
    assert (status, err) == (0, "")
    assert files(runs / "mine") == {*RESULTS, *NEEDED}
    assert out.splitlines()[-1] == f"{folders.size_text(sum(LEFTOVERS.values()))} to free"
    assert "runs/mine/report" in out and "1.0 kB" in out
    assert call(capsys, "clean", "--run", "mine", "--keep-results") == (0, "nothing to remove\n", "")


def test_a_run_goes_whole_and_nothing_else(runs, capsys):
    size = folders.size(runs / "mine")
    status, out, _ = call(capsys, "clean", "--run", "mine", "--yes")
    assert status == 0 and not (runs / "mine").exists()
    assert f"{folders.size_text(size)} to free" in out and "runs/mine/pretrain" in out
    assert {path.name for path in runs.iterdir()} == {"other", ".cache", "stray"}


def test_the_cache(runs, capsys):
    status, out, _ = call(capsys, "clean", "--cache", "--yes")
    assert status == 0 and "  50 B  runs/.cache/hashes" in out and "5.0 kB to free" in out
    assert not list((runs / ".cache").iterdir()) and files(runs / "mine") == {*RESULTS, *LEFTOVERS, *NEEDED}
    write(runs / ".cache" / "revisions.json", 9)  # which commit the hub gave first: nothing makes it again
    assert call(capsys, "clean", "--cache", "--yes") == (0, "nothing to remove\n", "")
    assert (runs / ".cache" / "revisions.json").is_file()


def test_without_yes_a_script_removes_nothing(runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    before = files(runs)
    status, out, err = call(capsys, "clean", "--run", "mine")
    assert status == 2 and "to free" in out
    assert err == "threefold: nothing was removed: --yes removes it without asking\n"
    assert files(runs) - {"mine/.lock"} == before


@pytest.mark.parametrize(
    ("answer", "stays"), [("y\n", False), ("YES\n", False), ("\n", True), ("n\n", True), ("yep\n", True), ("", True)]
)
def test_a_person_is_asked(runs, capsys, monkeypatch, answer, stays):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    status, out, _ = call(capsys, "clean", "--run", "other")
    assert status == 0 and "Remove? [y/N] " in out
    assert (runs / "other" / "config.toml").exists() == stays


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --run --cache is required"),
        (["--run", "mine", "--cache"], "not allowed with"),
        (["--cache", "--keep-results"], "--keep-results is about a run"),
        (["--run", "mien"], "no run 'mien', did you mean mine?"),
        (["--run", "stray"], "no run 'stray'"),
        (["--run", "../precious"], "a name has only"),
        (["--run", ".cache"], "a name has only"),
        (["--run", ""], "one of the arguments --run --cache is required"),
        (["--run", "linked"], "run linked is a link"),
        (["--run", "linked", "--keep-results"], "run linked is a link"),
        (["--run", "inside", "--keep-results"], "leads out of the runs folder"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_everything(runs, capsys, arguments, said):
    precious = runs.parent / "precious"
    (precious / "config.toml").touch()
    write(precious / "a.failed.ipynb", 1)
    (runs / "linked").symlink_to(precious, target_is_directory=True)
    (runs / "inside").mkdir()
    (runs / "inside" / "config.toml").touch()
    (runs / "inside" / "notebooks").symlink_to(precious, target_is_directory=True)
    before = files(runs.parent)
    status, _, err = call(capsys, "clean", *arguments, "--yes")
    assert status == 2 and said in err and err.count("\n") == 1
    assert {path for path in files(runs.parent) if not path.endswith("/.lock")} == before


def test_a_cache_elsewhere_is_refused(runs, capsys, monkeypatch):
    monkeypatch.setenv("THREEFOLD_CACHE", str(runs.parent / "precious"))
    status, _, err = call(capsys, "clean", "--cache", "--yes")
    assert status == 2 and "not in the runs folder" in err and err.count("\n") == 1
    assert (runs.parent / "precious" / "weights").exists()


def test_links_are_removed_not_followed(runs, capsys):
    (runs / "mine" / "seeds").symlink_to(runs.parent / "precious", target_is_directory=True)
    (runs / "mine" / "pretrain" / "deep").symlink_to(runs.parent / "precious", target_is_directory=True)
    assert call(capsys, "clean", "--run", "mine", "--yes")[0] == 0
    assert not (runs / "mine").exists() and (runs.parent / "precious" / "weights").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_nothing_is_removed_under_a_run_at_work(runs, capsys):
    before = files(runs)
    with scheduler.lock(runs / "mine"):
        for arguments in (["--run", "mine"], ["--run", "mine", "--keep-results"], ["--cache"]):
            status, _, err = call(capsys, "clean", *arguments, "--yes")
            assert status == 2 and "mine is" in err and err.count("\n") == 1
        assert scheduler.at_work(runs / "mine") and not scheduler.at_work(runs / "other")
        told = json.loads(call(capsys, "status", "--json")[1])["runs"]
        assert {run["run"]: run["at_work"] for run in told} == {"mine": True, "other": False}
        assert "(at work)" in call(capsys, "status")[1]
    work = runs / "mine" / ".sft.partial"
    run_folder.hold(work)  # as a notebook that papermill executes by itself
    try:
        for arguments in (["--run", "mine"], ["--run", "mine", "--keep-results"], ["--cache"]):
            status, _, err = call(capsys, "clean", *arguments, "--yes")
            assert status == 2 and "run mine is at work" in err and err.count("\n") == 1
    finally:
        run_folder.release(work)
    assert files(runs) - {"mine/.lock", ".cache/code.json"} == before  # `status` keeps what it parsed
    assert not scheduler.at_work(runs / "mine")
    assert call(capsys, "clean", "--run", "mine", "--yes")[0] == 0


def test_a_removal_cut_short_can_be_taken_up_again(runs, capsys, monkeypatch):
    remove, removed = folders.shutil.rmtree, []

    def stop(path, *rest, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    monkeypatch.setattr(folders.shutil, "rmtree", stop)
    assert call(capsys, "clean", "--run", "mine", "--yes")[0] == 130
    assert removed and (runs / "mine" / "config.toml").exists()
    monkeypatch.undo()
    monkeypatch.setattr(paths, "RUNS", runs)
    assert call(capsys, "clean", "--run", "mine", "--yes")[0] == 0 and not (runs / "mine").exists()


def test_status_of_all_runs(runs, capsys):
    (runs / "other" / "config.toml").write_text("no_such_key = 1\n")
    found = json.loads(call(capsys, "status", "--json")[1])
    assert found["cache_bytes"] >= 5050
    mine, other = found["runs"]
    assert mine["run"] == "mine" and mine["bytes"] == folders.size(runs / "mine") and mine["error"] is None
    stages = open_run("", "mine", create=False)
    assert sum(mine["stages"].values()) > 10 and set(mine["stages"]) == {"fresh", "stale", "missing", "failed"}
    assert stages.name == "mine" and mine["stages"]["failed"] == 1  # 03_dpo.failed.ipynb
    assert "no_such_key" in other["error"] and sum(other["stages"].values()) == 0
    status, out, err = call(capsys, "status")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert (status, err) == (0, "") and list(lines) == ["mine", "other", ".cache"]
    assert folders.size_text(mine["bytes"]) in lines["mine"] and "1 failed" in lines["mine"]
    assert "no_such_key" in lines["other"]


def test_no_runs_yet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "none")
    assert call(capsys, "status") == (0, "no runs yet: `threefold run --preset smoke` makes one\n", "")
    assert json.loads(call(capsys, "status", "--json")[1]) == {"runs": [], "cache_bytes": 0}
    assert not (tmp_path / "none").exists()


WATCHED = """
import sys, time
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from study.cli import main
assert main(["status"]) == 0
print(sum(file.endswith(".safetensors") for file in opened), {"torch", "numpy", "pandas"} & sys.modules.keys())
print(time.process_time())
"""


def test_status_of_fifty_runs_takes_seconds(tmp_path, monkeypatch):
    """Large files that have not changed are not read again, and nothing is imported that takes seconds. (Five seconds
    are the limit on a quiet machine; this is CPU time, which other processes do not count in.)"""
    run = sealed_run(tmp_path, monkeypatch, size=SMALL)
    for number in range(49):
        shutil.copytree(run.path, paths.RUNS / f"copy{number}", copy_function=os.link)
    said = []
    for _ in range(2):
        environment = os.environ | {"THREEFOLD_RUNS": str(paths.RUNS), "PYTHONPATH": str(paths.PACKAGES)}
        done = subprocess.run([sys.executable, "-c", WATCHED], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert [lines[-2] for lines in said] == ["150 set()", "0 set()"]
    assert said[0][:50] == said[1][:50] and all("3 fresh" in line for line in said[1][:50])
    assert float(said[1][-1]) < 5
