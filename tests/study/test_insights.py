"""Sentences from records: they claim what a test holds, and nothing else."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from report_fixtures import SKILL, make_run
from scipy.stats import binomtest

from basics import paths
from papertrail.report import sources
from study.comparison import Comparison, insights, limits, precedent, tables
from study.comparison.differences import compared
from study.comparison.results import compact, duration, listed, percent, plain, probability, signed


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.load(make_run(tmp_path_factory.mktemp("runs") / "fake"))


def all_insights(comparison):
    return [
        *insights.key_insights(comparison),
        *insights.stage_evolution(comparison),
        *insights.stability(comparison),
        *insights.standing(comparison, "gpt2"),
        *insights.standing(comparison, "distilgpt2"),
        *limits.limitations(comparison),
    ]


def test_real_differences_are_said_with_values_interval_p_and_n(comparison):
    found = {one.key: one for one in insights.stage_changes(comparison)}
    sentence = found["sft-better"].sentence.replace("\u00a0", " ")
    assert "Threefold SFT improves on Threefold pretrain" in sentence and "word problems" in sentence
    assert re.search(
        r"91\.\d% against \d\.\d%; \+\d\d\.\d pp \[\+\d\d\.\d, \+\d\d\.\d\], p < 0\.001, n = 300", sentence
    )
    assert found["sft-better"].differs and "perplexity" in found["sft-worse"].sentence
    assert "no detectable difference" in found["sft-no-detectable-difference"].sentence
    assert not found["sft-no-detectable-difference"].differs


def test_every_insight_names_records_that_exist(comparison):
    for one in all_insights(comparison):
        assert all(name in comparison.records for name in one.evidence), one
        assert "executed/" not in one.sentence  # links are added where the list is published
        assert one.evidence or one.key in ("ledger", "seeds", "speed"), one


def test_runs_whose_differences_are_noise_claim_none(tmp_path):
    level = dict.fromkeys(SKILL, (2.1, 0.8, 0.5, 0.5, 0.5))
    for trial in range(3):
        seeds = {model: 100 * trial + index for index, model in enumerate(SKILL)}
        loaded = Comparison.load(make_run(tmp_path / str(trial), skills=level, seeds=seeds, ablations=False))
        claimed = [one.sentence for one in all_insights(loaded) if one.differs]
        assert claimed == []
        for result in (tables.stage_evolution(loaded), tables.standing(loaded), tables.standing(loaded, "distilgpt2")):
            assert {one["verdict"] for one in result.values["differences"]} <= {
                "equivalent",
                "no detectable difference",
            }


def test_identical_models_are_never_said_to_differ(tmp_path):
    level = dict.fromkeys(SKILL, (2.1, 0.8, 0.5, 0.5, 0.5))
    loaded = Comparison.load(make_run(tmp_path / "fake", skills=level, seeds=dict.fromkeys(SKILL, 5)))
    found = [*insights.stage_changes(loaded), *insights.standing(loaded), *insights.standing(loaded, "distilgpt2")]
    assert found and not any(one.differs for one in found)
    for result in (tables.stage_evolution(loaded), tables.standing(loaded), tables.standing(loaded, "distilgpt2")):
        assert result.values["differences"]
        for one in result.values["differences"]:
            assert one["change"] == 0 and one["p"] == 1 and one["identical"]
            assert one["verdict"] == "no detectable difference"
    for one in found:
        assert "no detectable difference" in one.sentence and "the same result on all" in one.sentence


def shuffled(comparison, seed):
    """Every item's results dealt out anew among the trained models: whatever differs now is chance."""
    generator = np.random.default_rng(seed)
    models = [model for model in comparison.models if model != "random"]
    items = {}
    for protocol in comparison.protocols:
        frames = [comparison.items(model, protocol) for model in models]
        unit = next((key for key in ("document", "item") if key in frames[0].columns), None)
        if unit is None:
            continue
        keys = [key for key in ("template", "draw") if key in frames[0].columns]
        frames = [frame.sort_values([unit, *keys]).reset_index(drop=True) for frame in frames]
        units, place = np.unique(frames[0][unit], return_inverse=True)
        order_UM = np.array([generator.permutation(len(models)) for _ in units])
        for rank, model in enumerate(models):
            holder = order_UM[place, rank]
            rows = pd.concat([frame[holder == index] for index, frame in enumerate(frames)])
            items[model, protocol] = rows.sort_index()
    return Comparison(comparison.records, resamples=300, _items=items)


