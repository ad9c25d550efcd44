"""The benchmarks' own working: that contestants compute the same, how ratios are formed, what is written. No timing."""

import importlib
import json
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Options, agree, median_interval, summary
from benchmarks.parts import OURS, PARTS, Part
from benchmarks.setup import Setup
from benchmarks.smoke import COMMAND


@pytest.fixture(scope="module")
def setup():
    torch.set_num_threads(1)
    return Setup("tiny", "sample")


def contestant(target, setup):
    module, name = target.split(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)(setup)


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "scoring", "generation"])
def test_all_contestants_of_a_part_compute_the_same(name, setup):
    part = PARTS[name]
    checks = {key: contestant(target, setup).check() for key, target in part.contestants.items()}
    assert checks[OURS] and all(checks[key] for key in part.contestants if key not in part.limits)
    found = agree(checks, part.tolerance)
    assert set(found["differences"]) == set(part.contestants) - {OURS, *part.limits}


def test_the_peer_that_groups_by_length_does_so(setup):
    """On examples of few tokens and of many, of which a round's batches would each hold some."""
    short, long = setup.examples(setup.size.examples * setup.size.steps), []
    for prompt, response in short[::2]:
        long += [(prompt, response * 3), (prompt, response)]
    positions = {}
    for name in ("TrlFineTuning", "TrlFineTuningGrouped"):
        peer = contestant(f"training:{name}", setup)
        peer.trainer = peer._trainer(peer.options, long)
        positions[name] = peer.computed(len(long))["positions an item"]
    assert positions["TrlFineTuningGrouped"] < 0.9 * positions["TrlFineTuning"]


def test_scoring_counts_the_positions_that_are_computed(setup):
    ours, batched = (contestant(f"evaluation:{name}", setup) for name in ("OurScoring", "TransformersScoring"))
    ours.check(), batched.check()
    n = len(batched.items)
    real = sum(len(context) + len(target) - 1 for context, target in batched.requests) / n
    longest = max(len(context) + len(target) - 1 for context, target in batched.requests)
    assert real <= batched.settings["positions an item"] == 2 * longest  # one batch
    assert ours.settings["positions an item"] < real / 2  # shots once, both labels in a row


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_padding_is_that_of_the_items_lengths(name, setup):
    """Tokens of the items and sinks are what is not padding, whatever a contestant packs; a pair's prompt counts once
    where it is computed once."""
    part, size = PARTS[name], setup.size
    n = size.steps * (size.examples if name == "sft" else size.pairs)
    items = setup.examples(n) if name == "sft" else setup.pairs(n)
    for key, target in part.contestants.items():
        own = contestant(target, setup).settings
        real = n * own["positions an item"] * (1 - own["padding"])
        times = 1 if key == OURS or name == "sft" else 2
        least = sum(times * len(prompt) + sum(map(len, responses)) for prompt, *responses in items)
        assert least * 0.99 <= real <= (least + 2 * times * n) * 1.01, key  # sinks and EOS beside them
        assert (own["padding"] == 0) == ("padding-free" in key or "packed" in key), key


def test_the_check_of_dpo_is_not_that_of_equal_models(setup):
    (loss,) = contestant(PARTS["dpo"].contestants[OURS], setup).check()["loss"]
    assert abs(loss - np.log(2)) > 1e-3


def test_a_contestant_with_another_weight_is_found_out(setup):
    part = PARTS["pretrain"]
    ours, theirs = (contestant(part.contestants[key], setup) for key in list(part.contestants)[:2])
    with torch.no_grad():
        theirs.model.model.layers[0].self_attn.o_proj.weight[0] += 0.5
    with pytest.raises(SystemExit, match="does not compute what ours does: loss differs"):
        agree({OURS: ours.check(), "theirs": theirs.check()}, part.tolerance)


def test_a_round_counts_what_it_trained_on(setup):
    rows = contestant("training:PlainLoop", setup)
    tokens, seconds = rows.round()["train"]
    size = setup.size
    assert tokens == size.steps * size.rows * (size.model.context - size.model.sinks) and seconds > 0
    trainer = contestant("training:TrlFineTuning", setup)
    for _ in range(2):  # it goes on where it rested
        assert trainer.round()["train"][0] == size.steps * size.examples
    assert trainer.trainer.state.global_step == 2 * size.steps


def test_agreement_wants_the_same_values_as_many_and_near():
    ours = {"loss": [2.0], "logprobs": [-100.0, -1.0]}
    near = {"loss": [2.0], "logprobs": [-100.0, -1.009]}
    assert agree({OURS: ours, "peer": near, "limit": {}}, 1e-4)["differences"]["peer"]["logprobs"] == pytest.approx(
        9e-5
    )
    for values, tolerance in (
        (near, 1e-5),
        ({"loss": [2.0]}, 1.0),
        ({**ours, "logprobs": [-100.0]}, 1.0),
        ({**ours, "loss": [float("nan")]}, 1.0),
    ):
        with pytest.raises(SystemExit):
            agree({OURS: ours, "peer": values}, tolerance)


