"""Presets: one TOML file describes a whole run of this study.

Precedence: default of the dataclass < preset file < `--set a.b=c` / papermill `-p`. Texts of overrides are parsed once,
by `parse_overrides`; from there on overrides are a mapping of dotted keys to values.
"""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from basics import paths
from basics.errors import ConfigError
from basics.names import check_name, did_you_mean, replicate_of, shown
from study import sizes
from threefold.config import (
    LENGTHS,
    AboveZero,
    AtLeastTwo,
    EvaluationConfig,
    ExternalConfig,
    Flag,
    Integer,
    ModelConfig,
    NonnegativeOrOff,
    OverlapConfig,
    Positive,
    PositiveOrOff,
    SourceConfig,
    Text,
    TokenizerConfig,
    TrainConfig,
    apply_variant,
    between,
    config_error,
    configuration,
    impossible,
    kind_at,
    parse_value,
    variant_changes,
)

# the comparison's rows, in the report's order
OWN_MODELS = ("random", "gpt2", "gpt2-adamw", "distilgpt2", "pretrain", "sft", "dpo")
LINEAGE = ("pretrain", "sft", "dpo")  # the stages that `seeds` trains again, each replicate from its own parent
TRAINED = ("pretrain", "gpt2", "gpt2-adamw", "distilgpt2", "sft", "dpo")  # stages that train; see `section`
REPLICATED = (*LINEAGE, "gpt2", "gpt2-adamw")  # what may be trained from several seeds; see `replicated`
_LARGEST_SEED = 2**32 - 1
_LARGEST_FILE = 1 << 20  # bytes of a preset; the ones here have four thousand


@configuration
class DataConfig:
    pretrain: tuple[SourceConfig, ...] = ()
    pretrain_heldout: tuple[SourceConfig, ...] = ()
    sft: tuple[SourceConfig, ...] = ()
    sft_heldout: tuple[SourceConfig, ...] = ()
    dpo: tuple[SourceConfig, ...] = ()
    dpo_heldout: tuple[SourceConfig, ...] = ()


