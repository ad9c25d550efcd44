"""Presets: TOML files read strictly into frozen dataclasses.

Precedence: dataclass default < preset file < `--set a.b=c` / papermill `-p`. `-1` means "off" or "all" throughout.
Whatever cannot be meant (unknown key, wrong type, impossible value) raises one `ConfigError` that names the file, the
key, what is allowed and the near miss.
"""

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from basics import paths
from basics.errors import ConfigError
from basics.names import LARGEST_INTEGER, check_name, did_you_mean, near_miss, replicate_of, shown


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Each component has its GPT-2 counterpart behind one switch."""

    n_layer: int = 4
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = -1  # -1: as many as n_head; fewer: grouped-query attention (Ainslie et al. 2023)
    d_ff: int = 384
    context: int = 256  # positions in a row, sinks included
    vocab_size: int = -1  # -1: the tokenizer's; filled in when the tokenizer is known
    norm: Literal["rms", "layer"] = "rms"
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    position: Literal["rope", "learned", "none"] = "rope"
    sinks: int = 1
    qk_norm: bool = False
    bias: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class TokenizerConfig:
    kind: Literal["train", "gpt2"] = "train"  # train: a byte-level BPE learned on the preset's own pretraining text
    vocab_size: int = 4096  # of a trained tokenizer, special tokens included
    split_digits: bool = (
        False  # of a trained tokenizer: every digit is a token of its own, so numbers of any length read alike
    )


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture: a registered source by name, or own files by path and reader."""

    source: str = ""  # a name in data/sources.toml
    split: str = "train"
    path: str = ""  # own file or folder instead of a registered source (JSONL, JSON, text, TSV, Parquet)
    # How to read `path`: text, wikitext, wikitext-raw, stories, reviews, instructions, preferences, sentiment, problems
    reader: str = ""
    max_examples: int = -1
    skip_examples: int = 0  # leave out the first N: lets one split serve two disjoint purposes


@dataclass(frozen=True)
class DataConfig:
    pretrain: tuple[SourceConfig, ...] = ()
    pretrain_heldout: tuple[SourceConfig, ...] = ()
    sft: tuple[SourceConfig, ...] = ()
    sft_heldout: tuple[SourceConfig, ...] = ()
    dpo: tuple[SourceConfig, ...] = ()
    dpo_heldout: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True)
class OverlapConfig:
    """The search of training text against what is measured on (`threefold.data.overlap`)."""

    ngram: int = 13  # words of a run that is evidence
    common: int = 10  # an n-gram in more documents of a training source is a template, no evidence; -1: none is
    line: int = 8  # words of the shortest line, and of the shortest question inside other text, that is evidence
    remove: bool = True  # take what was found out of the training text; false: only report it


@dataclass(frozen=True)
class TrainConfig:
    """One stage's optimisation. Batch sizes are rows of `model.context` positions (DPO: pairs)."""

    steps: int = -1  # -1: as many as `tokens` or `epochs` ask for; exactly one of the three is set
    tokens: int = -1  # non-padding tokens to train on
    epochs: float = -1.0
    batch_size: int = 16
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW
    learning_rate: float = 3e-3  # AdamW's
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.05  # share of the steps
    decay: float = 0.2  # wsd: share of the steps that decay
    final_lr_ratio: float = 0.1
    clip: float = 1.0  # gradient norm; -1: off
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    shard: Literal["auto", "on", "off"] = "auto"  # with several workers: split the model over them; auto: if too large
    checkpoint_every: int = -1  # steps between resumable states; -1: about one a minute
    evaluate_every: int = -1  # steps between held-out losses; -1: at the start and the end only
    replay: float = 0.0  # sft: share of the rows that are pretraining text
    beta: float = 0.1  # dpo (Rafailov et al. 2023)
    distill_temperature: float = 2.0  # distilgpt2 (Sanh et al. 2019)
    distill_weight: float = 0.5  # weight of the soft-target loss against the next-token loss


@dataclass(frozen=True)
class ExternalConfig:
    """A further model to evaluate: a transformers folder, a hub id, or a package's file `package:NAME/FILE.gguf`."""

    name: str = ""
    location: str = ""
    revision: str = ""


