"""Checks of a whole preset, made before anything is trained: that it names all data it needs, that own files can be
read, and that what the evaluations ask fits the model's context."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from basics.errors import ConfigError
from study import stages
from study.preset import Preset, evaluation_sources, lineage
from threefold.data.templates import EXAMPLE_READERS, TEXT_READERS

READERS = {  # that can be used for a part of [data] or a key of [evaluation]; others take any
    **dict.fromkeys(("sft", "sft_heldout"), EXAMPLE_READERS),
    **dict.fromkeys(("dpo", "dpo_heldout", "preferences"), ("preferences",)),
    **dict.fromkeys(("perplexity", "lines"), TEXT_READERS),
    **dict.fromkeys(("sentiment", "sentiment_demonstrations"), ("sentiment",)),
    **dict.fromkeys(("problems", "problem_demonstrations"), ("problems",)),
    "instructions": ("instructions",),
}


def check(preset: Preset, data_dir: str | Path = "") -> None:
    """Refuse a preset that names no data for something that it asks for, or own files that hold none.

    Raises ConfigError with all missing keys at once, or with what cannot be used in its place; SourceError and
    DataError with the file.
    """
    from threefold.data import sources  # late: it takes a second to import

    evaluation, named = preset.evaluation, evaluation_sources(preset)
    parts = [part for name in lineage(preset) for part in (name, f"{name}_heldout")]
    missing = [f"data.{part}" for part in parts if not getattr(preset.data, part)]
    few_shot = (
        ("sentiment", max(evaluation.sentiment_shots, default=0), "sentiment_shots = [0]"),
        ("problem", evaluation.problem_shots, "problem_shots = 0"),
    )
    for task, shots, without in few_shot:
        key = f"{task}_demonstrations"
        if shots and key not in named and {task, f"{task}s"} & named.keys():
            missing.append(f"evaluation.{key} (or set evaluation.{without})")
    if missing:
        raise ConfigError(f"preset {preset.name}: missing: {', '.join(missing)}")
    context = preset.model.context
    too_long = {
        "evaluation.window": evaluation.window if "perplexity" in named else 0,
        "evaluation.speed_prompt + evaluation.speed_new_tokens": evaluation.speed_prompt + evaluation.speed_new_tokens
        if "speed" in stages.plan(preset)
        else 0,
    }
    for keys, length in too_long.items():
        if length > context:
            raise ConfigError(f"preset {preset.name}: {keys} = {length}: expected at most model.context = {context}")
    used = [(f"data.{part}", source) for part in READERS for source in getattr(preset.data, part, ())]
    used += [(f"evaluation.{key}", source) for key, source in named.items()]
    for key, source in used:
        allowed, reader = READERS.get(key.partition(".")[2]), source.reader or sources.find(source.source).reader
        if allowed and reader not in allowed:
            raise ConfigError(
                f"preset {preset.name}: {key}: reader {reader!r} does not give what is needed here: expected "
                f"{' or '.join(allowed)}"
            )
    for source in stages.sources(preset, "data"):
        if source.path:
            next(sources.iterate(source, data_dir))


def check_evaluations(preset: Preset, tokenizer: Any, data_dir: str | Path = "") -> None:
    """Refuse evaluations whose prompts do not fit the context under this tokenizer, as they would be after training.

    Every protocol runs as it will, on a model that scores nothing. Raises EvaluationError with the keys to change.
    """
    import numpy as np

    from threefold.evaluation import LanguageModel, evaluate

    class Unscored(LanguageModel):
        def loglikelihoods(self, requests, **_options):
            return [np.zeros(len(target)) for _, target in requests]

        def generate(self, prompts, *_arguments, **_options):
            return [("", 0) for _ in prompts]

    small = replace(preset.model, n_layer=1, d_model=4, n_head=1, n_kv_head=-1, d_ff=4, vocab_size=len(tokenizer))
    model = Unscored.random(small, tokenizer, preset.seed, preset.name, device="cpu")
    evaluate(model, replace(preset.evaluation, bootstrap=1), data_dir, seed=preset.seed)
