"""The lines of docs/trust.md: what `threefold verify` finds, who refuses it, and what a full forgery can do."""

import json
import shutil

import pytest
from cli_fixtures import sealed_run
from shared import call, flip

from basics import files
from basics.errors import CheckpointError, ConfigError, RecordError
from papertrail.run import CONFIG, RUN_FILE
from papertrail.verify import verify
from study.cli.common import open_intact
from study.run import open_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with three finished stages, their notebooks written and sealed as `threefold run` does."""
    made = sealed_run(tmp_path, monkeypatch)
    assert verify(made)[1] == []
    return made


def edit(file, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def without_hash(run) -> None:
    facts = json.loads((run.stage_folder("sft") / RUN_FILE).read_text())
    del facts[files.SELF]
    (run.stage_folder("sft") / RUN_FILE).write_text(json.dumps(facts))


def from_another_execution(run) -> None:
    """An unsealed notebook that published another execution's record."""
    file = run.stage_folder("sft") / RUN_FILE
    facts = {key: value for key, value in json.loads(file.read_text()).items() if key != files.SELF}
    del facts["notebook_sha256"]
    files.write_note(file, facts)
    edit(run.notebook("02_sft"), '"wall_seconds": ', '"wall_seconds": 1')


CASES = {
    "a changed output": (lambda run: flip(run.stage_folder("sft") / "model.safetensors"), "sft/model.safetensors"),
    "a missing output": (lambda run: (run.stage_folder("sft") / "model.safetensors").unlink(), "sft/model.safetensors"),
    "a changed run.json": (lambda run: edit(run.stage_folder("sft") / RUN_FILE, '"tokens": 5', '"tokens": 6'), "sft"),
    "a misnamed hash": (lambda run: edit(run.stage_folder("sft") / RUN_FILE, files.SELF, "note_sha257"), "sft"),
    "no hash": (without_hash, "sft"),
    "no run.json": (lambda run: (run.stage_folder("sft") / RUN_FILE).unlink(), "notebooks/02_sft.ipynb"),
    "no stage folder": (lambda run: shutil.rmtree(run.stage_folder("sft")), "notebooks/02_sft.ipynb"),
    "a changed notebook": (lambda run: edit(run.notebook("02_sft"), "2.5", "9.5"), "notebooks/02_sft.ipynb"),
    "another execution's notebook": (from_another_execution, "notebooks/02_sft.ipynb"),
    "a notebook of no stage": (
        lambda run: shutil.copy(run.notebook("02_sft"), run.notebook("04_evaluate-mine")),
        "notebooks/04_evaluate-mine.ipynb",
    ),
    "a changed config.toml": (lambda run: edit(run.path / CONFIG, "steps = 1", "steps = 3"), CONFIG),
    "a config.toml without its hash": (lambda run: edit(run.path / CONFIG, "# SHA-256", "# SHA-257"), CONFIG),
}


@pytest.mark.parametrize(("change", "named"), CASES.values(), ids=CASES.keys())
def test_what_was_changed_is_named_and_its_records_are_refused(run, capsys, change, named):
    """`verify` names it and exits with 1; what reads records (report, compare, curves) refuses in one line."""
    change(run)
    assert any(line.partition(":")[0] == named for line in verify(run)[1]), verify(run)[1]
    status, _, said = call(capsys, "verify", "--run", "tiny")
    assert status in (1, 2) and named.rpartition("/")[2] in said
    if "missing" not in said:  # a missing file is reported by the command that needs it
        with pytest.raises((CheckpointError, RecordError, ConfigError)) as caught:
            open_intact("tiny")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sft/mine.txt", "notebooks/mine.ipynb"])
def test_a_file_that_no_stage_wrote_is_named(run, name):
    shutil.copy(run.notebook("02_sft"), run.path / name)
    (problem,) = verify(run)[1]
    assert problem.startswith(f"{name}: ")


@pytest.mark.parametrize("stage", ["data", "pretrain"])
def test_a_parent_that_is_gone_or_another_is_named(run, stage):
    kept = run.path.parent / "kept"
    shutil.move(run.stage_folder(stage), kept)
    run.notebook(run.spec(stage).executed).unlink()
    assert f"sft: made from stage {stage}, which is not there" in verify(run)[1] or stage == "data"
    assert any(line.endswith(f"made from stage {stage}, which is not there") for line in verify(run)[1])


def test_any_bit_of_config_toml_counts(run):
    content = (run.path / CONFIG).read_bytes()
    for place in range(0, len(content), 7):
        for bit in (1, 16):
            (run.path / CONFIG).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            assert run.config_problem() != ""


def test_a_changed_config_is_not_run(run):
    edit(run.path / CONFIG, "steps = 1", "steps = 3")
    with pytest.raises(ConfigError, match=r"config\.toml of run tiny is not as .*--preset .*config\.toml"):
        open_run("", "tiny")
    assert (
        open_run(run.path / CONFIG, "tiny").preset.sft.steps == 3
    )  # asked for, it is taken, and written with its hash
    assert open_run("", "tiny").preset.sft.steps == 3


def test_a_copied_run_is_whole_under_its_new_name(run):
    shutil.copytree(run.path, run.path.with_name("trial"))
    copy = open_run("", "trial")
    assert verify(copy)[1] == [] and open_intact("trial").path == copy.path
    assert copy.finished("sft")["run"] == "tiny"  # under which its notebooks were executed, and are made again


def test_a_full_forgery_passes(run):
    """A result changed with every hash over it leaves nothing for `verify` to find: hashes are not signatures."""
    folder = run.stage_folder("sft")
    (folder / "model.safetensors").write_text("forged weights")
    facts = {key: value for key, value in json.loads((folder / RUN_FILE).read_text()).items() if key != files.SELF}
    facts["outputs"]["model.safetensors"] = files.sha256_bytes(b"forged weights")
    edit(run.notebook("02_sft"), "2.5", "9.5")
    facts["notebook_sha256"] = files.sha256_file(run.notebook("02_sft"))
    files.write_note(folder / RUN_FILE, facts)
    assert verify(run)[1] == []
