"""What the views read of a run: checkpoints, loss curves, evaluation results by item and the texts of the items."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from basics import files
from basics.errors import CheckpointError, ConfigError, MissingInput, RecordError, ThreefoldError
from basics.names import did_you_mean, replicate_of
from papertrail import records
from study.existing import open_existing
from study.preset import LINEAGE, TRAINED, evaluation_sources
from study.run import Run, text_parameter
from threefold.config import SourceConfig
from threefold.data import sources
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation import perplexity
from threefold.model import load_checkpoint
from threefold.training.state import METRICS, curve

Names = str | Sequence[str]  # "sft, dpo" (a papermill parameter) or ["sft", "dpo"]


def open_run(name: str = "smoke", data_dir: str = "") -> Run:
    """A run as it was last configured, for reading only.

    data_dir: the folder of the evaluation items' texts; default $THREEFOLD_DATA, then the one the run was made with.
    Raises MissingInput, which lists the runs and names the command that makes one.
    """
    return open_existing(text_parameter("run", name), data_dir)


def split(names: Names) -> list[str]:
    """The single names of a list, or of a text with commas."""
    listed = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in listed if name.strip()]


def each(names: Iterable[Any], read: Callable[[Any], Any]) -> tuple[dict[Any, Any], list[str]]:
    """({name: what `read` returns for it}, the messages of the names for which it failed)."""
    values, messages = {}, []
    for name in names:
        try:
            values[name] = read(name)
        except ConfigError:
            raise
        except ThreefoldError as error:
            messages.append(str(error))
    return values, messages


@contextmanager
def _made_by(run: Run, stage: str) -> Iterator[None]:
    """Within this block the message of an error also names the command that makes the stage."""
    try:
        yield
    except ThreefoldError as error:
        command = run.command(stage)
        if command in str(error):
            raise
        raise type(error)(f"{error}: `{command}`") from error


# Trainings ----------------------------------------------------------------------------------------------------------


def trainings(run: Run) -> list[str]:
    """The stages that train a model in this run's preset, replicates included."""
    return [name for name in run.plan if replicate_of(name)[0] in TRAINED]


def chosen(run: Run, names: Names) -> list[str]:
    """Stages by name; default the three stages. Raises ConfigError for one that the run does not train."""
    allowed = trainings(run)
    named = split(names) or [name for name in LINEAGE if name in allowed]
    for name in named:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ConfigError(f"stage {name!r}{hint}; run {run.name} trains {', '.join(allowed)}")
    return named


def checkpoint(run: Run, stage: str) -> tuple[Any, Any]:
    """(decoder, tokenizer) of a finished stage. Raises MissingInput; CheckpointError where a file was changed."""
    with _made_by(run, stage):
        return _checkpoint(run.intact(stage), run.require(stage)["fingerprint"]["digest"])


@lru_cache(maxsize=12)
def _checkpoint(folder: Path, _digest: str) -> tuple[Any, Any]:
    return load_checkpoint(folder), load_tokenizer(folder)


def loss_curve(run: Run, stage: str, points: int) -> dict:
    """The loss curve of a stage, finished or in training.

    Raises MissingInput; CheckpointError where a finished stage's metrics.jsonl was changed.
    """
    with _made_by(run, stage):
        partial = run.partial_folder(stage)
        if not run.stage_folder(stage).exists() and (partial / METRICS).is_file():
            return curve(partial, points=points)
        written, file = run.require(stage)["outputs"].get(METRICS), run.stage_folder(stage) / METRICS
        if not file.is_file() or files.sha256_file(file) != written:
            raise CheckpointError(
                f"{stage}/{METRICS} of run {run.name} is not what the stage wrote: "
                f"`threefold verify --run {run.name}` lists all such files; run stage {stage} again"
            )
        return curve(file.parent, points=points)


# Evaluations --------------------------------------------------------------------------------------------------------


