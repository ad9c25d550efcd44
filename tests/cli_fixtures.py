"""Runs for the commands: one at work, whose curves are exported, and one with finished stages."""

import json
from datetime import UTC, datetime
from pathlib import Path

from report_fixtures import cell, notebook, output
from shared import ONE_STEP

from basics import files, paths
from papertrail.run import with_hash
from study.preset import load_preset, to_toml
from study.run import Run, open_run, open_stage

LINES = [
    {"step": 1, "tokens": 100, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0, "seconds": 2.0},
    {"step": 1, "tokens": 100, "heldout_loss": 2.75},
    {"step": 2, "tokens": 200, "loss": 9.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0, "seconds": 4.0},
    {"resumed_from": 1},
    {"step": 2, "tokens": 200, "loss": 2.25, "lr": 0.2, "grad_norm": 1.5, "tokens_per_second": 50.0, "seconds": 5.5},
    {"step": 2, "tokens": 200, "heldout_loss": 2.5, "heldout_margin": 0.25},
]
STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def trained_run(folder: Path, monkeypatch) -> Run:
    """Stage pretrain finished, stage sft and the second seed's pretraining at work."""
    monkeypatch.setattr(paths, "RUNS", folder)
    made = Run.of("mine", folder / "mine", load_preset("smoke", {"seeds": 2}))
    again = [made.partial_folder("sft"), made.partial_folder("pretrain-seed2")]
    for folder in (made.stage_folder("pretrain"), *again):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
        facts = {"stage": "x", "fingerprint": {}, "outputs": {}, "started": STARTED.isoformat()}
        files.write_note(folder / "run.json", facts)
    (made.path / "config.toml").write_text(with_hash(to_toml(made.preset)))
    return made


def sealed_run(folder: Path, monkeypatch, size: int = 0) -> Run:
    """Run `tiny` with three finished stages, their notebooks written and sealed as `threefold run` does.

    size: bytes that the weights have at least.
    """
    monkeypatch.setattr(paths, "RUNS", folder / "runs")
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    (folder / "tiny.toml").write_text('name = "tiny"\n' + ONE_STEP)
    for name in ("data", "pretrain", "sft"):
        stage = open_stage(name, preset=str(folder / "tiny.toml"))
        (stage.begin() / "model.safetensors").write_text(f"weights of {name}".ljust(size))
        facts = stage.finish(tokens=5)
        executed = stage.run.notebook(stage.run.spec(name).executed)
        notebook(executed, cell("finish()", output(f"stage/{name}", facts, "done"), output("loss", {"loss": 2.5}, "|")))
        stage.run.seal(name)
    return open_run("", "tiny")
