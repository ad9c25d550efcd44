"""The claims ledger yields every verdict, and none that the records do not carry."""

import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from report_fixtures import SKILL, cell, length_curves, make_run, notebook, output, stage_values

from papertrail.records import Record, escape
from study.comparison import Comparison, attribution, claims, variance
from study.comparison.claims import (
    CONTRADICTED,
    NOT_HERE,
    NOT_MEASURED,
    NOT_RESOLVED,
    SUPPORTED,
    SUPPORTED_HERE,
    Claim,
    Finding,
    Scope,
)
from threefold.evaluation.statistics import wilson

verdicts = claims.judge
EVERY = {SUPPORTED, CONTRADICTED, NOT_RESOLVED, NOT_MEASURED}
HERE = {SUPPORTED: SUPPORTED_HERE, CONTRADICTED: NOT_HERE}  # the same, where the claim's conditions are not met
ITS_OWN = Scope(253_000_000, 600e6, "NVIDIA H100")  # the claim's conditions
SMALL = Scope(1_380_000, 366e3, "CPU, 2 cores")


def records_of(tmp_path, **records):
    """A comparison that holds just these records."""
    cells = [cell("x", output(name.replace("__", "/"), values, "x")) for name, values in records.items()]
    notebook(tmp_path / "notebook.ipynb", *cells)
    return Comparison.load(tmp_path)


@pytest.mark.parametrize(
    ("finding", "verdict"),
    [
        (Finding("x", 11, 14, scope=ITS_OWN), SUPPORTED),
        (Finding("x", 1, 4, scope=ITS_OWN), CONTRADICTED),
        (Finding("x", 21, 40, scope=ITS_OWN), CONTRADICTED),
        (Finding("x", 5, 15), NOT_RESOLVED),
        (Finding("x", 5, 25), NOT_RESOLVED),
        (Finding("x", None, None), NOT_RESOLVED),
        (Finding("x", 11, 14, unresolved="timed apart"), NOT_RESOLVED),
        (Finding("x", 11, 14, instead="on another set"), NOT_MEASURED),
        (Finding("x", 10, 14), NOT_RESOLVED),  # the edges are outside the band
        (Finding("x", 20, 24, scope=ITS_OWN), CONTRADICTED),
        (Finding("x", 11, 14, scope=SMALL), SUPPORTED_HERE),
        (Finding("x", 1, 4, scope=SMALL), NOT_HERE),
        (Finding("x", 1, 4), NOT_HERE),  # of a model whose size is not recorded
        (Finding("x", 1, 4, scope=SMALL, met=True), CONTRADICTED),
        (Finding("x", 1, 4, scope=ITS_OWN._replace(device="CPU")), CONTRADICTED),
        (Finding("x", 1, 4, scope=ITS_OWN._replace(device="CPU"), timed=True), NOT_HERE),  # a kernel of another device
        (None, NOT_MEASURED),
    ],
)
def test_a_verdict_follows_from_interval_and_band(finding, verdict):
    claim = Claim("key", "source", "claimed", "10 to 20", (10, 20), lambda comparison: finding)
    assert claim.judge(None).verdict == verdict


def test_keys_are_unique_and_every_claim_of_the_design_is_there():
    keys = [claim.key for claim in claims.CLAIMS]
    assert len(set(keys)) == len(keys) == 19
    assert all(claim.source and claim.claimed and claim.reading for claim in claims.CLAIMS)


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        ([88.0, 88.1, 87.9] * 3, SUPPORTED_HERE),  # the base is 14% faster
        ([97.0, 97.1, 96.9] * 3, NOT_HERE),
        ([80.0, 95.0, 99.0] * 3, NOT_RESOLVED),
        ([88.0, 88.1, 87.9], NOT_RESOLVED),  # three rounds have no interval
        ([88.0], NOT_RESOLVED),
        (None, NOT_MEASURED),
    ],
)
def test_component_speed(tmp_path, other, verdict):
    base = {"variant": "base", "tokens_per_second": [100.0, 100.1, 99.9] * 3, "heldout_loss": [2.0, 2.1, 2.05]}
    variant = {"variant": "norm=layer", "tokens_per_second": other, "heldout_loss": [2.0, 2.1, 2.05]}
    both = {"ablation__base": base, "ablation__norm-layer": variant}
    assert verdicts(records_of(tmp_path, **both))["rmsnorm-speed"].verdict == verdict