@dataclass(frozen=True)
class BaselinesConfig:
    gpt2: str = "train"  # train: the GPT-2 architecture on the same tokens; or a folder; or a hub id
    gpt2_revision: str = ""
    distilgpt2: str = "train"  # train: a half-depth student distilled from our gpt2; or a folder; or a hub id
    distilgpt2_revision: str = ""
    external: tuple[ExternalConfig, ...] = ()


@dataclass(frozen=True)
class EvaluationConfig:
    perplexity: SourceConfig = field(default_factory=SourceConfig)  # the "test" text
    lines: SourceConfig = field(default_factory=SourceConfig)  # the "validation" text of the lines-100 protocol
    window: int = 1024  # positions of a disjoint window
    stride: int = 512
    strided_documents: int = -1  # documents the strided protocol covers
    sentiment: SourceConfig = field(default_factory=SourceConfig)
    sentiment_demonstrations: SourceConfig = field(default_factory=SourceConfig)
    sentiment_shots: tuple[int, ...] = (0, 3)
    sentiment_templates: int = 5  # how many of the protocol's templates
    sentiment_draws: int = 5  # demonstration draws of each few-shot setting
    sentiment_grid_items: int = 0  # items asked under all five templates x five draws, to split the variance; 0: none
    sentiment_calibration: bool = False  # also publish accuracy under contextual calibration
    problems: SourceConfig = field(default_factory=SourceConfig)
    problem_demonstrations: SourceConfig = field(default_factory=SourceConfig)
    problem_shots: int = 5
    problem_new_tokens: int = 256
    instructions: SourceConfig = field(default_factory=SourceConfig)
    instruction_new_tokens: int = 64
    instruction_generations: int = 200  # how many of the held-out instructions are also answered by generation
    preferences: SourceConfig = field(default_factory=SourceConfig)
    batch_tokens: int = 16384  # positions in one scoring batch: memory for speed
    speed_batch_sizes: tuple[int, ...] = (1, 8)
    speed_prompt: int = 64
    speed_new_tokens: int = 64
    speed_repeats: int = 5
    bootstrap: int = 10000  # resamples behind an interval


@dataclass(frozen=True)
class AblationConfig:
    """A variant is what it changes, "norm=layer" or "optimizer=adamw,learning_rate=2e-3": keys of [model] or of
    [ablations.train]. The base and every variant are trained from each seed.
    """

    steps: int = -1  # -1: no ablations
    seeds: int = 1
    base: str = ""  # what the base changes in [model], written like a variant: a smaller one affords more seeds
    variants: tuple[str, ...] = (
        "norm=layer",
        "ffn=gelu",
        "position=learned",
        "position=none",
        "sinks=0",
        "sinks=4",
        "qk_norm=true",
        "optimizer=adamw",
    )
    rounds: int = 15  # timed steps of each, taken in turn; from 6 on their median has a 95% interval
    train: TrainConfig = field(default_factory=TrainConfig)
    length_streams: int = 8  # streams of evaluation.perplexity's text for loss by position; -1: not measured
    length_factor: int = 16  # positions of a stream, in contexts


