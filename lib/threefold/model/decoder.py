"""The decoder: one pre-norm transformer whose parts each have a GPT-2 counterpart behind a switch of `ModelConfig`.

Formulas: RMSNorm (Zhang & Sennrich 2019, 1910.07467), rotary positions (Su et al. 2021, 2104.09864; the rotate-half
layout of Llama), SwiGLU (Shazeer 2020, 2002.05202), grouped-query attention (Ainslie et al. 2023, 2305.13245), QK-norm
as in Qwen3, attention sinks as learned tokens (Xiao et al. 2023, 2309.17453, section 3.3), GPT-2 (Radford et al. 2019).

Shape suffixes: B rows, T new tokens, S key slots, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary, L layers, P shared prefix slots.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from basics.errors import ConfigError, DataError
from threefold.config import ModelConfig
from threefold.model.attention import Attention, AttentionContext, RMSNorm, additive_mask, rotary_tables
from threefold.model.cache import KVCache
from threefold.model.kernels import Linear, Packed, linears, packs
from threefold.segments import PADDING, SINK, TRUNK_SHIFT

ATTENTION_KINDS = ("auto", "sdpa", "explicit")
INITIAL_STD = 0.02  # GPT-2's
INPUT_LOGIT = 4  # the largest logit that a fresh model may give to its input token
PACK_ROWS, PACK_POSITIONS = 8, 1024  # from which copying the weights for their products pays
UNFUSED_MAX = 768  # positions up to which a CPU computes attention in bf16 as plain products; see `Decoder`


class Embedding(nn.Embedding):
    """nn.Embedding whose weights `Decoder.initialise` draws."""

    def reset_parameters(self) -> None:
        pass


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def sees(query: Tensor, key: Tensor) -> Tensor:
    """Whether a token of one segment may see an earlier one of another: of its own, of its trunk, or a sink."""
    return (query == key) | (key == query >> TRUNK_SHIFT) | (key == SINK)


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Positions of packed rows [B, T]: how many earlier tokens each one sees. Sinks count from 0, a document from the
    number of sinks, a branch from the end of its trunk; padding is at 0."""
    visible_BTT = sees(segments_BT[:, :, None], segments_BT[:, None, :]).tril_(diagonal=-1)
    return visible_BTT.sum(dim=-1).masked_fill_(segments_BT == PADDING, 0)


def segment_block_mask(segments_BT: Tensor) -> BlockMask:
    """The mask of packed rows as FlexAttention takes it."""
    B, T = segments_BT.shape

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & sees(segments_BT[b, t], segments_BT[b, s])

    return create_block_mask(visible, B, None, T, T, device=segments_BT.device)


