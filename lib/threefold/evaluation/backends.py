"""The two ways in which a model runs under evaluation: as our Decoder, or as a model of transformers."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basics.errors import CheckpointError
from threefold.model import hf
from threefold.model.cache import KVCache
from threefold.model.decoder import Decoder
from threefold.model.decoding import steps
from threefold.model.generation import generate as generate_ids
from threefold.model.hf_config import GPT2, LLAMA, QWEN3

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")  # of a config.json, the first that is set counts
UNLIMITED = sys.maxsize  # positions of a model that names no limit
NO_LIMIT = 10**9  # transformers writes 1e30 where a limit is not known
PROBE_TOLERANCE = 1e-3  # a converted model's logits may differ by this share of the largest logit


class Backend:
    """What both backends share. `head` turns hidden states into logits; both run under `torch.inference_mode()`."""

    name: str
    branches = False  # whether a row may hold several continuations of its context
    head: torch.nn.Module

    def __init__(self, model: Any, context: int, vocab_size: int):
        self.model, self.context, self.vocab_size = model.eval(), context, vocab_size
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype

    def prefix(self, ids: Sequence[int]) -> KVCache | None:
        """The keys and values of a prefix, batch 1, where rows can share them; None: each row carries the prefix."""
        return None

    def packed(self, rows: int, positions: int) -> AbstractContextManager:
        """As `Decoder.packed`."""
        return nullcontext()

    def cached_positions(self) -> int:
        """Positions whose keys and values half of a GPU's free memory holds; 0 on a CPU, or where it is not known."""
        return 0


class DecoderBackend(Backend):
    """Our Decoder. The keys and values of a shared prefix are computed once."""

    name = "decoder"
    branches = True

    def __init__(self, decoder: Decoder):
        super().__init__(decoder, decoder.config.context, decoder.config.vocab_size)
        self.head = decoder.head

    def packed(self, rows: int, positions: int) -> AbstractContextManager:
        return self.model.packed(rows, positions)

    def cached_positions(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.mem_get_info(self.device)[0] // 2 // KVCache.of(self.model, 1, 1).nbytes

    def prefix(self, ids: Sequence[int]) -> KVCache:
        cache = KVCache.of(self.model, 1, len(ids))
        self.model.hidden(torch.tensor([list(ids)], device=self.device), cache=cache)
        return cache

    def states(self, tokens_BT: Tensor, prefix: KVCache | None = None, branches_BT: np.ndarray | None = None) -> Tensor:
        """Hidden states h_BTD of right-padded rows; with causal attention, padding on the right changes nothing.

        branches_BT: 0 where a token belongs to its row's context, n for the n-th continuation, which sees the context
            and itself only, -1 for padding. None: rows have at most one continuation.
        """
        segments_BT = None if branches_BT is None else torch.from_numpy(branches_BT).to(self.device)
        cache = None if prefix is None else prefix.expand(*tokens_BT.shape)
        return self.model.hidden(tokens_BT, segments_BT=segments_BT, cache=cache)

    def prefill(self, tokens_BT: Tensor, positions: int) -> tuple[Tensor, KVCache]:
        """(logits [B, V] after the tokens, the cache with room for so many positions of every row)."""
        cache = KVCache.of(self.model, len(tokens_BT), positions)
        return self.head(self.model.hidden(tokens_BT, cache=cache)[:, -1]), cache

    def decoding(self, cache: KVCache) -> Callable[[Tensor], Tensor]:
        """A function from the next token of every row [B] to the logits after it [B, V], as `generate` decodes."""
        return steps(self.model, cache)

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, tokenizer: Any, stop: list[str]
    ) -> list[list[int]]:
        return generate_ids(
            self.model,
            prompts,
            max_new_tokens,
            stop=stop or None,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            eos_id=tokenizer.eos_token_id,
        )


class TransformersBackend(Backend):
    """A model of transformers. Where its logits are its head applied to its last hidden state, the two run apart;
    where they are not (soft-capped or scaled logits), `states` are whole logits and `head` is the identity."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any):
        config = model.config.get_text_config()
        lengths = [getattr(config, key, None) for key in CONTEXT_KEYS]
        numbers = [length for length in (*lengths, tokenizer.model_max_length) if type(length) in (int, float)]
        context = next((length for length in numbers if length > 0), NO_LIMIT)
        super().__init__(model, int(context) if context < NO_LIMIT else UNLIMITED, config.vocab_size)
        self._linear = self._head_is_linear()
        self.head = model.get_output_embeddings() if self._linear else torch.nn.Identity()

    @torch.inference_mode()
    def _head_is_linear(self) -> bool:
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(self.model, "base_model") or self.model.base_model is self.model:
            return False
        probe = _probe(self.vocab_size, self.context).to(self.device)
        apart = head(self.model.base_model(probe, use_cache=False)[0])
        return torch.allclose(apart, self.model(probe, use_cache=False).logits, rtol=1e-4, atol=1e-4)

    def states(self, tokens_BT: Tensor, prefix: None = None, branches_BT: None = None) -> Tensor:
        if self._linear:
            return self.model.base_model(tokens_BT, use_cache=False)[0]
        return self.model(tokens_BT, use_cache=False).logits

    def prefill(self, tokens_BT: Tensor, positions: int) -> tuple[Tensor, Any]:
        out = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def decoding(self, cache: Any) -> Callable[[Tensor], Tensor]:
        def step(tokens_B: Tensor) -> Tensor:
            nonlocal cache
            out = self.model(tokens_B[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return out.logits[:, -1]

        return step

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, tokenizer: Any, stop: list[str]
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        width, eos = max(map(len, prompts)), tokenizer.eos_token_id
        pad = eos  # masked: any id that the model knows
        tokens_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
            stop_strings=stop or None,
        )
        # What this leaves open transformers would take from the checkpoint: penalties, forced and suppressed tokens.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out_BT = self.model.generate(
                tokens_BT, attention_mask=mask_BT, generation_config=config, tokenizer=tokenizer
            )
        finally:
            self.model.generation_config = own
        rows = out_BT[:, width:].tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]


def _probe(vocab_size: int, context: int) -> Tensor:
    return torch.randint(vocab_size, (2, min(24, context)), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def as_decoder(model: Any) -> Decoder | None:
    """The same model as a Decoder, or None if the Decoder cannot hold it or computes something else."""
    if type(model).__name__ not in (LLAMA, QWEN3, GPT2):
        return None
    try:
        decoder = hf.from_transformers(model)
    except CheckpointError:
        return None
    decoder = decoder.to(device=model.device, dtype=model.dtype).eval()
    probe = _probe(model.config.vocab_size, decoder.config.context).to(model.device)
    expected, got = model(probe, use_cache=False).logits, decoder(probe)
    return decoder if (expected - got).abs().max() <= PROBE_TOLERANCE * expected.abs().max() else None