def thinned(comparison, documents, count):
    """The same run over fewer documents and items, so that a hundred of them can be compared in a test."""
    items = {}
    for model in comparison.models:
        for protocol in comparison.evaluations(model):
            frame = comparison.items(model, protocol)
            unit = next((key for key in ("document", "item") if key in frame.columns), None)
            if unit:
                frame = frame[frame[unit] < (documents if unit == "document" else count)]
            items[model, protocol] = frame
    return Comparison(comparison.records, resamples=300, _items=items)


RUNS = 60


@pytest.mark.parametrize("documents", [6, 40])
def test_shuffled_results_yield_false_sentences_in_at_most_a_twentieth_of_reports(comparison, documents):
    """The family-wise error over *all* sentences and tables of a report, by simulation; and that the tests are not
    simply blind: the same results unshuffled are told apart, and unadjusted ones would claim much."""
    small = thinned(comparison, documents, 60)
    false, unadjusted = 0, 0
    for seed in range(RUNS):
        world = shuffled(small, seed)
        every = compared(world)
        claimed = [one for one in every if one.detected]
        said = [one for one in insights.key_insights(world) if one.differs] if claimed else []
        assert bool(said) <= bool(claimed)
        false += bool(claimed)
        unadjusted += any(replace(one, adjusted=None).detected for one in every)
    assert len(every) > 40
    assert binomtest(false, RUNS, 0.05, alternative="greater").pvalue > 0.05, f"{false} of {RUNS} reports"
    assert unadjusted > 5 * max(false, 1)
    assert any(one.detected for one in compared(small))


def test_shuffled_reports_hold_no_sentence_that_claims(comparison):
    for seed in (0, 1, 2):
        world = shuffled(comparison, seed)
        for one in [*all_insights(world), *precedent.sentences(world)]:
            assert not one.differs
            for words in ("exceeds", "lags", "improves", "loses against", "has improved", "has lost", "better in"):
                assert words not in one.sentence, one.sentence


def test_equivalence_is_claimed_falsely_at_most_in_a_fortieth(comparison):
    """A true difference of exactly the margin (2 points of 4,000 items, half of them discordant by chance): the 95%
    interval lies within the margin in at most 2.5% of samples; with no true difference it mostly does."""
    from study.comparison.differences import Difference
    from study.comparison.measures import MEASURES
    from threefold.evaluation.statistics import paired_proportions

    def equivalent(gain, trials=400, n=4000):
        generator, count = np.random.default_rng(1), 0
        for _ in range(trials):
            kind = generator.choice(3, n, p=[0.05 + gain, 0.05, 0.90 - gain])  # only b, only a, both
            one = paired_proportions(kind != 0, kind != 1)
            found = Difference(MEASURES["sentiment"], "a", "b", one.difference, one.low, one.high, one.p, n, "x")
            count += found.verdict == "equivalent"
        return count / trials

    assert equivalent(MEASURES["sentiment"].margin) <= 0.04
    assert equivalent(0.0) > 0.95


def test_evidence_holds_the_numbers_and_links_to_the_notebooks(comparison):
    result = insights.bullets("x", insights.standing(comparison, "gpt2"), "None.", comparison)
    for one in result.values["insights"]:
        assert one["notebooks"] == ["04_evaluate-gpt2.ipynb", "04_evaluate-dpo.ipynb"]
        for value in one["values"]:
            assert {"change", "low", "high", "p", "p_adjusted", "n", "margin", "smallest_detectable"} <= set(value)
            assert value["n"] > 0 and value["smallest_detectable"] > 0
    assert "[04\\_evaluate-dpo](executed/04_evaluate-dpo.ipynb)" in result.markdown
    assert "From [" not in insights.bullets("x", insights.standing(comparison, "gpt2"), "None.").markdown