@dataclass(frozen=True)
class Preset:
    name: str = ""
    description: str = ""
    seed: int = 1337
    seeds: int = 1  # trainings of pretrain, sft and dpo, from seed, seed + 1, ...; the other stages run once
    price_per_hour: float = -1.0  # USD that an hour of the machine is taken to cost, for the report; -1: not stated
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    gpt2: TrainConfig = field(default_factory=TrainConfig)
    distilgpt2: TrainConfig = field(default_factory=TrainConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    dpo: TrainConfig = field(default_factory=TrainConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ablations: AblationConfig = field(default_factory=AblationConfig)


OWN_MODELS = ("random", "gpt2", "distilgpt2", "pretrain", "sft", "dpo")  # the comparison's rows, in the report's order
REPEATED = ("pretrain", "sft", "dpo")  # the stages that `seeds` trains again, each replicate from its own parent
TRAINED = ("pretrain", "gpt2", "distilgpt2", "sft", "dpo")  # sections of a preset that are one TrainConfig each
LENGTHS = ("steps", "tokens", "epochs")  # the three ways to say how long a stage trains
_NO_LENGTH = dict.fromkeys(LENGTHS, -1)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in paths.PRESETS.glob("*.toml"))


def load_preset(name_or_path: str | Path, overrides: Mapping[str, object] | Iterable[str] = ()) -> Preset:
    """The preset of that name (or of that `.toml` file) with overrides applied, checked.

    Overrides are `{"a.b": value}` or `["a.b=c", ...]`, see `override`.
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
    preset = _read(path)
    overrides = overrides if isinstance(overrides, Mapping) else list(overrides)
    if overrides:
        return override(preset, overrides, origin=f"{path.name} with overrides")
    return validate(preset, path.name)


def from_toml(path: str | Path) -> Preset:
    """A preset from a TOML file, checked like any other; without a name of its own it takes the file's."""
    path = Path(path)
    return validate(_read(path), path.name)


def to_dict(config: Any) -> dict[str, Any]:
    """A preset, or one section of it, as plain dicts, lists and scalars: what JSON and TOML can hold."""
    return _plain(asdict(config))


def to_toml(preset: Preset) -> str:
    """The whole preset, defaults included, as TOML that `from_toml` reads back equal."""
    return tomli_w.dumps(to_dict(preset))


def override(preset: Preset, overrides: Mapping[str, object] | Iterable[str], *, origin: str = "override") -> Preset:
    """The preset with some keys replaced, checked.

    Overrides are `{"sft.learning_rate": 1e-4}` or `["sft.learning_rate=1e-4"]`. A text is read by the type of its key:
    as it stands for a string, as a TOML value otherwise (`3e-4`, `true`, `[0, 3]`, `{source = "x"}`; `0,3` for a list).
    `data.pretrain.0.max_examples` reaches into a list. None leaves the preset's value. One of steps, tokens and epochs
    replaces whichever of the three the preset has.
    """
    table = to_dict(preset)
    lengths: dict[str, set[str]] = {}
    for key, value, raw in _as_pairs(overrides):
        if value is None:
            continue
        holder, last, kind = _locate(table, key, origin)
        holder[last] = _from_text(kind, value, raw) if isinstance(value, str) else _plain(value)
        section, _, name = key.rpartition(".")
        if name in LENGTHS and set(LENGTHS) <= set(holder):
            lengths.setdefault(section, set()).add(name)
    for section, named in lengths.items():
        holder, last, _ = _locate(table, section, origin)
        train = holder[last]
        if any(isinstance(train[name], int | float) and train[name] > 0 for name in named):
            train.update({name: -1 for name in LENGTHS if name not in named})
    return validate(_build(Preset, table, "", origin), origin)


def split_overrides(text: str) -> list[str]:
    """`"a.b=c; d.e=[1; 2]"` -> `["a.b=c", "d.e=[1; 2]"]`: the parts between semicolons outside quotes and brackets."""
    parts, depth, quote, escaped = [""], 0, "", False
    for char in text:
        if quote:
            ends = char == quote and not escaped
            escaped = quote == '"' and char == "\\" and not escaped
            quote = "" if ends else quote
        elif char in "\"'":  # opens a string only where a TOML value can begin: not the apostrophe of a bare word
            quote = char if depth or parts[-1].rstrip().endswith("=") else ""
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == ";" and depth <= 0:
            parts.append("")
            depth = 0
            continue
        parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def join_overrides(overrides: Mapping[str, object] | Iterable[str]) -> str:
    """Overrides as one text that `split_overrides` and `override` read back to the same values."""
    if isinstance(overrides, Mapping):
        pairs = [(key, _inline(value)) for key, value in overrides.items() if value is not None]
    else:
        pairs = [(key, text) for key, text, _ in _as_pairs(overrides)]
    joined = []
    for key, text in pairs:
        item = f"{key}={text}"
        if split_overrides(f"{item}; seed=0") != [item, "seed=0"]:  # a bare string that would not survive
            item = f"{key}={_quoted(text)}"
        joined.append(item)
    return "; ".join(joined)


def model_names(preset: Preset) -> list[str]:
    """Every model the run evaluates, in the report's order: the random control, baselines, our stages, externals."""
    return [*OWN_MODELS, *(external.name for external in preset.baselines.external)]


def evaluation_sources(preset: Preset) -> dict[str, SourceConfig]:
    """The sources that evaluations read, by key of [evaluation]; those that are not set left out."""
    found = {entry.name: getattr(preset.evaluation, entry.name) for entry in fields(preset.evaluation)}
    return {
        name: value for name, value in found.items() if isinstance(value, SourceConfig) and (value.source or value.path)
    }


def measured_on(preset: Preset) -> dict[str, SourceConfig]:
    """What no model of the preset may be trained on, by use: what evaluations score and the held-out text of stages.

    Demonstrations are not among them: they are shown, not scored, and come from training splits. One source with
    several uses is named by the first.
    """
    found = {name: value for name, value in evaluation_sources(preset).items() if not name.endswith("_demonstrations")}
    for part in ("pretrain_heldout", "sft_heldout", "dpo_heldout"):
        sources = getattr(preset.data, part)
        for number, source in enumerate(sources, start=1):
            if source not in found.values():
                found[part if len(sources) == 1 else f"{part}_{number}"] = source
    return found


# Reading ------------------------------------------------------------------------------------------------------------

_LARGEST_FILE = 1 << 20  # bytes of a preset; the ones here have four thousand


def _read(path: Path) -> Preset:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path.name}: {path.stat().st_size:,} bytes: a preset has at most {_LARGEST_FILE:,}")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # no TOML, a number of thousands of digits, brackets without end
        raise ConfigError(f"{path.name}: no TOML: {error}") from error
    if not table.get("name"):
        table["name"] = path.stem
    return _build(Preset, table, "", path.name)


