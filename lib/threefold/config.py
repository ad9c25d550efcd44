"""Configurations of a model, its data, its training and its evaluation: frozen dataclasses that pydantic checks.

Every configuration is checked when it is made: an unknown key, a wrong type or an impossible value raises a one-line
ConfigError that names the key, the value, what is allowed and the near miss. `-1` means "off" or "all" throughout.
"""

import functools
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from basics.errors import ConfigError
from basics.names import LARGEST_INTEGER, did_you_mean, near_miss, shown

# Types of values ----------------------------------------------------------------------------------------------------


def _expect(expected: str, allowed: Callable[[Any], bool]) -> AfterValidator:
    def check(value: Any) -> Any:
        if not allowed(value):
            raise PydanticCustomError("impossible", "expected {expected}", {"expected": expected})
        return value

    return AfterValidator(check)


def between(low: float, high: float) -> AfterValidator:
    """The rule that a value lies from low to high."""
    return _expect(f"from {low} to {high}", lambda value: low <= value <= high)


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Integer = Annotated[int, Strict(), Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Natural = Annotated[Integer, _expect("at least 0", lambda value: value >= 0)]
Positive = Annotated[Integer, _expect("at least 1", lambda value: value >= 1)]
AtLeastTwo = Annotated[Integer, _expect("at least 2", lambda value: value >= 2)]
NaturalOrAll = Annotated[Integer, _expect("-1 or at least 0", lambda value: value >= -1)]
PositiveOrOff = Annotated[Integer, _expect("-1 or at least 1", lambda value: value == -1 or value >= 1)]
AboveZero = Annotated[Number, _expect("more than 0", lambda value: value > 0)]
AboveZeroOrOff = Annotated[Number, _expect("-1 or more than 0", lambda value: value == -1 or value > 0)]
Nonnegative = Annotated[Number, _expect("at least 0", lambda value: value >= 0)]
NonnegativeOrOff = Annotated[Number, _expect("-1 or at least 0", lambda value: value == -1 or value >= 0)]
Fraction = Annotated[Number, between(0, 1)]
BelowOne = Annotated[Number, _expect("at least 0 and less than 1", lambda value: 0 <= value < 1)]


def impossible(expected: str, key: str = "", value: Any = None) -> PydanticCustomError:
    """The error that a check of several keys together raises: what is expected, and the key to change (if one)."""
    context = {"expected": f"expected {expected}" if key else expected, "key": key, "value": value}
    return PydanticCustomError("impossible", "{expected}", context)


@dataclass_transform(frozen_default=True)
def configuration(cls: type) -> Any:
    """Decorator: a frozen dataclass whose values pydantic checks; a value that does not fit raises ConfigError."""
    checked = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    initialize = checked.__init__

    @functools.wraps(initialize)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            initialize(self, *args, **kwargs)
        except ValidationError as error:
            raise config_error(error, checked) from None

    checked.__init__ = __init__
    return checked


# Configurations -----------------------------------------------------------------------------------------------------


@configuration
class ModelConfig:
    """A decoder-only transformer. Each component has its GPT-2 counterpart behind one switch."""

    n_layer: Positive = 4
    d_model: Positive = 128
    n_head: Positive = 4
    n_kv_head: PositiveOrOff = -1  # -1: as many as n_head; fewer: grouped-query attention (Ainslie et al. 2023)
    d_ff: Positive = 384
    context: AtLeastTwo = 256  # positions in a row, sinks included
    vocab_size: PositiveOrOff = -1  # -1: the tokenizer's; filled in when the tokenizer is known
    norm: Literal["rms", "layer"] = "rms"
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    position: Literal["rope", "learned", "none"] = "rope"
    sinks: Natural = 1
    qk_norm: Flag = False
    bias: Flag = False
    tie_embeddings: Flag = True
    rope_theta: AboveZero = 10000.0
    norm_eps: AboveZero = 1e-5

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.d_model % self.n_head:
            raise impossible(f"a multiple of n_head = {self.n_head}", "d_model", self.d_model)
        if self.n_kv_head != -1 and self.n_head % self.n_kv_head:
            raise impossible(f"-1 or a divisor of n_head = {self.n_head}", "n_kv_head", self.n_kv_head)
        head = self.d_model // self.n_head
        if self.position == "rope" and head % 2:
            raise impossible(
                f"an even number of dimensions per head (d_model / n_head = {head}): rotary positions turn pairs",
                "d_model",
                self.d_model,
            )
        if self.context <= self.sinks + 1:
            raise impossible(
                f"at least {self.sinks + 2}, two positions beside sinks = {self.sinks}", "context", self.context
            )
        return self


GPT2_VOCABULARY = 50257  # GPT-2's byte-level BPE


@configuration
class TokenizerConfig:
    kind: Literal["train", "gpt2"] = "train"  # train: a byte-level BPE learned on the preset's own pretraining text
    vocab_size: Integer = 4096  # of a trained tokenizer, special tokens included
    split_digits: Flag = False  # of a trained tokenizer: every digit is a token of its own


@configuration
class SourceConfig:
    """One part of a mixture: a registered source by name, or own files by path and reader."""

    source: Text = ""  # a name in data/sources.toml
    split: Text = "train"
    path: Text = ""  # own file or folder instead of a registered source (JSONL, JSON, text, TSV, Parquet)
    # How to read `path`: text, wikitext, wikitext-raw, stories, reviews, reviews-reworded, instructions, preferences,
    # sentiment, problems or minimal-pairs
    reader: Text = ""
    max_examples: PositiveOrOff = -1
    skip_examples: Natural = 0  # leave out the first N: lets one split serve two disjoint purposes

    @property
    def is_set(self) -> bool:
        """Whether any key of this source is set."""
        return self != SourceConfig()

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if self.source and self.path:
            raise impossible("expected either source (a name in data/sources.toml) or path, not both")
        return self


@configuration
class OverlapConfig:
    """The search for evaluation texts in training text (`threefold.data.overlap`)."""

    ngram: AtLeastTwo = 13  # words of a run that is evidence
    common: PositiveOrOff = 10  # an n-gram in more documents of a source is a template, not evidence; -1: none is
    line: Positive = 8  # words of the shortest line, and of the shortest question inside other text, that is evidence
    remove: Flag = True  # remove what was found from the training text; false: only report it


LENGTHS = ("steps", "tokens", "epochs")  # the three ways to say how long a stage trains


@configuration
class TrainConfig:
    """One stage's optimisation. Batch sizes are rows of `model.context` positions (DPO: pairs)."""

    steps: PositiveOrOff = -1  # -1: as many as `tokens` or `epochs` ask for; at most one of the three is set
    tokens: PositiveOrOff = -1  # non-padding tokens to train on
    epochs: AboveZeroOrOff = -1.0
    batch_size: Positive = 16
    accumulate: Positive = 1
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW
    learning_rate: AboveZero = 3e-3  # AdamW's
    muon_learning_rate: AboveZero = 0.02
    weight_decay: Nonnegative = 0.1
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Fraction = 0.05  # share of the steps
    decay: Fraction = 0.2  # wsd: share of the steps that decay
    final_lr_ratio: Fraction = 0.1
    clip: AboveZeroOrOff = 1.0  # gradient norm; -1: off
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    shard: Literal["auto", "on", "off"] = "auto"  # with several workers: split the model over them; auto: if too large
    # Steps between resumable states; -1: about one a minute. A state is written while the next steps are taken, and the
    # next one waits for it, so a kill loses at most twice as many steps.
    checkpoint_every: PositiveOrOff = -1
    evaluate_every: PositiveOrOff = -1  # steps between held-out losses; -1: at the start and the end only
    replay: BelowOne = 0.0  # sft: share of the rows that are pretraining text
    beta: AboveZero = 0.1  # dpo (Rafailov et al. 2023)
    distill_temperature: AboveZero = 2.0  # distilgpt2 (Sanh et al. 2019)
    distill_weight: Fraction = 0.5  # weight of the soft-target loss against the next-token loss

    @property
    def lengths(self) -> list[str]:
        """Those of `LENGTHS` that are set."""
        return [name for name in LENGTHS if getattr(self, name) != -1]

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if len(self.lengths) > 1:
            raise impossible(f"exactly one of steps, tokens and epochs is to be set, {' and '.join(self.lengths)} are")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise impossible(
                f"at most {1 - self.warmup:g}, warmup and decay are shares of the same steps", "decay", self.decay
            )
        return self


@configuration
class ExternalConfig:
    """A further model to evaluate: a transformers folder, a hub id, or a package's file `package:NAME/FILE.gguf`."""

    name: Text = ""
    location: Text = ""
    revision: Text = ""


@configuration
class EvaluationConfig:
    perplexity: SourceConfig = SourceConfig()  # the "test" text
    lines: SourceConfig = SourceConfig()  # the "validation" text of the lines-100 protocol
    window: AtLeastTwo = 1024  # positions of a disjoint window
    stride: Positive = 512
    strided_documents: PositiveOrOff = -1  # documents the strided protocol covers
    blimp: SourceConfig = SourceConfig()
    blimp_pairs: PositiveOrOff = -1  # minimal pairs of each phenomenon, drawn by the seed; -1: all
    sentiment: SourceConfig = SourceConfig()
    sentiment_demonstrations: SourceConfig = SourceConfig()
    sentiment_shots: tuple[Natural, ...] = (0, 3)
    sentiment_templates: Positive = 5  # how many of the protocol's templates
    sentiment_draws: Positive = 5  # demonstration draws of each few-shot setting
    sentiment_grid_items: Natural = 0  # items asked under all five templates x five draws, to split the variance
    problems: SourceConfig = SourceConfig()
    problem_demonstrations: SourceConfig = SourceConfig()
    problem_shots: Natural = 5
    problem_new_tokens: Positive = 256
    instructions: SourceConfig = SourceConfig()
    instruction_new_tokens: Positive = 64
    instruction_generations: NaturalOrAll = 200  # how many of the held-out instructions are also answered by generation
    preferences: SourceConfig = SourceConfig()
    batch_tokens: Positive = 16384  # positions in one scoring batch: memory for speed
    speed_batch_sizes: tuple[Positive, ...] = (1, 8)
    speed_prompt: Positive = 64
    speed_new_tokens: Positive = 64
    speed_repeats: Positive = 5
    bootstrap: Positive = 10000  # resamples behind an interval

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        if self.stride > self.window:
            raise impossible(f"at most window = {self.window}, or tokens would be left out", "stride", self.stride)
        return self


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ConfigError for settings that no token can be drawn with; see `threefold.model.generate`."""
    for name, value, allowed, right in (
        ("temperature", temperature, "0 (greedy) or more", 0 <= temperature < float("inf")),
        ("top_k", top_k, "-1 (all) or at least 1", top_k == -1 or top_k >= 1),
        ("top_p", top_p, "more than 0 and at most 1", 0 < top_p <= 1),
    ):
        if not right:
            raise ConfigError(f"{name} = {value}: allowed is {allowed}")


# Variants -----------------------------------------------------------------------------------------------------------

GPT2_PARTS = {"norm": "layer", "ffn": "gelu", "position": "learned", "qk_norm": False, "bias": True, "n_kv_head": -1}


def gpt2_counterpart(config: ModelConfig) -> ModelConfig:
    """GPT-2's parts (Radford et al. 2019) at the same depth, width, context and parameters of the feed-forward.

    LayerNorm, GELU, learned positions, biases, full heads, no QK-norm and no sinks. GELU's feed-forward has two
    matrices where SwiGLU's has three, so its width is 3/2 of it.
    """
    d_ff = round(config.d_ff * 3 / 2) if config.ffn == "swiglu" else config.d_ff
    return replace(config, d_ff=d_ff, sinks=0, tie_embeddings=True, **GPT2_PARTS)


def variant_changes(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of ModelConfig and of TrainConfig that a variant changes, with their values.

    A variant is written `ffn=gelu`, `norm=layer,bias=true` or `optimizer=adamw,learning_rate=2e-3`.
    Raises ConfigError.
    """
    changes: dict[type, dict[str, Any]] = {ModelConfig: {}, TrainConfig: {}}
    for part in variant.split(","):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"{variant!r}: expected key=value with a key of [model] or [ablations.train]")
        if key in LENGTHS:
            raise ConfigError(f"{variant!r}: {key}: every variant trains equally long, ablations.steps says how long")
        owner = TrainConfig if key in get_type_hints(TrainConfig) else ModelConfig
        changes[owner][key] = parse_value(kind_at(owner, (key,), f"{variant!r}"), text)
    return changes[ModelConfig], changes[TrainConfig]