def test_the_interval_of_a_median_covers_as_it_says():
    for n, places in ((9, (1, 7)), (6, (0, 5)), (17, (4, 12))):  # tables of the sign test's interval
        values = np.arange(n)[::-1]
        median, low, high, coverage = median_interval(values)
        assert (median, low, high) == (np.median(values), *places) and coverage >= 0.95
    assert median_interval([3.0, 1.0, 2.0])[1:] == (1.0, 3.0, 0.75)
    generator = np.random.default_rng(0)
    draws = generator.lognormal(size=(4000, 9))
    inside = [low <= 1 <= high for _, low, high, _ in map(median_interval, draws)]
    assert np.mean(inside) == pytest.approx(median_interval(range(9))[3], abs=0.015)


def test_ratios_are_paired_and_shares_count_the_limit():
    part = Part("x", {OURS: "", "peer": "", "limit": ""}, {"train": "tokens/s", "matmul": "GFLOP/s"}, 3,
                least={("peer", "train"): 2.0}, limits=("limit",))  # fmt: skip
    speeds = [(100, 50, 1.0), (10, 5, 0.1), (40, 10, 0.4)]  # the machine slows both alike in the second round
    rounds = [
        {OURS: {"train": [a, 1.0]}, "peer": {"train": [2 * b, 2.0]}, "limit": {"matmul": [c, 1.0]}}
        for a, b, c in speeds
    ]
    found = summary(part, rounds, {OURS: {"flops_per_token": {"6N": 5e6}}})
    ratio = {"peer": "peer", "measure": "train", "ratio": 2.0, "low": 2.0, "high": 4.0, "coverage": 0.75, "least": 2.0}
    assert found["ratios"] == [ratio]
    packed = {OURS: {"positions an item": 20.0}, "peer": {"positions an item": 50.0}}
    assert summary(part, rounds, packed)["ratios"] == [ratio | {"positions": 2.5, "step": 0.8}]
    assert found["rates"][OURS]["train"]["median"] == 40
    shares = {entry["contestant"]: entry["share"] for entry in found["shares"]}
    assert shares == {OURS: pytest.approx(0.5), "peer": pytest.approx(0.25)}


def test_an_epoch_with_its_reference_pass_takes_both_times():
    part = PARTS["dpo"]
    peer = list(part.contestants)[2]  # computes its reference in each step
    rounds = [{OURS: {"train": [8, 1.0], "reference": [8, 0.25]}, peer: {"train": [8, 4.0]}}]
    rates = summary(part, rounds, {})["rates"]
    assert rates[OURS]["train with reference"]["median"] == pytest.approx(8 / 1.25)
    assert rates[peer]["train with reference"]["median"] == pytest.approx(2)


def test_a_part_is_run_by_turns_and_written(tmp_path):
    said = []
    result = harness.run("generation", Options(size="tiny", data="sample", rounds=2, threads=1), said.append)
    as_json, as_table = harness.write(result, tmp_path)
    kept = json.loads(as_json.read_text())
    assert len(kept["rounds"]) == 2 and kept["threads"] == 1 and kept["hardware"]["cores"] >= 1
    assert {"torch", "transformers"} <= set(kept["versions"]) and kept["git"]["commit"]
    assert all(items == 18 and seconds > 0 for r in kept["rounds"] for m in r.values() for items, seconds in m.values())
    table = as_table.read_text()
    overview = (tmp_path / "README.md").read_text()
    line = (
        "[Batched generation](generation.md) | sample-sentiment, sample-stories | transformers generate | tokens/s, few"
    )
    assert line in overview
    assert (
        kept["data"]["sentences"]["source"] == "sample-sentiment" and "3 starts of stories of `sample-stories`" in table
    )
    assert "nine in ten); a tokenizer of" in table and "`auto`" not in table
    assert table.startswith("## Batched generation") and "| transformers generate | fp32 |" in table
    columns = [line.count("|") for line in table.splitlines()]
    assert all(a == b for a, b in pairwise(columns) if a and b)
    assert str(tmp_path) not in table + as_json.read_text()


def test_the_smoke_run_is_started_by_a_command_that_there_is():
    told = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "Execute the stages of a run" in told.stdout


def test_a_fallen_contestant_ends_the_part_with_its_log(monkeypatch):
    part = PARTS["generation"]
    broken = Part(part.title, {OURS: "evaluation:Nobody"}, part.measures, 1)
    monkeypatch.setitem(harness.PARTS, "generation", broken)
    with pytest.raises(SystemExit, match=r"exit code 1[\s\S]*Nobody"):
        harness.run("generation", Options(size="tiny", data="sample"))
