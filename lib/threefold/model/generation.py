"""Generation over the KV cache, greedy or sampled: batches whose rows end independently, with stop strings, and one
stream of any length in constant memory."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from basics.errors import ConfigError, DataError, EvaluationError
from threefold.config import check_sampling
from threefold.model.cache import KVCache, StreamingCache
from threefold.model.decoder import Decoder
from threefold.model.decoding import steps
from threefold.segments import PADDING, SINK

SHARED = 16  # tokens that prompts have in common before it pays to compute them once
PADDED = 128  # tokens of padding on a CPU, which another forward costs less than
READ = 1 << 17  # positions that a GPU reads at once
SLACK = 4  # tokens decoded beyond a stop string's bytes: tokenizers may drop a space at the start of what they decode


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] | None = None,
    decode: Callable[[list[int]], str] | None = None,
    eos_id: int | Collection[int] | None = None,
    prefix: KVCache | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """The new token ids of each prompt, in the prompts' order.

    A row ends before its EOS (which is left out), with the token that completes a stop string (which stays in: cut the
    decoded text at the string), after `max_new_tokens`, or when prompt and new tokens fill the model's context.

    prompts: token ids with whatever the tokenizer puts in front (BOS, the sink); lengths may differ. What all of them
        begin with is computed once.
    stop: strings, looked for in `decode` of the new tokens only.
    eos_id: one id or several; None: rows never end by themselves.
    prefix: a batch-1 cache of tokens before all prompts (not repeated in them).
    sampling: fields of `Sampling`; greedy by default. A row's draws do not depend on when other rows end.

    Raises ConfigError (impossible settings), DataError (an empty prompt, one that leaves no room in the context, a
    token id the model does not know; names its index), EvaluationError (logits that are not finite).
    """
    sampler = Sampling(**sampling)
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: allowed is 0 or more")
    if isinstance(stop, str) or "" in (stop or ()):
        raise ConfigError("stop is a list of strings, none of them empty")
    if stop and decode is None:
        raise ValueError("stop strings need `decode`, which turns token ids into text")
    before = 0 if prefix is None else prefix.length
    for index, prompt in enumerate(prompts):
        _check_ids(prompt, model.config.vocab_size, f"prompt {index}")
        if before + len(prompt) >= model.config.context:
            raise DataError(
                f"prompt {index} has {before + len(prompt)} tokens, which leaves no room in a context of "
                f"{model.config.context}; shorten it"
            )
    room = [min(max_new_tokens, model.config.context - before - len(prompt)) for prompt in prompts]
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    tail = max((len(text.encode()) for text in stop or ()), default=0) + SLACK
    new: list[list[int]] = [[] for _ in prompts]

    def continues(row: int, token: int) -> bool:
        """Whether the prompt's row continues after this token, which is kept unless it is an EOS."""
        if token < 0:
            raise EvaluationError(f"prompt {row}: the logits of new token {len(new[row])} are not finite")
        if token in ends:
            return False
        new[row].append(token)
        if len(new[row]) == room[row]:
            return False
        text = decode(new[row][-tail:]) if stop else ""
        return not any(term in text for term in stop or ())

    with model.packed(len(prompts), sum(map(len, prompts)) + sum(room)):
        active = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the prompts that rows belong to
        logits_BV, cache = _prefill(model, [prompts[i] for i in active], max(room), prefix)
        running, decode_next = set(active), steps(model, cache)
        for step in count(1):
            tokens_B = sampler.pick(logits_BV, active, len(prompts))
            for row, token in zip(active, tokens_B.tolist(), strict=True):
                if row in running and not continues(row, token):
                    running.remove(row)
            if not running:
                return new
            # What finished rows cost in each step outweighs one copy of the rest; past the context none can run.
            done = len(active) - len(running)
            full = before + step + max(len(prompts[row]) for row in active) > model.config.context
            if done and (8 * done >= len(active) or full):
                index = torch.tensor([i for i, row in enumerate(active) if row in running], device=tokens_B.device)
                cache, tokens_B = decode_next.filled().select(index), tokens_B[index]
                active, decode_next = [active[i] for i in index.tolist()], steps(model, cache)
            logits_BV = decode_next(tokens_B)


