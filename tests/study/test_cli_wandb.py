"""metrics.jsonl as offline runs of Weights & Biases: read again from what the real package wrote, where it is
installed."""

import json
import os
import struct
import subprocess
import sys
import types

import pytest
from cli_fixtures import LINES, STARTED, trained_run

from study import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    return trained_run(tmp_path, monkeypatch)


def records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: seven bytes of head, then LevelDB's log of 32 KiB blocks."""
    assert data.startswith(b":W&B")
    found, part, at = [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its pieces
            found.append(part)
            part = b""
    return found


def test_an_offline_run_holds_every_number_and_nothing_of_the_machine(run):
    pytest.importorskip("wandb", exc_type=ImportError)
    from wandb.proto.wandb_internal_pb2 import Record

    # In a process of its own: the package leaves a service running until its process ends.
    code = "import sys; from study import cli; sys.exit(cli.main(['wandb', '--run', 'mine']))"
    environment = os.environ | {"THREEFOLD_RUNS": str(run.path.parent)}
    environment |= {
        "WANDB_CONFIG_DIR": str(run.path.parent / "config"),
        "WANDB_MODE": "online",
        "WANDB_DIR": "elsewhere",
    }
    for _ in range(2):  # the second replaces the first
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "nothing was sent" in done.stdout
    made = {}
    for folder in (run.path / "wandb").iterdir():
        assert folder.name.startswith("offline-run-")
        (file,) = folder.glob("run-*.wandb")
        assert str(run.path.parent).encode() not in file.read_bytes()
        read = [Record.FromString(one) for one in records(file.read_bytes())]
        (about,) = [one.run for one in read if one.HasField("run")]
        assert about.host == "" and not list((folder / "files").iterdir())
        steps = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in one.history.item}
            for one in read
            if one.HasField("history")
        ]
        made[about.display_name] = (about, steps)
    assert sorted(made) == ["mine/pretrain", "mine/pretrain-seed2", "mine/sft"]
    about, steps = made["mine/sft"]
    assert (about.project, about.run_group, about.job_type) == ("threefold", "mine", "sft")
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["seeds"] == 2 and config["sft"]["learning_rate"] == run.preset.sft.learning_rate
    began = STARTED.timestamp()
    series = [
        {key: step.get(key) for key in ("_step", "_timestamp", "train/loss", "heldout/loss", "heldout/margin")}
        for step in steps
    ]
    assert series == [
        {"_step": 1, "_timestamp": began + 2.0, "train/loss": 2.5, "heldout/loss": 2.75, "heldout/margin": None},
        {"_step": 2, "_timestamp": began + 5.5, "train/loss": 2.25, "heldout/loss": 2.5, "heldout/margin": 0.25},
    ]
    assert {key for step in steps for key in step} >= {"train/lr", "train/grad_norm", "train/tokens"}


def test_without_the_package_the_extra_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["wandb", "--run", "mine"]) == 2
    said = capsys.readouterr().err
    assert said == "threefold: Weights & Biases is not installed: `pip install -e '.[wandb]'`\n"
    assert not (run.path / "wandb").exists()


def test_a_damaged_line_leaves_the_export_that_was_there(run, capsys, monkeypatch):
    # Nothing of the package is used before all curves are read.
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    (run.path / "wandb").mkdir()
    with open(run.partial_folder("sft") / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo\n')
    assert cli.main(["wandb", "--run", "mine"]) == 2
    assert f"metrics.jsonl:{len(LINES) + 1}: not JSON" in capsys.readouterr().err
    assert (run.path / "wandb").is_dir()
