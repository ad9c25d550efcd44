"""Batched generation against recomputing every sequence from its start, one at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from shared import randomised

from basics.errors import ConfigError, DataError, EvaluationError
from threefold.config import ModelConfig
from threefold.model import Decoder, KVCache, decoding, generate, generation
from threefold.model.generation import sample

BASE = ModelConfig(n_layer=2, d_model=32, n_head=4, d_ff=48, context=64, vocab_size=50)
GPT2 = {"norm": "layer", "ffn": "gelu", "position": "learned", "bias": True, "sinks": 0}
VARIANTS = {"llama": {}, "qwen3": {"n_kv_head": 2, "qk_norm": True}, "gpt2": GPT2, "no positions": {"position": "none"}}
EOS = 7


def decoder(seed: int = 0, attention: str = "auto", **parts) -> Decoder:
    return randomised(Decoder(replace(BASE, **parts), attention=attention), seed)


def prompts(count: int, seed: int = 0, common: int = 0, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 50, common).tolist()
    return [head + rng.integers(0, 50, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@torch.no_grad()
def recomputed(model: Decoder, prompt: list[int], max_new_tokens: int, eos: int | None = EOS) -> list[int]:
    """Greedy generation without a cache or a batch."""
    new: list[int] = []
    while len(new) < max_new_tokens and len(prompt) + len(new) < model.config.context:
        token = int(model(torch.tensor([prompt + new]))[0, -1].argmax())
        if token == eos:
            break
        new.append(token)
    return new


@pytest.fixture
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids="as on {}".format)
@pytest.mark.parametrize("common", [0, 18, 40], ids="{} common".format)
@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_greedy_equals_recomputation_row_by_row(parts, common, device, monkeypatch, nan_in_fresh_memory):
    """On a GPU, steps of fixed shapes over the cache's whole capacity are recorded; they are the same steps here."""
    taken, run = [], decoding.FixedSteps._run
    monkeypatch.setattr(decoding, "CAPTURED", {"cpu"} if device == "cuda" else set())
    monkeypatch.setattr(decoding.FixedSteps, "_run", lambda self: taken.append(self.cache.batch) or run(self))
    model = decoder(**parts)
    asked = prompts(9, seed=common, common=common)
    free = [recomputed(model, prompt, 24, None) for prompt in asked]
    assert generate(model, asked, 24) == free
    endings = {
        token: [row[: row.index(token)] if token in row else row for row in free] for row in free for token in row
    }
    eos = max(endings, key=lambda token: len(set(map(len, endings[token]))))  # rows end at many different steps
    assert len(set(map(len, endings[eos]))) > 2
    assert generate(model, asked, 24, eos_id=eos) == endings[eos]
    assert bool(taken) == (device == "cuda") and (not taken or min(taken) < len(asked))  # also after rows have ended


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 30), st.integers(0, 12))
def test_greedy_of_any_batch_equals_each_prompt_alone(seed, count, common, new):
    model = decoder(seed % 3)
    asked = prompts(count, seed, common)
    together = generate(model, asked, new, eos_id=EOS)
    assert together == [generate(model, [prompt], new, eos_id=EOS)[0] for prompt in asked]


@pytest.mark.parametrize("common", [0, 18], ids="{} common".format)
@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_prompts_read_in_groups_of_similar_length(parts, common, monkeypatch, nan_in_fresh_memory):
    model = decoder(**parts)
    asked = [[1] * common + prompt for prompt in ([5] * 20, [3], [4] * 9, [9, 2], [6] * 8, [8] * 21, [2, 2])]
    read = []
    for padded in (10**6, 1, 0):
        monkeypatch.setattr(generation, "PADDED", padded)
        groups = [list(map(len, group)) for group in generation.groups_by_length(sorted(asked, key=len, reverse=True))]
        read.append([[n - common for n in group] for group in groups])
        assert generate(model, asked, 12) == [recomputed(model, prompt, 12, None) for prompt in asked]
    assert read == [[[21, 20, 9, 8, 2, 2, 1]], [[21, 20], [9, 8], [2, 2, 1]], [[21], [20], [9], [8], [2, 2], [1]]]


def test_equal_and_one_token_prompts():
    model = decoder()
    assert generate(model, [[3], [3], [9]], 12) == [recomputed(model, [p], 12, None) for p in (3, 3, 9)]
    same = prompts(1, common=30)[0]
    assert generate(model, [same, same, same], 5) == [recomputed(model, same, 5, None)] * 3


def test_a_prefix_computed_before_is_the_start_of_every_prompt():
    model = decoder()
    start = prompts(1, seed=5, longest=25)[0]
    with torch.inference_mode():
        cache = KVCache.of(model, 1, len(start))
        model(torch.tensor([start]), cache=cache)
    for common in (0, 20):
        asked = prompts(4, seed=6, common=common, longest=8)
        expected = [recomputed(model, start + prompt, 9) for prompt in asked]
        assert generate(model, asked, 9, eos_id=EOS, prefix=cache) == expected


