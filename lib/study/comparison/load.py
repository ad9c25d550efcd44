"""All records of a run in one place, and the refusal of any evaluation that ran other weights than the stage's."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from basics import files, names
from basics.errors import MissingInput, RecordError
from papertrail import records
from papertrail.records import Record
from papertrail.run import read_run_file
from study.comparison import models
from study.preset import LINEAGE, OWN_MODELS
from study.run import Run
from study.stages import replicate_folder

OWN_NOTEBOOK = "06_compare"
FACTS = ("parameters", "precision", "backend", "context", "vocabulary", "tokenizer_sha256", "revision", "location")


@dataclass(frozen=True)
class Value:
    """One measured figure with its 95% interval, in the metric's own unit."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    protocol: str
    metric: str


@dataclass(frozen=True)
class Comparison:
    """What the notebooks of one run measured. Everything the report says is a function of this."""

    records: dict[str, Record]
    folder: Path | None = None  # the run's folder: per-item results lie there; None when only notebooks are at hand
    resamples: int = 10_000
    # From 2 on: the other trainings of the lineage, each a comparison of its own under the first's names ("sft", not
    # "sft-seed2"), so that whatever reads a figure of the first reads it of these, and no table shows them unasked.
    replicates: dict[int, "Comparison"] = field(default_factory=dict)
    differences: dict[tuple[str, str, str], Any] = field(default_factory=dict, repr=False, compare=False)  # computed
    _items: dict[tuple[str, str], pd.DataFrame | None] = field(default_factory=dict, repr=False, compare=False)

    # Reading --------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, location: Run | str | Path) -> "Comparison":
        """Read the executed notebooks of a run, of a run's folder, or of a folder of notebooks.

        With a `Run`, every notebook that its preset asks for must be there, and notebooks it does not ask for (of a
        model no longer in the preset, say) are left out.

        Raises:
            MissingInput: a notebook that was not run; names the command.
            RecordError: an error output, a record that stands twice, weights that are not the stage's, or two
                replicates of a stage with the same weights.
        """
        if isinstance(location, Run):
            plan = [stage for stage in location.plan if stage != "compare"]
            paths = []
            for stage in plan:
                path = location.notebook(location.plan[stage].executed)
                if not path.is_file():
                    raise MissingInput(f"{path.name} has not been run: `{location.command(stage)}`")
                location.check_notebook(stage)
                paths.append(path)
            folder: Path | None = location.path
            resamples = location.preset.evaluation.bootstrap
        else:
            base = Path(location)
            inside = (base / "notebooks").is_dir()
            folder, resamples = (base if inside else None), 10_000
            found = sorted((base / "notebooks" if inside else base).glob("*.ipynb"))
            paths = [p for p in found if p.stem != OWN_NOTEBOOK and not p.name.endswith(".failed.ipynb")]
            if not paths:
                raise MissingInput(f"{base.name}: no executed notebooks; `threefold run` makes them")
        collected: dict[int, dict[str, Record]] = {1: {}}
        for path in paths:
            for full, record in records.read(path).items():
                name, replicate = _first_name(full)
                known = collected.setdefault(replicate, {})
                if name in known:
                    raise RecordError(f"record {full} stands in {known[name].notebook} and in {record.notebook}")
                known[name] = record
        first, *others = (
            cls(collected[place], folder and replicate_folder(folder, place), resamples) for place in sorted(collected)
        )
        first.replicates.update(zip(sorted(collected)[1:], others, strict=True))
        first.verify()
        return first

    def verify(self) -> None:
        """Every evaluation ran the weights that its stage made, and they still lie there, of every replicate; and no
        replicate is another one's copy. Raises RecordError."""
        for place, replicate in self.replicates.items():
            try:
                replicate.verify()
            except RecordError as error:
                raise RecordError(f"replicate {place}: {error}") from error
        for model in LINEAGE:
            made: dict[str, int] = {}
            for place, replicate in {1: self, **self.replicates}.items():
                weights = (replicate.stage(model) or {}).get("weights_sha256")
                if weights and made.setdefault(weights, place) != place:
                    raise RecordError(
                        f"replicates {made[weights]} and {place} of {model} have the same weights {weights}: they are "
                        f"one training; run {names.replicate_name(model, place)} again"
                    )
        for model in self.models:
            made = self._made(model)
            for protocol, values in self.evaluations(model).items():
                ran = values.get("weights_sha256")
                if made is None:  # an external or the random control: its evaluations must at least agree
                    made = (ran, f"evaluation {protocol}")
                if ran != made[0]:
                    raise RecordError(
                        f"evaluation {protocol} of {model} ran weights {ran}, but {made[1]} has weights {made[0]}: "
                        f"evaluate {model} again"
                    )

    def _made(self, model: str) -> tuple[str, str] | None:
        """(hash of the weights of the stage of that name, where it is from); None where no stage made the model."""
        stage = self.stage(model)
        told = (stage["weights_sha256"], f"stage {model}") if stage and stage.get("weights_sha256") else None
        if self.folder is None:
            return told
        facts = read_run_file(self.folder / model)
        on_disk = (facts or {}).get("weights_sha256")
        if not on_disk:
            return told
        if told and told[0] != on_disk:
            raise RecordError(
                f"notebook of stage {model} made weights {told[0]}, but its run.json says {on_disk}: run the stage "
                f"again"
            )
        weights = self.folder / model / "model.safetensors"
        if weights.is_file() and (actual := files.sha256_file(weights)) != on_disk:
            raise RecordError(
                f"{model}/model.safetensors has hash {actual}, but its run.json says {on_disk}: "
                f"the weights were replaced after stage {model}; run it again"
            )
        return on_disk, f"run.json of stage {model}"

    def facts(self, model: str) -> dict[str, Any]:
        """What its evaluations say of the model itself: parameters, precision, context, vocabulary, tokenizer hash."""
        found: dict[str, Any] = {}
        for values in self.evaluations(model).values():
            settings = values.get("settings", {})
            for part in (settings, settings.get("model")):
                if isinstance(part, dict):
                    found |= {key: part[key] for key in FACTS if key in part and key not in found}
        return found

    def share_tokenizer(self, a: str, b: str) -> bool:
        """Whether both models cut text into the same tokens, so that their perplexities per token compare."""
        one, other = (self.facts(model).get("tokenizer_sha256") for model in (a, b))
        return a == b or (one is not None and one == other)

    def weights(self, model: str) -> str | None:
        """SHA-256 of the weights that the model's evaluations ran; one for all of them (`verify`)."""
        return next((values.get("weights_sha256") for values in self.evaluations(model).values()), None)

    def same_weights(self, a: str, b: str) -> bool:
        """Whether two models are one."""
        return self.weights(a) is not None and self.weights(a) == self.weights(b)

    # Looking up -----------------------------------------------------------------------------------------------------

    def values(self, name: str) -> dict[str, Any] | None:
        """The values of a record, None when there is none of that name."""
        record = self.records.get(name)
        return record.values if record else None

    def stage(self, name: str) -> dict[str, Any] | None:
        """run.json of a stage as its notebook published it."""
        return self.values(f"stage/{name}")

    def curve(self, name: str) -> dict[str, Any] | None:
        return self.values(f"curve/{name}")

    def model(self, name: str) -> dict[str, Any] | None:
        """Configuration and parameter counts of a model; later stages and the random control share pretraining's."""
        own = self.values(f"model/{name}")
        return own if own or name not in ("random", "sft", "dpo") else self.values("model/pretrain")

    @cached_property
    def models(self) -> list[str]:
        """Evaluated models in the fixed order."""
        return models.ordered(name.split("/")[1] for name in self.records if name.startswith("evaluation/"))

    @cached_property
    def trained(self) -> list[str]:
        """Stages with a loss curve or tokens, in the fixed order."""
        stages_ = [name.split("/")[1] for name in self.records if name.startswith(("stage/", "curve/"))]
        return [name for name in models.ordered(stages_) if name in OWN_MODELS]

    def evaluations(self, model: str) -> dict[str, dict[str, Any]]:
        """Protocol -> values of the model's evaluation record."""
        prefix = f"evaluation/{model}/"
        found = {name[len(prefix) :]: r.values for name, r in self.records.items() if name.startswith(prefix)}
        timed = self.values(f"speed/{model}")  # of all models, interleaved, in a notebook of its own
        return found | ({"speed": timed} if timed else {})

    @cached_property
    def protocols(self) -> list[str]:
        """All protocols that any model was measured by, in the order of the records."""
        return list(dict.fromkeys(protocol for model in self.models for protocol in self.evaluations(model)))

    def is_trained_here(self, model: str) -> bool:
        """Whether one of this run's stages made the model."""
        return self.stage(model) is not None

    def name(self, model: str) -> str:
        """The model's name for a reader."""
        return models.name(model, trained_here=self.is_trained_here(model))

    def metric(self, model: str, protocol: str, metric: str) -> Value | None:
        """One metric of one protocol; None when it was not measured."""
        entry = self.evaluations(model).get(protocol, {}).get("metrics", {}).get(metric)
        if entry is None or entry.get("value") is None:
            return None
        return Value(entry["value"], entry.get("low"), entry.get("high"), entry.get("n"), protocol, metric)

    def items(self, model: str, protocol: str) -> pd.DataFrame | None:
        """Per-item results, None when they are not at hand. Raises RecordError when they are not those of the
        record."""
        if (model, protocol) not in self._items:
            self._items[model, protocol] = self._read_items(model, protocol)
        return self._items[model, protocol]

    def _read_items(self, model: str, protocol: str) -> pd.DataFrame | None:
        if self.folder is None:
            return None
        folder = f"speed/items/{model}" if protocol == "speed" else f"evaluation/{model}/items"
        path = self.folder / folder / f"{protocol.replace('/', '_')}.parquet"
        if not path.is_file():
            return None
        told = (self.evaluations(model).get(protocol, {}).get("items") or {}).get("sha256")
        if told and (actual := files.sha256_file(path)) != told:
            raise RecordError(
                f"{path.name} of {model} has hash {actual}, but the record says {told}: evaluate {model} again"
            )
        return pd.read_parquet(path)

    def dumps(self) -> str:
        """Record names and their values as JSON, for hashing what a comparison was made from."""
        every = {
            f"{place}/{name}": record.values
            for place, one in {1: self, **self.replicates}.items()
            for name, record in one.records.items()
        }
        return json.dumps(every, sort_keys=True)


def _first_name(name: str) -> tuple[str, int]:
    """A record's name in the first training, and the replicate it is of: "stage/sft-seed2" -> ("stage/sft", 2)."""
    kind, slash, rest = name.partition("/")
    subject, *protocol = rest.split("/")
    base, replicate = names.replicate_of(subject)
    return "/".join([f"{kind}{slash}{base}", *protocol]), replicate
