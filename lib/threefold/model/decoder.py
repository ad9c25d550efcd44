"""The decoder: one pre-norm transformer whose parts each have a GPT-2 counterpart behind a switch of `ModelConfig`.

Formulas: RMSNorm (Zhang & Sennrich 2019, 1910.07467), rotary positions (Su et al. 2021, 2104.09864; the rotate-half
layout of Llama), SwiGLU (Shazeer 2020, 2002.05202), grouped-query attention (Ainslie et al. 2023, 2305.13245), QK-norm
as in Qwen3, attention sinks as learned tokens (Xiao et al. 2023, 2309.17453, section 3.3), GPT-2 (Radford et al. 2019).

Shape suffixes: B rows, T new tokens, S key slots, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary, L layers, P shared prefix slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from basics.errors import ConfigError, DataError
from threefold.config import ModelConfig
from threefold.model.kernels import Linear, Packed, linears, packs, rms_norm, rotate
from threefold.segments import PADDING, SINK, TRUNK_SHIFT

ATTENTION_KINDS = ("auto", "sdpa", "explicit")
INITIAL_STD = 0.02  # GPT-2's
PACK_ROWS, PACK_POSITIONS = 8, 1024  # from which copying the weights for their products pays
SPELLED_OUT = 768  # positions up to which a CPU computes attention in bf16 as plain products; see `Decoder`
BLOCK, MOST_BLOCKS = 64, 4  # queries, at least, of a block of spelled-out causal attention; blocks of a row


def kv_heads(config: ModelConfig) -> int:
    """Key/value heads: `n_kv_head`, or as many as query heads where that is -1."""
    return config.n_head if config.n_kv_head == -1 else config.n_kv_head


class Embedding(nn.Embedding):
    """nn.Embedding whose weights `Decoder.initialise` draws."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; no mean is taken out and there is no bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def rotary_tables(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/K), each [..., T, K/2] in fp32.

    Computed from the positions once a forward and not kept in a buffer: a buffer is cast with the model (bf16 angles
    are wrong past a few hundred positions), is garbage after `to_empty`, and has an end; computing costs below 1% of a
    layer.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


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


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share."""

    positions: Tensor  # int64 [B, T], or [T] where they are the same in every row
    causal: bool  # plain causal attention over the new tokens, no mask tensor needed
    mask: Tensor | None  # additive, broadcastable to [B, H, T, S]; over the cache's own slots where there is a cache
    rotary: tuple[Tensor, Tensor] | None
    explicit: bool
    cached_rotary: tuple[Tensor, Tensor] | None = None  # of all cached keys, where the cache holds them unrotated
    block_mask: BlockMask | None = None  # of FlexAttention, in place of a mask


class KVCache:
    """Preallocated keys and values of all layers, [L, B, G, capacity, K], filled in slot order.

    Rows may hold padding (segment -1 in the forward that wrote them): it is masked for ever after, and positions count
    real tokens only, so left- and right-padded batches give what each row alone gives. Use it under `torch.no_grad()`.

    `expand` makes rows that all continue one batch-1 cache without copying it: the shared part is attended to as one
    matrix for all rows (few-shot prompts, many samples of one prompt).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prefix: tuple[Tensor, Tensor] | None = None,
    ):
        self.config, self.batch, self.capacity = config, batch, capacity
        shape = (config.n_layer, batch, kv_heads(config), capacity, config.d_model // config.n_head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.prefix = prefix  # keys and values [L, 1, G, P, K] before every row's own slots
        self.used = 0  # own slots filled in every row
        self.real_BS: Tensor | None = None  # which own slots hold real tokens; None: all of them
        prefix_length = 0 if prefix is None else prefix[0].shape[3]
        self.prefix_length = prefix_length
        self.next_position: int | Tensor = prefix_length  # [B, 1] once rows differ
        self._next: int | Tensor = prefix_length  # next_position once the tokens begun are finished

    @classmethod
    def of(cls, model: "Decoder", batch: int, capacity: int) -> "KVCache":
        """A cache on the model's device and in its dtype."""
        weight = model.embed.weight
        return cls(model.config, batch, capacity, dtype=weight.dtype, device=weight.device)

    @property
    def length(self) -> int:
        """Slots filled in every row: the shared prefix, real tokens and padding."""
        return self.prefix_length + self.used

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, slots not filled yet included."""
        return sum(part.nbytes for part in (self.keys, self.values, *(self.prefix or ())))

    def expand(self, batch: int, capacity: int | None = None) -> "KVCache":
        """`batch` rows that continue this cache's one row, which is shared, not copied.

        capacity: further slots of each row (None: as many as are left here). ValueError when this cache has several
        rows or padding.
        """
        if self.batch != 1 or self.real_BS is not None:
            raise ValueError("only a cache of one row without padding can be expanded")
        own = self.keys[:, :, :, : self.used], self.values[:, :, :, : self.used]
        if self.prefix is None:
            prefix = own
        elif self.used == 0:
            prefix = self.prefix
        else:
            prefix = tuple(torch.cat(pair, dim=3) for pair in zip(self.prefix, own, strict=True))
        return KVCache(
            self.config,
            batch,
            self.capacity - self.used if capacity is None else capacity,
            dtype=self.keys.dtype,
            device=self.keys.device,
            prefix=prefix,
        )

    def select(self, rows: Tensor) -> "KVCache":
        """The same cache with only these rows (an int64 index); frees what finished rows held."""
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen.batch = len(rows)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.empty((old.shape[0], len(rows), *old.shape[2:]), dtype=old.dtype, device=old.device)
            new[:, :, :, : self.used] = old[:, rows, :, : self.used]
            setattr(chosen, name, new)
        chosen.real_BS = None if self.real_BS is None else self.real_BS[rows]
        chosen.next_position = self.next_position if isinstance(self.next_position, int) else self.next_position[rows]
        return chosen

    def join(self, parts: Sequence["KVCache"]) -> None:
        """Take over the tokens of caches whose rows, one part after the other, are this empty one's. All rows' tokens
        end at the same slot; what lies before shorter ones is padding."""
        self.used = max(part.used for part in parts)
        real_BS = torch.ones((self.batch, self.capacity), dtype=torch.bool, device=self.keys.device)
        end = 0
        for part in parts:
            rows, first = slice(end, end + part.batch), self.used - part.used
            end += part.batch
            for own, taken in ((self.keys, part.keys), (self.values, part.values)):
                own[:, rows, :, :first] = 0  # fresh memory may hold NaN, which no mask takes out
                own[:, rows, :, first : self.used] = taken[:, :, :, : part.used]
            real_BS[rows, :first] = False
            if part.real_BS is not None:
                real_BS[rows, first : self.used] = part.real_BS[:, : part.used]
        if not real_BS.all():
            self.real_BS = real_BS
            self._next = self.prefix_length + real_BS[:, : self.used].sum(dim=1, keepdim=True)
        self.finish(0)

    def begin(self, length: int, real_BT: Tensor | None) -> Tensor | None:
        """Room for `length` new tokens; returns their positions [B, T], or None when they simply count on in every row.

        DataError when they do not fit the capacity.
        """
        if self.used + length > self.capacity:
            raise DataError(
                f"a KV cache of {self.capacity} slots cannot take {length} tokens after {self.used}; "
                "give it more capacity"
            )
        if real_BT is None and self.real_BS is None:
            return None
        device = self.keys.device
        if real_BT is None:
            real_BT = torch.ones((self.batch, length), dtype=torch.bool, device=device)
        if self.real_BS is None:
            self.real_BS = torch.ones((self.batch, self.capacity), dtype=torch.bool, device=device)
        self.real_BS[:, self.used : self.used + length] = real_BT
        counts_BT = real_BT.long().cumsum(dim=1)
        positions_BT = (self.next_position + counts_BT - 1).clamp_min(0)
        self._next = self.next_position + counts_BT[:, -1:]
        return positions_BT

    def begin_documents(self, length: int) -> None:
        """Room for `length` new tokens of several documents side by side, after which the cache is full.

        ValueError where rows have tokens of their own already.
        """
        if self.used or type(self) is not KVCache:
            raise ValueError(
                "packed documents follow a prefix that all rows share, or nothing; rows with tokens of their own, and "
                "streaming caches, take segments of 0 (real) and -1 (padding)"
            )
        self.begin(length, None)
        self.capacity = length  # what came after would see several documents as one past

    def unrotated_positions(self, length: int) -> Tensor | None:
        """Positions [S] of all slots with `length` new tokens, where keys are written unrotated; None: rotated."""
        return None

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all own ones so far, [B, G, S, K]."""
        end = self.used + k_BGTK.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.used : end] = k_BGTK
        values[:, :, self.used : end] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def finish(self, length: int) -> None:
        """Count `length` new tokens as written in every layer."""
        self.used += length
        self.next_position = self.prefix_length + self.used if self.real_BS is None else self._next


