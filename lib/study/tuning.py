"""The trials before a training: short trainings on the same text, whose learning rates are the preset's times a
multiplier each. The rates of the trial with the lowest held-out loss are those that the stage trains with.

Every model has as many trials as any other, each for the same share of its training's length. A trial is a whole
training: its schedule ends where it ends. One that diverges has no held-out loss and is not chosen.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from basics.errors import DivergedError
from basics.files import read_note, write_note
from study.run import Stage
from study.training import RATES, prepare
from threefold.config import TrainConfig
from threefold.training.monitor import Progress


def trial_config(config: TrainConfig, multiplier: float, share: float) -> TrainConfig:
    """The training's configuration with its learning rates times the multiplier, for a share of its length."""
    (length,) = config.lengths
    whole = getattr(config, length)
    part = share * whole if length == "epochs" else max(1, round(share * whole))
    return replace(config, **{length: part}, **{key: multiplier * getattr(config, key) for key in RATES})


def run_trials(stage: Stage, folder: Path, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Train every trial of a stage "tune-..." in its folder, in the order of the multipliers.

    Each gives {"multiplier", the rates, "steps", "tokens", "heldout_loss" (after the last step, in nats per token; DPO:
    per pair; None if it diverged), "seconds" (in training steps)}, which a finished trial keeps as a note in the
    folder: it is not repeated. An interrupted trial is resumed from its last state. Raises what `prepare` and
    `threefold.training.train` do, DivergedError only if every trial diverged.
    """
    tuning, trials = stage.preset.tuning, []
    for number, multiplier in enumerate(tuning.multipliers, start=1):
        work, note = folder / f"trial-{number}", folder / f"trial-{number}.json"
        if (kept := read_note(note)) is None:
            inputs, config = prepare(stage), trial_config(stage.config, multiplier, tuning.share)
            name = f"{stage.name} × {multiplier:g}"
            try:
                result = inputs.train(config, work, seed=stage.seed, progress=progress, name=name).result
                measured = {key: getattr(result, key) for key in ("steps", "tokens", "heldout_loss", "seconds")}
            except DivergedError as error:
                print(error)
                measured = {"steps": 0, "tokens": 0, "heldout_loss": None, "seconds": 0.0}
            kept = {"multiplier": multiplier, **{key: getattr(config, key) for key in RATES}, **measured}
            write_note(note, kept)
        shutil.rmtree(work, ignore_errors=True)  # its weights; the note is what is kept
        trials.append(kept)
    if all(trial["heldout_loss"] is None for trial in trials):
        way = "lower its learning rates, or the smallest of tuning.multipliers"
        raise DivergedError(f"{stage.name}: every trial diverged; {way}")
    return trials


def choose(model: str, config: TrainConfig, trials: Sequence[Mapping[str, Any]], share: float) -> dict[str, Any]:
    """The choice between trials, without times: {"model", "optimizer", "multiplier", the rates, "heldout_loss",
    "trials", "share", "edge"}. Of equal losses the first is taken.

    edge: whether the best multiplier is the smallest or the largest, so that the best rate may lie outside the grid.
    """
    finished = [trial for trial in trials if trial["heldout_loss"] is not None]
    best = min(finished, key=lambda trial: trial["heldout_loss"])
    multipliers = [trial["multiplier"] for trial in trials]
    return {
        "model": model,
        "optimizer": config.optimizer,
        **{key: best[key] for key in ("multiplier", *RATES, "heldout_loss")},
        "trials": len(trials),
        "share": share,
        "edge": best["multiplier"] in (min(multipliers), max(multipliers)),
    }