def test_length_claims_say_what_was_compared_and_stay_open_without_an_interval(tmp_path):
    judged = verdicts(lengths({}))
    assert judged["rope-length"].measured.endswith(
        "(past their table they predict nothing) (a model whose size is not recorded)"
    )
    assert judged["rope-length"].finding.scope.basis == "3 seeds × 4 streams"
    assert judged["sinks-length"].measured.startswith("−0.3")
    curves = length_curves(seeds=1, streams=1)
    found = records_of(tmp_path, **{"length__base": curves["base"], "length__l": curves["position=learned"]})
    judged = verdicts(found)
    assert judged["rope-length"].verdict == judged["sinks-length"].verdict == NOT_RESOLVED


def test_claims_on_public_sets_count_on_those_sets_only(tmp_path):
    skills = {"pretrain": (2.0, 0.6, 0.8, 0.0, 0.0, 0.5), "sft": (2.0 + 0.2311, 0.6, 0.84, 0.0, 0.5, 0.5)}  # +26%
    on_sample = verdicts(Comparison.load(make_run(tmp_path / "sample", skills=skills, ablations=False)))
    assert on_sample["sft-perplexity"].verdict == NOT_MEASURED
    assert "not wikitext2" in on_sample["sft-perplexity"].measured and "+2" in on_sample["sft-perplexity"].measured
    run = make_run(tmp_path / "real", skills=skills, source="wikitext2", ablations=False)
    found = verdicts(Comparison.load(run))
    assert found["sft-perplexity"].verdict == SUPPORTED_HERE and "1.05M parameters" in found["sft-perplexity"].measured
    assert found["gpt2-perplexity"].verdict == NOT_MEASURED and "trained here" in found["gpt2-perplexity"].measured
    flat = {"sft": skills["pretrain"]}
    run = make_run(tmp_path / "flat", skills=skills | flat, source="wikitext2", ablations=False)
    assert verdicts(Comparison.load(run))["sft-perplexity"].verdict == NOT_HERE


@pytest.mark.parametrize(("nats", "verdict"), [(1.70, SUPPORTED_HERE), (2.25, NOT_HERE)])
def test_published_gpt2_is_the_only_yardstick_for_its_claim(tmp_path, nats, verdict):
    skills = {"pretrain": (nats, 0.6, 0.8, 0.0, 0.0, 0.5)}
    run = make_run(tmp_path / "fake", skills=skills, source="wikitext2", hub=("gpt2",), ablations=False)
    assert verdicts(Comparison.load(run))["gpt2-perplexity"].verdict == verdict


def test_speed_needs_interleaved_timings(tmp_path):
    found = verdicts(Comparison.load(make_run(tmp_path / "here", ablations=False)))
    assert found["speed-gpt2"].verdict == SUPPORTED_HERE and "1.05M parameters" in found["speed-gpt2"].measured
    run = make_run(tmp_path / "fake", ablations=False, hub=("gpt2", "distilgpt2"))
    found = verdicts(Comparison.load(run))
    assert found["speed-gpt2"].verdict == SUPPORTED_HERE and found["speed-distilgpt2"].verdict == SUPPORTED
    loaded = Comparison.load(run)
    for model in loaded.models:
        loaded.evaluations(model)["speed"]["settings"]["measured_by_turns_with"] = []
    apart = verdicts(loaded)
    assert apart["speed-gpt2"].verdict == NOT_RESOLVED and "separate processes" in apart["speed-gpt2"].measured


def test_a_model_from_elsewhere_has_no_say_in_how_far_models_differ(tmp_path):
    level = {model: (2.1, 0.6, 0.9, 0.0, 0.0, 0.5) for model in SKILL}
    run = make_run(
        tmp_path / "fake", skills=level | {"other": (2.1, 0.6, 0.5, 0, 0, 0.5)}, extra=("other",), ablations=False
    )
    (run / "notebooks" / "01_pretrain-other.ipynb").unlink()  # it was not trained here
    loaded = Comparison.load(run)
    assert "other" in loaded.models and "other" not in loaded.baselines
    assert "other" not in variance.scores(loaded, "sample-sentiment/3-shot")[1]["model"]
    verdict = verdicts(loaded)["method-outweighs-model"]
    assert verdict.verdict == SUPPORTED_HERE and verdict.finding.scope.basis == "5 models × 3 templates"