@pytest.mark.parametrize("parts", [{}, GPT2], ids=["rope", "learned"])
def test_rows_end_where_the_context_is_full(parts):
    model = decoder(**parts)
    asked = [list(range(50)) + [1] * 13, [2] * 40, [3]]
    new = generate(model, asked, 100)
    assert [len(p) + len(n) for p, n in zip(asked, new, strict=True)] == [64, 64, 64]
    assert new == [recomputed(model, p, 100, None) for p in asked]


def test_eos_ends_a_row_and_is_left_out():
    model = decoder()
    asked = prompts(4)
    free = generate(model, asked, 20)
    ends = {row[5] for row in free}
    for row, cut in zip(free, generate(model, asked, 20, eos_id=ends), strict=True):
        assert cut == row[: next(i for i, token in enumerate(row) if token in ends)]
    assert generate(model, asked, 20, eos_id=free[0][0])[0] == []


def test_a_stop_string_ends_its_row_with_the_token_that_completes_it():
    def decode(ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    model = decoder()
    asked = prompts(5)
    free = generate(model, asked, 25)
    stop = [f"{free[0][9]}><{free[0][10]}>", f"<{free[1][3]}>"]
    for row, got in zip(free, generate(model, asked, 25, stop=stop, decode=decode), strict=True):
        ends = [n for n in range(1, 26) if any(term in decode(row[:n]) for term in stop)]
        assert got == row[: ends[0] if ends else 25]
    with pytest.raises(ValueError, match="decode"):
        generate(model, asked, 5, stop=["x"])


def test_a_stop_string_is_looked_for_in_new_text_only():
    model = decoder()
    asked = [[4, 4, 4]]
    free = generate(model, asked, 10)[0]
    assert 4 not in free
    assert generate(model, asked, 10, stop=["<4>"], decode=lambda ids: "".join(f"<{i}>" for i in ids))[0] == free


def test_nothing_asked_nothing_given():
    assert generate(decoder(), [], 5) == []
    assert generate(decoder(), [[1], [2]], 0) == [[], []]


# Sampling


def test_sampling_is_repeatable_and_a_row_does_not_depend_on_when_others_end():
    model = decoder()
    asked = prompts(6)

    def run(**settings) -> list[list[int]]:
        return generate(model, asked, 20, temperature=1.5, generator=torch.Generator().manual_seed(4), **settings)

    free = run()
    assert free == run() and free != generate(model, asked, 20)
    ended = run(eos_id=free[2][3])
    assert len(ended[2]) <= 3
    for whole, cut in zip(free, ended, strict=True):
        assert whole[: len(cut)] == cut


def test_samples_follow_the_distribution():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for temperature in (0.7, 1.0, 2.0):
        tokens = sample(logits.expand(20_000, -1), temperature, -1, 1.0, draws)
        expected = (logits[0].double() / temperature).softmax(-1) * 20_000
        assert stats.chisquare(torch.bincount(tokens, minlength=12), expected).pvalue > 0.001


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.01, 1.0), st.floats(0.1, 3.0))
def test_top_k_and_top_p_keep_what_transformers_keeps(seed, top_k, top_p, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = (
        TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
        if top_p < 1
        else (TopKLogitsWarper(top_k)(None, scores))
    )
    kept = set(scores[0].isfinite().nonzero().flatten().tolist())
    draws = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    got = set(sample(logits.expand(4000, -1), temperature, top_k, top_p, draws).tolist())
    assert got <= kept
    likely = {i for i, p in enumerate(scores[0].double().softmax(-1).tolist()) if p > 1 / 2000}
    assert likely <= got


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    model = decoder()
    asked = prompts(3)
    greedy = generate(model, asked, 15)
    assert generate(model, asked, 15, temperature=2.0, top_k=1) == greedy
    assert generate(model, asked, 15, temperature=2.0, top_p=1e-6) == greedy
    assert generate(model, asked, 15, temperature=2.0, top_k=500) != greedy, "more than the vocabulary is all of it"


# Faults


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k = 0: allowed is -1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"stop": "text"}, "list of strings"),
        ({"stop": [""]}, "list of strings"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        generate(decoder(), [[1]], **{"max_new_tokens": 5, "decode": str, **setting})


def test_prompts_that_cannot_be_continued_are_named():
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generate(decoder(), [[1], []], 5)
    with pytest.raises(DataError, match="prompt 2 has 64 tokens, which leaves no room in a context of 64"):
        generate(decoder(), [[1], [2], [3] * 64], 5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_stop_it(temperature):
    model = decoder()
    with torch.no_grad():
        model.embed.weight[11] = float("nan")
    with pytest.raises(EvaluationError, match="prompt 1: the logits of new token 0"):
        generate(Broken(model), [[1, 2], [1, 11]], 3, temperature=temperature)


class Broken(Decoder):
    """A decoder whose head is sound, so that only the row with the broken token is not finite."""

    def __init__(self, model: Decoder):
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.register_buffer("sound", decoder().embed.weight.detach())

    @property
    def head_weight(self) -> torch.Tensor:
        return self.sound