def stream(
    model: Decoder,
    prompt: Sequence[int],
    cache: StreamingCache,
    max_new_tokens: int = -1,
    *,
    eos_id: int | None = None,
    suppress: Collection[int] = (),
    **sampling: Any,
) -> Iterator[int]:
    """New token ids one by one, each from the sinks and the window of `cache`; as in `generate` while nothing has left
    it. Memory does not depend on how many tokens are asked for, nor on the prompt's length.

    prompt: token ids with whatever the tokenizer puts in front; its first tokens are what the cache holds as sinks.
    cache: of one row, empty, or with what a stream before left in it: all but the last token that it gave.
    max_new_tokens: -1 for no end.
    eos_id: ends the stream and is left out; None: nothing does.
    suppress: ids that are never drawn.
    sampling: fields of `Sampling`; greedy by default.

    Raises ConfigError (impossible settings) and DataError (an empty prompt or an unknown token id; learned positions,
    which cannot stream past their table) before the first token is asked for, EvaluationError (logits that are not
    finite).
    """
    sampler = Sampling(**sampling)
    if max_new_tokens < -1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: allowed is -1 (no end) or more")
    _check_ids(prompt, model.config.vocab_size, "the prompt")
    _check_ids([*prompt, *suppress], model.config.vocab_size, "suppress")
    room = model.config.context - cache.seen - len(prompt)
    if model.config.position == "learned" and not 0 <= max_new_tokens <= room:
        raise DataError(
            f"this model has {model.config.context} learned positions, which leave {max(room, 0)} tokens after the "
            "prompt: set max_new_tokens to no more, or stream a model with rotary positions"
        )

    @torch.inference_mode()
    def tokens() -> Iterator[int]:
        device = model.embed.weight.device
        at_once = max(cache.capacity - cache.seen, 1)
        hidden_BTD = model.hidden(torch.tensor([list(prompt[:at_once])], device=device), cache=cache)
        for token in prompt[at_once:]:
            hidden_BTD = model.hidden(torch.tensor([[token]], device=device), cache=cache)
        given = 0
        while given != max_new_tokens:
            logits_BV = model.head(hidden_BTD[:, -1])
            logits_BV[:, list(suppress)] = float("-inf")
            tokens_B = sampler.pick(logits_BV, [0], 1)
            token = int(tokens_B)
            if token < 0:
                raise EvaluationError(f"the logits of new token {given} are not finite")
            if token == eos_id:
                return
            yield token
            given += 1
            if given != max_new_tokens:
                hidden_BTD = model.hidden(tokens_B[:, None], cache=cache)

    return tokens()


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as transformers does. Raises ConfigError for impossible settings.

    temperature: 0 is greedy; else logits are divided by it, then cut to the `top_k` largest (-1: all), then to the
    smallest set that holds `top_p` of the probability (Holtzman et al. 2020). generator: None: torch's global one.
    """

    temperature: float = 0.0
    top_k: int = -1
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)

    def pick(self, logits_BV: Tensor, rows: Sequence[int], prompts: int) -> Tensor:
        """The next token of each row [B]; -1 where its logits are not finite.

        rows: the prompt that each row belongs to. A draw is made for every one of the prompts, so that those of a row
        do not depend on when other rows end.
        """
        best_B, token_B = logits_BV.max(dim=-1)
        if self.temperature:
            device = "cpu" if self.generator is None else self.generator.device
            draws_N = torch.rand(prompts, dtype=torch.float64, generator=self.generator, device=device)
            draws_B = draws_N.cpu()[rows].to(logits_BV.device)
            token_B = sample(logits_BV, self.temperature, self.top_k, self.top_p, draws_B)
        return torch.where(best_B.isfinite(), token_B, -1)


def _prefill(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefix: KVCache | None
) -> tuple[Tensor, KVCache]:
    """Logits after each prompt [B, V] and their cache: the common start once, the rest padded left, in groups: of
    similar length on a CPU, of at most `READ` positions on a GPU. prompts: longest first."""
    device = model.embed.weight.device
    shared = min(common_prefix_length(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    if shared >= SHARED:
        start = KVCache.of(model, 1, shared) if prefix is None else prefix.expand(1, shared)
        model.hidden(torch.tensor([list(prompts[0][:shared])], device=device), cache=start)
        prefix = start
    else:
        shared = 0

    def empty(batch: int, capacity: int) -> KVCache:
        return KVCache.of(model, batch, capacity) if prefix is None else prefix.expand(batch, capacity)

    rests = [prompt[shared:] for prompt in prompts]
    capacity = len(rests[0]) + max_new_tokens - 1  # the last token is never fed back
    if device.type == "cpu":
        groups = groups_by_length(rests)
    else:
        most = max(1, READ // len(rests[0]))
        groups = [rests[i : i + most] for i in range(0, len(rests), most)]
    caches = [empty(len(group), len(group[0]) if len(groups) > 1 else capacity) for group in groups]
    logits_BV = torch.cat([_read(model, group, cache) for group, cache in zip(groups, caches, strict=True)])
    if len(groups) == 1:
        return logits_BV, caches[0]
    cache = empty(len(prompts), capacity)
    cache.join(caches)
    return logits_BV, cache


def groups_by_length(rows: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """Rows, longest first, in groups: padding a group to the length of its first row takes at most PADDED tokens."""
    groups, begin, padded = [], 0, 0
    for i, row in enumerate(rows):
        padded += len(rows[begin]) - len(row)
        if padded > PADDED:
            groups.append(rows[begin:i])
            begin, padded = i, 0
    return [*groups, rows[begin:]]


def _read(model: Decoder, rows: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Logits after each row [B, V], padded left to the first one's length; its tokens are added to the cache."""
    width, device = len(rows[0]), model.embed.weight.device
    tokens_BT = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    segments = None
    if len(rows[-1]) < width:
        padded = [[PADDING] * (width - len(row)) + [SINK] * len(row) for row in rows]
        segments = torch.tensor(padded, device=device)
    return model.head(model.hidden(tokens_BT, segments_BT=segments, cache=cache)[:, -1])