def test_every_verdict_names_its_scope(tmp_path):
    loaded = Comparison.load(make_run(tmp_path / "fake", source="wikitext2"))
    for key, one in verdicts(loaded).items():
        settled = one.verdict in (SUPPORTED, CONTRADICTED, SUPPORTED_HERE, NOT_HERE)
        assert not settled or one.finding.scope.text, key
    scope = verdicts(loaded)["swiglu-perplexity"].finding.scope
    assert scope == (1_400_000, 4e5, "CPU", "held-out text", "3 seeds")
    text = "1.05M parameters, 2.9M tokens, CPU, 2 cores, wikitext2-text/disjoint-256, n = 40, one training seed"
    assert verdicts(loaded)["sft-perplexity"].finding.scope.text.replace("\u00a0", " ") == text


def test_the_ledger_lists_every_claim_once(tmp_path):
    loaded = Comparison.load(make_run(tmp_path / "fake"))
    result = claims.ledger(loaded)
    assert len(result.values["claims"]) == len(claims.CLAIMS)
    assert sum(claims.counts(claims.judge(loaded).values()).values()) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert escape(f"“{claim.source}”") in result.markdown and claim.where
        assert result.values["claims"][claim.key]["source"] == claim.source


def test_claims_are_judged_by_key():
    assert list(claims.judge(in_memory({}), "hours", "stability")) == ["hours", "stability"]
    with pytest.raises(KeyError, match="no-such-claim"):
        claims.judge(in_memory({}), "no-such-claim")


# Every claim, every verdict ------------------------------------------------------------------------------------------


def lengths(rises, noise=0.01, without=""):
    curves = length_curves(rises, noise=noise)
    return in_memory({f"length/{name.replace('=', '-')}": one for name, one in curves.items() if name != without})


def in_memory(records, items=None):
    """A comparison of records and per-item results that were never written."""
    made = {name: Record(name, values, None, "made.ipynb", 0) for name, values in records.items()}
    return Comparison(made, resamples=200, _items=dict(items or {}))


def evaluated(scores, protocol, metric, *, stages=(), tokenizers=None, value=None):
    """model -> per-item frame, as records and items of one protocol; `stages` were trained here."""
    records, items = {}, {}
    for model, frame in scores.items():
        settings = {"tokenizer_sha256": (tokenizers or {}).get(model, "bpe")}
        metrics = {metric: value or {"value": 0.5, "low": 0.4, "high": 0.6, "n": len(frame)}}
        records[f"evaluation/{model}/{protocol}"] = {"metrics": metrics, "settings": settings, "weights_sha256": model}
        items[model, protocol] = frame.assign(correct_calibrated=frame["correct"]) if "correct" in frame else frame
    return in_memory(records | {f"stage/{stage}": {} for stage in stages}, items)


def ablation(variant, quantity, base, other):
    def make(seeds):
        records = {"ablation/a": {"variant": "base", quantity: base}, "ablation/b": {"variant": variant}}
        records["ablation/b"][quantity] = other[:seeds]
        return in_memory(records)

    return make


def seeds(*logs):
    return [100 * math.exp(x) for x in logs]


def perplexities(a, b, ratio, spread=0.001, protocol="wikitext2/disjoint-1024", **options):
    noise = np.random.default_rng(1).normal(0, spread, 40)
    frames = {}
    for model, nats in ((a, np.full(40, 3.0)), (b, 3.0 + math.log(ratio) + noise)):
        frames[model] = pd.DataFrame({"document": range(40), "nats": 100 * nats, "tokens": 100, "bytes": 400})
    return evaluated(frames, protocol, "perplexity", **options)


def accuracies(a, b, points, n=20_000, source="sst2"):
    right = np.arange(n) % 2 == 0
    flipped = right.copy()
    wrong = np.flatnonzero(right != (points > 0))[: abs(round(n * points / 100))]
    flipped[wrong] = points > 0
    frames = {m: pd.DataFrame({"item": range(n), "correct": c}) for m, c in ((a, right), (b, flipped))}
    return evaluated(frames, f"{source}/3-shot", "accuracy_calibrated")


def problems(right, n, source="gsm8k"):
    frame = pd.DataFrame({"item": range(n), "correct": np.arange(n) < right})
    value = wilson(right, n)._asdict()
    return evaluated({"dpo": frame}, f"{source}/5-shot", "exact_match", value=value)