@configuration
class BaselinesConfig:
    gpt2: Text = "train"  # train: the GPT-2 architecture on the same tokens; or a folder; or a hub id
    gpt2_revision: Text = ""
    distilgpt2: Text = "train"  # train: a half-depth student distilled from our gpt2; or a folder; or a hub id
    distilgpt2_revision: Text = ""
    seeds: Flag = False  # true: GPT-2's architecture, where it is trained here, is trained from each of the seeds too
    external: tuple[ExternalConfig, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "BaselinesConfig":
        for name in ("gpt2", "distilgpt2"):
            if not getattr(self, name):
                raise impossible("train, a folder or a hub id", name, "")
        if self.distilgpt2 == "train" != self.gpt2:
            raise impossible(
                f"a folder or a hub id, as in baselines.gpt2 = {self.gpt2!r}: train needs a gpt2 that is trained here",
                "distilgpt2",
                "train",
            )
        return self


@configuration
class TuningConfig:
    """Trials before each training, which choose its learning rates by the held-out loss (`study.tuning`)."""

    multipliers: tuple[AboveZero, ...] = ()  # of the section's learning rates, one trial each; none: no trials
    share: Annotated[AboveZero, between(0, 1)] = 0.25  # of the training's length, for each trial


@configuration
class AblationConfig:
    """A variant is what it changes, "norm=layer" or "optimizer=adamw,learning_rate=2e-3": keys of [model] or of
    [ablations.train]. The base and every variant are trained from each seed.
    """

    steps: PositiveOrOff = -1  # -1: no ablations
    seeds: Positive = 1
    base: Text = ""  # what the base changes in [model], written like a variant: a smaller one affords more seeds
    variants: tuple[Text, ...] = (
        "norm=layer",
        "ffn=gelu",
        "position=learned",
        "position=none",
        "sinks=0",
        "sinks=4",
        "qk_norm=true",
        "optimizer=adamw",
    )
    # An attribution: the parts that make the base GPT-2's recipe, in the order in which they are taken back, and what
    # then makes the base larger. Each is written like a variant; see `attribution_chain`.
    chain: tuple[Text, ...] = ()
    scale: Text = ""
    rounds: Positive = 15  # timed steps of each, interleaved; from 6 on their median has a 95% interval
    train: TrainConfig = TrainConfig()
    length_streams: PositiveOrOff = 8  # streams of evaluation.perplexity's text for loss by position; -1: not measured
    length_factor: AtLeastTwo = 16  # positions of a stream, in contexts


@configuration
class Preset:
    name: Text = ""
    description: Text = ""
    notice: Text = ""  # one line that opens the report: what the run is, where it is not what a reader may take it for
    seed: Annotated[Integer, between(0, _LARGEST_SEED)] = 1337
    seeds: Positive = 1  # trainings of pretrain, sft and dpo, from seed, seed + 1, ...; the other stages run once
    price_per_hour: NonnegativeOrOff = -1.0  # USD assumed for an hour of the machine, for the report; -1: not stated
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    overlap: OverlapConfig = OverlapConfig()
    pretrain: TrainConfig = TrainConfig()
    gpt2: TrainConfig = TrainConfig()
    gpt2_adamw: TrainConfig = TrainConfig()  # GPT-2's own recipe, a further row where this section has a length
    distilgpt2: TrainConfig = TrainConfig()
    sft: TrainConfig = TrainConfig()
    dpo: TrainConfig = TrainConfig()
    tuning: TuningConfig = TuningConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ablations: AblationConfig = AblationConfig()


# Reading and writing ------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in paths.PRESETS.glob("*.toml"))


def load_preset(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Preset:
    """The preset of that name (or of that `.toml` file) with overrides applied, checked.

    Raises ConfigError: unknown preset, unreadable TOML, unknown key, wrong type or impossible value.
    """
    text = str(name_or_path)
    if text.endswith(".toml") or "/" in text:
        try:
            path = next((path for path in (Path(text), paths.PROJECT / text) if path.is_file()), None)
        except OSError as error:  # a name too long for any file
            raise ConfigError(f"preset {shown(text)}: {error.strerror}") from error
        if path is None:
            raise ConfigError(f"preset {text!r:.300}: no such file; presets by name: {', '.join(preset_names())}")
    else:
        path = paths.PRESETS / f"{text}.toml"
        if text not in preset_names():
            raise ConfigError(
                f"unknown preset {shown(text)}{did_you_mean(text, preset_names())}; "
                f"allowed: {', '.join(preset_names())}, or a path that ends in .toml"
            )
    try:
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise ConfigError(f"{path.name}: {size:,} bytes: a preset has at most {_LARGEST_FILE:,}")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no file, no UTF-8, no TOML, brackets without end
        raise ConfigError(f"{path.name}: cannot be read as TOML: {error}") from error
    preset = from_dict(_located({**table, "name": table.get("name") or path.stem}, path.parent), path.name)
    return override(preset, overrides or {}, origin=f"{path.name} with overrides" if overrides else path.name)


def _located(values: Any, folder: Path) -> Any:
    """The values of a preset's file in which a relative path that is there in the file's folder is made absolute."""
    if isinstance(values, list):
        return [_located(value, folder) for value in values]
    if not isinstance(values, dict):
        return values
    found = {key: _located(value, folder) for key, value in values.items()}
    for key in ("path", "location", "gpt2", "distilgpt2"):
        given = found.get(key)
        if isinstance(given, str) and given not in ("", "train") and os.path.exists(folder / given):
            found[key] = str((folder / given).absolute())
    return found


def from_dict(table: Mapping[str, Any], origin: str) -> Preset:
    """A preset from plain values, checked key by key (`validate` checks it as a whole). Raises ConfigError."""
    try:
        return TypeAdapter(Preset).validate_python(dict(table))
    except ValidationError as error:
        raise config_error(error, Preset, origin) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A preset, or one section of it, as plain dicts, lists and scalars: what JSON and TOML can hold."""
    return to_jsonable_python(config)


def to_toml(preset: Preset) -> str:
    """The whole preset, defaults included, as TOML that `load_preset` reads back equal."""
    return tomli_w.dumps(to_dict(preset))


# Overrides ----------------------------------------------------------------------------------------------------------


def parse_overrides(texts: str | Iterable[str]) -> dict[str, Any]:
    """Texts such as `sft.learning_rate=1e-4` or `seed=3; model.norm=layer` as {dotted key: value}.

    A value is read by the type of its key: literally for a string, as a TOML value otherwise (`3e-4`, `true`,
    `[0, 3]`, `{source = "x"}`; `0,3` for a list). One string may hold several overrides between semicolons.
    Raises ConfigError: no `=`, unknown key.
    """
    values: dict[str, Any] = {}
    for text in _split(texts) if isinstance(texts, str) else texts:
        key, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
        key = key.strip()
        if not equals:
            raise ConfigError(f"override {shown(text)}: expected key=value, for example sft.learning_rate=1e-4")
        values.pop(key, None)  # of two, the later one is applied, at its place
        values[key] = parse_value(kind_at(Preset, key.split("."), "override"), value.strip())
    return values


def format_overrides(overrides: Mapping[str, Any]) -> str:
    """Overrides as one text that `parse_overrides` reads back, for a command line."""
    return "; ".join(f"{key}={_inline_toml(value)}" for key, value in overrides.items() if value is not None)


def override(preset: Preset, overrides: Mapping[str, Any], *, origin: str = "override") -> Preset:
    """The preset with some keys replaced, `{"sft.learning_rate": 1e-4}`, checked.

    `data.pretrain.0.max_examples` reaches into a list. None leaves the preset's value. One of steps, tokens and epochs
    replaces whichever of the three the preset has. A string for a key of another type is parsed, because papermill
    passes `3e-4` as a string. Raises ConfigError.
    """
    table = to_dict(preset)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    for key, value in overrides.items():
        kind = kind_at(Preset, key.split("."), origin)
        *sections, last = key.split(".")
        holder: Any = table
        for depth, part in enumerate((*sections, last)):
            if isinstance(holder, list) and part not in map(str, range(len(holder))):
                where = f"{'.'.join(sections[:depth])} is a list of {len(holder)}, its items count from 0"
                raise ConfigError(f"{origin}: {key}: {where}")
            place = int(part) if isinstance(holder, list) else part
            if depth < len(sections):
                holder = holder[place]
        if isinstance(value, str):
            value = parse_value(kind, value, quotes=False)
        if last in LENGTHS and set(LENGTHS) <= set(holder) and isinstance(value, int | float) and value > 0:
            given = {name for name in LENGTHS if ".".join([*sections, name]) in overrides}
            holder.update({name: -1 for name in LENGTHS if name not in given})
        holder[place] = value
    return validate(from_dict(table, origin), origin)


def _split(text: str) -> list[str]:
    """`"a.b=c; d.e=[1; 2]"` -> `["a.b=c", "d.e=[1; 2]"]`: the parts between semicolons, except those in a TOML string,
    list or table."""
    parts: list[str] = []
    for piece in text.split(";"):
        if parts and _is_open(parts[-1].partition("=")[2].strip()):
            parts[-1] += f";{piece}"
        else:
            parts.append(piece)
    return [part.strip() for part in parts if part.strip()]


def _is_open(value: str) -> bool:
    """Whether a value begins a TOML string, list or table that it does not end."""
    if not value.startswith(("'", '"', "[", "{")):
        return False
    try:
        return not tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return True


def _inline_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_inline_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline_toml, value)) + "]"
    # JSON's scalars are TOML's, except that TOML has the delete character escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


# Checks of a whole preset -------------------------------------------------------------------------------------------


def validate(preset: Preset, origin: str = "preset") -> Preset:
    """The same preset, if its sections fit together; else ConfigError with the key and what is allowed."""
    try:
        sizes.check(to_dict(preset), (*map(section, TRAINED), "ablations.train"))
        _check_whole(preset)
        for key, source in _sources(preset).items():
            _check_source(key, source)
        _check_baselines(preset.baselines)
        _check_ablations(preset)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return preset


def _check_whole(preset: Preset) -> None:
    check_name(preset.name, "name")
    last, least = preset.seed + preset.seeds - 1, 256 + preset.model.sinks + 1
    if last > _LARGEST_SEED:
        raise ConfigError(
            f"seeds = {preset.seeds}: the last of them would be {last}, expected seed + seeds - 1 to be at most "
            f"{_LARGEST_SEED}"
        )
    if preset.tokenizer.kind == "train" and preset.tokenizer.vocab_size < least:
        raise ConfigError(
            f"tokenizer.vocab_size = {preset.tokenizer.vocab_size}: expected at least {least} "
            "(256 bytes, the end-of-text token and the sinks)"
        )
    for name in trained(preset):
        if not getattr(preset, section(name)).lengths:
            raise ConfigError(f"{name}: exactly one of steps, tokens and epochs is to be set, none is")
    multipliers = preset.tuning.multipliers
    if len(set(multipliers)) < len(multipliers):
        raise ConfigError(f"tuning.multipliers = {shown(list(multipliers))}: expected each of them once")


def _sources(preset: Preset) -> dict[str, SourceConfig]:
    """The preset's data sources by key."""
    parts = {part.name: getattr(preset.data, part.name) for part in fields(DataConfig)}
    data = {f"data.{name}.{index}": source for name, part in parts.items() for index, source in enumerate(part)}
    return data | {f"evaluation.{key}": source for key, source in evaluation_sources(preset).items()}


def _check_source(key: str, source: SourceConfig) -> None:
    if not source.source and not source.path:
        raise ConfigError(f"{key}: expected either source (a name in data/sources.toml) or path")
    if source.path and not source.reader:
        raise ConfigError(
            f"{key}: a path needs a reader: text, wikitext, wikitext-raw, stories, reviews, reviews-reworded, "
            "instructions, preferences, sentiment, problems or minimal-pairs"
        )


def _check_baselines(baselines: BaselinesConfig) -> None:
    seen = set(OWN_MODELS)
    for index, external in enumerate(baselines.external):
        key = f"baselines.external.{index}"
        check_name(external.name, f"{key}.name")
        if external.name in seen:
            raise ConfigError(f"{key}.name = {external.name!r}: that model is there already; rename this one")
        if replicate_of(external.name)[1] > 1:
            raise ConfigError(f"{key}.name = {external.name!r}: -seed and a number end a replicate's name")
        if not external.location:
            raise ConfigError(f"{key}.location: expected a folder, a hub id or package:NAME/FILE.gguf, it is empty")
        seen.add(external.name)


def _check_ablations(preset: Preset) -> None:
    ablations, base = preset.ablations, ablation_base(preset)
    lengths = {name: getattr(ablations.train, name) for name in ablations.train.lengths}
    if ablations.steps != -1 and lengths not in ({}, {"steps": ablations.steps}):
        raise ConfigError(
            f"ablations.train: leave out steps, tokens and epochs, ablations.steps = {ablations.steps} says how long"
        )
    trainings = {"ablations.base": (base, ablations.train)}
    variants = [("variants", variant) for variant in ablations.variants]
    variants += [("chain", part) for part in ablations.chain]
    variants += [("chain", ",".join(ablations.chain))] if ablations.chain else []
    variants += [("scale", ablations.scale)] if ablations.scale else []
    for key, variant in variants:
        try:
            training = apply_variant(base, ablations.train, variant)
        except ConfigError as error:
            raise ConfigError(f"ablations.{key}: {error}") from None
        if key != "variants" and training == (base, ablations.train):
            raise ConfigError(f"ablations.{key}: {variant!r} is what the base has already")
        trainings[f"ablations.{key}: {variant!r}"] = training
    if ablations.chain and len(attribution_chain(ablations)) < 1 + len(ablations.chain) + bool(ablations.scale):
        raise ConfigError("ablations.chain: two of its parts begin with the same key, by which a part is named")
    if ablations.scale and not ablations.chain:
        raise ConfigError("ablations.scale: it is the last link of ablations.chain, which is empty")
    for key, (model, train) in trainings.items():
        changed = {"model": to_dict(model), "ablations": {**to_dict(ablations), "train": to_dict(train)}}
        try:
            sizes.check(to_dict(preset) | changed, ("ablations.train",))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


# What a preset says -------------------------------------------------------------------------------------------------


def ablation_base(preset: Preset) -> ModelConfig:
    """The model that the ablations' variants differ from: `ablations.base` applied to [model]. Raises ConfigError."""
    if not preset.ablations.base:
        return preset.model
    try:
        model_changes, train_changes = variant_changes(preset.ablations.base)
        if train_changes:
            raise ConfigError(f"{preset.ablations.base!r}: expected keys of [model]; [ablations.train] has others")
        return replace(preset.model, **model_changes)
    except ConfigError as error:
        raise ConfigError(f"ablations.base: {error}") from None


def attribution_chain(ablations: AblationConfig) -> dict[str, str]:
    """{link: variant that it leads to} of the attribution, from "recipe", GPT-2's, to "scale"; empty without a chain.

    A link is named after the key that it takes back: ["optimizer=adamw", "norm=layer"] gives {"recipe":
    "optimizer=adamw,norm=layer", "optimizer": "norm=layer", "norm": "base"}.
    """
    if not ablations.chain:
        return {}
    links = ["recipe", *(part.partition("=")[0].strip() for part in ablations.chain)]
    ends = [",".join(ablations.chain[place:]) or "base" for place in range(len(links))]
    return dict(zip(links, ends, strict=True)) | ({"scale": ablations.scale} if ablations.scale else {})


def lineage(preset: Preset) -> tuple[str, ...]:
    """The stages of LINEAGE up to the last one that the preset has data or a length for: without any for SFT and DPO
    it ends with pretraining."""
    asked = [name for name in LINEAGE if getattr(preset.data, name) or getattr(preset, name).lengths]
    return LINEAGE[: LINEAGE.index(asked[-1]) + 1] if asked else LINEAGE[:1]


def section(stage: str) -> str:
    """The section of a preset that says how a stage of TRAINED trains: "gpt2_adamw" of "gpt2-adamw"."""
    return stage.replace("-", "_")


def kind_and_model(stage: str) -> tuple[str, str]:
    """("evaluate", "sft") of the stage "evaluate-sft", ("tune", "sft") of "tune-sft", ("sft", "sft") of "sft". The
    model keeps the replicate that the stage's name ends in."""
    kind, _, model = stage.partition("-")
    return (kind, model) if kind in ("evaluate", "tune") else (stage, stage)


def trained(preset: Preset) -> list[str]:
    """The stages of TRAINED that the preset asks for: a baseline that is loaded is not trained."""
    asked = {"gpt2": preset.baselines.gpt2 == "train", "distilgpt2": preset.baselines.distilgpt2 == "train"}
    asked |= {"gpt2-adamw": bool(preset.gpt2_adamw.lengths), **dict.fromkeys(lineage(preset), True)}
    return [name for name in TRAINED if asked.get(name)]


def replicated(preset: Preset) -> list[str]:
    """The trainings that are repeated from each of the preset's seeds."""
    asked = REPLICATED if preset.baselines.seeds else LINEAGE
    return [name for name in asked if name in trained(preset)]


def model_names(preset: Preset) -> list[str]:
    """Every model the run evaluates, in the report's order: the random control, baselines, our stages, externals."""
    absent = {*LINEAGE, "gpt2-adamw"} - {*trained(preset)}
    return [*(name for name in OWN_MODELS if name not in absent), *(entry.name for entry in preset.baselines.external)]


def evaluation_sources(preset: Preset) -> dict[str, SourceConfig]:
    """The sources that evaluations read, by key of [evaluation]; those that are not set left out."""
    values = {entry.name: getattr(preset.evaluation, entry.name) for entry in fields(preset.evaluation)}
    return {name: value for name, value in values.items() if isinstance(value, SourceConfig) and value.is_set}


def scored_on(preset: Preset) -> dict[str, SourceConfig]:
    """What evaluations score, by use. Demonstrations are not included: they are shown, not scored, and come from
    training splits."""
    return {name: value for name, value in evaluation_sources(preset).items() if not name.endswith("_demonstrations")}


def measured_on(preset: Preset) -> dict[str, SourceConfig]:
    """What no model of the preset may be trained on, by use: what evaluations score and the held-out text of stages.
    One source with several uses is named by the first."""
    named = scored_on(preset)
    for part in ("pretrain_heldout", "sft_heldout", "dpo_heldout"):
        sources = getattr(preset.data, part)
        for number, source in enumerate(sources, start=1):
            if source not in named.values():
                named[part if len(sources) == 1 else f"{part}_{number}"] = source
    return named
