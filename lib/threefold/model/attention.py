"""Attention with its kernels: fused (SDPA), unfused, FlexAttention, and over a shared prefix. Shape suffixes as in
`model.decoder`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from threefold.config import ModelConfig
from threefold.model.cache import KVCache, kv_heads
from threefold.model.kernels import Linear, linears, rms_norm, rotate

BLOCK, MOST_BLOCKS = 64, 4  # queries, at least, of a block of unfused causal attention; blocks of a row


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, x / sqrt(mean(x^2) + eps) * weight over the last dimension, by `kernels.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/K), each [..., T, K/2] in fp32.

    Computed from the positions once a forward and not kept in a buffer: a buffer is cast with the model (bf16 angles
    are wrong past a few hundred positions), is garbage after `to_empty`, and has an end; computing costs below 1% of a
    layer.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


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
    """softmax(q k^T / sqrt(K) + mask) v [B, H, T, K], by the fused kernel or unfused; the same values."""
    B, H, T, _ = q_BHTK.shape
    repeats, mask = H // k_BGSK.shape[1], context.mask
    if context.block_mask is not None:
        return flex_attention(q_BHTK, k_BGSK, v_BGSK, block_mask=context.block_mask, enable_gqa=repeats > 1)
    if T == 1:  # one product for all queries of a group: their key/value head is not repeated
        q_BGRK = q_BHTK.reshape(B, -1, repeats, q_BHTK.shape[-1])
        attended = _unfused if context.explicit else F.scaled_dot_product_attention
        return attended(q_BGRK, k_BGSK, v_BGSK, mask).reshape(B, H, 1, -1)
    k_BHSK, v_BHSK = repeat_heads(k_BGSK, repeats), repeat_heads(v_BGSK, repeats)
    if not context.explicit:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=context.causal)
    blocks = min(MOST_BLOCKS, T // BLOCK)
    if mask is None or k_BHSK.shape[2] > T or blocks < 2:
        return _unfused(q_BHTK, k_BHSK, v_BHSK, mask)
    # Where all tokens are new the mask is triangular: no query of a block sees a key of a later one. Keys are cut once
    # and put together again for each block: the gradients of overlapping slices would all be padded to full length.
    sizes = [T * (block + 1) // blocks - T * block // blocks for block in range(blocks)]
    parts, end = [], 0
    k_parts, v_parts = k_BHSK.split(sizes, dim=2), v_BHSK.split(sizes, dim=2)
    for block, q_part in enumerate(q_BHTK.split(sizes, dim=2)):
        begin, end = end, end + sizes[block]
        k_seen, v_seen = (torch.cat(seen[: block + 1], dim=2) for seen in (k_parts, v_parts))
        parts.append(_unfused(q_part, k_seen, v_seen, mask[..., begin:end, :end]))
    return torch.cat(parts, dim=2)


def _unfused(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None) -> Tensor:
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
