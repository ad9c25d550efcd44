"""The models that a run evaluates, by name: the untrained control, checkpoints of the run, models from outside."""

from dataclasses import replace

from threefold import config
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation.adapter import LanguageModel
from threefold.run import Stage


def subject(stage: Stage, model: str) -> LanguageModel:
    """The model of that name (`config.model_names`) as the stage's run has it; the stage's replicate of it.

    Raises MissingInput (the stage that makes it has not been run), SourceError and CheckpointError (a model from
    outside that is not to be had, or whose weights do not fit).
    """
    baselines = stage.preset.baselines
    external = {entry.name: entry for entry in baselines.external}
    if model == "random":
        tokenizer = load_tokenizer(stage.require("data") / "tokenizer")
        return LanguageModel.random(
            replace(stage.preset.model, vocab_size=len(tokenizer)), tokenizer, stage.preset.seed
        )
    if model in external:
        return LanguageModel.from_location(external[model], data_dir=stage.run.data_dir)
    if (location := getattr(baselines, model, "train")) != "train":
        revision = getattr(baselines, f"{model}_revision")
        return LanguageModel.from_location(location, revision, stage.run.data_dir, name=model)
    name = config.replicate_name(model, stage.replicate) if model in config.REPEATED else model
    return LanguageModel.from_checkpoint(stage.require(model), name)
