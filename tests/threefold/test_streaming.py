"""Streaming over sinks and a window: against exact attention while nothing has left, then against a dense oracle."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from basics.errors import ConfigError, DataError, EvaluationError
from threefold.config import ModelConfig
from threefold.model import Decoder, StreamingCache, generate, stream

BASE = ModelConfig(n_layer=3, d_model=32, n_head=4, d_ff=48, context=32, vocab_size=50)
GPT2 = {"norm": "layer", "ffn": "gelu", "position": "learned", "bias": True, "sinks": 0}
VARIANTS = {"llama": {}, "qwen3": {"n_kv_head": 2, "qk_norm": True}, "gpt2": GPT2, "no positions": {"position": "none"}}
UNBOUNDED = {name: VARIANTS[name] for name in ("llama", "qwen3", "no positions")}


def decoder(attention: str = "auto", **parts) -> Decoder:
    model = Decoder(replace(BASE, **parts), attention=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def streamed(model: Decoder, tokens: list[int], cache: StreamingCache, first: int = 1) -> torch.Tensor:
    """Logits [T, V] after each token: the first ones in one forward, the others one by one."""
    pieces = [tokens[:first], *([token] for token in tokens[first:])]
    return torch.cat([model(torch.tensor([piece]), cache=cache)[0] for piece in pieces])


@torch.inference_mode()
def oracle(model: Decoder, tokens: list[int], sinks: int, window: int) -> torch.Tensor:
    """Logits [T, V] with no cache: layer by layer, the keys and values of all tokens at once, computed from what each
    token saw in the layer below; then token by token its sinks and window, counted from 0 in their order."""
    config = model.config
    half = config.d_model // config.n_head // 2
    turn_K = torch.tensor([config.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64)

    def rotated(x_SHK: torch.Tensor, positions: list[int]) -> torch.Tensor:
        x_SHK = x_SHK.double()
        if config.position != "rope":
            return x_SHK
        angles = torch.tensor(positions, dtype=torch.float64)[:, None, None] * turn_K
        turned = torch.complex(x_SHK[..., :half], x_SHK[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    h_TD = model.embed(torch.tensor(tokens))
    for block in model.blocks:
        x_TD, attention = block.attention_norm(h_TD), block.attention
        q, k, v = (part(x_TD).unflatten(-1, (-1, 2 * half)) for part in (attention.q, attention.k, attention.v))
        if config.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        k, v = (part.repeat_interleave(config.n_head // part.shape[1], dim=1) for part in (k, v))
        seen = []
        for n in range(len(tokens)):
            held = [*range(min(sinks, n + 1)), *range(max(sinks, n + 1 - window), n + 1)]
            positions = list(range(len(held)))
            q_HK = rotated(q[n : n + 1], positions[-1:])[0]
            k_SHK = rotated(k[held], positions)
            weights_HS = (torch.einsum("hk,shk->hs", q_HK, k_SHK) / math.sqrt(2 * half)).softmax(-1)
            seen.append(torch.einsum("hs,shk->hk", weights_HS, v[held].double()).flatten())
        h_TD = h_TD + attention.o(torch.stack(seen).to(h_TD))
        h_TD = h_TD + block.ffn(block.ffn_norm(h_TD))
    return F.linear(model.norm(h_TD), model.embed.weight)


def agree(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Nothing has left


@pytest.mark.parametrize("first", [1, 13, 32])
@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_it_is_exact_attention_while_nothing_has_left(parts, first):
    model, tokens = decoder(**parts), text(32)
    with torch.inference_mode():
        agree(streamed(model, tokens, StreamingCache.of(model, 1), first), model(torch.tensor([tokens]))[0])


def test_several_tokens_may_follow_others_while_nothing_leaves():
    model, tokens = decoder(), text(32)
    cache = StreamingCache.of(model, 1)
    with torch.inference_mode():
        got = torch.cat(
            [model(torch.tensor([part]), cache=cache)[0] for part in (tokens[:5], tokens[5:20], tokens[20:])]
        )
        agree(got, model(torch.tensor([tokens]))[0])


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_it_says_what_generate_says_while_nothing_has_left(parts, attention):
    model = decoder(attention, **parts)
    for length in (1, 9, 31):
        prompt = text(length, seed=length)
        (expected,) = generate(model, [prompt], 100)
        assert list(stream(model, prompt, StreamingCache.of(model, 1), len(expected))) == expected
        for seed in (1, 2):
            sampling = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
            (drawn,) = generate(model, [prompt], 100, generator=torch.Generator().manual_seed(seed), **sampling)
            generator = torch.Generator().manual_seed(seed)
            cache = StreamingCache.of(model, 1)
            assert list(stream(model, prompt, cache, len(drawn), generator=generator, **sampling)) == drawn


# Past the window


@pytest.mark.parametrize(("sinks", "window"), [(0, 8), (1, 1), (1, 7), (1, 31), (4, 9)])
@pytest.mark.parametrize("parts", UNBOUNDED.values(), ids=UNBOUNDED)
def test_past_the_window_it_equals_the_dense_oracle(parts, sinks, window):
    model, tokens = decoder(**parts), text(90)
    expected = oracle(model, tokens, sinks, window)
    for first in (1, sinks + window):
        agree(streamed(model, tokens, StreamingCache.of(model, 1, window, sinks=sinks), first), expected)
    with torch.inference_mode():  # the oracle tells one from the other
        exact = model(torch.tensor([tokens]))[0]
    assert (expected[: sinks + window] - exact[: sinks + window]).abs().max() < 1e-3
    assert (expected[sinks + window :] - exact[sinks + window :]).abs().max() > 1e-1


@pytest.mark.parametrize(("sinks", "window"), [(0, 8), (1, 7), (4, 28)])
def test_one_layer_is_a_fresh_forward_over_the_sinks_and_the_window_alone(sinks, window):
    """Keys and values of the first layer depend on their own token only: the model itself is the oracle."""
    model, tokens = decoder(n_layer=1), text(70)
    got = streamed(model, tokens, StreamingCache.of(model, 1, window, sinks=sinks))
    with torch.inference_mode():
        for n in (sinks + window - 1, sinks + window, 50, 69):
            held = tokens[:sinks] + tokens[n + 1 - window : n + 1]
            agree(got[n], model(torch.tensor([held]))[0, -1])


def test_rows_of_a_batch_stream_side_by_side_and_may_be_dropped():
    model = decoder()
    rows = torch.tensor([text(60, seed) for seed in range(3)])
    cache = StreamingCache.of(model, 3, 9)
    with torch.inference_mode():
        got = [model(rows[:, n : n + 1], cache=cache)[:, 0] for n in range(40)]
        cache = cache.select(torch.tensor([2, 0]))
        rest = [model(rows[[2, 0], n : n + 1], cache=cache)[:, 0] for n in range(40, 60)]
    expected = torch.stack([oracle(model, row.tolist(), 1, 9) for row in rows])
    agree(torch.stack(got, dim=1), expected[:, :40])
    agree(torch.stack(rest, dim=1), expected[[2, 0], 40:])


@pytest.mark.parametrize("length", [3, 10, 11, 45])
def test_greedy_streams_go_past_the_context_as_the_oracle_does(length):
    model, prompt = decoder(), text(length)
    new = list(stream(model, prompt, StreamingCache.of(model, 1, 9), 60))
    assert len(new) == 60
    assert oracle(model, prompt + new, 1, 9)[length - 1 : -1].argmax(-1).tolist() == new


def test_a_stream_without_an_end_goes_on():
    model = decoder()
    endless = stream(model, text(5), StreamingCache.of(model, 1, 9), temperature=1.0)
    assert len(list(islice(endless, 300))) == 300


def test_a_stream_goes_on_from_what_one_before_left():
    model, prompt = decoder(), text(5)
    whole = list(stream(model, prompt, StreamingCache.of(model, 1, 9), 30))
    cache = StreamingCache.of(model, 1, 9)
    first = list(stream(model, prompt, cache, 18))
    assert first + list(stream(model, first[-1:], cache, 12)) == whole


def test_what_is_held_stops_growing():
    """Not one tensor that the cache holds is larger, newer or elsewhere after 200 more tokens."""
    model = decoder(n_kv_head=2)
    cache = StreamingCache.of(model, 1, 15)

    def held() -> dict[str, tuple[int, int]]:
        tensors = {name: value for name, value in vars(cache).items() if isinstance(value, torch.Tensor)}
        return {name: (value.untyped_storage().nbytes(), value.data_ptr()) for name, value in tensors.items()}

    new = stream(model, [1], cache)
    list(islice(new, 16))
    full = held()
    assert cache.used == cache.seen == 16 and cache.nbytes == 3 * 2 * 2 * 16 * 8 * 4  # layers, k and v, heads, slots
    assert sum(size for size, _ in full.values()) == cache.nbytes
    assert not [name for name, value in vars(cache).items() if isinstance(value, list | dict | tuple)]
    list(islice(new, 200))
    assert held() == full and (cache.used, cache.seen) == (16, 216)


# Ends


def test_eos_ends_it_and_suppressed_tokens_are_never_drawn():
    model, prompt = decoder(), text(4)
    free = list(stream(model, prompt, StreamingCache.of(model, 1, 9), 40))
    end = free[12]
    assert list(stream(model, prompt, StreamingCache.of(model, 1, 9), 40, eos_id=end)) == free[: free.index(end)]
    barred = list(stream(model, prompt, StreamingCache.of(model, 1, 9), 40, suppress=(end, free[0])))
    assert len(barred) == 40 and not {end, free[0]} & set(barred)
    hot = stream(model, prompt, StreamingCache.of(model, 1, 9), 400, temperature=9.0, suppress=range(2, 50))
    assert set(hot) == {0, 1}


# Faults


def test_learned_positions_stream_to_the_end_of_their_table_and_no_further():
    model = decoder(**GPT2)
    assert len(list(stream(model, text(2), StreamingCache.of(model, 1, 8), 30))) == 30
    for asked in (31, -1):
        with pytest.raises(DataError, match="32 learned positions, which leave 30 tokens"):
            stream(model, text(2), StreamingCache.of(model, 1, 8), asked)
    cache = StreamingCache.of(model, 1, 8)
    streamed(model, text(32), cache)
    with pytest.raises(DataError, match="position 32 is past the 32 learned positions"):
        streamed(model, [1], cache)


@pytest.mark.parametrize(
    ("window", "sinks", "message"),
    [
        (0, -1, "window = 0: allowed is 1 to 31, what the model's context of 32 leaves beside 1 sink$"),
        (32, -1, "window = 32: allowed is 1 to 31"),
        (29, 4, "window = 29: allowed is 1 to 28"),
        (-2, 0, "window = -2: allowed is 1 to 32, .* beside 0 sinks"),
        (-1, 32, "sinks = 32: allowed is -1"),
        (-1, -2, "sinks = -2"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(window, sinks, message):
    with pytest.raises(ConfigError, match=message):
        StreamingCache(BASE, 1, window, sinks=sinks)


def test_the_default_window_fills_the_context():
    cache = StreamingCache(BASE, 1)
    assert (cache.sinks, cache.window, cache.capacity) == (1, 31, 32)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"prompt": []}, DataError, "prompt is empty"),
        ({"temperature": -1.0}, ConfigError, "temperature = -1.0"),
        ({"top_k": 0}, ConfigError, "top_k = 0"),
        ({"max_new_tokens": -2}, ConfigError, "max_new_tokens = -2"),
    ],
)
def test_impossible_streams_are_refused_before_they_begin(given, error, message):
    model = decoder()
    with pytest.raises(error, match=message):
        stream(model, **{"prompt": [1], "cache": StreamingCache.of(model, 1), **given})


def test_logits_that_are_no_numbers_stop_it():
    model = decoder()
    with torch.no_grad():
        model.blocks[0].attention.o.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="logits of new token 0"):
        next(stream(model, [1], StreamingCache.of(model, 1)))


def test_the_cache_refuses_what_it_cannot_hold():
    model = decoder()
    cache = StreamingCache.of(model, 1, 4)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"one token at a time .* not 6 after 0"):
            model(torch.tensor([text(6)]), cache=cache)
        with pytest.raises(ValueError, match="without padding"):
            model(torch.tensor([[1]]), segments_BT=torch.tensor([[0]]), cache=cache)
    with pytest.raises(ValueError, match="cannot be shared"):
        cache.expand(2)
