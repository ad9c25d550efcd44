"""Run folders in which anything was changed, environment variables and command lines of any content: what the command
is for, or one line."""

import io
import os
import shutil
from pathlib import Path

import pytest
from cli_fixtures import sealed_run
from hypothesis import given
from hypothesis import strategies as st
from properties import damaged, documented, examples
from shared import call

from basics import paths
from basics.errors import ThreefoldError
from papertrail import scheduler
from papertrail.verify import verify
from study.cli import common
from study.run import open_run
from threefold.training import rendezvous


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with three finished stages, which verifies."""
    with pytest.MonkeyPatch.context() as patch:
        run = sealed_run(tmp_path_factory.mktemp("whole"), patch)
        assert verify(run)[1] == []
    (run.path / ".data_dir").write_text(str(run.path))
    (run.path / ".lock").write_text("1")
    return run.path


@pytest.fixture
def runs(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "any-runs"
    monkeypatch.setattr(paths, "RUNS", folder)
    return folder


def change(draw, run: Path) -> None:
    """Change one thing of a run's folder, as hands, disks and copying do."""
    entries = sorted(path for path in run.rglob("*") if path.exists() and not path.is_symlink())
    if not entries:
        return
    path, other = (draw(st.sampled_from(entries)) for _ in range(2))
    what = draw(
        st.sampled_from(["damage"] * 4 + ["remove", "file", "folder", "link", "loop", "pipe", "device", "swap"])
    )
    if what == "damage" and path.is_file():
        path.write_bytes(draw(damaged(path.read_bytes())))
        return
    if what == "swap" and path.is_file() and other.is_file():
        content = path.read_bytes(), other.read_bytes()
        other.write_bytes(content[0]), path.write_bytes(content[1])
        return
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "file":
        path.write_text("x")
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(run.parent)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")


def content(folder: Path) -> dict[str, bytes]:
    """The files that hold results, by path: not the note of the data folder and the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".data_dir", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@examples("run folder", 60)
@given(data=st.data())
def test_a_run_folder_in_which_anything_was_changed(whole, runs, capsys, data):
    """`verify` names what differs, and no command takes a changed file for what a stage wrote."""
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(whole, runs / "tiny")
    for _ in range(data.draw(st.integers(1, 2))):
        change(data.draw, runs / "tiny")
    for words in (["status"], ["status", "--run", "tiny"], ["compare", "tiny", "other"], ["tensorboard", "--run=tiny"]):
        status, out, err = call(capsys, *words)
        assert status in (0, 2) and bool(out) == (status == 0) and err.count("\n") == (status == 2), err
    status, out, err = call(capsys, "verify", "--run", "tiny")
    same = content(whole) == content(runs / "tiny")
    assert status == 0 if same else status in (1, 2), (out, err)
    if documented(lambda: common.open_intact("tiny")):
        kept = content(runs / "tiny")
        assert all(kept.get(name, old) == old for name, old in content(whole).items())


# Where words are expected; what would train, wait for a terminal or write outside of the runs folder is not tried.
COMMANDS = ("run", "new", "train", "status", "verify", "compare", "tensorboard", "clean", "generate", "chat", "export")
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=8),
    st.sampled_from(["tiny", "no-such-run", "smoke.toml", "sft", "dpo", "=", "--", "-", "--run", "--json", "--stage"]),
    st.sampled_from(["--set", "--only", "sft.steps=0", "a=b", "../x", "/dev/null", "1e9", "9" * 5000, "\ud800", "~x"]),
)


def started(*_, **__):
    raise ThreefoldError("a run is not started here")


@examples("command line", 80)
@given(command=st.sampled_from(COMMANDS) | st.text(max_size=5), words=st.lists(WORDS, max_size=4))
def test_a_command_line_of_any_words(whole, runs, tmp_path_factory, capsys, command, words):
    """An answer and exit 0, or one line and exit 2; the run stays as it is."""
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(whole, runs / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setattr("sys.stdin", io.StringIO())
        patch.setattr(scheduler, "execute", started)
        status, out, err = call(capsys, command, *words)
    assert (status, err.count("\n")) in ((0, 0), (2, 1), (1, 1)), (status, out, err)
    assert content(runs / "tiny") == content(whole)


NUMBERS = st.sampled_from(["0", "1", "2", "-1", "3", "65536", "x", "", "1.5", "٣", "9" * 5000, "0x1", " 2", "1\n"])
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "COMP_POINT", "OMP_NUM_THREADS")
PLACES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ["/dev/null", "/proc/x", "~no-such-user", "a" * 5000, "a/" * 3000, ".", "loop", "\x1b[2J", "{{< x >}}"]
)


@examples("environment variable", 40)
@given(numbers=st.dictionaries(st.sampled_from(VARIABLES), NUMBERS), place=PLACES)
def test_environment_variables_of_any_value(runs, tmp_path_factory, capsys, numbers, place):
    """Numbers of workers and places of folders: understood, or one line that names the variable."""
    here = tmp_path_factory.getbasetemp() / "environment"
    if not here.exists():
        here.mkdir()
        (here / "loop").symlink_to("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name in (*VARIABLES, "MASTER_ADDR", "THREEFOLD_DATA"):
            patch.delenv(name, raising=False)
        for name, value in {**numbers, "MASTER_ADDR": "localhost", "COMP_LINE": "threefold st"}.items():
            patch.setenv(name, value)
        found = documented(rendezvous.rank_and_size, "environment")
        assert found is None or 0 <= found[0] < found[1]
        assert call(capsys, "completion", "words")[::2] == (0, "")
        patch.setenv("THREEFOLD_RUNS", place)
        patch.setattr(paths, "RUNS", paths.named_by("THREEFOLD_RUNS", runs))
        status, _, err = call(capsys, "status")
        assert (status, err.count("\n")) in ((0, 0), (2, 1)), err
        if documented(lambda: open_run("smoke"), "THREEFOLD_RUNS"):
            assert call(capsys, "status")[0] == 0
        patch.setenv("THREEFOLD_DATA", place)
        folder = documented(lambda: open_run("smoke", create=False).data_dir, "$THREEFOLD_DATA")
        assert not folder or os.path.isdir(folder)
