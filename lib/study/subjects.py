"""The models that a run evaluates, by name: the untrained control, checkpoints of the run, models from outside."""

from dataclasses import replace

from basics import names
from basics.errors import SourceError
from study.preset import REPLICATED
from study.run import Stage
from threefold.data import hub
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation.adapter import LanguageModel


def subject(stage: Stage, model: str) -> LanguageModel:
    """The model of that name (`model_names`) as the stage's run has it; the stage's replicate of it.

    Raises MissingInput (the stage that makes it has not been run), SourceError and CheckpointError (a model from
    outside that cannot be had, or whose weights do not fit).
    """
    baselines = stage.preset.baselines
    external = {entry.name: entry for entry in baselines.external}
    if model == "random":
        tokenizer = load_tokenizer(stage.require("data") / "tokenizer")
        return LanguageModel.random(
            replace(stage.preset.model, vocab_size=len(tokenizer)), tokenizer, stage.preset.seed
        )
    if model in external:
        return _from_outside(stage, model, external[model].location, external[model].revision)
    if (location := getattr(baselines, model, "train")) != "train":
        return _from_outside(stage, model, location, getattr(baselines, f"{model}_revision"))
    name = names.replicate_name(model, stage.replicate) if model in REPLICATED else model
    return LanguageModel.from_checkpoint(stage.require(model), name)


def _from_outside(stage: Stage, name: str, location: str, revision: str) -> LanguageModel:
    """A model from outside. One on the hub without a revision is that of the commit which its first load recorded."""
    asked = revision or hub.recorded_commit(location)
    try:
        model = LanguageModel.from_location(location, asked, stage.run.data_dir, name=name)
    except SourceError as error:
        if asked == revision:
            raise
        raise SourceError(
            f"{error}; asked for was commit {asked}, which the first load recorded in {hub.REVISIONS} of the cache "
            "folder: take it out there to load another one"
        ) from error
    if not revision and (commit := model.facts.get("revision")):
        hub.record_commit(location, commit)
    return model