class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate x) * up x), or GPT-2's down(gelu_tanh(up x)). [B, T, D] -> [B, T, D]"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.bias) if config.ffn == "swiglu" else None
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        gate_BTF, up_BTF = linears(x_BTD, self.gate, self.up)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor, context: AttentionContext, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Decoder(nn.Module):
    """The language model. `vocab_size` of the config must be set.

    `attention` chooses the kernel: "sdpa", "explicit", or "auto", which is SDPA except for bf16 on a CPU at up to
    UNFUSED_MAX positions. Packed documents, forward and backward of a small model on two cores with AVX512-BF16: SDPA
    takes 1.35 times as long as unfused products at 512 positions a row, 1.33 times at 768, and in fp32 1.13 and
    1.10 times (benchmarks/attention.py). But the scores that these keep for the backward pass grow with the square of
    the length, SDPA keeps none.
    """

    def __init__(self, config: ModelConfig, attention: Literal["auto", "sdpa", "explicit"] = "auto"):
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError(
                "model.vocab_size is not set; it is the tokenizer's size and must be filled in before building a model"
            )
        if attention not in ATTENTION_KINDS:
            raise ConfigError(f"attention = {attention!r}: allowed are {', '.join(ATTENTION_KINDS)}")
        self.config = config
        self.attention = attention
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.position = Embedding(config.context, config.d_model) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self._packed_head: Packed | None = None
        self.unembed = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        if not self.embed.weight.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: normal(0, 0.02) as in GPT-2, biases 0, norms 1, and the two projections into the residual
        stream 0, so that every block begins as the identity. Drawn from `generator`, or from torch's global one.

        Embeddings of a model wider than 200 get a standard deviation of 4 / d_model. With 0.02, a fresh model with tied
        embeddings would predict its input token again, with a logit of 0.02 d_model, and its loss would be far above
        that of a uniform distribution: 20 instead of 10.8 nats for the 253M model. A logit of 4 does not matter beside
        a vocabulary (benchmarks/initialisation.py).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                embedding = isinstance(module, nn.Embedding)
                std = min(INITIAL_STD, INPUT_LOGIT / self.config.d_model) if embedding else INITIAL_STD
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, RMSNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.attention.o.weight)
            nn.init.zeros_(block.ffn.down.weight)

    @contextmanager
    def packed(self, rows: int, positions: int) -> Iterator[None]:
        """Inside this context products use copies of the weights in a layout made for them, where that is faster: on a
        CPU, for `positions` in all and `rows` of them at a time. The weights must not change inside; no gradients.
        """
        if rows < PACK_ROWS or positions < PACK_POSITIONS or not packs(self.embed.weight) or self._packed_head:
            yield
            return
        groups: list[tuple[Linear, ...]] = []
        for block in self.blocks:
            a, f = block.attention, block.ffn
            groups += [(a.q, a.k, a.v), (a.o,), (f.up,) if f.gate is None else (f.gate, f.up), (f.down,)]
        try:
            for group in groups:
                weights, biases = [layer.weight.detach() for layer in group], [layer.bias for layer in group]
                group[0].packed = Packed(weights, biases, rows)
            self._packed_head = Packed([self.head_weight.detach()], [None], rows)
            yield
        finally:
            self._packed_head = None
            for group in groups:
                group[0].packed = None

    def forward(self, tokens_BT: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """Logits [B, T, V] of each next token; the arguments are those of `hidden`."""
        return self.head(self.hidden(tokens_BT, *inputs, **named))

    def head(self, h_BTD: Tensor) -> Tensor:
        """Logits [..., V] of (already normed) hidden states [..., D]."""
        return F.linear(h_BTD, self.head_weight) if self._packed_head is None else self._packed_head(h_BTD)[0]

    @property
    def head_weight(self) -> Tensor:
        """The unembedding [V, D]: the token embedding where they are tied."""
        return self.embed.weight if self.unembed is None else self.unembed.weight

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, ready for `head`.

        tokens_BT: int64 ids.
        positions_BT: int64; default: counting from 0 (from the cache's end), or by `segment_positions` where segments
            are given.
        segments_BT: 0 is a sink that every later token sees, n >= 1 the n-th document, which sees its own past and the
            sinks, -1 is padding, which no token sees (what is computed there means nothing); branches of a document as
            `threefold.segments` has them. None: plain causal.
        cache: keys and values of earlier tokens; the new ones are added. Segments then tell real tokens (0) from
            padding (-1); documents may only follow a prefix that all rows share (every one of them sees it), and
            nothing can follow them: else ValueError.

        DataError: positions past a learned table (rotary positions have no end), or no room in the cache.
        """
        return self.run(tokens_BT, self.prepare(tokens_BT, positions_BT, segments_BT, cache), cache)

    def prepare(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        in_blocks: bool = False,
    ) -> AttentionContext:
        """What all layers share, for `run`: positions, masks and angles; arguments and errors as in `hidden`.

        `run` is what a compiler gets: with this in its graph masks and angles are recomputed in every layer.

        in_blocks: documents of packed rows are kept apart by FlexAttention (Dong et al. 2024, 2412.05496), which leaves
            out blocks of scores that are masked whole. Only a `run` that is compiled for a GPU is fast with it, and on
            a CPU it has no gradients.
        """
        T = tokens_BT.shape[1]
        kind = tokens_BT.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.embed.weight.dtype
        block_mask = None
        if cache is None:
            mask = None if segments_BT is None or in_blocks else self._segment_mask(segments_BT, dtype)
            if in_blocks and segments_BT is not None:
                block_mask = segment_block_mask(segments_BT)
            if positions_BT is None and segments_BT is not None:
                positions_BT = segment_positions(segments_BT)
            start = 0
        else:
            start = cache.length
            if segments_BT is not None and int(segments_BT.max()) > SINK:
                cache.begin_documents(T)
                counted_BT = start + segment_positions(segments_BT)
                mask = self._segment_mask(segments_BT, dtype)
            else:
                counted_BT = cache.begin(T, None if segments_BT is None else segments_BT != PADDING)
                mask = self._cache_mask(cache, T, dtype)
            positions_BT = counted_BT if positions_BT is None else positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(start, start + T, device=tokens_BT.device)  # [T]: the same in every row

        rotary = cached_rotary = None
        packed = segments_BT is not None and cache is None and (in_blocks or self.config.context >= T)
        if self.position is not None and not packed:  # those of packed rows count within the row; a GPU would wait here
            self._check_learned(positions_BT)
        elif self.config.position == "rope":
            head_width = self.config.d_model // self.config.n_head
            cos, sin = rotary_tables(positions_BT, head_width, self.config.rope_theta)
            rotary = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
            unrotated_S = None if cache is None else cache.unrotated_positions(T)
            if unrotated_S is not None:
                cached_rotary = rotary_tables(unrotated_S, head_width, self.config.rope_theta)

        causal = mask is None and block_mask is None and (cache is None or cache.length == 0)
        explicit = self.attention == "explicit" or (
            self.attention == "auto" and dtype == torch.bfloat16 and kind == "cpu" and T <= UNFUSED_MAX
        )
        if explicit and causal and T > 1:
            mask = additive_mask(_causal(T, T, tokens_BT.device), dtype)
        return AttentionContext(positions_BT, causal, mask, rotary, explicit, cached_rotary, block_mask)

    def run(
        self,
        tokens_BT: Tensor,
        context: AttentionContext,
        cache: KVCache | None = None,
        blocks: Iterable[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, with what `prepare` made of the same arguments. blocks: called
        in place of the model's own, as compiled forms of them."""
        h_BTD = self.embed(tokens_BT)
        if self.position is not None:
            h_BTD = h_BTD + self.position(context.positions)
        for block in self.blocks if blocks is None else blocks:
            h_BTD = block(h_BTD, context, cache)
        if cache is not None:
            cache.finish(tokens_BT.shape[1])
        return self.norm(h_BTD)

    def _segment_mask(self, segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1, T, T]. Padding sees padding and the sinks, so that no row of the softmax is empty."""
        T = segments_BT.shape[1]
        visible_BTT = sees(segments_BT[:, :, None], segments_BT[:, None, :])
        return additive_mask(visible_BTT & _causal(T, T, segments_BT.device), dtype)[:, None]

    def _cache_mask(self, cache: KVCache, T: int, dtype: torch.dtype) -> Tensor | None:
        """Over the cache's own slots: [B, 1, T, S] with padding, [T, S] where several tokens follow others, or None."""
        S = cache.used + T
        if cache.real_BS is None:
            if T == 1 or cache.length == 0:
                return None
            return additive_mask(_causal(T, S, cache.keys.device), dtype)
        allowed_BTS = cache.real_BS[:, None, :S]
        if T > 1:
            slots_S = torch.arange(S, device=cache.keys.device)
            itself_TS = slots_S[cache.used :, None] == slots_S  # padding sees itself: no row of the softmax is empty
            allowed_BTS = (allowed_BTS & _causal(T, S, cache.keys.device)) | itself_TS
        return additive_mask(allowed_BTS, dtype)[:, None]

    def _check_learned(self, positions: Tensor) -> None:
        if positions.device.type == "meta":
            return
        last = int(positions.max())
        if last >= self.config.context:
            raise DataError(
                f"position {last} is past the {self.config.context} learned positions of this model; shorten the text, "
                'or train with position = "rope"'
            )


def _causal(T: int, S: int, device: torch.device) -> Tensor:
    """True where the t-th of the last T slots may see slot s. [T, S]"""
    return torch.ones((T, S), dtype=torch.bool, device=device).tril_(diagonal=S - T)


def parameter_counts(model: Decoder | ModelConfig) -> dict[str, int]:
    """Parameters by component: embeddings, positions, attention, ffn, norms, head (0 where tied) and total, their sum.

    A `ModelConfig` is built on the meta device: no memory, no time.
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = Decoder(model)
    counts = dict.fromkeys(("embeddings", "positions", "attention", "ffn", "norms", "head"), 0)
    named = {"unembed": "head", "norm": "norms", "embed": "embeddings", "position": "positions"}
    for name, parameter in model.named_parameters():  # "embed.weight", "blocks.0.attention.q_norm.weight", ...
        component = next((named[part] for part in named if part in name), None) or name.split(".")[2]
        counts[component] += parameter.numel()
    return {**counts, "total": sum(counts.values())}
