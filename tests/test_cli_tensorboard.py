"""metrics.jsonl as TensorBoard's scalars, through a writer with the interface of torch's SummaryWriter."""

import ast
import importlib.util
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from threefold import cli, config, paths
from threefold.cli import tensorboard
from threefold.errors import MissingInput, TrainingError
from threefold.run import Run

LINES = [
    {"step": 1, "tokens": 100, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0, "seconds": 2.0},
    {"step": 1, "tokens": 100, "heldout_loss": 2.75},
    {"step": 2, "tokens": 200, "loss": 9.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0, "seconds": 4.0},
    {"resumed_from": 1},
    {"step": 2, "tokens": 200, "loss": 2.25, "lr": 0.2, "grad_norm": 1.5, "tokens_per_second": 50.0, "seconds": 5.5},
    {"step": 2, "tokens": 200, "heldout_loss": 2.5, "heldout_margin": 0.25},
]
STARTED = datetime(2026, 1, 1, tzinfo=UTC)


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
    """Stage pretrain finished, stage sft and the second seed's pretraining at work."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    made = Run("mine", tmp_path / "mine", config.load_preset("smoke", ["seeds=2"]))
    again = [made.partial_folder("sft"), made.partial_folder("pretrain-seed2")]
    for folder in (made.stage_folder("pretrain"), *again):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
        facts = {"stage": "x", "fingerprint": {}, "outputs": {}, "started": STARTED.isoformat()}
        (folder / "run.json").write_text(json.dumps(facts))
    (made.path / "config.toml").write_text(config.to_toml(made.preset))
    return made


def test_every_number_that_counts_becomes_a_scalar(run):
    out = tensorboard.export(run, FakeWriter)
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
    (tensorboard.export(run, FakeWriter) / "old").touch()
    tensorboard.export(run, FakeWriter)
    assert not (run.path / "tensorboard" / "old").exists()


def test_a_damaged_line_names_the_file_and_leaves_the_export_that_was_there(run):
    tensorboard.export(run, FakeWriter)
    with open(run.partial_folder("sft") / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo\n')
    with pytest.raises(TrainingError, match=r"\.sft\.partial/metrics\.jsonl:7: not JSON"):
        tensorboard.export(run, FakeWriter)
    assert (run.path / "tensorboard" / "sft" / "events.json").exists()


def test_nothing_trained_yet(tmp_path):
    empty = Run("empty", tmp_path / "empty", config.load_preset("smoke"))
    with pytest.raises(MissingInput, match="run empty has trained no stage yet"):
        tensorboard.export(empty, FakeWriter)


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
    monkeypatch.setattr(tensorboard, "summary_writer", lambda: FakeWriter)
    assert cli.main(["tensorboard", "--run", "mine"]) == 0
    assert "tensorboard --logdir" in capsys.readouterr().out and (run.path / "tensorboard" / "sft").is_dir()


def test_without_tensorboard_the_extra_is_named(run, monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def absent(name, *rest, **options):
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert cli.main(["tensorboard", "--run", "mine"]) == 2
    _, err = capsys.readouterr()
    assert err == "threefold: TensorBoard is not installed: `pip install -e '.[tensorboard]'`\n"
    assert not (run.path / "tensorboard").exists()