def apply_variant(model: ModelConfig, train: TrainConfig, variant: str) -> tuple[ModelConfig, TrainConfig]:
    """The two configurations with a variant's changes. Raises ConfigError."""
    model_changes, train_changes = variant_changes(variant)
    try:
        return replace(model, **model_changes), replace(train, **train_changes)
    except ConfigError as error:
        raise ConfigError(f"{variant!r}: {error}") from None


# Keys, texts and messages -------------------------------------------------------------------------------------------


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration, outermost first."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys.append(f"{prefix}{name}")
        if is_dataclass(kind):
            keys += all_keys(kind, f"{prefix}{name}.")
    return keys


def kind_at(cls: type, path: Sequence[str | int], origin: str = "") -> Any:
    """The type behind a path of keys ("data", "pretrain", "0", "split"). ConfigError where there is none."""
    kind: Any = cls
    for depth, key in enumerate(path):
        here = ".".join(map(str, path[:depth]))
        if is_dataclass(kind):
            kinds = get_type_hints(kind)
            if key not in kinds:
                raise _unknown_key(cls, kind, here, str(key), origin)
            kind = kinds[key]
        elif get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        else:
            raise ConfigError(_with(origin, f"{here}.{key}: {here} is a value ({_describe(kind)}), it has no keys"))
    return kind