class StreamingCache(KVCache):
    """Keys and values of the first `sinks` tokens and of the last `window` ones, however many have passed (Xiao et al.
    2023, 2309.17453, section 3.2). A token counts to the window that it sees.

    Positions are those within the cache: 0..k-1 for the sinks, from k for the window in the order of the text, so that
    none leaves the training context. Keys are held unrotated, for the position of each changes with every token that
    leaves. What is held was computed when its token was processed, from what was held then. The window is a ring: the
    newest token takes the slot of the oldest.

    window: -1 for what the context leaves beside the sinks. sinks: -1 for the model's. Rows hold no padding. Raises
    ConfigError where sinks and window do not fit the context.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        window: int = -1,
        *,
        sinks: int = -1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.sinks = config.sinks if sinks == -1 else sinks
        if not 0 <= self.sinks < config.context:
            raise ConfigError(f"sinks = {sinks}: allowed is -1 (the model's) or 0 to {config.context - 1}")
        most = config.context - self.sinks
        self.window = most if window == -1 else window
        if not 1 <= self.window <= most:
            raise ConfigError(
                f"window = {window}: allowed is 1 to {most}, what the model's context of {config.context} leaves "
                f"beside {self.sinks} sink{'' if self.sinks == 1 else 's'}"
            )
        super().__init__(config, batch, self.sinks + self.window, dtype=dtype, device=device)
        self.seen = 0  # tokens that have passed

    @classmethod
    def of(cls, model: "Decoder", batch: int, window: int = -1, *, sinks: int = -1) -> "StreamingCache":
        """A cache on the model's device and in its dtype."""
        weight = model.embed.weight
        return cls(model.config, batch, window, sinks=sinks, dtype=weight.dtype, device=weight.device)

    def expand(self, batch: int, capacity: int | None = None) -> KVCache:
        """Not here: ValueError."""
        raise ValueError("a streaming cache cannot be shared: its positions move")

    def begin(self, length: int, real_BT: Tensor | None) -> Tensor | None:
        """As `KVCache.begin`. Past the window one token at a time: each sees another window. Learned positions are
        part of what is cached; they count all tokens, and end with their table."""
        if real_BT is not None:
            raise ValueError("a streaming cache takes rows without padding")
        if self.seen + length <= self.capacity:
            return None
        if length > 1:
            raise ValueError(
                f"a streaming cache of {self.capacity} slots takes one token at a time once they are full, "
                f"not {length} after {self.seen}"
            )
        last = self.seen if self.config.position == "learned" else self.capacity - 1
        return torch.tensor([last], device=self.keys.device)

    def unrotated_positions(self, length: int) -> Tensor:
        slots_S = torch.arange(min(self.seen + length, self.capacity), device=self.keys.device)
        if self.seen + length <= self.capacity:
            return slots_S
        oldest = (self.seen + length - self.sinks) % self.window  # its place in the ring, the next to be written
        return torch.where(slots_S < self.sinks, slots_S, self.sinks + (slots_S - self.sinks - oldest) % self.window)

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all that are held [B, G, S, K], in the order of the slots."""
        length = k_BGTK.shape[2]
        begin = self.seen if self.seen < self.capacity else self.sinks + (self.seen - self.sinks) % self.window
        end = max(self.used, begin + length)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, begin : begin + length] = k_BGTK
        values[:, :, begin : begin + length] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def finish(self, length: int) -> None:
        self.seen += length
        self.used = min(self.seen, self.capacity)


class Attention(nn.Module):
    """Causal multi-head attention with optional grouped keys/values, QK-norm and rotary positions.

    q, k and v are three matrices, which Muon orthogonalises each by itself and which map to Llama's names one to one;
    they are put side by side for one product (`kernels.linears`).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, kv_heads(config)
        self.head_width = config.d_model // config.n_head
        self.q = Linear(config.d_model, config.d_model, bias=config.bias)
        self.k = Linear(config.d_model, self.n_kv_head * self.head_width, bias=config.bias)
        self.v = Linear(config.d_model, self.n_kv_head * self.head_width, bias=config.bias)
        self.o = Linear(config.d_model, config.d_model, bias=config.bias)
        self.q_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None

    def project(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, G, T, K], normed and rotated as they are attended with (keys for a
        cache that holds them unrotated are not)."""
        B, T, _ = x_BTD.shape
        q_BTD, k_BTE, v_BTE = linears(x_BTD, self.q, self.k, self.v)
        q_BTHK = q_BTD.view(B, T, self.n_head, self.head_width)
        k_BTGK = k_BTE.view(B, T, self.n_kv_head, self.head_width)
        v_BGTK = v_BTE.view(B, T, self.n_kv_head, self.head_width).transpose(1, 2)
        if self.q_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if context.rotary is not None:  # fp32 tables promote bf16 heads: the rotation is exact, then cast back
            q_BTHK = rotate(q_BTHK, *context.rotary).to(v_BGTK.dtype)
            if context.cached_rotary is None:
                k_BTGK = rotate(k_BTGK, *context.rotary).to(v_BGTK.dtype)
        return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BGTK

    def forward(self, x_BTD: Tensor, context: AttentionContext, cache: KVCache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTK, k_BGTK, v_BGTK = self.project(x_BTD, context)
        if cache is None:
            k_BGSK, v_BGSK = k_BGTK, v_BGTK
        else:
            k_BGSK, v_BGSK = cache.write(self.layer, k_BGTK, v_BGTK)
        if context.cached_rotary is not None:
            k_BGSK = rotate(k_BGSK, *context.cached_rotary).to(v_BGTK.dtype)
        if cache is not None and cache.prefix is not None:
            prefix_k, prefix_v = (part[self.layer] for part in cache.prefix)
            out_BHTK = attend_shared(q_BHTK, prefix_k, prefix_v, k_BGSK, v_BGSK, context.mask)
        else:
            out_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, context)
        return self.o(out_BHTK.transpose(1, 2).reshape(B, T, -1))


def repeat_heads(x_BGSK: Tensor, repeats: int) -> Tensor:
    """Every key/value head `repeats` times in a row, [B, G * repeats, S, K]."""
    if repeats == 1:
        return x_BGSK
    B, G, S, K = x_BGSK.shape
    return x_BGSK[:, :, None].expand(B, G, repeats, S, K).reshape(B, G * repeats, S, K)


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, context: AttentionContext) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v [B, H, T, K], by the fused kernel or spelled out; the same values."""
    B, H, T, _ = q_BHTK.shape
    repeats, mask = H // k_BGSK.shape[1], context.mask
    if context.block_mask is not None:
        return flex_attention(q_BHTK, k_BGSK, v_BGSK, block_mask=context.block_mask, enable_gqa=repeats > 1)
    if T == 1:  # the queries of a group stand side by side before their one head, which is not repeated
        q_BGRK = q_BHTK.reshape(B, -1, repeats, q_BHTK.shape[-1])
        attended = _spelled_out if context.explicit else F.scaled_dot_product_attention
        return attended(q_BGRK, k_BGSK, v_BGSK, mask).reshape(B, H, 1, -1)
    k_BHSK, v_BHSK = repeat_heads(k_BGSK, repeats), repeat_heads(v_BGSK, repeats)
    if not context.explicit:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=context.causal)
    blocks = min(MOST_BLOCKS, T // BLOCK)
    if mask is None or k_BHSK.shape[2] > T or blocks < 2:
        return _spelled_out(q_BHTK, k_BHSK, v_BHSK, mask)
    # Where all tokens are new the mask is triangular: no query of a block sees a key of a later one. Keys are cut once
    # and put together again for each block: the gradients of overlapping slices would all be padded to full length.
    sizes = [T * (block + 1) // blocks - T * block // blocks for block in range(blocks)]
    parts, end = [], 0
    k_parts, v_parts = k_BHSK.split(sizes, dim=2), v_BHSK.split(sizes, dim=2)
    for block, q_part in enumerate(q_BHTK.split(sizes, dim=2)):
        begin, end = end, end + sizes[block]
        k_seen, v_seen = (torch.cat(seen[: block + 1], dim=2) for seen in (k_parts, v_parts))
        parts.append(_spelled_out(q_part, k_seen, v_seen, mask[..., begin:end, :end]))
    return torch.cat(parts, dim=2)


def _spelled_out(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None) -> Tensor:
    scores_BHTS = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHSK.transpose(-1, -2)
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    return scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(v_BHSK.dtype) @ v_BHSK


def attend_shared(
    q_BHTK: Tensor, prefix_k: Tensor, prefix_v: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention over a prefix [1, G, P, K] that all rows share and may see in full, and over each row's own slots.

    The prefix is multiplied once with the queries of all rows (as in Hydragen, Juravsky et al. 2024, 2402.05099).
    """
    B, H, T, K = q_BHTK.shape
    G, P = prefix_k.shape[1], prefix_k.shape[2]
    repeats = H // G
    q_BGRTK = (q_BHTK * K**-0.5).reshape(B, G, repeats, T, K)
    q_GNK = q_BGRTK.transpose(0, 1).reshape(G, B * repeats * T, K)
    shared_GNP = q_GNK @ prefix_k[0].transpose(-1, -2)
    own_BGRTS = (q_BGRTK.reshape(B, G, repeats * T, K) @ k_BGSK.transpose(-1, -2)).view(B, G, repeats, T, -1)
    if mask is not None:  # [T, S] or [B, 1, T, S]
        own_BGRTS = own_BGRTS + (mask if mask.dim() == 2 else mask[:, :, None])
    shared_BGRTP = shared_GNP.view(G, B, repeats, T, P).transpose(0, 1)
    weights = torch.cat((shared_BGRTP, own_BGRTS), dim=-1).softmax(dim=-1, dtype=torch.float32).to(v_BGSK.dtype)
    shared_weights, own_weights = weights.split((P, own_BGRTS.shape[-1]), dim=-1)
    out_GNK = shared_weights.transpose(0, 1).reshape(G, B * repeats * T, P) @ prefix_v[0]
    out_BGRTK = out_GNK.view(G, B, repeats, T, K).transpose(0, 1)
    own_BGRTK = (own_weights.reshape(B, G, repeats * T, -1) @ v_BGSK).view(B, G, repeats, T, K)
    return (out_BGRTK + own_BGRTK).reshape(B, H, T, K)


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
    SPELLED_OUT positions. Packed documents, forward and backward of a small model on two cores with AVX512-BF16: SDPA
    takes 1.35 times as long as products spelled out at 512 positions a row, 1.33 times at 768, and in fp32 1.13 and
    1.10 times (benchmarks/attention.py). But the scores that these keep for the backward pass grow with the square of
    the length, SDPA keeps none.
    """

    def __init__(self, config: ModelConfig, attention: Literal["auto", "sdpa", "explicit"] = "auto"):
        super().__init__()
        _check(config)
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
        stream 0, so that every block begins as the identity. Drawn from `generator`, or from torch's global one."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD, generator=generator)
            elif isinstance(module, RMSNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.attention.o.weight)
            nn.init.zeros_(block.ffn.down.weight)

    @contextmanager
    def packed(self, rows: int, positions: int) -> Iterator[None]:
        """Within it products take copies of the weights that are laid out for them, where that pays: on a CPU, for
        `positions` in all and `rows` of them at a time. Weights are not to change meanwhile; no gradients.
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

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of each next token; see `hidden` for the arguments."""
        return self.head(self.hidden(tokens_BT, positions_BT, segments_BT, cache))

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

        `run` is what a compiler gets: with this in its graph it works masks and angles out anew in every layer.

        in_blocks: documents of packed rows are kept apart by FlexAttention (Dong et al. 2024, 2412.05496), which leaves
            out blocks of scores that are masked whole. Only a `run` that is compiled for a GPU is fast with it, and on
            a CPU it has no gradients.
        """
        T = tokens_BT.shape[1]
        dtype = self._compute_dtype(tokens_BT.device)
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
        if self.position is not None:
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
            self.attention == "auto" and dtype == torch.bfloat16 and tokens_BT.device.type == "cpu" and T <= SPELLED_OUT
        )
        if explicit and causal and T > 1:
            mask = additive_mask(_causal(T, T, tokens_BT.device), dtype)
        return AttentionContext(positions_BT, causal, mask, rotary, explicit, cached_rotary, block_mask)

    def run(self, tokens_BT: Tensor, context: AttentionContext, cache: KVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] after the final norm, with what `prepare` made of the same arguments."""
        h_BTD = self.embed(tokens_BT)
        if self.position is not None:
            h_BTD = h_BTD + self.position(context.positions)
        for block in self.blocks:
            h_BTD = block(h_BTD, context, cache)
        if cache is not None:
            cache.finish(tokens_BT.shape[1])
        return self.norm(h_BTD)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.embed.weight.dtype

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


def _check(config: ModelConfig) -> None:
    if config.vocab_size < 1:
        raise ConfigError(
            "model.vocab_size is not set; it is the tokenizer's size and must be filled in before building a model"
        )


def parameter_counts(model: Decoder | ModelConfig) -> dict[str, int]:
    """Parameters by component: embeddings, positions, attention, ffn, norms, head (0 where tied) and total, their sum.

    A `ModelConfig` is built on the meta device: no memory, no time.
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = Decoder(model)
    counts = dict.fromkeys(("embeddings", "positions", "attention", "ffn", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        counts[_component(name)] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


_TOP_LEVEL: Mapping[str, str] = {"embed": "embeddings", "position": "positions", "unembed": "head", "norm": "norms"}


def _component(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "blocks":
        return _TOP_LEVEL[parts[0]]
    return "norms" if any(part.endswith("norm") for part in parts) else parts[2]