def _unknown(key: str, cls: type, origin: str) -> ConfigError:
    prefix, _, last = key.rpartition(".")
    allowed = [entry.name for entry in fields(cls)]
    miss = near_miss(last, allowed)
    here = f"{prefix}.{miss}" if prefix and miss else miss
    miss = here or near_miss(key, all_keys())  # perhaps a key of another section, or one whose section was left out
    hint = f", did you mean {miss}?" if miss else ""
    where = f" in [{prefix}]" if prefix else ""
    return ConfigError(f"{origin}: unknown key {key}{hint} (allowed{where}: {', '.join(allowed)})")


def all_keys(cls: type = Preset, prefix: str = "") -> list[str]:
    """Every dotted key of a preset, outermost first."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys.append(f"{prefix}{name}")
        if is_dataclass(kind):
            keys += all_keys(kind, f"{prefix}{name}.")
    return keys


def _build(cls: type, table: Mapping[str, Any], where: str, origin: str) -> Any:
    kinds = get_type_hints(cls)
    values = {}
    for name, value in table.items():
        key = f"{where}.{name}" if where else name
        if name not in kinds:
            raise _unknown(key, cls, origin)
        values[name] = _value(kinds[name], value, key, origin)
    return cls(**values)


def _value(kind: Any, value: Any, key: str, origin: str) -> Any:
    """The value as its field's type, or ConfigError. A whole number will do for a float; nothing else is converted."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _build(kind, value, key, origin)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_value(get_args(kind)[0], item, f"{key}.{index}", origin) for index, item in enumerate(value))
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        number = False
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind is int and number and isinstance(value, int):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    hint = did_you_mean(value, get_args(kind)) if get_origin(kind) is Literal and isinstance(value, str) else ""
    raise ConfigError(f"{origin}: {key} = {shown(value)}: expected {_describe(kind)}{hint}")


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list, each item {_describe(get_args(kind)[0])}"
    if is_dataclass(kind):
        return "a table with " + ", ".join(entry.name for entry in fields(kind))
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# Overrides ----------------------------------------------------------------------------------------------------------


def _inline(value: Any, nested: bool = False) -> str:
    """A value as the right-hand side of an override: strings bare where they can be, everything else as inline TOML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_inline(item, True)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(item, True) for item in value) + "]"
    if isinstance(value, str):
        bare = not nested and value and value == value.strip() and value[0] not in "\"'"
        return value if bare else _quoted(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    """A TOML basic string; its escapes are JSON's, except that delete has to be one."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _as_pairs(overrides: Mapping[str, object] | Iterable[str]) -> list[tuple[str, object, bool]]:
    """(key, value, whether the value is raw text in which a string may stand in quotes) of each override."""
    if isinstance(overrides, Mapping):
        return [(key, value, False) for key, value in overrides.items()]
    pairs = []
    for item in overrides:
        if not isinstance(item, str) or "=" not in item:
            raise ConfigError(f"override {shown(item)}: expected key=value, for example sft.learning_rate=1e-4")
        key, _, text = item.partition("=")
        pairs.append((key.strip(), text.strip(), True))
    return pairs