def evaluations(run: Run, model: str) -> dict[str, dict[str, Any]]:
    """{protocol: the values of its record} of a model.

    Raises MissingInput; RecordError where its notebook was changed or its evaluation used other weights than the
    model has now.
    """
    stage = f"evaluate-{model}"
    if stage not in run.plan:
        known, _ = evaluated(run)
        hint = did_you_mean(model, known)
        raise MissingInput(f"run {run.name} has not evaluated {model!r}{hint}; evaluated are {', '.join(known)}")
    with _made_by(run, stage):
        facts, prefix = run.require(stage), f"evaluation/{model}/"
        run.check_notebook(stage)
        notebook = run.notebook(run.spec(stage).executed)
        if not notebook.is_file():
            raise MissingInput(f"notebooks/{notebook.name} of run {run.name} is not there")
        found = _records(notebook, facts.get("finished", ""))
        values = {name.removeprefix(prefix): found[name].values for name in found if name.startswith(prefix)}
        made = run.require(model)["weights_sha256"] if model in run.plan else None
        used = {record["weights_sha256"] for record in values.values()}
        if made and used - {made}:
            raise RecordError(
                f"{model} was evaluated with weights {min(used - {made})[:12]} and now has weights {made[:12]}; "
                "evaluate it again"
            )
        return values


@lru_cache(maxsize=50)
def _records(notebook: Path, _executed: str) -> dict[str, records.Record]:
    return records.read(notebook)


def evaluated(run: Run) -> tuple[list[str], list[str]]:
    """(the models whose evaluations can be read, the messages of the others)."""
    models = [name.removeprefix("evaluate-") for name in run.plan if name.startswith("evaluate-")]
    values, messages = each(models, lambda model: evaluations(run, model))
    return list(values), messages


def protocols(run: Run) -> list[str]:
    """The protocols with results by item of any model."""
    return list(dict.fromkeys(protocol for model in evaluated(run)[0] for protocol in evaluations(run, model)))


def items(run: Run, model: str, protocol: str) -> pd.DataFrame:
    """A model's items under a protocol. Raises MissingInput or RecordError, which name the command that makes them."""
    measured, stage = evaluations(run, model), f"evaluate-{model}"
    file = run.stage_folder(stage) / "items" / f"{protocol.replace('/', '_')}.parquet"
    with _made_by(run, stage):
        if protocol not in measured or not file.is_file():
            raise MissingInput(f"run {run.name} has no results of {model} under {protocol}: run")
        if files.sha256_file(file) != measured[protocol]["items"]["sha256"]:
            raise RecordError(f"{file.name} of {model} is not what its record says; evaluate {model} again")
        return pd.read_parquet(file)


def texts(run: Run, model: str, protocol: str) -> dict[int, dict[str, str]]:
    """{item: its texts by name ("sentence", "prompt", "chosen", ...)}, from the data that the evaluation read.

    Raises RecordError where no key of the preset's `evaluation` reads those data now.
    """
    data = evaluations(run, model)[protocol]["settings"].get("data") or {}
    measured = data.get("fingerprint"), data.get("examples")
    named = evaluation_sources(run.preset).values()
    read_rows, messages = each(named, lambda source: _rows(source, run.data_dir, *measured))
    source = next((source for source, rows in read_rows.items() if rows is not None), None)
    if source is None:
        reasons = "; ".join(messages) or "its files or its keys have changed"
        raise RecordError(f"[evaluation] now reads other data than {protocol} was measured on: {reasons}")
    rows = read_rows[source]
    if "/lines-" in protocol:
        wikitext = sources.resolve(source, run.data_dir).reader.startswith("wikitext")
        rows = perplexity.first_lines(rows, wikitext)
    fields = [row if isinstance(row, dict) else {"text": row} for row in rows]
    return {item: {name: str(text) for name, text in row.items() if name != "label"} for item, row in enumerate(fields)}


@lru_cache(maxsize=8)
def _rows(source: SourceConfig, data_dir: str, fingerprint: str, examples: int) -> list | None:
    """The rows of a source; None where they are not those of that fingerprint and number."""
    if sources.resolve(source, data_dir).fingerprint != fingerprint:
        return None
    rows = sources.load(source, data_dir)
    return rows if len(rows) == examples else None
