"""What views read of a run: checkpoints, curves, results of single items and the texts that these are about."""

import contextlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from basics import files, paths
from basics.errors import CheckpointError, ConfigError, MissingInput, RecordError, ThreefoldError
from basics.names import check_name, near_miss, replicate_of
from papertrail.run import Run, data_dir_of
from study import stages
from study.comparison.load import Comparison
from threefold.config import SourceConfig
from threefold.data import sources
from threefold.data.templates import instruction_prompt
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation import perplexity
from threefold.model import load_checkpoint
from threefold.training.state import METRICS

LINEAGE = ("pretrain", "sft", "dpo")


def run_names() -> list[str]:
    """The runs in the runs folder."""
    return sorted(path.parent.name for path in paths.RUNS.glob("*/config.toml"))


def open_run(name: str = "smoke", data_dir: str = "") -> Run:
    """A run as it was last configured, to look at; nothing is written.

    data_dir: where the texts of evaluation items are read; default $THREEFOLD_DATA, then what the run was made with.
    Raises MissingInput, with the runs there are and the command that makes one.
    """
    check_name(name, "run")
    names = run_names()
    if name not in names:
        miss = near_miss(name, names)
        raise MissingInput(
            f"no run {name!r}{f', did you mean {miss}?' if miss else ''}; runs: {', '.join(names) or 'none yet'}; "
            "`threefold run --preset smoke` makes one"
        )
    return Run.open("", name, data_dir=data_dir_of(name, data_dir), create=False)


# Stages -------------------------------------------------------------------------------------------------------------


def trainings(run: Run) -> list[str]:
    """The stages that train a model in this run's preset, replicates included."""
    models = set(stages.TRAINS) - {"ablations"}
    return [name for name in stages.steps(run.preset) if replicate_of(name)[0] in models]


def chosen(run: Run, names: str | Iterable[str]) -> list[str]:
    """Stages as a person names them: a list, or one text with commas; none: the lineage. ConfigError for one that the
    preset does not have."""
    named = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
    named = [name for name in named if name] or list(LINEAGE)
    allowed = trainings(run)
    for name in named:
        if name not in allowed:
            miss = near_miss(name, allowed)
            raise ConfigError(
                f"stage {name!r}{f', did you mean {miss}?' if miss else ''}; run {run.name} trains {', '.join(allowed)}"
            )
    return named