def common_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all rows begin with."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def sample(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, draws_B: Tensor) -> Tensor:
    """Tokens [B] by inverting each row's cumulative distribution at its draw from [0, 1)."""
    scores_BV = logits_BV.float() / temperature
    count = logits_BV.shape[-1] if top_k == -1 else min(top_k, logits_BV.shape[-1])
    scores_BC, ids_BC = (
        scores_BV.topk(count) if count < scores_BV.shape[-1] else scores_BV.sort(dim=-1, descending=True)
    )
    p_BC = scores_BC.double().softmax(dim=-1)
    if top_p < 1:
        p_BC = p_BC.masked_fill(p_BC.cumsum(dim=-1) - p_BC >= top_p, 0.0)  # what lies before it is enough without it
    cumulative_BC = p_BC.cumsum(dim=-1)
    at_B1 = draws_B.to(cumulative_BC)[:, None] * cumulative_BC[:, -1:]
    chosen_B1 = torch.searchsorted(cumulative_BC, at_B1, right=True).clamp_max(count - 1)
    return ids_BC.gather(1, chosen_B1)[:, 0]


def _check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    if not len(ids):
        raise DataError(f"{what} is empty: give at least one token, such as the BOS token")
    wrong = next((id for id in ids if not 0 <= id < vocabulary), None)
    if wrong is not None:
        raise DataError(f"{what} has token id {wrong}: the model knows 0 to {vocabulary - 1}")
