"""Loss by position: each mode against an uncached or token-by-token computation, buckets and effects by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_fixtures import article, model_config, tokenizer, wikitext2
from report_fixtures import length_curves
from test_streaming import oracle, streamed

from basics.errors import DataError, EvaluationError
from study.comparison import length as compared
from threefold.config import ModelConfig
from threefold.data.tokenizer import with_sinks
from threefold.evaluation import LanguageModel, length, perplexity
from threefold.evaluation.statistics import crossed_mean, paired_student
from threefold.model import Decoder, StreamingCache

BASE = ModelConfig(n_layer=3, d_model=32, n_head=4, d_ff=48, context=16, vocab_size=50)
VARIANTS = {
    "one sink": {},
    "no sink": {"sinks": 0},
    "four sinks": {"sinks": 4},
    "qwen3": {"n_kv_head": 2, "qk_norm": True},
    "no positions": {"position": "none"},
}
variants = pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)


def decoder(**parts) -> Decoder:
    model = Decoder(replace(BASE, **parts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (count, size), generator=torch.Generator().manual_seed(seed))


def nats(logits_TV: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_TV[:-1], tokens[1:], reduction="none")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The modes


@variants
def test_full_is_the_cross_entropy_of_one_forward(parts):
    model, tokens = decoder(**parts), rows(3, 70)
    with torch.inference_mode():
        expected = torch.stack([nats(model(row[None])[0], row) for row in tokens])
    close(length.losses(model, tokens, "full", batch_tokens=100), expected)


@variants
def test_window_and_sinks_are_full_while_nothing_has_left(parts):
    model, tokens = decoder(**parts), rows(2, 17)  # 16 are read, the last one is only predicted
    full = length.losses(model, tokens, "full")
    for mode in ("window", "sinks", "recomputed"):
        found = length.losses(model, tokens[:, :16] if mode == "recomputed" else tokens, mode)
        close(found, full[:, : found.shape[1]])


@variants
@pytest.mark.parametrize("mode", ["window", "sinks"])
def test_window_and_sinks_are_the_streaming_cache_token_by_token(parts, mode):
    model, tokens = decoder(**parts), rows(2, 75)
    kept = (model.config.sinks or 4) if mode == "sinks" else 0
    expected = [nats(streamed(model, row.tolist(), StreamingCache.of(model, 1, sinks=kept)), row) for row in tokens]
    found = length.losses(model, tokens, mode, batch_tokens=74)
    close(found, torch.stack(expected))
    full = length.losses(model, tokens, "full")
    assert (found[:, :16] - full[:, :16]).abs().max() < 1e-4 < 1e-2 < (found[:, 17:] - full[:, 17:]).abs().max()


@pytest.mark.parametrize(("sinks", "window"), [(0, 8), (1, 1), (1, 15), (4, 9)])
@pytest.mark.parametrize("parts", [{}, {"position": "none"}, {"qk_norm": True}])
def test_streamed_is_the_dense_oracle_over_several_layers(parts, sinks, window):
    model, tokens = decoder(**parts), rows(1, 90)[0]
    with torch.inference_mode():
        found = model.head(length.streamed(model, tokens[None], sinks, window)[0])
        close(found, oracle(model, tokens.tolist(), sinks, window))


@pytest.mark.parametrize(("mode", "sinks"), [("window", 0), ("sinks", 1)])
def test_one_layer_is_a_fresh_forward_over_what_is_held(mode, sinks):
    """Keys and values of the first layer depend on their own token only: the model itself, uncached, is the oracle."""
    model, tokens = decoder(n_layer=1), rows(1, 60)
    found = length.losses(model, tokens, mode)[0]
    with torch.inference_mode():
        for n in (15, 16, 40, 58):
            held = torch.cat((tokens[0, :sinks], tokens[0, max(sinks, n + 1 - (16 - sinks)) : n + 1]))
            close(found[n], F.cross_entropy(model(held[None])[0, -1], tokens[0, n + 1]))


@pytest.mark.parametrize("parts", [*VARIANTS.values(), {"position": "learned"}], ids=[*VARIANTS, "learned"])
@pytest.mark.parametrize("size", [12, 16, 17, 24, 61, 64])
def test_recomputed_windows_are_read_on_their_own(parts, size):
    model, tokens, k = decoder(**parts), rows(2, size), parts.get("sinks", 1)
    found = length.losses(model, tokens, "recomputed", batch_tokens=40)
    assert found.shape == (2, size - 1)
    with torch.inference_mode():
        for row in range(2):
            for p in range(1, size):
                end = min(size, 16 if p < 16 else 16 + 8 * ((p - 16) // 8 + 1))
                held = torch.cat((tokens[row, :k], tokens[row, max(k, end - 16 + k) : end]))
                place = len(held) - (end - p)
                close(found[row, p - 1], F.cross_entropy(model(held[None])[0, place - 1], tokens[row, p]))


def test_learned_positions_end_with_their_table():
    model, tokens = decoder(position="learned"), rows(2, 40)
    assert length.modes(model.config) == ("full", "recomputed")
    for mode, message in (("full", "16 learned positions"), ("window", "learned positions"), ("sinks", "learned")):
        with pytest.raises(DataError, match=message):
            length.losses(model, tokens, mode)
    short = length.losses(model, tokens[:, :16], "full")
    close(length.losses(model, tokens[:, :16], "window"), short)
    close(length.losses(model, tokens, "recomputed")[:, :15], short)


def test_an_unknown_mode_is_refused():
    with pytest.raises(EvaluationError, match="no mode 'dense'; there are full, window, sinks, recomputed"):
        length.losses(decoder(), rows(1, 20), "dense")


# Against perplexity


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_full_sums_to_what_disjoint_perplexity_sums(sinks):
    """Streams of one context are the windows of the perplexity protocol, cut from the same running text."""
    fitting = with_sinks(tokenizer(), sinks)
    config = model_config(context=48, sinks=sinks, vocab_size=len(fitting))
    model = Decoder(config)
    model.initialise(torch.Generator().manual_seed(1))
    adapter = LanguageModel.from_model(model, fitting, "tiny")
    documents = [article(120, seed) for seed in range(3)]
    text, _ = perplexity.running_text(documents)
    ids = adapter.encode([text])[0]
    ids = ids[: len(ids) // (48 - sinks) * (48 - sinks)]
    windows = torch.tensor([adapter.prefix_ids + ids[at : at + 48 - sinks] for at in range(0, len(ids), 48 - sinks)])
    found = length.losses(model, windows, "full")[:, sinks:].sum()
    requests = [([*row[: sinks + 1]], [*row[sinks + 1 :]]) for row in windows.tolist()]
    spans = adapter.loglikelihoods(requests, batch_tokens=512, describe=str)
    assert float(found) == pytest.approx(-sum(float(span.sum()) for span in spans), rel=1e-5)
    whole = perplexity.disjoint(adapter, wikitext2(documents), 48)
    left = len(adapter.encode([text])[0]) - len(ids)
    assert whole.settings["text_tokens"] - left == len(ids)
    if left < 2:
        assert float(whole.items["nats"].sum()) == pytest.approx(float(found), rel=1e-5)


# Streams and buckets


def test_streams_are_cut_end_to_end_with_the_sinks_in_front():
    found = length.cut(range(100), [97, 98], 30, 5)
    assert found.shape == (3, 30)
    assert found[:, :3].tolist() == [[97, 98, 0], [97, 98, 30], [97, 98, 60]] and found[0, -1] == 27
    assert len(length.cut(range(100), [], 30, 2)) == 2
    with pytest.raises(EvaluationError, match=r"holds 100 tokens, a stream takes 101; lower ablations.length_factor"):
        length.cut(range(100), [], 101, 5)


def test_edges_hold_the_halves_and_multiples_of_the_context():
    marks = length.edges(128, 16)
    assert {0, 16, 32, 64, 128, 256, 512, 1024, 2048} <= set(marks) and marks == sorted(set(marks))
    assert len([mark for mark in marks if 128 <= mark < 256]) == 2
    assert length.edges(100, 12)[-1] == 1200


def test_buckets_are_means_by_slot_from_the_first_that_counts():
    nats_NT = torch.arange(1.0, 12.0)[None]  # slot p has p nats
    found = length.buckets(nats_NT, [0, 4, 8, 12], first=2)
    np.testing.assert_allclose(found, [[2.5, 5.5, 9.5]])


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_the_record_of_a_variant(position):
    models = {seed: decoder(position=position, context=16) for seed in (7, 8)}
    models[8].initialise(torch.Generator().manual_seed(8))
    ids = rows(1, 200)[0].tolist()
    values = length.by_position(models, ids, [3], streams=9, factor=4, batch_tokens=64)
    assert (values["context"], values["factor"], values["streams"], values["position"]) == (16, 4, 3, position)
    assert set(values["nats"]) == set(length.modes(models[7].config))
    tokens = length.cut(ids, [3], 64, 3)
    for mode, by_seed in values["nats"].items():
        assert list(by_seed) == ["7", "8"]
        ends = 16 if position == "learned" and mode == "full" else 64
        marks = [mark for mark in values["edges"] if mark <= ends]
        expected = length.losses(models[8], tokens[:, :ends], mode)
        widths = np.diff([2, *marks[1:]])  # slot 1, the text's first token, has nothing before it
        np.testing.assert_allclose(np.asarray(by_seed["8"]) @ widths, expected[:, 1:].sum(dim=1), rtol=1e-4)
    with pytest.raises(EvaluationError, match="several variants"):
        length.by_position({1: models[7], 2: decoder(sinks=0)}, ids, [3], streams=1, factor=2)


# Effects


def test_the_rope_effect_is_a_difference_of_two_rises():
    curves = length_curves({"full": 1.5, "recomputed": 0.2}, noise=0.0)
    curves["base"]["nats"]["full"]["1338"] = (np.asarray(curves["base"]["nats"]["full"]["1338"]) + 5).tolist()
    found = compared.rope(curves)  # a model that is worse everywhere extrapolates no worse
    assert found.interval.value == pytest.approx(1.3) and found.values_SN.shape == (3, 4)
    assert compared.rope({**curves, "base": curves["position=none"]}) is None


def test_the_sinks_effect_is_paired_by_seed_and_stream():
    """Streams differ by far more than the modes do; the pairs do not."""
    curves = length_curves({"window": 0.4, "sinks": 0.1}, noise=0.01)
    found = compared.sinks(curves)
    base = curves["base"]["nats"]
    weights = np.diff(curves["base"]["edges"])[4:]
    cells = [
        [
            np.average(np.subtract(s, w)[4:], weights=weights)
            for s, w in zip(base["sinks"][i], base["window"][i], strict=True)
        ]
        for i in base["sinks"]
    ]
    assert tuple(found.interval) == pytest.approx(tuple(crossed_mean(cells)))
    assert -0.35 < found.interval.low < -0.3 < found.interval.high < -0.25
    assert np.std([np.mean(stream) for stream in base["window"]["1337"]]) > 0.1


def test_learned_positions_have_no_loss_past_their_table():
    learned = length_curves()["position=learned"]
    assert compared.mean_nats(learned, "full", 0.5, 1).shape == (3, 4)
    assert compared.mean_nats(learned, "full", 1, 2) is None and compared.rise(learned, "full") is None
    assert compared.rise(learned, "recomputed").mean() == pytest.approx(0.05, abs=0.02)


def test_octaves_reach_the_factor():
    assert compared.octaves(16) == [(1, 2), (2, 4), (4, 8), (8, 16)]
    assert compared.octaves(12)[-1] == (8, 12) and compared.octaves(2) == [(1, 2)]


# The interval


def test_a_crossed_mean_of_one_seed_is_students_over_streams():
    values = [[0.1, 0.4, 0.2, 0.9]]
    expected = paired_student([0.0] * 4, values[0])
    for table in (values, np.transpose(values)):
        found = crossed_mean(table)
        assert (found.value, found.low, found.high) == pytest.approx(expected[:3])
    assert crossed_mean([[2.0]]).low is None and crossed_mean([[2.0, 2.0], [2.0, 2.0]]).low is None


def test_a_crossed_mean_by_hand():
    """Means over seeds 2 and 4 (variance 2 / 2), over streams 1, 3, 5 (variance 4 / 3)."""
    values = np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]])
    found = crossed_mean(values)
    variance = 2 / 2 + 4 / 3
    freedom = variance**2 / ((2 / 2) ** 2 / 1 + (4 / 3) ** 2 / 2)
    from scipy import stats

    half = stats.t.ppf(0.975, freedom) * variance**0.5
    assert (found.value, found.low, found.high, found.n) == pytest.approx((3.0, 3.0 - half, 3.0 + half, 6))


@pytest.mark.parametrize(("seed_sd", "stream_sd", "cell_sd"), [(1, 1, 1), (0, 1, 1), (0.2, 1, 0.2), (1, 0.2, 1)])
def test_a_crossed_interval_covers_as_it_says(seed_sd, stream_sd, cell_sd):
    generator, covered = np.random.default_rng(0), 0
    for _ in range(600):
        y = generator.normal(0, seed_sd, (3, 1)) + generator.normal(0, stream_sd, (1, 8))
        found = crossed_mean(y + generator.normal(0, cell_sd, (3, 8)))
        covered += found.low < 0 < found.high
    assert covered / 600 > 0.92
