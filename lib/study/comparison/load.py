"""All records of a run in one place: one long table of what was measured, and the refusal of any evaluation that ran
other weights than the stage's."""

import re
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from basics import files, names
from basics.errors import MissingInput, RecordError
from papertrail import records
from papertrail.notebook_files import executed_notebooks
from papertrail.records import Record
from papertrail.run import read_run_file
from study.comparison import models
from study.comparison.measures import MEASURES, unit_of
from study.preset import LINEAGE, REPLICATED
from study.run import Run
from study.stages import replicate_folder

OWN_NOTEBOOK = "06_compare"
MEASURED = ("evaluation/", "speed/")  # records with metrics of a model
COLUMNS = (
    "replicate", "model", "protocol", "form", "size", "metric", "measure", "value", "low", "high", "n", "unit", "record"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the notebooks of one run measured. Everything the report says is a function of this."""

    records: dict[str, Record]
    folder: Path | None = None  # the run's folder, with the per-item results; None where only notebooks were read
    resamples: int = 10_000
    absent: tuple[str, ...] = ()  # stages that the run's preset asks for and that are not finished
    # From 2 on: the other trainings of the lineage, each a comparison of its own under the first's names ("sft", not
    # "sft-seed2"), so that whatever reads a figure of the first reads it of these, and no table shows them unasked.
    replicates: dict[int, "Comparison"] = field(default_factory=dict)
    differences: dict[tuple[str, str, str], Any] = field(default_factory=dict, repr=False)  # computed
    _items: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict, repr=False)

    # Reading --------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, location: Run | str | Path) -> "Comparison":
        """Read the executed notebooks of a run, of a run's folder, or of a folder of notebooks.

        With a `Run`, the notebooks of its finished stages are read, and others (of a model no longer in the preset,
        say) are not.

        Raises:
            MissingInput: a notebook that was not run; names the command.
            RecordError: an error output, a record that two notebooks hold, weights that are not the stage's, or two
                replicates of a stage with the same weights.
        """
        resamples, absent = 10_000, ()
        if isinstance(location, Run):
            by_stage, folder, resamples = _finished(location), location.path, location.preset.evaluation.bootstrap
            paths = [*by_stage.values()]
            absent = tuple(stage for stage in location.plan if stage not in (*by_stage, "compare"))
        else:
            base = Path(location)
            folder = base if (base / "notebooks").is_dir() else None
            executed = executed_notebooks(base / "notebooks" if folder else base)
            paths = [path for path in executed if path.stem != OWN_NOTEBOOK]
            if not paths:
                raise MissingInput(f"{base.name}: no executed notebooks; `threefold run` makes them")
        collected: dict[int, dict[str, Record]] = {1: {}}
        for path in paths:
            for full, record in records.read(path).items():
                parts = full.split("/")  # "stage/sft-seed2" is "stage/sft" of replicate 2
                subject, replicate = names.replicate_of("/".join(parts[:2]))
                name = "/".join([subject, *parts[2:]])
                known = collected.setdefault(replicate, {})
                if name in known:
                    raise RecordError(f"record {full} stands in {known[name].notebook} and in {record.notebook}")
                known[name] = record
        trainings = {
            place: cls(found, folder and replicate_folder(folder, place), resamples, absent)
            for place, found in sorted(collected.items())
        }
        first = trainings.pop(1)
        first.replicates.update(trainings)
        first.verify()
        return first

    def verify(self) -> None:
        """Check that every evaluation, those of replicates included, ran the weights that its stage made and that are
        still there, and that no replicate is a copy of another. Raises RecordError."""
        made: dict[tuple[str, str], int] = {}
        for replicate, comparison in self.trainings.items():
            prefix = f"replicate {replicate}: " if replicate > 1 else ""
            for model in comparison.models:
                known = None
                for place, weights, stage in comparison._hashes(model):
                    known = known or (place, weights)
                    if weights != known[1]:
                        raise RecordError(
                            f"{prefix}{place} has weights {weights}, but {known[0]} has weights {known[1]}: "
                            f"{comparison._made_again(stage)}"
                        )
            for model in REPLICATED:
                weights = comparison.stage(model).get("weights_sha256")
                if weights and (earlier := made.setdefault((model, weights), replicate)) != replicate:
                    raise RecordError(
                        f"replicates {earlier} and {replicate} of {model} have the same weights {weights}: they are "
                        f"one training: {comparison._made_again(model)}"
                    )

    def _hashes(self, model: str) -> Iterator[tuple[str, str | None, str]]:
        """(place, SHA-256 of the model's weights there, the stage to run where it is not that of the places before)."""
        if weights := self.stage(model).get("weights_sha256"):
            yield f"stage {model} by its notebook", weights, ""
        if self.folder is not None and (weights := (read_run_file(self.folder / model) or {}).get("weights_sha256")):
            yield f"run.json of stage {model}", weights, model
            file = self.folder / model / "model.safetensors"
            if file.is_file():
                yield f"{model}/{file.name}", files.sha256_file(file), model
        if shown := self.values(f"continuations/{model}"):
            yield f"continuations of {model}", shown["weights_sha256"], f"evaluate-{model}"
        for protocol, values in self.evaluations(model).items():
            yield f"evaluation {protocol} of {model}", values.get("weights_sha256"), f"evaluate-{model}"

    def _made_again(self, stage: str) -> str:
        """The command that makes a stage of these results again."""
        replicate = int(self.folder.name) if self.folder and self.folder.parent.name == "seeds" else 1
        run = self.folder.parents[1] if replicate > 1 else self.folder
        named = f"--run {run.name} " if run else ""
        return f"`threefold run {named}--only {names.replicate_name(stage, replicate)} --force` makes it again"

    # Records --------------------------------------------------------------------------------------------------------

    @property
    def trainings(self) -> dict[int, "Comparison"]:
        """The first training and its replicates, in the order of their seeds."""
        return {1: self, **self.replicates}

    def values(self, name: str) -> dict[str, Any]:
        """The values of a record; empty when there is none of that name."""
        return self.records[name].values if name in self.records else {}

    def under(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The values of all records whose names begin with a prefix, by the rest of the name."""
        return {name.removeprefix(prefix): r.values for name, r in self.records.items() if name.startswith(prefix)}

    def by_variant(self, kind: str) -> dict[str, dict[str, Any]]:
        """Variant -> values of the records "ablation/..." or "length/...". The variant is the override that it stands
        for ("norm=layer") or "base"."""
        return {str(values.get("variant", name)): values for name, values in self.under(f"{kind}/").items()}

    def stage(self, name: str) -> dict[str, Any]:
        """run.json of a stage as its notebook published it; empty where this run has no such stage."""
        return self.values(f"stage/{name}")

    def trained_here(self, model: str) -> bool:
        """Whether a stage of this run made the model."""
        return f"stage/{model}" in self.records

    def model(self, name: str) -> dict[str, Any]:
        """Configuration and parameter counts of a model; later stages and the random control share pretraining's."""
        shared = name in ("random", "sft", "dpo")
        return self.values(f"model/{name}") or (self.values("model/pretrain") if shared else {})

    @cached_property
    def models(self) -> list[str]:
        """Evaluated models in the fixed order."""
        return models.ordered(self._subjects("evaluation/"))

    @property
    def lineage(self) -> list[str]:
        """Evaluated stages of this run's own model, first to last."""
        return [stage for stage in LINEAGE if stage in self.models]

    @cached_property
    def trained(self) -> list[str]:
        """Stages with a loss curve or tokens, in the fixed order."""
        curves = self._subjects("curve/")
        counted = [name for name in self._subjects("stage/") if self.stage(name).get("tokens")]
        return [name for name in models.ordered(counted + curves) if name in {*models.MODELS, *self.models, *curves}]

    def _subjects(self, *kinds: str) -> list[str]:
        """What the records of these kinds are about, each once: models, or stages."""
        return list(dict.fromkeys(name.split("/")[1] for name in self.records if name.startswith(kinds)))

    @cached_property
    def baselines(self) -> list[str]:
        """Evaluated models that our stages are compared with, in the fixed order."""
        return [one for one in self.models if models.is_baseline(one, trained_here=self.trained_here(one))]

    def name(self, model: str) -> str:
        """The model's name for a reader."""
        return models.name(model, trained_here=self.trained_here(model))

    def evaluations(self, model: str) -> dict[str, dict[str, Any]]:
        """Protocol -> values of the model's evaluation record."""
        timed = self.values(f"speed/{model}")  # of all models, interleaved, in a notebook of its own
        return self.under(f"evaluation/{model}/") | ({"speed": timed} if timed else {})

    def settings(self, model: str, protocol: str | None) -> dict[str, Any]:
        """The settings of an evaluation; none where there is no such evaluation."""
        return self.evaluations(model).get(protocol or "", {}).get("settings", {})

    def facts(self, model: str) -> ChainMap[str, Any]:
        """The settings of all its evaluations, of which the first that has a key counts: for what they say of the model
        itself, its parameters, context, vocabulary, tokenizer's hash and revision."""
        return ChainMap(*(values.get("settings", {}) for values in self.evaluations(model).values()))

    def share_tokenizer(self, a: str, b: str) -> bool:
        """Whether both models cut text into the same tokens, so that their perplexities per token compare."""
        one, other = (self.facts(model).get("tokenizer_sha256") for model in (a, b))
        return a == b or (one is not None and one == other)

    def same_weights(self, a: str, b: str) -> bool:
        """Whether two models are one. All evaluations of a model ran the same weights (`verify`)."""
        one, other = (next((v.get("weights_sha256") for v in self.evaluations(m).values()), None) for m in (a, b))
        return one is not None and one == other

    @property
    def majority(self) -> float | None:
        """Accuracy of always answering the more frequent label of the sentiment set."""
        found = (self.settings(model, self.protocol("sentiment")) for model in self.models)
        return next((float(one["majority_accuracy"]) for one in found if "majority_accuracy" in one), None)

    @property
    def timed_together(self) -> bool:
        """Whether the models' timings alternated in one process; only then do their speeds compare."""
        timed = [values["speed"] for model in self.models if "speed" in (values := self.evaluations(model))]
        return bool(timed) and all(one["settings"].get("measured_by_turns_with") for one in timed)

    # What was measured ----------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a measured metric of a model under a protocol, of this training and its replicates (COLUMNS).

        form and size: the protocol's name after its data set, "3-shot" as "#-shot" and 3. measure: key of the measure
        whose figure it is, "" otherwise. low, high and n are None where there is no interval.
        """
        rows = [
            (replicate, model, protocol, *_form(protocol), metric, "", *map(entry.get, ("value", "low", "high", "n")),
             unit_of(entry.get("unit")), f"speed/{model}" if protocol == "speed" else f"evaluation/{model}/{protocol}")
            for replicate, comparison in self.trainings.items()
            for model in comparison._subjects(*MEASURED)
            for protocol, values in comparison.evaluations(model).items()
            for metric, entry in values.get("metrics", {}).items()
            if entry.get("value") is not None
        ]  # fmt: skip
        frame = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
        for measure in MEASURES.values():
            candidates = frame[(frame["form"] == measure.form) & (frame["metric"] == measure.metric)]
            first = candidates[candidates["replicate"] == 1]
            if not first.empty:
                protocol = max(zip(first["size"], first["protocol"], strict=True))[1]
                chosen = candidates.index[candidates["protocol"] == protocol]
                frame.loc[chosen, ["measure", "unit"]] = [measure.key, measure.unit]
        return frame

    @cached_property
    def _rows(self) -> dict[tuple, Any]:
        rows = list(self.table.itertuples(index=False, name="Row"))
        by_metric = {(row.protocol, row.metric, row.model, row.replicate): row for row in rows}
        return by_metric | {(row.measure, row.model, row.replicate): row for row in rows if row.measure}

    @cached_property
    def _protocols(self) -> dict[str, str]:
        measured = self.table[self.table["measure"] != ""]
        return dict(zip(measured["measure"], measured["protocol"], strict=True))

    @cached_property
    def protocols(self) -> list[str]:
        """All protocols that any model was measured by, in the order of the records."""
        return list(dict.fromkeys(protocol for model in self.models for protocol in self.evaluations(model)))

    def protocol(self, measure: str) -> str | None:
        """The protocol whose figures are the measure's in this run."""
        return self._protocols.get(measure)

    def value(self, measure: str, model: str, replicate: int = 1) -> Any | None:
        """The measure's row of the table for a model; None when it was not measured."""
        return self._rows.get((measure, model, replicate))

    def last(self, measure: str) -> Any | None:
        """The measure's row of the table for the last stage of our model that has one; None without any."""
        return next((row for stage in reversed(LINEAGE) if (row := self.value(measure, stage)) is not None), None)

    def metric(self, model: str, protocol: str | None, metric: str) -> Any | None:
        """One metric's row of the table; None when it was not measured."""
        return self._rows.get((protocol, metric, model, 1))

    def items(self, model: str, protocol: str) -> pd.DataFrame | None:
        """Per-item results, None when they are missing. Raises RecordError when they are not those of the
        record."""
        if (model, protocol) in self._items or self.folder is None:
            return self._items.get((model, protocol))
        folder = f"speed/items/{model}" if protocol == "speed" else f"evaluation/{model}/items"
        path = self.folder / folder / f"{protocol.replace('/', '_')}.parquet"
        if not path.is_file():
            return None
        recorded = (self.evaluations(model).get(protocol, {}).get("items") or {}).get("sha256")
        if recorded and (actual := files.sha256_file(path)) != recorded:
            raise RecordError(
                f"{path.name} of {model} has hash {actual}, but the record says {recorded}: "
                f"{self._made_again('speed' if protocol == 'speed' else f'evaluate-{model}')}"
            )
        return self._items.setdefault((model, protocol), pd.read_parquet(path))


def _finished(run: Run) -> dict[str, Path]:
    """The notebooks of a run's finished stages, by stage. Raises MissingInput, RecordError."""
    paths = {}
    for stage in run.plan:
        if stage == "compare":
            continue
        run.check_notebook(stage)
        if run.finished(stage) is not None:
            paths[stage] = run.notebook(run.plan[stage].executed)
            if not paths[stage].is_file():
                raise MissingInput(f"{paths[stage].name} is not there: `{run.command(stage)}`")
    if not paths:
        raise MissingInput(f"run {run.name} has no finished stage: `threefold run --run {run.name}` makes them")
    return paths


def _form(protocol: str) -> tuple[str, int]:
    """ "sst2/3-shot-grid" -> ("#-shot-grid", 3)."""
    form = protocol.partition("/")[2]
    number = re.search(r"\d+", form)
    return re.sub(r"\d+", "#", form, count=1), int(number.group()) if number else 0
