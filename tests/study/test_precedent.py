"""The precedent's protocols rerun, and what sentiment varies with."""

import numpy as np
import pytest
from report_fixtures import make_run

from study.comparison import Comparison, precedent, variance
from study.comparison.differences import difference
from threefold.evaluation import statistics


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.load(make_run(tmp_path_factory.mktemp("runs") / "fake", ablations=False))


def test_claimed_rerun_and_sound_stand_side_by_side(comparison):
    result = precedent.figures(comparison)
    figures = result.values["figures"]
    assert [one["claimed"] for one in figures.values()] == ["−33%", "+26%", "+0.5%", "+4 pp", "−4 pp", "0.0%", "–"]
    lines = difference(comparison, "perplexity_lines", "pretrain", "sft")
    assert figures["perplexity-sft"]["rerun"]["value"] == lines.change != figures["perplexity-sft"]["sound"]["value"]
    assert lines.method == "bootstrap over documents"
    prompt = difference(comparison, "sentiment_prompt", "pretrain", "sft")
    assert figures["sentiment-sft"]["rerun"]["n"] == prompt.n == 200 and figures["sentiment-sft"]["sound"]["n"] == 300
    assert figures["control"]["rerun"]["n"] == 200 and "random control" in result.markdown
    protocols = {comparison.evaluations("dpo").get(comparison.protocol("sentiment_prompt"), {}).get("protocol")}
    assert protocols == {"sample-sentiment/precedent-3-shot"}


def test_fifty_problems_are_the_first_fifty(comparison):
    right = comparison.items("dpo", "sample-problems/5-shot").sort_values("item")["correct"].to_numpy()[:50]
    found = precedent.first_problems(comparison, "dpo")
    assert (found["value"], found["low"], found["high"], found["n"]) == statistics.wilson(int(right.sum()), 50)
    none = precedent.first_problems(comparison, "gpt2", count=5)
    assert none["n"] == 5


def test_what_was_not_measured_is_said(comparison):
    bare = Comparison(comparison.records)  # no per-item results
    rows = precedent.figures(bare).values["rows"]
    assert [row["Its protocol, rerun here"] for row in rows][:6] == ["not measured"] * 6
    assert rows[6]["Its protocol, rerun here"].endswith("n\u00a0=\u00a0200")
    empty = Comparison({})
    assert len(precedent.figures(empty).values["rows"]) == 5
    assert [one.key for one in precedent.sentences(empty)] == ["precedent-widths"]


def test_sentences_give_widths_and_chance(comparison):
    found = {one.key: one.sentence.replace("\u00a0", " ") for one in precedent.sentences(comparison)}
    assert "50.0% [43.1, 56.9]" in found["precedent-widths"] and "up to 7.1%" in found["precedent-widths"]
    assert f"{100 * statistics.detectable_difference(200):.1f} points" in found["precedent-widths"]
    assert "of the same 200 items" in found["precedent-chance"] and "51.0%" in found["precedent-chance"]
    assert "0 of 5 trained models" in found["precedent-overlap"]
    assert not any(one.differs for one in precedent.sentences(comparison))


# Variance components -------------------------------------------------------------------------------------------------


def test_scores_are_stacked_by_model_template_draw_and_item(comparison):
    protocol = "sample-sentiment/3-shot"
    stacked, levels = variance.scores(comparison, protocol)
    assert stacked.shape == (5, 3, 2, 300) and levels["model"] == ["gpt2", "distilgpt2", "pretrain", "sft", "dpo"]
    frame = comparison.items("sft", protocol).query("template == 'movie' and draw == 1").sort_values("item")
    np.testing.assert_array_equal(stacked[3, levels["template"].index("movie"), 1], frame["correct"])
    assert set(np.unique(stacked)) == {0.0, 1.0}


def test_incomplete_cells_are_not_compared(comparison):
    items = {("sft", "sample-sentiment/3-shot"): comparison.items("sft", "sample-sentiment/3-shot").iloc[300:]}
    assert (
        variance.scores(Comparison(comparison.records, comparison.folder, _items=items), "sample-sentiment/3-shot")
        is None
    )


def test_components_are_those_of_the_scores_and_one_level_is_said(comparison):
    from threefold.evaluation.statistics import variance_components

    result = variance.components(comparison)
    assert set(result.values["protocols"]) == {"sample-sentiment/0-shot", "sample-sentiment/3-shot"}
    told = result.values["protocols"]["sample-sentiment/3-shot"]["components"]
    stacked, _ = variance.scores(comparison, "sample-sentiment/3-shot")
    assert told == variance_components(stacked)._asdict()
    zero = result.values["protocols"]["sample-sentiment/0-shot"]
    assert zero["components"]["draw"] is None and zero["levels"]["draw"] == 1
    lines = [line for line in result.markdown.split("\n") if "demonstration draw" in line]
    assert ["one level: not estimated" in line for line in lines] == [True, False]
    assert "not at hand" in variance.components(Comparison(comparison.records)).markdown