def timed(a, b, ratio, spread=0.001, repeats=5, stages=()):
    records, items = {}, {}
    noise = np.exp(np.random.default_rng(2).normal(0, spread, repeats))
    for model, rate in ((a, np.full(repeats, 100.0)), (b, 100 * ratio * noise)):
        rows = {"repeat": range(repeats), "batch": 1, "phase": "decode", "tokens_per_second": rate}
        items[model, "speed"] = pd.DataFrame(rows)
        metrics = {"decode_b1": {"value": float(np.median(rate))}}
        records[f"evaluation/{model}/speed"] = {"metrics": metrics, "settings": {"measured_by_turns_with": [a]}}
    return in_memory(records | {f"stage/{stage}": {} for stage in stages}, items)


def trained(hours, gpu="NVIDIA H100 80GB HBM3", parameters=253_000_000, tokens=600_000_000):
    records = {"model/pretrain": {"parameters": {"total": parameters}, "config": {}}}
    for stage in ("pretrain", "sft", "dpo"):
        facts = stage_values(stage, None, tokens) | {"device_seconds": 1200 * hours}
        records[f"stage/{stage}"] = facts | {"hardware": {"gpu": [gpu] if gpu else [], "cores": 2}}
    return in_memory(records)


def curves(*losses):
    return in_memory({f"curve/{s}": {"loss": list(x)} for s, x in zip(("gpt2", "pretrain"), losses, strict=False)})


def worded(template_sd, model_sd, n=2000, templates=5):
    """Accuracies of three models under templates whose true means have these deviations."""
    generator = np.random.default_rng(3)
    frames = {}
    steps = np.linspace(-1, 1, templates) * template_sd
    for place, model in enumerate(("pretrain", "sft", "dpo")):
        rows = [
            pd.DataFrame({"item": range(n), "template": f"t{t}", "draw": 0, "correct": generator.random(n) < level})
            for t, level in enumerate(0.5 + (place - 1) * model_sd + steps)
        ]
        frames[model] = pd.concat(rows, ignore_index=True)
    return evaluated(frames, "sst2/3-shot", "accuracy_calibrated")


FALLING = np.linspace(3, 1, 100)
JUMPING = np.concatenate([FALLING[:50], np.full(50, 2.9)])
NINE = seeds(*[0] * 9)  # rounds


def chained(group: str, effect: float, noise: float = 0.01):
    """A chain of three links, one a group, over three seeds; the links of the other groups lower the loss by 0.3."""
    chain = {"recipe": "a", "optimizer": "b", "norm": "base", "scale": "c"}
    losses, loss = [[5.0, 5.1, 5.2]], np.array([5.0, 5.1, 5.2])
    for name in ("pipeline", "architecture", "scale"):
        loss = loss + (effect + noise * np.array([-1, 0, 1]) if name == group else -0.3 + 0.001 * np.array([1, 0, -1]))
        losses.append(loss.tolist())
    known = {"seeds": [1, 2, 3], "parameters": 1_400_000, "tokens": 300_000}
    variants = {variant: {"heldout_loss": one, **known} for variant, one in zip(chain.values(), losses, strict=True)}
    return in_memory({attribution.record_name(one): one for one in attribution.links(variants, chain)})