def _locate(table: dict[str, Any], key: str, origin: str) -> tuple[Any, Any, Any]:
    """(container, index in it, type there) of a dotted key inside a preset's table."""
    holder, last, kind, seen = None, None, Preset, []
    node: Any = table
    for part in key.split("."):
        if is_dataclass(kind):
            kinds = get_type_hints(kind)
            if part not in kinds:
                raise _unknown(".".join([*seen, part]), kind, origin)
            holder, last, kind = node, part, kinds[part]
        elif get_origin(kind) is tuple:
            if part not in map(str, range(len(node))):
                raise ConfigError(f"{origin}: {key}: {'.'.join(seen)} is a list of {len(node)}, its items count from 0")
            holder, last, kind = node, int(part), get_args(kind)[0]
        else:
            raise ConfigError(f"{origin}: {key}: {'.'.join(seen)} is a value ({_describe(kind)}), it has no keys")
        node = holder[last]
        seen.append(part)
    return holder, last, kind


def _from_text(kind: Any, text: str, raw: bool) -> Any:
    """A text as the TOML value its field wants; a text that is none is returned as it is, for `_value` to refuse."""
    if kind is str or get_origin(kind) is Literal:
        parsed = _toml_value(text) if raw and text[:1] in ("'", '"') else text
        return parsed if isinstance(parsed, str) else text
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    if get_origin(kind) is tuple and not text.startswith("["):
        return [_from_text(get_args(kind)[0], item.strip(), raw) for item in text.split(",") if item.strip()]
    return _toml_value(text)


def _toml_value(text: str) -> Any:
    if "\n" in text:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


# Validation ---------------------------------------------------------------------------------------------------------

Rule = tuple[str, Callable[[Any], bool]]


def _least(low: float) -> Rule:
    return f"at least {low}", lambda value: value >= low


def _above(low: float) -> Rule:
    return f"more than {low}", lambda value: value > low


def _between(low: float, high: float) -> Rule:
    return f"from {low} to {high}", lambda value: low <= value <= high


def _below_one() -> Rule:
    return "at least 0 and less than 1", lambda value: 0 <= value < 1


def _off_or(rule: Rule) -> Rule:
    text, holds = rule
    return f"-1 or {text}", lambda value: value == -1 or holds(value)


_LARGEST_SEED = 2**32 - 1

_RULES: dict[type, dict[str, Rule]] = {
    ModelConfig: {
        **dict.fromkeys(("n_layer", "d_model", "n_head", "d_ff"), _least(1)),
        **dict.fromkeys(("n_kv_head", "vocab_size"), _off_or(_least(1))),
        "context": _least(2),
        "sinks": _least(0),
        **dict.fromkeys(("rope_theta", "norm_eps"), _above(0)),
    },
    SourceConfig: {"max_examples": _off_or(_least(1)), "skip_examples": _least(0)},
    OverlapConfig: {"ngram": _least(2), "common": _off_or(_least(1)), "line": _least(1)},
    TrainConfig: {
        **dict.fromkeys(("steps", "tokens", "checkpoint_every", "evaluate_every"), _off_or(_least(1))),
        **dict.fromkeys(("epochs", "clip"), _off_or(_above(0))),
        **dict.fromkeys(("batch_size", "accumulate"), _least(1)),
        **dict.fromkeys(("learning_rate", "muon_learning_rate", "beta", "distill_temperature"), _above(0)),
        "weight_decay": _least(0),
        **dict.fromkeys(("beta1", "beta2", "replay"), _below_one()),
        **dict.fromkeys(("warmup", "decay", "final_lr_ratio", "distill_weight"), _between(0, 1)),
    },
    EvaluationConfig: {
        "window": _least(2),
        **dict.fromkeys(
            (
                *("stride", "sentiment_templates", "sentiment_draws", "problem_new_tokens", "instruction_new_tokens"),
                *("batch_tokens", "speed_prompt", "speed_new_tokens", "speed_repeats", "bootstrap"),
            ),
            _least(1),
        ),
        "strided_documents": _off_or(_least(1)),
        **dict.fromkeys(("problem_shots", "sentiment_grid_items"), _least(0)),
        "instruction_generations": _off_or(_least(0)),
        "sentiment_shots": ("numbers of at least 0", lambda shots: all(shot >= 0 for shot in shots)),
        "speed_batch_sizes": ("numbers of at least 1", lambda sizes: all(size >= 1 for size in sizes)),
    },
    AblationConfig: {
        "steps": _off_or(_least(1)),
        "seeds": _least(1),
        "rounds": _least(1),
        "length_streams": _off_or(_least(1)),
        "length_factor": _least(2),
    },
    Preset: {"seed": _between(0, _LARGEST_SEED), "seeds": _least(1), "price_per_hour": _off_or(_least(0))},
}