def test_confounds_are_attached_to_the_sentences_they_touch(tmp_path):
    def keys(found):
        return {key for one in found for key in one.confounds}

    run = make_run(tmp_path / "one", source="wikitext-2", tokenizers={"gpt2": "another"}, hub=("distilgpt2",))
    loaded = Comparison.load(run)
    for values in (loaded.stage(stage) for stage in ("pretrain", "sft", "dpo", "gpt2")):
        values["fingerprint"]["config"]["data"] = {"pretrain": [{"source": "wikitext-103"}]}
    for model in loaded.models:
        for protocol, record in loaded.evaluations(model).items():
            if "text" in protocol and protocol != "speed":
                record["settings"] = record["settings"] | {"data": {"source": "wikitext-2", "subsampled": False}}
    gpt2, distilgpt2 = insights.standing(loaded, "gpt2"), insights.standing(loaded, "distilgpt2")
    assert {"tokenizer", "baseline", "in-domain"} <= keys(gpt2)
    assert "in-domain" in keys(distilgpt2) and not {"tokenizer", "baseline"} & keys(distilgpt2)
    better = next(one for one in distilgpt2 if one.key == "distilgpt2-better")
    assert "Threefold DPO trained on other text of wikitext-103" in better.sentence
    assert "DistilGPT-2 (hub) did not as far as is known" in better.sentence
    task = {"source": "gsm8k", "subsampled": True}
    for model in loaded.models:
        record = loaded.evaluations(model)["wikitext-2-problems/5-shot"]
        record["settings"] = record["settings"] | {"data": task}
    loaded.stage("sft")["fingerprint"]["config"]["data"] = {"sft": [{"source": "gsm8k"}]}
    changed = next(one for one in insights.stage_changes(loaded) if one.key == "sft-better")
    assert {"train-split", "subsampled"} <= set(changed.confounds)
    assert (
        "Threefold SFT trained on other items of gsm8k, Threefold pretrain did not (word problems)" in changed.sentence
    )
    assert "a sub-sample of gsm8k (word problems)" in changed.sentence


def test_two_names_of_the_same_weights_are_said_to_be_the_same(tmp_path):
    loaded = Comparison.load(
        make_run(tmp_path / "fake", skills={"sft": SKILL["pretrain"]}, seeds={"pretrain": 3, "sft": 3})
    )
    for record in loaded.evaluations("sft").values():
        record["weights_sha256"] = loaded.stage("pretrain")["weights_sha256"]
    (one,) = [one for one in insights.stage_changes(loaded) if one.key.startswith("sft")]
    assert one.confounds == ("same-weights",) and "the two are the same weights" in one.sentence


def test_stability_is_told_from_the_curves(comparison):
    (steady,) = insights.stability(comparison)
    assert "All 5 stages trained steadily" in steady.sentence and not steady.differs
    assert steady.evidence == tuple(f"curve/{stage}" for stage in comparison.trained)
    assert len(steady.values) == 5


def test_the_last_stage_is_set_against_the_first(comparison):
    found = {one.key: one for one in insights.since_pretraining(comparison)}
    assert "Since pretraining, Threefold DPO has improved" in found["since-pretraining-better"].sentence
    assert "perplexity" in found["since-pretraining-worse"].sentence


def test_the_control_is_compared_with_chance(tmp_path):
    run = make_run(tmp_path / "fake")
    (chance,) = insights.control(Comparison.load(run))
    assert "at chance" in chance.sentence and not chance.differs
    loaded = Comparison.load(run)
    metrics = loaded.evaluations("random")["sample-sentiment/3-shot"]["metrics"]
    metrics["accuracy"] |= {"value": 0.9, "low": 0.86, "high": 0.93}
    (biased,) = insights.control(loaded)
    assert "**not** at chance" in biased.sentence and biased.differs