REASONS = {
    f"attribution-{group}": {
        SUPPORTED: partial(chained, group, -0.2),
        CONTRADICTED: partial(chained, group, 0.2),
        NOT_RESOLVED: partial(chained, group, -0.01, 0.1),
    }
    for group in attribution.GROUPS
}
RMS = ablation("norm=layer", "tokens_per_second", NINE, seeds(*[-0.13, -0.131, -0.129] * 3))
SWIGLU = ablation("ffn=gelu", "heldout_loss", [2.0, 2.0, 2.0], [2.03, 2.031, 2.029])
FORCED = {
    "rmsnorm-speed": {
        SUPPORTED: lambda: RMS(9),
        CONTRADICTED: lambda: ablation("norm=layer", "tokens_per_second", NINE, seeds(*[0.01, 0, 0.02] * 3))(9),
        NOT_RESOLVED: lambda: RMS(1),
    },
    "swiglu-perplexity": {
        SUPPORTED: lambda: SWIGLU(3),
        CONTRADICTED: lambda: ablation("ffn=gelu", "heldout_loss", [2.0] * 3, [1.99, 2.0, 2.001])(3),
        NOT_RESOLVED: lambda: ablation("ffn=gelu", "heldout_loss", [2.0] * 3, [1.9, 2.2, 2.05])(3),
    },
    "rope-length": {
        SUPPORTED: lambda: lengths({"full": 0.0, "recomputed": 0.2}),
        CONTRADICTED: lambda: lengths({"full": 1.5, "recomputed": 0.0}),
        NOT_RESOLVED: lambda: lengths({"full": 0.1, "recomputed": 0.1}, noise=0.3),
        NOT_MEASURED: lambda: lengths({}, without="position=learned"),
    },
    "sinks-length": {
        SUPPORTED: lambda: lengths({"window": 0.4, "sinks": 0.0}),
        CONTRADICTED: lambda: lengths({"window": 0.0, "sinks": 0.4}),
        NOT_RESOLVED: lambda: lengths({"window": 0.1, "sinks": 0.1}, noise=0.3),
        NOT_MEASURED: lambda: lengths({}, without="base"),
    },
    "gpt2-perplexity": {
        SUPPORTED: lambda: perplexities("gpt2", "pretrain", 0.6),
        CONTRADICTED: lambda: perplexities("gpt2", "pretrain", 0.8),
        NOT_RESOLVED: lambda: perplexities("gpt2", "pretrain", 0.67, spread=0.3),
        NOT_MEASURED: lambda: perplexities("gpt2", "pretrain", 0.6, stages=("gpt2",)),
    },
    "sft-perplexity": {
        SUPPORTED: lambda: perplexities("pretrain", "sft", 1.26),
        CONTRADICTED: lambda: perplexities("pretrain", "sft", 1.02),
        NOT_RESOLVED: lambda: perplexities("pretrain", "sft", 1.13, spread=0.3),
        NOT_MEASURED: lambda: perplexities("pretrain", "sft", 1.26, protocol="sample-text/disjoint-256"),
    },
    "dpo-perplexity": {
        SUPPORTED: lambda: perplexities("sft", "dpo", 1.005),
        CONTRADICTED: lambda: perplexities("sft", "dpo", 1.05),
        NOT_RESOLVED: lambda: perplexities("sft", "dpo", 1.005, spread=0.05),
        NOT_MEASURED: lambda: perplexities("sft", "dpo", 1.005, tokenizers={"dpo": "another"}),
    },
    "sft-sentiment": {
        SUPPORTED: lambda: accuracies("pretrain", "sft", 4),
        CONTRADICTED: lambda: accuracies("pretrain", "sft", -4),
        NOT_RESOLVED: lambda: accuracies("pretrain", "sft", 4, n=200),
        NOT_MEASURED: lambda: accuracies("pretrain", "sft", 4, source="sample-sentiment"),
    },
    "dpo-sentiment": {
        SUPPORTED: lambda: accuracies("sft", "dpo", -4),
        CONTRADICTED: lambda: accuracies("sft", "dpo", 4),
        NOT_RESOLVED: lambda: accuracies("sft", "dpo", -4, n=200),
    },
    "gsm8k-zero": {
        SUPPORTED: lambda: problems(0, 1319),
        CONTRADICTED: lambda: problems(130, 1319),
        NOT_RESOLVED: lambda: problems(0, 50),
        NOT_MEASURED: lambda: problems(0, 1319, source="sample-problems"),
    },
    "speed-gpt2": {
        SUPPORTED: lambda: timed("gpt2", "pretrain", 1.0, stages=("pretrain",)),
        CONTRADICTED: lambda: timed("gpt2", "pretrain", 0.5, stages=("pretrain",)),
        NOT_RESOLVED: lambda: timed("gpt2", "pretrain", 1.0, spread=0.5, stages=("pretrain",)),
    },
    "speed-distilgpt2": {
        SUPPORTED: lambda: timed("gpt2", "distilgpt2", 2.0),
        CONTRADICTED: lambda: timed("gpt2", "distilgpt2", 1.1),
        NOT_RESOLVED: lambda: timed("gpt2", "distilgpt2", 2.0, repeats=2),
    },
    "tokens-per-hour": {
        SUPPORTED: lambda: trained(60),
        CONTRADICTED: lambda: trained(1),
        NOT_MEASURED: lambda: trained(60, gpu="NVIDIA A100"),
    },
    "hours": {
        SUPPORTED: lambda: trained(27),
        CONTRADICTED: lambda: trained(2),
        NOT_MEASURED: lambda: trained(27, parameters=4_000_000),
    },
    "stability": {
        SUPPORTED: lambda: curves(FALLING, FALLING),
        CONTRADICTED: lambda: curves(FALLING, JUMPING),
        NOT_MEASURED: lambda: curves(FALLING),
    },
    "method-outweighs-model": {
        SUPPORTED: lambda: worded(0.2, 0.01),
        CONTRADICTED: lambda: worded(0.01, 0.2),
        NOT_RESOLVED: lambda: worded(0.1, 0.084),
    },
    **REASONS,
}
COUNTS = {"tokens-per-hour", "hours", "stability"}  # counts of what one run did: measured or not, never unresolved


