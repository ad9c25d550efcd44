"""Sentences from records: they claim what a test holds, and nothing else."""

import re

import pytest
from report_fixtures import SKILL, make_run
from threefold import paths
from threefold.comparison import Comparison, insights, tables
from threefold.comparison.results import compact, duration, listed, percent, plain, probability, signed
from threefold.report import sources


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.load(make_run(tmp_path_factory.mktemp("runs") / "fake"))


def all_insights(comparison):
    return [
        *insights.key_insights(comparison),
        *insights.stage_changes(comparison),
        *insights.standing(comparison, "gpt2"),
        *insights.standing(comparison, "distilgpt2"),
        *insights.confounds(comparison),
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
        assert one.evidence or one.key in ("ledger", "seeds", "speed"), one


def test_runs_whose_differences_are_noise_claim_none(tmp_path):
    level = dict.fromkeys(SKILL, (2.1, 0.8, 0.5, 0.5, 0.5))
    for trial in range(3):
        seeds = {model: 100 * trial + index for index, model in enumerate(SKILL)}
        loaded = Comparison.load(make_run(tmp_path / str(trial), skills=level, seeds=seeds, ablations=False))
        claimed = [one.sentence for one in all_insights(loaded) if one.differs and one.key != "control"]
        assert claimed == []
        for result in (tables.stage_evolution(loaded), tables.standing(loaded), tables.distilgpt2(loaded)):
            assert {one["verdict"] for one in result.values["differences"]} <= {
                "equivalent",
                "no detectable difference",
            }


def test_identical_models_are_never_said_to_differ(tmp_path):
    level = dict.fromkeys(SKILL, (2.1, 0.8, 0.5, 0.5, 0.5))
    loaded = Comparison.load(make_run(tmp_path / "fake", skills=level, seeds=dict.fromkeys(SKILL, 5)))
    found = [*insights.stage_changes(loaded), *insights.standing(loaded), *insights.standing(loaded, "distilgpt2")]
    assert found and not any(one.differs for one in found)
    for result in (tables.stage_evolution(loaded), tables.standing(loaded)):
        assert all(one["change"] == 0 and one["p"] == 1 for one in result.values["differences"])


def test_the_control_is_compared_with_chance(tmp_path):
    loaded = Comparison.load(make_run(tmp_path / "fake"))
    (chance,) = insights.control(loaded)
    assert "at chance" in chance.sentence and not chance.differs
    metrics = loaded.evaluations("random")["sample-sentiment/3-shot"]["metrics"]
    metrics["accuracy"] |= {"value": 0.9, "low": 0.86, "high": 0.93}
    (biased,) = insights.control(loaded)
    assert "**not** at chance" in biased.sentence and biased.differs


def test_confounds_come_with_the_records_that_show_them(tmp_path):
    run = make_run(tmp_path / "one", source="wikitext-2", tokenizers={"gpt2": "another"}, hub=("distilgpt2",))
    found = {one.key: one.sentence for one in insights.confounds(Comparison.load(run))}
    assert "GPT-2 (trained here) carries" in found["baseline"] and "DistilGPT-2" not in found["baseline"]
    assert "GPT-2 (trained here)" in found["tokenizer"] and "bits per byte" in found["tokenizer"]
    assert "n = 300" in found["subsampled"]
    assert "40 documents" in found["documents"] and "once" in found["seeds"]
    assert "speed" not in found  # timed by turns
    plain_run = {one.key for one in insights.confounds(Comparison.load(make_run(tmp_path / "two")))}
    assert "tokenizer" not in plain_run and "subsampled" not in plain_run and "in-domain" in plain_run


def test_definitions_and_prompts_give_spans(comparison):
    (definitions,) = insights.definitions(comparison)
    assert "a factor of 2." in definitions.sentence
    (prompts,) = insights.prompts(comparison)
    assert "spans" in prompts.sentence and not prompts.differs


def test_variables_are_text_and_cover_what_the_report_quotes(comparison):
    values = insights.variables(comparison, "fake", "smoke")
    assert all(isinstance(value, str) and value for value in values.values())
    quoted = {reference.key for reference in sources.read(paths.REPORT).variables}
    assert quoted <= set(values)
    assert values["parameters"] == "1.05M" and values["n_models"] == "6"


def test_a_run_with_nothing_measured_still_has_every_variable(tmp_path):
    run = make_run(tmp_path / "fake")
    for path in (run / "notebooks").glob("04_*.ipynb"):
        path.unlink()
    loaded = Comparison.load(run)
    values = insights.variables(loaded)
    assert values["perplexity_gap"] == "not measured" and values["n_models"] == "0"
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
    from threefold.comparison.differences import Difference
    from threefold.comparison.measures import INSTRUCTIONS, SENTIMENT

    lost = Difference(SENTIMENT, "gpt2", "dpo", 0.05, 0.01, 0.09, 0.03, 300, "x", adjusted=0.12, family=15)
    (one,) = insights.in_short(comparison, "x", [lost])
    sentence = one.sentence.replace("\u00a0", " ")
    assert "no detectable difference in sentiment (+5.0 pp [+1.0, +9.0], yet p = 0.120 adjusted for 15" in sentence
    assert not one.differs
    floor = Difference(INSTRUCTIONS, "gpt2", "distilgpt2", 0.0, -0.03, 0.03, 1.0, 100, "x")
    assert "both 0.0%" in insights.in_short(comparison, "x", [floor])[0].sentence