def there(run: Run, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(the stages that are finished, a line for each that is not: which, and what makes it)."""
    found, missing = [], []
    for name in names:
        try:
            run.require(name)
            found.append(name)
        except MissingInput as error:
            missing.append(str(error))
    return found, missing


def loaded(run: Run, stage: str) -> tuple[Any, Any]:
    """(decoder, tokenizer) of a finished stage, kept in memory while the weights are the same."""
    facts = run.require(stage)
    return _loaded(run.intact(stage), facts["fingerprint"]["digest"])


@lru_cache(maxsize=12)
def _loaded(folder: Path, _digest: str) -> tuple[Any, Any]:
    return load_checkpoint(folder), load_tokenizer(folder)


def metrics_folder(run: Run, stage: str) -> Path | None:
    """Where a stage's metrics.jsonl lies, of one that is still training too. Raises CheckpointError for a finished
    stage's that is not what it wrote."""
    folders = (run.stage_folder(stage), run.partial_folder(stage))
    found = next((folder for folder in folders if (folder / METRICS).is_file()), None)
    if found == folders[0]:
        written = run.require(stage)["outputs"].get(METRICS)
        if files.sha256_file(found / METRICS) != written:
            raise CheckpointError(
                f"{stage}/{METRICS} of run {run.name} is not what the stage wrote: "
                f"`threefold verify --run {run.name}` tells all; run stage {stage} again"
            )
    return found


# Evaluations --------------------------------------------------------------------------------------------------------


def comparison(run: Run) -> Comparison:
    """The records of the notebooks executed so far. Raises MissingInput; RecordError, of a notebook that was changed
    since too."""
    for stage in stages.steps(run.preset):
        run.check_notebook(stage)
    executed = sorted((run.path / "notebooks").glob("*.ipynb"))
    return _comparison(run.path, tuple((path.name, path.stat().st_mtime_ns) for path in executed))


@lru_cache(maxsize=2)
def _comparison(folder: Path, _state: tuple) -> Comparison:
    return Comparison.load(folder)


def readable(run: Run) -> None:
    """Raises RecordError where there are records that cannot be read, a notebook that was changed since for one."""
    with contextlib.suppress(MissingInput):
        comparison(run)


def evaluated(run: Run) -> list[str]:
    """The models that were evaluated; none where nothing was, or where the records cannot be read."""
    try:
        return comparison(run).models
    except ThreefoldError:
        return []


def scored(run: Run) -> list[str]:
    """The protocols that have items with a text."""
    try:
        return [name for name in comparison(run).protocols if name != "speed"]
    except ThreefoldError:
        return []


def items(run: Run, model: str, protocol: str) -> pd.DataFrame:
    """A model's items under a protocol. MissingInput where there are none, with what makes them."""
    found = comparison(run).items(model, protocol)
    if found is None:
        plan = stages.steps(run.preset)
        stage = f"evaluate-{model}"
        way = f"run `{run.command(stage)}`" if stage in plan else f"evaluated are {', '.join(evaluated(run))}"
        raise MissingInput(f"run {run.name} has no results of {model} under {protocol}: {way}")
    return found


def texts(run: Run, model: str, protocol: str) -> dict[int, dict[str, str]]:
    """item -> its texts by name ("sentence", "prompt", "chosen", ...), as the run's evaluation read them.

    MissingInput or RecordError where the data are not at hand, or are not those that were evaluated.
    """
    frame = items(run, model, protocol)
    noted = comparison(run).evaluations(model)[protocol]["settings"].get("data") or {}
    key = _section(frame, protocol)
    source: SourceConfig = getattr(run.preset.evaluation, key)
    if not (source.source or source.path):
        raise MissingInput(f"run {run.name} no longer names evaluation.{key}, so its texts are not known")
    found = _rows(source, run.data_dir, noted.get("fingerprint", ""), noted.get("examples", -1))
    if found is None:
        raise RecordError(
            f"evaluation.{key} ({source.source or source.path}) now reads other data than {protocol} was measured on"
        )
    if key in ("perplexity", "lines"):
        wikitext = sources.resolve(source, run.data_dir).reader.startswith("wikitext")
        rows = perplexity.first_lines(found, wikitext) if key == "lines" else found
        return {index: {"text": row} for index, row in enumerate(rows)}
    return {index: _named(row) for index, row in enumerate(found)}


def _section(frame: pd.DataFrame, protocol: str) -> str:
    """The key of [evaluation] whose source a protocol's items are rows of."""
    if "document" in frame:
        return "lines" if "/lines-" in protocol else "perplexity"
    for column, key in (("question", "problems"), ("reference", "instructions"), ("logp_chosen", "preferences")):
        if column in frame:
            return key
    return "sentiment"


@lru_cache(maxsize=4)
def _rows(source: SourceConfig, data_dir: str, fingerprint: str, examples: int) -> list | None:
    """The items of a source; None where they are not those of that fingerprint and number."""
    if sources.resolve(source, data_dir).fingerprint != fingerprint:
        return None
    rows = sources.load(source, data_dir)
    return rows if len(rows) == examples else None


def _named(row: dict) -> dict[str, str]:
    if "instruction" in row:
        return {"prompt": instruction_prompt(row["instruction"], row["input"]), "reference": row["output"]}
    if "sentence" in row:
        return {"sentence": row["sentence"]}
    return {name: str(value) for name, value in row.items()}
