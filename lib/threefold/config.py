"""Presets: TOML files read strictly into frozen dataclasses.

Precedence: dataclass default < preset file < `--set a.b=c` / papermill `-p`. `-1` means "off" or "all" throughout.
"""

from dataclasses import dataclass, field
from typing import Literal


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


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture: a registered source by name, or own files by path and reader."""

    source: str = ""  # a name in data/sources.toml
    split: str = "train"
    path: str = ""  # own file or folder instead of a registered source (JSONL, JSON, text, TSV, Parquet)
    reader: str = ""  # how to read `path`: text, wikitext, stories, instructions, preferences, sentiment, problems
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
    checkpoint_every: int = -1  # steps between resumable states; -1: about one a minute
    evaluate_every: int = -1  # steps between held-out losses; -1: at the start and the end only
    replay: float = 0.0  # sft: share of the rows that are pretraining text
    beta: float = 0.1  # dpo (Rafailov et al. 2023)
    distill_temperature: float = 2.0  # distilgpt2 (Sanh et al. 2019)
    distill_weight: float = 0.5  # weight of the soft-target loss against the next-token loss


@dataclass(frozen=True)
class ExternalConfig:
    """A further model to evaluate: a transformers folder, a hub id, or `package:NAME/FILE.gguf` inside an installed package."""

    name: str = ""
    location: str = ""
    revision: str = ""


@dataclass(frozen=True)
class BaselinesConfig:
    gpt2: str = "train"  # train: the GPT-2 architecture on the same tokens; or a folder; or a hub id
    gpt2_revision: str = ""
    distilgpt2: str = "train"  # train: a half-depth student distilled from the gpt2 row; or a folder; or a hub id
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
    steps: int = -1  # -1: no ablations
    seeds: int = 1
    variants: tuple[str, ...] = ("norm=layer", "ffn=gelu", "position=learned", "sinks=0")
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Preset:
    name: str = ""
    description: str = ""
    seed: int = 1337
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    gpt2: TrainConfig = field(default_factory=TrainConfig)
    distilgpt2: TrainConfig = field(default_factory=TrainConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    dpo: TrainConfig = field(default_factory=TrainConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ablations: AblationConfig = field(default_factory=AblationConfig)