def test_every_claim_has_records_for_every_verdict_that_it_can_have():
    assert set(FORCED) == {claim.key for claim in claims.CLAIMS}
    for key, forced in FORCED.items():
        assert set(forced) | {NOT_MEASURED} == EVERY - ({NOT_RESOLVED} if key in COUNTS else set()), key


@pytest.mark.parametrize(("key", "verdict"), [(key, verdict) for key, forced in FORCED.items() for verdict in forced])
def test_records_force_each_verdict(key, verdict):
    found = claims.judge(FORCED[key][verdict](), key)[key]
    under_its_conditions = key in ("speed-distilgpt2", "tokens-per-hour", "hours")
    assert found.verdict == (verdict if under_its_conditions else HERE.get(verdict, verdict)), found.measured
    if verdict in (SUPPORTED, CONTRADICTED):
        assert found.finding.low <= found.finding.high


@pytest.mark.parametrize("key", list(FORCED))
def test_without_records_nothing_is_measured(key):
    assert claims.judge(in_memory({}), key)[key].verdict == NOT_MEASURED


def test_a_speed_against_a_gpt2_trained_here_is_about_its_own_size():
    assert (
        claims.judge(timed("gpt2", "pretrain", 1.0, stages=("gpt2",)), "speed-gpt2")["speed-gpt2"].verdict
        == SUPPORTED_HERE
    )


def test_times_of_another_size_budget_or_device_are_not_the_claims():
    for one in (trained(27, parameters=4_000_000), trained(27, tokens=1_000_000)):
        assert claims.judge(one, "hours")["hours"].verdict == NOT_MEASURED
    assert claims.judge(trained(60, gpu=""), "tokens-per-hour")["tokens-per-hour"].verdict == NOT_MEASURED  # a CPU
    assert "4M parameters, not 253M" in claims.judge(trained(27, parameters=4_000_000), "hours")["hours"].measured


def test_the_same_answers_under_every_template_settle_nothing():
    cells = [pd.DataFrame({"item": range(50), "template": f"t{t}", "draw": 0, "correct": 1}) for t in range(5)]
    same = evaluated(
        dict.fromkeys(("pretrain", "sft", "dpo"), pd.concat(cells, ignore_index=True)),
        "sst2/3-shot",
        "accuracy_calibrated",
    )
    verdict = claims.judge(same, "method-outweighs-model")["method-outweighs-model"]
    assert verdict.verdict == NOT_RESOLVED and "the same answers" in verdict.measured


def test_variances_are_unbiased_and_their_interval_covers():
    """Against the definition (all pairs of distinct items), and on noise, where observed means vary by chance alone."""
    small = np.random.default_rng(0).random((6, 3, 4))
    by_pairs = [[], []]
    for i, j in itertools.permutations(range(6), 2):
        by_pairs[0].append(np.mean([np.cov(small[i, m], small[j, m])[0, 1] for m in range(3)]))
        by_pairs[1].append(np.cov(small[i].mean(axis=1), small[j].mean(axis=1))[0, 1])
    assert variance.method_against_model(small)[:2] == pytest.approx([np.mean(by_pairs[0]), np.mean(by_pairs[1])])
    found = []
    for seed in range(200):
        noise = 100.0 * (np.random.default_rng(seed).random((60, 4, 3)) < 0.6)
        found.append(variance.method_against_model(noise))
    method, model, low, high = np.array(found).T
    assert abs((method - model).mean()) < 2 * (method - model).std() / math.sqrt(200)
    assert ((low > 0) | (high < 0)).mean() <= 0.05
