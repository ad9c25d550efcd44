"""The claims ledger yields every verdict, and none that the records do not carry."""

import pytest
from report_fixtures import SKILL, cell, make_run, notebook, output, sha, stage_values
from threefold.comparison import Comparison, claims
from threefold.comparison.claims import CONTRADICTED, NOT_MEASURED, NOT_RESOLVED, SUPPORTED, Claim, Finding


def verdicts(comparison):
    return {one.claim.key: one for one in claims.judge(comparison)}


def records_of(tmp_path, **records):
    """A comparison that holds just these records."""
    cells = [cell("x", output(name.replace("__", "/"), values, "x")) for name, values in records.items()]
    notebook(tmp_path / "notebook.ipynb", *cells)
    return Comparison.load(tmp_path)


@pytest.mark.parametrize(
    ("finding", "verdict"),
    [
        (Finding("x", 11, 14), SUPPORTED),
        (Finding("x", 1, 4), CONTRADICTED),
        (Finding("x", 21, 40), CONTRADICTED),
        (Finding("x", 5, 15), NOT_RESOLVED),
        (Finding("x", 5, 25), NOT_RESOLVED),
        (Finding("x", None, None), NOT_RESOLVED),
        (Finding("x", 11, 14, unresolved="timed apart"), NOT_RESOLVED),
        (Finding("x", 11, 14, instead="on another set"), NOT_MEASURED),
        (None, NOT_MEASURED),
    ],
)
def test_a_verdict_follows_from_interval_and_band(finding, verdict):
    claim = Claim("key", "claimed", "10 to 20", (10, 20), lambda comparison: finding)
    assert claim.judge(None).verdict == verdict


def test_keys_are_unique_and_every_claim_of_the_design_is_there():
    keys = [claim.key for claim in claims.CLAIMS]
    assert len(set(keys)) == len(keys) == 16


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        ([88.0, 88.1, 87.9], SUPPORTED),  # the base is 14% faster
        ([97.0, 97.1, 96.9], CONTRADICTED),
        ([80.0, 95.0, 99.0], NOT_RESOLVED),
        ([88.0], NOT_RESOLVED),
        (None, NOT_MEASURED),
    ],
)
def test_component_speed(tmp_path, other, verdict):
    base = {"variant": "base", "tokens_per_second": [100.0, 100.1, 99.9], "heldout_loss": [2.0, 2.1, 2.05]}
    variant = {"variant": "norm=layer", "tokens_per_second": other, "heldout_loss": [2.0, 2.1, 2.05]}
    both = {"ablation__base": base, "ablation__norm-layer": variant}
    assert verdicts(records_of(tmp_path, **both))["rmsnorm-speed"].verdict == verdict


@pytest.mark.parametrize(
    ("change", "verdict"), [((-9, -5), SUPPORTED), ((1, 3), CONTRADICTED), ((-2, 3), NOT_RESOLVED)]
)
def test_length_claims_read_published_effects(tmp_path, change, verdict):
    low, high = change
    found = records_of(tmp_path, length__rope={"low": low, "high": high, "text": "loss at 16x"})
    assert verdicts(found)["rope-length"].verdict == verdict
    assert verdicts(found)["sinks-length"].verdict == NOT_MEASURED


def test_claims_on_public_sets_count_on_those_sets_only(tmp_path):
    skills = {"pretrain": (2.0, 0.8, 0.0, 0.0, 0.5), "sft": (2.0 + 0.2311, 0.84, 0.0, 0.5, 0.5)}  # +26%
    on_sample = verdicts(Comparison.load(make_run(tmp_path / "sample", skills=skills, ablations=False)))
    assert on_sample["sft-perplexity"].verdict == NOT_MEASURED
    assert "not wikitext2" in on_sample["sft-perplexity"].measured and "+2" in on_sample["sft-perplexity"].measured
    run = make_run(tmp_path / "real", skills=skills, source="wikitext2", ablations=False)
    found = verdicts(Comparison.load(run))
    assert found["sft-perplexity"].verdict == SUPPORTED
    assert found["gpt2-perplexity"].verdict == NOT_MEASURED and "trained here" in found["gpt2-perplexity"].measured
    flat = {"sft": skills["pretrain"]}
    run = make_run(tmp_path / "flat", skills=skills | flat, source="wikitext2", ablations=False)
    assert verdicts(Comparison.load(run))["sft-perplexity"].verdict == CONTRADICTED


@pytest.mark.parametrize(("nats", "verdict"), [(1.70, SUPPORTED), (2.25, CONTRADICTED)])
def test_published_gpt2_is_the_only_yardstick_for_its_claim(tmp_path, nats, verdict):
    skills = {"pretrain": (nats, 0.8, 0.0, 0.0, 0.5)}
    run = make_run(tmp_path / "fake", skills=skills, source="wikitext2", hub=("gpt2",), ablations=False)
    assert verdicts(Comparison.load(run))["gpt2-perplexity"].verdict == verdict


def test_speed_needs_timings_by_turns(tmp_path):
    run = make_run(tmp_path / "fake", ablations=False)
    found = verdicts(Comparison.load(run))
    assert found["speed-gpt2"].verdict == SUPPORTED and found["speed-distilgpt2"].verdict == SUPPORTED
    loaded = Comparison.load(run)
    for model in loaded.models:
        loaded.evaluations(model)["speed"]["settings"]["measured_by_turns_with"] = []
    apart = verdicts(loaded)
    assert apart["speed-gpt2"].verdict == NOT_RESOLVED and "separate processes" in apart["speed-gpt2"].measured


@pytest.mark.parametrize(
    ("gpu", "seconds", "verdict"),
    [
        ("NVIDIA H100 80GB HBM3", 72_000, SUPPORTED),
        ("NVIDIA H100 80GB HBM3", 2_400, CONTRADICTED),
        (None, 9, NOT_MEASURED),
    ],
)
def test_training_speed_is_claimed_for_one_device(tmp_path, gpu, seconds, verdict):
    facts = stage_values("pretrain", sha("x"), 600_000_000) | {"device_seconds": seconds}
    facts["hardware"] = {"gpu": [gpu] if gpu else [], "cores": 2}
    assert verdicts(records_of(tmp_path, stage__pretrain=facts))["tokens-per-hour"].verdict == verdict


def test_method_against_model(tmp_path):
    level = {model: (2.1, 0.9, 0.0, 0.0, 0.5) for model in SKILL}  # templates differ, models do not
    run = make_run(tmp_path / "same", skills=level, ablations=False)
    assert verdicts(Comparison.load(run))["method-outweighs-model"].verdict == SUPPORTED
    apart = {model: (2.1, 0.6 + 0.09 * index, 0.0, 0.0, 0.5) for index, model in enumerate(SKILL)}
    run = make_run(tmp_path / "apart", skills=apart, ablations=False)
    assert verdicts(Comparison.load(run))["method-outweighs-model"].verdict == CONTRADICTED


def test_the_ledger_lists_every_claim_once(tmp_path):
    loaded = Comparison.load(make_run(tmp_path / "fake"))
    result = claims.ledger(loaded)
    assert len(result.values["claims"]) == len(claims.CLAIMS)
    assert sum(claims.counts(claims.judge(loaded)).values()) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert claim.claimed[:20] in result.markdown
