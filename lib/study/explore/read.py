"""What the views read of a run: checkpoints, loss curves, results of single items and the texts these are about."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from basics import files
from basics.errors import CheckpointError, ConfigError, MissingInput, RecordError, ThreefoldError
from basics.names import check_name, did_you_mean, replicate_of
from study import run as study_run
from study.comparison.load import Comparison
from study.preset import LINEAGE, TRAINED
from study.run import Run, data_dir_of, run_names
from threefold.config import SourceConfig
from threefold.data import sources
from threefold.data.templates import instruction_prompt
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation import perplexity
from threefold.model import load_checkpoint
from threefold.training.state import METRICS, curve


def open_run(name: str = "smoke", data_dir: str = "") -> Run:
    """A run as it was last configured, for reading only.

    data_dir: the folder of the evaluation items' texts; default $THREEFOLD_DATA, then the one the run was made with.
    Raises MissingInput, which lists the runs and names the command that makes one.
    """
    check_name(name, "run")
    names = run_names()
    if name not in names:
        raise MissingInput(
            f"no run {name!r}{did_you_mean(name, names)}; runs: {', '.join(names) or 'none yet'}; "
            "`threefold run --preset smoke` makes one"
        )
    return study_run.open_run("", name, data_dir=data_dir_of(name, data_dir), create=False)


# Stages -------------------------------------------------------------------------------------------------------------


def trainings(run: Run) -> list[str]:
    """The stages that train a model in this run's preset, replicates included."""
    return [name for name in run.plan if replicate_of(name)[0] in TRAINED]


def chosen(run: Run, names: str | Iterable[str]) -> list[str]:
    """Stages by name: a list, or one text with commas; default the three stages. Raises ConfigError for others."""
    named = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
    named = [name for name in named if name] or list(LINEAGE)
    allowed = trainings(run)
    for name in named:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ConfigError(f"stage {name!r}{hint}; run {run.name} trains {', '.join(allowed)}")
    return named


def finished(run: Run, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(the stages that are finished, for each other one a line with the command that makes it)."""
    present, missing = [], []
    for name in names:
        try:
            run.require(name)
            present.append(name)
        except MissingInput as error:
            missing.append(str(error))
    return present, missing


def checkpoint(run: Run, stage: str) -> tuple[Any, Any]:
    """(decoder, tokenizer) of a finished stage, cached by the stage's fingerprint."""
    facts = run.require(stage)
    return _checkpoint(run.intact(stage), facts["fingerprint"]["digest"])


@lru_cache(maxsize=12)
def _checkpoint(folder: Path, _digest: str) -> tuple[Any, Any]:
    return load_checkpoint(folder), load_tokenizer(folder)


def loss_curve(run: Run, stage: str, points: int) -> dict | None:
    """The loss curve of a finished or running stage, None where there is none.

    Raises CheckpointError where a finished stage's metrics.jsonl was changed.
    """
    finished_folder, partial = run.stage_folder(stage), run.partial_folder(stage)
    if (finished_folder / METRICS).is_file():
        written = run.require(stage)["outputs"].get(METRICS)
        if files.sha256_file(finished_folder / METRICS) != written:
            raise CheckpointError(
                f"{stage}/{METRICS} of run {run.name} is not what the stage wrote: "
                f"`threefold verify --run {run.name}` lists all such files; run stage {stage} again"
            )
        return curve(finished_folder, points=points)
    return curve(partial, points=points) if (partial / METRICS).is_file() else None


# Evaluations --------------------------------------------------------------------------------------------------------


def comparison(run: Run) -> Comparison:
    """The records of the notebooks executed so far. Raises MissingInput; RecordError where a notebook was changed."""
    for stage in run.plan:
        run.check_notebook(stage)
    executed = sorted((run.path / "notebooks").glob("*.ipynb"))
    return _comparison(run.path, tuple((path.name, path.stat().st_mtime_ns) for path in executed))


@lru_cache(maxsize=2)
def _comparison(folder: Path, _state: tuple) -> Comparison:
    return Comparison.load(folder)


def evaluated(run: Run) -> list[str]:
    """The evaluated models; [] where there are none or the records cannot be read."""
    try:
        return comparison(run).models
    except ThreefoldError:
        return []


def protocols(run: Run) -> list[str]:
    """The protocols with results by item; [] where there are none or the records cannot be read."""
    try:
        return [name for name in comparison(run).protocols if name != "speed"]
    except ThreefoldError:
        return []


def items(run: Run, model: str, protocol: str) -> pd.DataFrame:
    """A model's items under a protocol. Raises MissingInput, which names the command that makes them."""
    frame = comparison(run).items(model, protocol)
    if frame is None:
        stage = f"evaluate-{model}"
        evaluated_stage = stage in run.plan
        way = f"run `{run.command(stage)}`" if evaluated_stage else f"evaluated are {', '.join(evaluated(run))}"
        raise MissingInput(f"run {run.name} has no results of {model} under {protocol}: {way}")
    return frame


def texts(run: Run, model: str, protocol: str) -> dict[int, dict[str, str]]:
    """{item: its texts by name ("sentence", "prompt", "chosen", ...)}, from the data that the evaluation read.

    Raises MissingInput or RecordError where the data are missing or differ from those that were evaluated.
    """
    frame = items(run, model, protocol)
    data = comparison(run).evaluations(model)[protocol]["settings"].get("data") or {}
    if "document" in frame:
        key = "lines" if "/lines-" in protocol else "perplexity"
    else:
        columns = {"question": "problems", "reference": "instructions", "logp_chosen": "preferences"}
        key = next((key for column, key in columns.items() if column in frame), "sentiment")
    source: SourceConfig = getattr(run.preset.evaluation, key)
    if not (source.source or source.path):
        raise MissingInput(f"run {run.name} no longer names evaluation.{key}, so its texts are not known")
    rows = _rows(source, run.data_dir, data.get("fingerprint", ""), data.get("examples", -1))
    if rows is None:
        raise RecordError(
            f"evaluation.{key} ({source.source or source.path}) now reads other data than {protocol} was measured on"
        )
    if key == "lines":
        rows = perplexity.first_lines(rows, sources.resolve(source, run.data_dir).reader.startswith("wikitext"))
    return {index: _texts(row) for index, row in enumerate(rows)}


@lru_cache(maxsize=4)
def _rows(source: SourceConfig, data_dir: str, fingerprint: str, examples: int) -> list | None:
    """The rows of a source; None where they are not those of that fingerprint and number."""
    if sources.resolve(source, data_dir).fingerprint != fingerprint:
        return None
    rows = sources.load(source, data_dir)
    return rows if len(rows) == examples else None


def _texts(row: str | dict) -> dict[str, str]:
    if isinstance(row, str):
        return {"text": row}
    if "instruction" in row:
        return {"prompt": instruction_prompt(row["instruction"], row["input"]), "reference": row["output"]}
    if "sentence" in row:
        return {"sentence": row["sentence"]}
    return {name: str(value) for name, value in row.items()}
