"""metrics.jsonl as TensorBoard's scalars, through a writer with the interface of torch's SummaryWriter."""

import ast
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
from cli_fixtures import STARTED, trained_run

from basics.errors import MissingInput, TrainingError
from study import cli
from study.cli import curves
from study.preset import load_preset
from study.run import Run


class FakeWriter:
    """Keeps what it is told in a file of its folder."""

    def __init__(self, log_dir: str):
        self.folder, self.told = Path(log_dir), []
        self.folder.mkdir(parents=True)

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        self.told.append([tag, scalar_value, global_step, walltime])

    def close(self):
        (self.folder / "events.json").write_text(json.dumps(self.told))


@pytest.fixture
def run(tmp_path, monkeypatch):
    return trained_run(tmp_path, monkeypatch)


def test_every_number_that_counts_becomes_a_scalar(run):
    out = curves.to_tensorboard(run, FakeWriter)
    assert out == run.path / "tensorboard"
    assert sorted(path.name for path in out.iterdir()) == ["pretrain", "pretrain-seed2", "sft"]
    told = json.loads((out / "pretrain" / "events.json").read_text())
    began = STARTED.timestamp()
    assert [
        entry for entry in told if entry[0] in ("train/loss", "heldout/loss", "heldout/margin", "train/tokens")
    ] == [
        ["train/tokens", 100, 1, began + 2.0],
        ["train/loss", 2.5, 1, began + 2.0],
        ["heldout/loss", 2.75, 1, began + 2.0],
        ["train/tokens", 200, 2, began + 5.5],  # the step that was taken again, not its first attempt
        ["train/loss", 2.25, 2, began + 5.5],
        ["heldout/loss", 2.5, 2, began + 5.5],
        ["heldout/margin", 0.25, 2, began + 5.5],
    ]
    assert {entry[0] for entry in told} >= {"train/lr", "train/grad_norm", "train/tokens_per_second"}
    assert not {"train/step", "train/seconds", "heldout/tokens"} & {entry[0] for entry in told}


def test_a_second_export_replaces_the_first(run):
    (curves.to_tensorboard(run, FakeWriter) / "old").touch()
    curves.to_tensorboard(run, FakeWriter)
    assert not (run.path / "tensorboard" / "old").exists()


def test_a_damaged_line_names_the_file_and_leaves_the_export_that_was_there(run):
    curves.to_tensorboard(run, FakeWriter)
    with open(run.partial_folder("sft") / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo\n')
    with pytest.raises(TrainingError, match=r"\.sft\.partial/metrics\.jsonl:7: not JSON"):
        curves.to_tensorboard(run, FakeWriter)
    assert (run.path / "tensorboard" / "sft" / "events.json").exists()


def test_nothing_trained_yet(tmp_path):
    empty = Run.of("empty", tmp_path / "empty", load_preset("smoke"))
    with pytest.raises(MissingInput, match="run empty has trained no stage yet"):
        curves.to_tensorboard(empty, FakeWriter)


def test_the_interface_is_that_of_torchs_writer():
    """Read from torch's source: importing it needs the package tensorboard."""
    (home,) = importlib.util.find_spec("torch").submodule_search_locations
    source = ast.parse((Path(home) / "utils" / "tensorboard" / "writer.py").read_text())
    (writer,) = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "SummaryWriter")
    takes = {
        node.name: [argument.arg for argument in node.args.args]
        for node in writer.body
        if isinstance(node, ast.FunctionDef)
    }
    assert takes["__init__"][1] == "log_dir"
    assert takes["add_scalar"][1:5] == ["tag", "scalar_value", "global_step", "walltime"]
    assert takes["close"] == ["self"]


def test_the_command(run, monkeypatch, capsys):
    fake = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert cli.main(["tensorboard", "--run", "mine"]) == 0
    assert "tensorboard --logdir" in capsys.readouterr().out and (run.path / "tensorboard" / "sft").is_dir()


def test_tensorboard_reads_what_its_own_writer_wrote(run):
    pytest.importorskip("tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.main(["tensorboard", "--run", "mine"]) == 0
    read = EventAccumulator(str(run.path / "tensorboard" / "sft"))
    read.Reload()
    assert [(one.step, one.value, one.wall_time) for one in read.Scalars("train/loss")] == [
        (1, 2.5, STARTED.timestamp() + 2.0),
        (2, 2.25, STARTED.timestamp() + 5.5),
    ]
    assert [one.value for one in read.Scalars("heldout/loss")] == [2.75, 2.5]


def test_without_tensorboard_the_extra_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["tensorboard", "--run", "mine"]) == 2
    _, err = capsys.readouterr()
    assert err == "threefold: TensorBoard is not installed: `pip install -e '.[tensorboard]'`\n"
    assert not (run.path / "tensorboard").exists()
