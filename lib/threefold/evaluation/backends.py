"""The two ways a model runs under evaluation: our Decoder, or a model of transformers as it is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basics.errors import CheckpointError
from threefold.model import hf
from threefold.model.cache import KVCache
from threefold.model.decoder import Decoder
from threefold.model.generation import generate as generate_ids

CONVERTIBLE = ("LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel")
PROBE_TOLERANCE = 1e-3  # a converted model's logits may differ by this share of the largest logit


class DecoderBackend:
    """Our Decoder: hidden states and head apart, keys and values of a shared prefix computed once."""

    name = "decoder"
    branches = True  # a row may hold several continuations of its context

    def __init__(self, decoder: Decoder):
        self.model = decoder.eval()
        self.context = decoder.config.context
        self.vocab_size = decoder.config.vocab_size
        self.head = decoder.head

    def prefix(self, ids: Sequence[int]) -> KVCache:
        """Keys and values of a prefix, batch 1."""
        cache = KVCache.of(self.model, 1, len(ids))
        self.model.hidden(torch.tensor([list(ids)], device=self.device), cache=cache)
        return cache

    def states(self, tokens_BT: Tensor, prefix: KVCache | None = None, branches_BT: np.ndarray | None = None) -> Tensor:
        """Hidden states h_BTD of right-padded rows: with causal attention padding on the right touches nothing.

        branches_BT: 0 where a token is of its row's context, n of the n-th continuation, which sees the context and
            itself only, -1 of padding; None: rows have one continuation at most.
        """
        segments_BT = None if branches_BT is None else torch.from_numpy(branches_BT).to(self.device)
        cache = None if prefix is None else prefix.expand(*tokens_BT.shape)
        return self.model.hidden(tokens_BT, segments_BT=segments_BT, cache=cache)

    def packed(self, rows: int, positions: int) -> AbstractContextManager:
        """As `Decoder.packed`."""
        return self.model.packed(rows, positions)

    def begin(self, tokens_BT: Tensor, new_tokens: int) -> tuple[Tensor, KVCache]:
        """Logits [B, V] after equally long prompts, and the state that `step` continues for `new_tokens`."""
        cache = KVCache.of(self.model, len(tokens_BT), tokens_BT.shape[1] + new_tokens)
        return self.head(self.model.hidden(tokens_BT, cache=cache)[:, -1]), cache

    def step(self, tokens_B1: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Logits [B, V] after one more token in every row."""
        return self.head(self.model.hidden(tokens_B1, cache=cache)[:, -1]), cache

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, tokenizer: Any, stop: list[str]
    ) -> list[list[int]]:
        return generate_ids(
            self.model,
            prompts,
            max_new_tokens,
            temperature=0,
            stop=stop or None,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            eos_id=tokenizer.eos_token_id,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


class TransformersBackend:
    """A transformers model as it is. Where its logits are its head applied to its last hidden state, the two are used
    apart; where they are not (soft-capped or scaled logits), whole logits stand in for the states."""

    name = "transformers"
    branches = False

    def __init__(self, model: Any, tokenizer: Any):
        self.model = model.eval()
        config = model.config.get_text_config()
        found = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "n_ctx"))
        self.context = int(next((value for value in found if value), tokenizer.model_max_length))
        self.vocab_size = config.vocab_size
        self._linear = self._head_is_linear()
        self.head = model.get_output_embeddings() if self._linear else torch.nn.Identity()

    @torch.inference_mode()
    def _head_is_linear(self) -> bool:
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(self.model, "base_model") or self.model.base_model is self.model:
            return False
        probe = _probe(self.vocab_size, self.context).to(self.model.device)
        apart = head(self.model.base_model(probe, use_cache=False)[0])
        return torch.allclose(apart, self.model(probe, use_cache=False).logits, rtol=1e-4, atol=1e-4)

    def prefix(self, ids: Sequence[int]) -> None:
        """Caches of foreign models differ too much to share safely; their rows carry the whole prompt."""
        return None

    def states(self, tokens_BT: Tensor, prefix: None = None, branches_BT: None = None) -> Tensor:
        if self._linear:
            return self.model.base_model(tokens_BT, use_cache=False)[0]
        return self.model(tokens_BT, use_cache=False).logits

    def packed(self, rows: int, positions: int) -> AbstractContextManager:
        return nullcontext()

    def begin(self, tokens_BT: Tensor, new_tokens: int) -> tuple[Tensor, Any]:
        out = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def step(self, tokens_B1: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = self.model(tokens_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, tokenizer: Any, stop: list[str]
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        tokens_BT = torch.full((len(prompts), width), pad, device=self.device)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, ids in enumerate(prompts):
            tokens_BT[row, width - len(ids) :] = torch.tensor(ids, device=self.device)
            mask_BT[row, width - len(ids) :] = 1
        out_BT = self.model.generate(
            tokens_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            **({"stop_strings": stop, "tokenizer": tokenizer} if stop else {}),
        )
        rows = out_BT[:, width:].tolist()
        eos = tokenizer.eos_token_id
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def _probe(vocab_size: int, context: int) -> Tensor:
    return torch.randint(vocab_size, (2, min(24, context)), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def as_decoder(model: Any) -> Decoder | None:
    """The same model as a Decoder, or None if the Decoder cannot hold it or computes something else."""
    if type(model).__name__ not in CONVERTIBLE:
        return None
    try:
        decoder = hf.from_transformers(model)
    except CheckpointError:
        return None
    decoder = decoder.to(device=model.device, dtype=model.dtype).eval()
    probe = _probe(model.config.vocab_size, decoder.config.context).to(model.device)
    expected, got = model(probe, use_cache=False).logits, decoder(probe)
    return decoder if (expected - got).abs().max() <= PROBE_TOLERANCE * expected.abs().max() else None