def test_confounds_come_with_the_records_that_show_them(tmp_path):
    run = make_run(tmp_path / "one", source="wikitext-2", tokenizers={"gpt2": "another"}, hub=("distilgpt2",))
    found = {one.key: one.sentence for one in limits.limitations(Comparison.load(run))}
    assert "GPT-2 (trained here) carries" in found["baseline"] and "DistilGPT-2" not in found["baseline"]
    assert "GPT-2 (trained here)" in found["tokenizer"] and "bits per byte" in found["tokenizer"]
    assert "n = 300" in found["subsampled"]
    assert "40 documents" in found["documents"] and "once" in found["seeds"]
    assert "speed" not in found  # timed by turns
    plain_run = {one.key for one in limits.limitations(Comparison.load(make_run(tmp_path / "two")))}
    assert "tokenizer" not in plain_run and "subsampled" not in plain_run and "in-domain" in plain_run


def test_definitions_and_prompts_give_spans(comparison):
    (definitions,) = insights.definitions(comparison)
    assert "a factor of 2." in definitions.sentence
    (prompts,) = insights.prompts(comparison)
    assert "spans" in prompts.sentence and not prompts.differs


def test_variables_are_text_and_cover_what_the_report_quotes(comparison):
    values = limits.variables(comparison, "fake", "smoke")
    assert all(isinstance(value, str) and value for value in values.values())  # None is for what was not measured
    quoted = {reference.key for reference in sources.read(paths.REPORT).variables}
    assert quoted <= set(values)
    assert values["parameters"] == "1.05M" and values["n_models"] == "6"


def test_a_run_with_nothing_measured_still_has_every_variable(tmp_path):
    run = make_run(tmp_path / "fake")
    for path in (run / "notebooks").glob("04_*.ipynb"):
        path.unlink()
    loaded = Comparison.load(run)
    values = limits.variables(loaded)
    assert values["perplexity_gap"] is None and values["n_models"] is None and values["parameters"] == "1.05M"
    assert insights.standing(loaded) == [] and insights.stage_changes(loaded) == []
    assert insights.bullets("x", [], "Nothing.").markdown == "Nothing."


def test_numbers_for_prose():
    assert percent(0) == "0.0%" and percent(0.8754) == "87.5%"
    assert signed(0.04, 1) == "0.0" and signed(-1.25, 1, " pp") == "−1.2 pp" and signed(3, 1) == "+3.0"
    assert plain(-1234.5, 1) == "−1,234.5" and plain(-0.001, 2) == "0.00"
    assert probability(0.0004) == "< 0.001" and probability(1) == "1.000"
    assert compact(253_000_000) == "253M" and compact(4096) == "4,096" and compact(1.5e9) == "1.5B"
    assert duration(90) == "90.0 s" and duration(600) == "10.0 min" and duration(97_200) == "27.0 h"
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""


def test_what_adjustment_took_away_and_what_is_at_zero_is_said(comparison):
    from study.comparison.differences import Difference
    from study.comparison.measures import MEASURES

    lost = Difference(MEASURES["sentiment"], "gpt2", "dpo", 0.05, 0.01, 0.09, 0.03, 300, "x", adjusted=0.12, family=15)
    (one,) = insights.in_short(comparison, "x", [lost])
    sentence = one.sentence.replace("\u00a0", " ")
    assert "no detectable difference in sentiment (+5.0 pp [+1.0, +9.0], yet p = 0.120 adjusted for 15" in sentence
    assert not one.differs
    rows = tuple(comparison.value("instructions", model) for model in ("gpt2", "distilgpt2"))
    floor = Difference(MEASURES["instructions"], "gpt2", "distilgpt2", 0.0, -0.03, 0.03, 1.0, 100, "x", rows=rows)
    assert "both 0.0%" in insights.in_short(comparison, "x", [floor])[0].sentence