def validate(preset: Preset, origin: str = "preset") -> Preset:
    """The same preset, if every value of it is possible; else ConfigError with the key and what is allowed."""
    check_name(preset.name, f"{origin}: name")
    for key, part in _parts(preset):
        _check_rules(part, key, origin)
        if isinstance(part, SourceConfig):
            _check_source(part, key, origin)
    if preset.seed + preset.seeds - 1 > _LARGEST_SEED:
        raise ConfigError(
            f"{origin}: seeds = {preset.seeds}: the last of them would be {preset.seed + preset.seeds - 1}, expected "
            f"seed + seeds - 1 to be at most {_LARGEST_SEED}"
        )
    _check_model(preset.model, "model", origin)
    if preset.tokenizer.kind == "train":
        least = 256 + max(preset.model.sinks, 0) + 1
        if preset.tokenizer.vocab_size < least:
            raise ConfigError(
                f"{origin}: tokenizer.vocab_size = {preset.tokenizer.vocab_size}: expected at least {least} "
                "(256 bytes, the end-of-text token and the sinks)"
            )
    for name in TRAINED:
        pretrained = getattr(preset.baselines, name, "train") != "train"  # a baseline that is loaded is not trained
        _check_train(getattr(preset, name), name, origin, needs_length=not pretrained)
    _check_train(preset.ablations.train, "ablations.train", origin, needs_length=False)
    lengths = {name: getattr(preset.ablations.train, name) for name in LENGTHS}
    if preset.ablations.steps != -1 and lengths not in (_NO_LENGTH, {**_NO_LENGTH, "steps": preset.ablations.steps}):
        raise ConfigError(
            f"{origin}: ablations.train: leave out steps, tokens and epochs, "
            f"ablations.steps = {preset.ablations.steps} says how long"
        )
    _check_externals(preset.baselines, origin)
    if preset.evaluation.stride > preset.evaluation.window:
        raise ConfigError(
            f"{origin}: evaluation.stride = {preset.evaluation.stride}: "
            f"expected at most evaluation.window = {preset.evaluation.window}, or tokens would be left out"
        )
    base = ablation_base(preset, origin)
    for variant in preset.ablations.variants:
        ablated(base, variant, f"{origin}: ablations.variants")
    return preset


def ablation_base(preset: Preset, origin: str = "preset") -> Preset:
    """The preset with the model that the ablations' variants differ from: `ablations.base` applied to [model]."""
    changes = preset.ablations.base
    if not changes:
        return preset
    changed = ablated(preset, changes, f"{origin}: ablations.base")
    if changed.ablations.train != preset.ablations.train:
        raise ConfigError(
            f"{origin}: ablations.base = {changes!r}: expected keys of [model]; [ablations.train] has others"
        )
    return changed


def ablated(preset: Preset, variant: str, origin: str = "variant") -> Preset:
    """The preset with one variant's changes to [model] and [ablations.train], as `ablations.variants` writes them:
    `ffn=gelu`, `norm=layer,bias=true` or `optimizer=adamw,learning_rate=2e-3`.
    """
    table = to_dict(preset)
    origin = f"{origin}: {variant!r}"
    training = {entry.name for entry in fields(TrainConfig)}
    for part in variant.split(","):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"{origin}: expected key=value with a key of [model] or [ablations.train]")
        if key in LENGTHS:
            raise ConfigError(f"{origin}: {key}: every variant trains equally long, ablations.steps says how long")
        holder, last, kind = _locate(table, f"{'ablations.train' if key in training else 'model'}.{key}", origin)
        holder[last] = _from_text(kind, text, True)
    changed = _build(Preset, table, "", origin)
    _check_rules(changed.model, "model", origin)
    _check_model(changed.model, "model", origin)
    _check_rules(changed.ablations.train, "ablations.train", origin)
    _check_train(changed.ablations.train, "ablations.train", origin, needs_length=False)
    return changed


