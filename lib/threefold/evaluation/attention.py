"""Attention probabilities of a decoder, and the share of them on the sinks.

Shape suffixes as in `model.decoder`: L layers, H query heads, T query positions, S key positions (as many).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from basics.errors import EvaluationError
from threefold.evaluation.length import cut
from threefold.model.attention import Attention, attend
from threefold.model.decoder import Decoder

VARIANTS = ("base", "sinks=0", "sinks=4")  # measured where they were trained
ROWS = 8  # of text, a context each
FIRST_QUERIES = 16  # left out of a share: a query that sees a handful of keys gives each of them much


@torch.inference_mode()
def maps(model: Decoder, tokens: Sequence[int] | Tensor) -> Tensor:
    """Attention probabilities of one plain forward over `tokens` (sinks included), [L, H, T, S] in fp32 on the CPU.

    They are those of the forward itself: each layer's queries and keys attend over an identity matrix as values, with
    the kernel that the model runs. Row t sums to 1 over keys 0 to t.

    Raises DataError for more tokens than a learned table has positions.
    """
    tokens_1T = torch.as_tensor(tokens, device=model.embed.weight.device)[None]
    probabilities: list[Tensor] = []

    def record(attention: Attention, arguments: tuple) -> None:
        x_BTD, context, _cache = arguments
        q_BHTK, k_BGSK, _ = attention.project(x_BTD, context)
        identity_SS = torch.eye(k_BGSK.shape[2], dtype=k_BGSK.dtype, device=k_BGSK.device)
        probabilities.append(
            attend(q_BHTK, k_BGSK, identity_SS.expand(*k_BGSK.shape[:2], -1, -1), context)[0].float().cpu()
        )

    hooks = [block.attention.register_forward_pre_hook(record) for block in model.blocks]
    try:
        model.hidden(tokens_1T)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(probabilities)


def sink_share(maps_LHTS: Tensor, sinks: int, first: int = FIRST_QUERIES) -> Tensor:
    """Mean probability on the first `sinks` keys over the queries from position `first` on, [L, H].

    For a model without sinks pass 1, the share of the text's first token. Raises EvaluationError if no query is left.
    """
    if not 1 <= sinks <= first < maps_LHTS.shape[-2]:
        raise EvaluationError(
            f"the share of {sinks} sinks over the queries from position {first} on needs 1 <= sinks <= first < "
            f"{maps_LHTS.shape[-2]}, the number of positions"
        )
    return maps_LHTS[..., first:, :sinks].sum(dim=-1).mean(dim=-1)


def uniform_share(length: int, sinks: int, first: int = FIRST_QUERIES) -> float:
    """`sink_share` of a head that attends uniformly: the mean of sinks / (t + 1)."""
    uniform_TS = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    return float(sink_share(uniform_TS[None, None], sinks, first))


def shares(models: Mapping[int, Decoder], ids: Sequence[int], sink_ids: Sequence[int]) -> dict[str, Any]:
    """The values of a record for one variant, over rows of a running text with the model's sinks in front of each.

    `share` [L, H] is the first seed's, `means` over all layers and heads are by seed, `uniform` is the share of heads
    that attend uniformly. For a model without sinks it is the share of the text's first token.

    models: one per seed.
    """
    config = next(iter(models.values())).config
    tokens_NT, sinks = cut(ids, sink_ids, config.context, ROWS), config.sinks
    share_by_seed = {
        seed: torch.stack([sink_share(maps(model, row_T), max(1, sinks)) for row_T in tokens_NT]).mean(dim=0)
        for seed, model in models.items()
    }
    return {
        "sinks": sinks,
        "share": next(iter(share_by_seed.values())).tolist(),
        "means": {str(seed): float(share_LH.mean()) for seed, share_LH in share_by_seed.items()},
        "uniform": uniform_share(tokens_NT.shape[1], max(1, sinks)),
        "rows": len(tokens_NT),
        "positions": tokens_NT.shape[1],
    }
