"""Loss by position, out to many times the training context, under several ways of reading a long text.

A position is a slot of the stream, counted from 0 and including the sinks; the loss at position p is that of the token
in slot p. Shape suffixes as in `model.decoder`, and N streams, J windows.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from basics.errors import DataError, EvaluationError
from threefold.config import ModelConfig, SourceConfig
from threefold.data import sources
from threefold.data.tokenizer import encode
from threefold.evaluation.perplexity import running_text
from threefold.evaluation.results import RECOMPUTED
from threefold.model.attention import Attention, AttentionContext, additive_mask, repeat_heads, rotary_tables
from threefold.model.decoder import Decoder
from threefold.model.kernels import rotate

VERSION = 1  # raised when a number would come out differently
VARIANTS = ("base", "sinks=0", "sinks=4", "position=learned", "position=none")  # measured where they were trained
MODES = ("full", "window", "sinks", RECOMPUTED)
FIRST_TOKENS = 4  # kept by "sinks" where a model has none of its own (Xiao et al. 2023, section 3.1)
STEPS = 2  # buckets an octave
SHORTEST = 3  # octaves below the context in which buckets begin
HEAD_TOKENS = 4096  # rows of logits held at a time


def by_position(
    models: Mapping[int, Decoder],
    ids: Sequence[int],
    sink_ids: Sequence[int],
    *,
    streams: int,
    factor: int = 16,
    batch_tokens: int = 16384,
) -> dict[str, Any]:
    """`length`: loss by position out to `factor` times the training context.

    - Data: `evaluation.perplexity`, all of it, joined as for `disjoint` into one running text.
    - Tokens: the model's own, cut into `ablations.length_streams` streams (fewer where the text ends) of
      `ablations.length_factor` x `model.context` positions each, the model's sinks in front. A stream may begin inside
      a document and run over several.
    - Scoring: natural-log likelihood of every token but the sinks and the first of the text, under each of
      `full`, attention over everything before; `window`, the last `model.context` tokens alone, each key and value as
      it was computed when its token came; `sinks`, the model's sinks (of a model without: the first four tokens) beside
      as many last ones as fill the context, rotary positions counted within the cache (Xiao et al. 2023, 2309.17453);
      `recomputed`, windows of the context that move by half of it, each computed on its own with positions from 0, the
      later half of it scored. `window` and `sinks` are `full` while nothing has left. Learned positions end with their
      table: `full` stops there, and `window` and `sinks`, which count all tokens, are left out.
    - Metrics: mean nats per token of each stream in buckets of position, two an octave and edges at the context's
      halves and multiples, for each mode and seed; intervals are made of streams and seeds by the comparison.
    - Reproduces: no published figure; `full` up to the context is the likelihood that `disjoint` sums.

    models: one a seed, of one configuration. ids: the running text's. Returns the values of a record.
    Raises EvaluationError where the text does not fill one stream.
    """
    config = next(iter(models.values())).config
    if any(model.config != config for model in models.values()):
        raise EvaluationError("length: models of several configurations are several variants")
    tokens_NS = cut(ids, sink_ids, factor * config.context, streams)
    first = len(sink_ids) + 1
    marks = [mark for mark in edges(config.context, factor) if mark == 0 or mark > first]
    nats: dict[str, dict[str, list[list[float]]]] = {}
    for mode in modes(config):
        last = config.context if mode == "full" and config.position == "learned" else tokens_NS.shape[1]
        within = [mark for mark in marks if mark <= last]
        nats[mode] = {
            str(seed): buckets(losses(model, tokens_NS[:, :last], mode, batch_tokens), within, first).round(5).tolist()
            for seed, model in models.items()
        }
    return {
        "version": VERSION,
        "position": config.position,
        "sinks": config.sinks,
        "context": config.context,
        "factor": factor,
        "streams": len(tokens_NS),
        "edges": marks,
        "nats": nats,
    }


def running_ids(source: SourceConfig, tokenizer: PreTrainedTokenizerFast, data_dir: str | Path = "") -> np.ndarray:
    """The running text of a source as ids, without sinks, joined as for perplexity."""
    wikitext = sources.resolve(source, data_dir).reader.startswith("wikitext")
    text, _ = running_text(sources.load(source, data_dir), wikitext)
    return next(iter(encode(tokenizer, [text])))


def modes(config: ModelConfig) -> tuple[str, ...]:
    """The modes that a model can be read in past its context, and for learned positions `full` up to it."""
    return ("full", RECOMPUTED) if config.position == "learned" else MODES


def cut(ids: Sequence[int], sink_ids: Sequence[int], length: int, most: int) -> Tensor:
    """Streams [N, length] of a running text, at most `most`, each with the sinks in front. Each begins `length` tokens
    after the previous one, so that models with different sinks read the same text.

    Raises EvaluationError where the text does not fill one stream.
    """
    if len(ids) < length:
        raise EvaluationError(
            f"length: the text holds {len(ids)} tokens, a stream takes {length}; lower ablations.length_factor, name a "
            "longer text in evaluation.perplexity, or leave the measure out with ablations.length_streams = -1"
        )
    count = min(most, len(ids) // length)
    text_NT = torch.as_tensor(np.asarray(ids[: count * length], np.int64)).view(count, length)
    sinks_NK = torch.tensor([list(sink_ids)] * count, dtype=torch.int64)
    return torch.cat((sinks_NK, text_NT[:, : length - len(sink_ids)]), dim=1)


def edges(context: int, factor: int) -> list[int]:
    """Edges of the buckets of position: 0, then two per octave from an eighth of the context on, up to the end."""
    steps = range(-SHORTEST * STEPS, math.floor(STEPS * math.log2(factor)) + 1)
    marks = [0, *(round(context * 2 ** (step / STEPS)) for step in steps), factor * context]
    return sorted(set(marks))


def buckets(nats_NT: Tensor, marks: Sequence[int], first: int) -> np.ndarray:
    """Mean nats of each stream between consecutive marks, [N, len(marks) - 1].

    nats_NT: of the tokens in slots 1 to S - 1. first: the first slot that counts.
    """
    nats_NS = F.pad(nats_NT.double(), (1, 0))
    parts = [nats_NS[:, max(low, first) : high].mean(dim=1) for low, high in pairwise(marks)]
    return torch.stack(parts, dim=1).numpy()


@torch.inference_mode()
def losses(model: Decoder, tokens_NS: Tensor, mode: str, batch_tokens: int = 16384) -> Tensor:
    """Nats [N, S - 1] of the tokens in slots 1 to S - 1 under a mode; fp32 on the CPU.

    tokens_NS: the model's sinks first. batch_tokens: positions per forward. mode: see `by_position`.
    Raises DataError for positions past a learned table; EvaluationError for an unknown mode.
    """
    config = model.config
    if mode not in MODES:
        raise EvaluationError(f"length: no mode {mode!r}; there are {', '.join(MODES)}")
    if mode == RECOMPUTED:
        return _recomputed(model, tokens_NS, batch_tokens)
    kept = (config.sinks or FIRST_TOKENS) if mode == "sinks" else 0
    parts = []
    for rows_BS in tokens_NS.split(max(1, batch_tokens // tokens_NS.shape[1])):
        rows_BS = rows_BS.to(model.embed.weight.device)
        seen_BT = rows_BS[:, :-1]
        h_BTD = model.hidden(seen_BT) if mode == "full" else streamed(model, seen_BT, kept, config.context - kept)
        pieces = zip(h_BTD.flatten(0, 1).split(HEAD_TOKENS), rows_BS[:, 1:].flatten().split(HEAD_TOKENS), strict=True)
        nats = [F.cross_entropy(model.head(h_MD).float(), target_M, reduction="none") for h_MD, target_M in pieces]
        parts.append(torch.cat(nats).view(seen_BT.shape).cpu())
    return torch.cat(parts)


def _recomputed(model: Decoder, tokens_NS: Tensor, batch_tokens: int) -> Tensor:
    """As `losses`, over windows of the context that move by half of it, each with the sinks in front, like those of the
    perplexity protocols.
    """
    (streams, length), context, sinks = tokens_NS.shape, model.config.context, model.config.sinks
    ends = [*range(min(context, length), length, max(1, context // 2)), length]
    windows = [
        torch.cat((tokens_NS[:, :sinks], tokens_NS[:, max(sinks, end - context + sinks) : end]), dim=1) for end in ends
    ]
    nats_NJT = losses(model, torch.cat(windows), "full", batch_tokens).view(len(ends), streams, -1).transpose(0, 1)
    new = [ends[0] - 1, *(end - start for start, end in pairwise(ends))]
    return torch.cat([nats_NT[:, -count:] for nats_NT, count in zip(nats_NJT.unbind(1), new, strict=True)], dim=1)


@torch.inference_mode()
def streamed(model: Decoder, tokens_BT: Tensor, sinks: int, window: int) -> Tensor:
    """Hidden states [B, T, D] as generation with a `StreamingCache` of `sinks` and `window` computes them, in parallel.

    The cache keeps a token's key and value in a layer as they were computed when the token came; a token that has left
    the cache is only masked. So a layer is one attention of the whole stream over the sinks and a band. Within the band
    only relative positions matter, which are those of the stream; relative to the sinks, a token's position is its slot
    in the cache.

    Raises DataError for positions past a learned table.
    """
    if model.config.position == "learned":
        if tokens_BT.shape[1] > min(model.config.context, sinks + window):
            raise DataError(
                f"a stream of {tokens_BT.shape[1]} tokens leaves the {model.config.context} learned positions or the "
                'window of this model; read it in windows (mode "recomputed"), or train with position = "rope"'
            )
        return model.hidden(tokens_BT)
    h_BTD = model.embed(tokens_BT)
    for block in model.blocks:
        h_BTD = h_BTD + _banded(block.attention, block.attention_norm(h_BTD), model.config, sinks, window)
        h_BTD = h_BTD + block.ffn(block.ffn_norm(h_BTD))
    return model.norm(h_BTD)


def _banded(attention: Attention, x_BTD: Tensor, config: ModelConfig, sinks: int, window: int) -> Tensor:
    """One layer's attention [B, T, D] over the sinks and the last `window` tokens, a block of queries at a time."""
    positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    q_BHTK, k_BGTK, v_BGTK = attention.project(
        x_BTD, AttentionContext(positions_T, False, None, rotary=None, explicit=True)
    )
    q_BHTK = q_BHTK * q_BHTK.shape[-1] ** -0.5
    k_BHTK, v_BHTK = (repeat_heads(part, q_BHTK.shape[1] // part.shape[1]) for part in (k_BGTK, v_BGTK))

    def rotated(x_BHTK: Tensor, at_T: Tensor) -> Tensor:
        if config.position != "rope":
            return x_BHTK
        cos, sin = rotary_tables(at_T, x_BHTK.shape[-1], config.rope_theta)
        return rotate(x_BHTK.transpose(1, 2), cos[:, None], sin[:, None]).transpose(1, 2).to(x_BHTK.dtype)

    to_sinks_BHTK = rotated(q_BHTK, positions_T.clamp_max(sinks + window - 1))  # the newest token's slot in the cache
    q_BHTK, k_BHTK = rotated(q_BHTK, positions_T), rotated(k_BHTK, positions_T)
    out = []
    for start in range(0, len(positions_T), window):
        queries, keys = slice(start, start + window), slice(max(sinks, start + 1 - window), start + window)
        ahead_TS = positions_T[queries, None] - positions_T[keys]  # how far the query is past the key
        seen_TS = torch.cat(
            (positions_T[queries, None] >= positions_T[:sinks], (ahead_TS >= 0) & (ahead_TS < window)), 1
        )
        scores_BHTS = torch.cat(
            (
                to_sinks_BHTK[:, :, queries] @ k_BHTK[:, :, :sinks].transpose(-1, -2),
                q_BHTK[:, :, queries] @ k_BHTK[:, :, keys].transpose(-1, -2),
            ),
            dim=-1,
        )
        scores_BHTS += additive_mask(seen_TS, scores_BHTS.dtype)
        weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(v_BHTK.dtype)
        out.append(weights_BHTS @ torch.cat((v_BHTK[:, :, :sinks], v_BHTK[:, :, keys]), dim=2))
    return attention.o(torch.cat(out, dim=2).transpose(1, 2).flatten(2))