def _parts(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, config) of a config and of every config inside it."""
    yield where, config
    for entry in fields(config):
        value = getattr(config, entry.name)
        key = f"{where}.{entry.name}" if where else entry.name
        if is_dataclass(value):
            yield from _parts(value, key)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if is_dataclass(item):
                    yield from _parts(item, f"{key}.{index}")


def _check_rules(config: Any, where: str, origin: str) -> None:
    for name, (text, holds) in _RULES.get(type(config), {}).items():
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{origin}: {where}{'.' if where else ''}{name} = {shown(value)}: expected {text}")


def _check_model(model: ModelConfig, where: str, origin: str) -> None:
    if model.d_model % model.n_head:
        raise ConfigError(
            f"{origin}: {where}.d_model = {model.d_model}: expected a multiple of {where}.n_head = {model.n_head}"
        )
    if model.n_kv_head != -1 and model.n_head % model.n_kv_head:
        raise ConfigError(
            f"{origin}: {where}.n_kv_head = {model.n_kv_head}: expected -1 or a divisor of n_head = {model.n_head}"
        )
    head = model.d_model // model.n_head
    if model.position == "rope" and head % 2:
        raise ConfigError(
            f"{origin}: {where}.d_model / {where}.n_head = {head}: expected an even number, rotary positions turn pairs"
        )
    if model.context <= model.sinks + 1:
        raise ConfigError(
            f"{origin}: {where}.context = {model.context}: expected at least {model.sinks + 2}, "
            f"two positions beside {where}.sinks = {model.sinks}"
        )


def _check_train(train: TrainConfig, where: str, origin: str, *, needs_length: bool) -> None:
    named = [name for name in LENGTHS if getattr(train, name) != -1]
    if len(named) > 1 or (needs_length and not named):
        what = " and ".join(named) + " are" if named else "none is"
        raise ConfigError(f"{origin}: {where}: exactly one of steps, tokens and epochs is to be set, {what}")
    if train.schedule == "wsd" and train.warmup + train.decay > 1:
        raise ConfigError(
            f"{origin}: {where}.decay = {train.decay}: expected at most {1 - train.warmup:g}, "
            f"warmup and decay are shares of the same steps"
        )


def _check_source(source: SourceConfig, where: str, origin: str) -> None:
    if source == SourceConfig() and where.startswith("evaluation."):
        return  # not set: the protocol that needs it says so
    if bool(source.source) == bool(source.path):
        raise ConfigError(f"{origin}: {where}: expected either source (a name in data/sources.toml) or path, not both")
    if source.path and not source.reader:
        raise ConfigError(
            f"{origin}: {where}: a path needs a reader: text, wikitext, wikitext-raw, stories, reviews, "
            "instructions, preferences, sentiment or problems"
        )


def _check_externals(baselines: BaselinesConfig, origin: str) -> None:
    seen = set(OWN_MODELS)
    for index, external in enumerate(baselines.external):
        key = f"baselines.external.{index}"
        check_name(external.name, f"{origin}: {key}.name")
        if external.name in seen:
            raise ConfigError(f"{origin}: {key}.name = {external.name!r}: that model is there already; rename this one")
        if replicate_of(external.name)[1] > 1:
            raise ConfigError(f"{origin}: {key}.name = {external.name!r}: -seed and a number end a replicate's name")
        if not external.location:
            raise ConfigError(
                f"{origin}: {key}.location: expected a folder, a hub id or package:NAME/FILE.gguf, it is empty"
            )
        seen.add(external.name)
    for name in ("gpt2", "distilgpt2"):
        if not getattr(baselines, name):
            raise ConfigError(f"{origin}: baselines.{name}: expected train, a folder or a hub id, it is empty")
    if baselines.distilgpt2 == "train" != baselines.gpt2:
        raise ConfigError(
            f"{origin}: baselines.distilgpt2 = 'train' is distilled from a gpt2 that is trained here, and "
            f"baselines.gpt2 = {baselines.gpt2!r}: set that to train too, or distilgpt2 to a folder or a hub id"
        )
