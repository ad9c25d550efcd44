"""Tiny models, a tokenizer and texts for the evaluation tests; nothing here needs a network or data from outside."""

import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from threefold.config import ModelConfig, TokenizerConfig
from threefold.data.tokenizer import build_tokenizer, with_sinks
from threefold.evaluation import LanguageModel
from threefold.evaluation.results import Dataset

VOCABULARY = (
    "the a baker ladder river stone sang walked found lost over quietly 12 4,500 3.5 café naïve “quoted” it 's was "
    "good bad great terrible positive negative Question Answer Review Sentiment Is this sentence or ? . , : ; ! ( ) [ ]"
)
WORDS = VOCABULARY.split()


def text(n_words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n_words,), generator=generator))


def article(n_words: int, seed: int) -> str:
    """An article in WikiText's raw form."""
    half = n_words // 2
    return (
        f" \n = Title {seed} = \n \n {text(half, seed)} , @-@ made \n \n = = Part = = \n \n "
        f"{text(n_words - half, seed + 1000)} \n"
    )


def wikitext2(documents: list[str]) -> Dataset:
    return Dataset("wikitext2", documents, wikitext=True)


@lru_cache
def tokenizer(sinks: int = 1):
    texts = [article(300, seed) for seed in range(20)]
    texts += ["positive negative Question: Is this sentence positive or negative?\nAnswer: positive"] * 30
    return build_tokenizer(TokenizerConfig(kind="train", vocab_size=384), texts, sinks=sinks)


@lru_cache
def gpt2_style_tokenizer():
    """The same ids without a prefix, as GPT-2's."""
    return with_sinks(tokenizer(), 0)


def _spread(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that a tiny untrained model prefers some tokens to others and every position matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15, generator=generator)
        elif "bias" in name:
            parameter.data.normal_(0, 0.05, generator=generator)


def llama(context: int = 128, seed: int = 0, **changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    _spread(model, seed)
    return model


def gpt2(context: int = 128, seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=384,
        n_positions=context,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=gpt2_style_tokenizer().eos_token_id,
        eos_token_id=gpt2_style_tokenizer().eos_token_id,
    )
    model = GPT2LMHeadModel(config).eval()
    _spread(model, seed)
    return model


def language_model(context: int = 128, seed: int = 0, name: str = "tiny", **options) -> LanguageModel:
    return LanguageModel.from_model(llama(context, seed), tokenizer(), name, **options)


def gpt2_language_model(context: int = 128, seed: int = 0, **options) -> LanguageModel:
    return LanguageModel.from_model(gpt2(context, seed), gpt2_style_tokenizer(), "tiny-gpt2", **options)


def model_config(**changes) -> ModelConfig:
    values = {"n_layer": 2, "d_model": 32, "n_head": 4, "d_ff": 64, "context": 128, "vocab_size": 384}
    return ModelConfig(**{**values, **changes})


@torch.inference_mode()
def naive_logprobs(model: torch.nn.Module, context: list[int], target: list[int]) -> torch.Tensor:
    """Log-probability of each target token, one sequence at a time through whole logits."""
    logits = model(torch.tensor([[*context, *target]])).logits[0].double().log_softmax(-1)
    first = len(context)
    return torch.stack([logits[first + i - 1, token] for i, token in enumerate(target)])


def real_data() -> Path:
    """The folder of real data, or a skip that says where it is looked for."""
    candidates = [os.environ.get("THREEFOLD_DATA", ""), str(Path(__file__).resolve().parents[2] / "shared" / "data")]
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("no real data: set THREEFOLD_DATA, or put a folder shared/data beside the clone")