def parse_value(kind: Any, text: str, *, quotes: bool = True) -> Any:
    """A text as a value of that type: unchanged for a string (unless quoted), else read as a TOML value (`3e-4`,
    `true`, `[0, 3]`, `{source = "x"}`; a list also as `0,3`). A text that cannot be parsed is returned as it is, for
    the check of types to refuse."""
    if kind is str or get_origin(kind) is Literal:
        parsed = _toml_value(text) if quotes and text[:1] in ("'", '"') else text
        return parsed if isinstance(parsed, str) else text
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    if get_origin(kind) is tuple and not text.startswith("["):
        return [parse_value(get_args(kind)[0], item.strip()) for item in text.split(",") if item.strip()]
    return _toml_value(text)


def _toml_value(text: str) -> Any:
    if "\n" in text:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def config_error(error: ValidationError, cls: type, origin: str = "") -> ConfigError:
    """The first of pydantic's errors about a configuration as one line."""
    first = error.errors(include_url=False)[0]
    path, value, context = first["loc"], first["input"], first.get("ctx", {})
    if path and isinstance(path[0], int):  # a positional argument
        path = (fields(cls)[path[0]].name, *path[1:]) if path[0] < len(fields(cls)) else ("argument", *path)
    if first["type"] == "unexpected_keyword_argument":
        kind = kind_at(cls, path[:-1])
        return _unknown_key(cls, kind, ".".join(map(str, path[:-1])), str(path[-1]), origin)
    if first["type"] == "impossible" and "key" in context:  # several keys together: see `impossible`
        path, value = (*path, context["key"]) if context["key"] else path, context["value"]
        quoted, expected = f" = {shown(value)}" if context["key"] else "", context["expected"]
    else:
        kind = kind_at(cls, path)
        literal = get_origin(kind) is Literal and isinstance(value, str)
        hint = did_you_mean(value, get_args(kind)) if literal else ""
        quoted = f" = {shown(value)}"
        expected = f"expected {context['expected'] if first['type'] == 'impossible' else _describe(kind) + hint}"
    key = ".".join(map(str, path))
    return ConfigError(_with(origin, f"{key}{quoted}: {expected}" if key else expected))


def _unknown_key(root: type, cls: type, prefix: str, key: str, origin: str) -> ConfigError:
    allowed = [entry.name for entry in fields(cls)]
    whole = f"{prefix}.{key}" if prefix else key
    miss = near_miss(key, allowed)
    here = f"{prefix}.{miss}" if prefix and miss else miss
    miss = here or near_miss(whole, all_keys(root))  # a key of another section, or one whose section was left out
    hint = f", did you mean {miss}?" if miss else ""
    where = f" in [{prefix}]" if prefix else ""
    return ConfigError(_with(origin, f"unknown key {whole}{hint} (allowed{where}: {', '.join(allowed)})"))


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list, each item {_describe(get_args(kind)[0])}"
    if is_dataclass(kind):
        return "a table with " + ", ".join(entry.name for entry in fields(kind))
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]


def _with(origin: str, message: str) -> str:
    return f"{origin}: {message}" if origin else message
