"""Costs by calculation against operations and bytes that were counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from basics import paths
from benchmarks import cost, pipeline, scale, seeds
from study.preset import load_preset
from threefold.config import ModelConfig, TrainConfig
from threefold.model.decoder import Decoder
from threefold.training import optimizers
from threefold.training.loop import build_optimizers

SMALL = ModelConfig(n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, context=24, vocab_size=61)


@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, ffn="gelu", norm="layer", bias=True, position="learned", tie_embeddings=False)],
    ids=["ours", "gpt2"],
)
def test_operations_a_token_are_those_that_torch_counts(config):
    model, tokens = Decoder(config, attention="explicit"), torch.zeros(3, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(tokens).sum().backward()
    found = cost.Model.of(config)
    assert found.flops_a_token * tokens.numel() == counted.get_total_flops()
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_operations_of_newton_schulz_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counted:
        optimizers.orthogonalise(torch.randn(2, *shape), (3.4445, -4.775, 2.0315), cost.NEWTON_SCHULZ, 1e-7)
    assert counted.get_total_flops() == 2 * cost.newton_schulz_flops(*shape)


def test_muon_trains_the_matrices_that_are_counted_and_workers_share_them():
    muon = next(o for o in build_optimizers(Decoder(SMALL), TrainConfig()) if isinstance(o, optimizers.Muon))
    shapes = [tuple(p.shape) for group in muon.param_groups for p in group["params"]]
    model = cost.Model.of(SMALL)
    assert {shape: shapes.count(shape) for shape in shapes} == model.hidden
    assert muon.param_groups[0]["ns_steps"] == cost.NEWTON_SCHULZ
    assert model.muon_flops() == sum(cost.newton_schulz_flops(*shape) for shape in shapes)
    assert model.muon_flops(2) == model.muon_flops() / 2 and model.muon_flops(64) == sum(
        cost.newton_schulz_flops(*shape) for shape in model.hidden
    )


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_ring_bytes_are_those_of_a_ring_that_sums(workers):
    """Each worker hands a chunk on to the next: W - 1 times to sum them, W - 1 times to spread the sums."""
    held = np.arange(workers * workers, dtype=float).reshape(workers, workers) ** 2  # worker x chunk
    expected, sent = held.sum(0), np.zeros(workers)
    for turn in range(2 * (workers - 1)):
        before = held.copy()
        for worker in range(workers):
            chunk, following = (worker - turn) % workers, (worker + 1) % workers
            if turn < workers - 1:
                held[following, chunk] += before[worker, chunk]
            else:
                chunk = (worker + 1 - (turn - workers + 1)) % workers
                held[following, chunk] = before[worker, chunk]
            sent[worker] += held.itemsize
    assert (held == expected).all()
    assert sent == pytest.approx([cost.ring_bytes(held[0].nbytes, workers)] * workers)


def test_a_steps_time_by_hand():
    model = cost.Model(parameters=10**8, products=10**8, attention=0, hidden={(1000, 1000): 3})
    device = cost.Device(flops=1e12, memory=1e11, link=1e9)
    one = cost.step(model, device, 1, 1000, 1)
    assert (one.compute, one.exposed) == (pytest.approx(0.6), 0)
    assert one.muon == pytest.approx(3 * 5 * 6e9 / 1e12) and one.update == pytest.approx(0.028)
    two = cost.step(model, device, 2, 1000, 1)
    assert two.compute == pytest.approx(0.3) and two.exchange == pytest.approx(0.4)
    assert two.exposed == pytest.approx(0.4 - 0.2)  # hidden by the backward pass, two thirds of 0.3 s
    assert two.muon == pytest.approx(2 * 5 * 6e9 / 1e12 + 3e6 / 1e9)
    assert cost.step(model, replace(device, overlap=0.0), 2, 1000, 1).exposed == pytest.approx(0.4)
    assert cost.step(model, replace(device, link=1e12), 2, 1000, 1).exposed == pytest.approx(
        4e-4 * cost.BUCKET / 4e8
    )  # the last bucket has nothing to hide behind
    assert two.total == pytest.approx(two.compute + two.exposed + two.muon + two.update)


def test_the_full_models_figures():
    """6N = 1.52 GFLOP a token, 1.67 with attention."""
    full = cost.Model.of(replace(load_preset("full").model, vocab_size=50258))
    assert 6 * full.parameters == pytest.approx(1.52e9, rel=0.005)
    assert full.flops_a_token == pytest.approx(1.67e9, rel=0.005)


# The pipeline ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_tables_that_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(scale, "kept_bytes", lambda config: (0.0, 0.0))
    scale.plan()
    page = (paths.PROJECT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in capsys.readouterr().out.splitlines() if line and "(measured)" not in line]
    assert len(lines) > 70 and [line for line in lines if line not in page and line[:-1] not in " ".join(page)] == []


def test_full_is_predicted_within_what_was_asked():
    one = pipeline.Pipeline(pipeline.CARDS["H100"])
    found = pipeline.minutes(one)
    assert found["all"] <= 90 and found["ablations"] <= 25 and found["step times"] <= 3
    assert found["SFT"] <= 5 and found["DPO"] <= 15
    assert found["all"] == pytest.approx(sum(value for name, value in found.items() if name != "all"))
    for half in (True, False):
        models = [one.config, *pipeline.EXTERNAL.values()]
        assert max(pipeline.Pipeline(one.card, half=half).problems(model) for model in models) <= 60
    assert pipeline.CARDS["H100"].price == load_preset("full").price_per_hour
    exact = pipeline.minutes(pipeline.Pipeline(one.card, half=False))
    assert exact["evaluations"] > found["evaluations"] and exact["pretrain"] == found["pretrain"]


def test_a_decoded_step_by_hand():
    one = pipeline.Pipeline(pipeline.Card(bf16=1e12, fp32=1e12, bandwidth=1e9, memory=1e9, price=1.0))
    config = ModelConfig(n_layer=2, d_model=8, n_head=2, d_ff=8, context=16, vocab_size=10)
    parameters = sum(p.numel() for p in Decoder(config).parameters())
    cached = 3 * 5 * 2 * 2 * 8  # rows, positions, keys and values, layers, width
    for half, size in ((True, 2), (False, 4)):
        expected = (parameters + cached) * size / 0.8e9 + (14 * 2 + 10) * pipeline.known("kernel")
        assert one._decoded(config, 3, 5, half) == pytest.approx(expected)


def test_the_bytes_of_the_loss_add_up():
    product, widen, largest, subtract, exponential, total, narrow, products = 2, 6, 4, 8, 8, 4, 6, 4
    eager = product + widen + largest + subtract + exponential + total + narrow + products
    assert {"eager": eager, "fused": 2 + 2 + 4 + 4} == cost.LOSS


def test_what_seeds_detect_is_found_four_times_in_five():
    """By simulation; and the deviation is that of each variant around its own mean."""
    generator = np.random.default_rng(0)
    for n in (3, 5, 8):
        differences = generator.normal(seeds.detectable(0.3, n), 0.3, (20_000, n))
        found = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.015)
    shifted = generator.normal([[0.0], [5.0], [-2.0]], 0.3, (3, 4000))
    assert seeds.pooled(shifted) == pytest.approx(0.3, rel=0.03)
