"""The original comparison side by side with ours, its protocols rerun, and what sentiment varies with."""

import re

import numpy as np
import pytest
from report_fixtures import make_run

from study.comparison import Comparison, original, variance
from study.comparison.differences import difference
from threefold.evaluation import statistics


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.load(make_run(tmp_path_factory.mktemp("runs") / "fake", ablations=False))


def rows(result):
    return {next(iter(row.values())): row for row in result.values["rows"]}


def test_its_perplexities_stand_beside_ours_with_their_changes(comparison):
    found = rows(original.by_model(comparison, "original-perplexity"))
    assert list(found) == ["GPT-2", "DistilGPT-2", "Threefold pretrain", "Threefold SFT", "Threefold DPO"]
    ours = found["Threefold pretrain"]
    assert (
        ours["Perplexity there"] == "27.03"
        and ours["Against GPT-2 there"] == "−33.5%"
        and ours["Tokens there"] == "600M"
    )
    assert ours["Against GPT-2 here"] == difference(comparison, "perplexity", "gpt2", "pretrain").text
    assert found["DistilGPT-2"]["Tokens here"] == "5M (2.5M inherited)"
    assert found["GPT-2"]["Against GPT-2 there"] is None


def test_its_stages_change_from_the_one_before_and_cumulatively(comparison):
    found = rows(original.by_model(comparison, "original-stages"))
    sft, dpo = found["Threefold SFT"], found["Threefold DPO"]
    assert sft["Perplexity, change there"] == sft["Cumulative there"] == "+26.3%"
    assert dpo["Perplexity, change there"] == "+0.5%" and dpo["Cumulative there"] == "+27.0%"
    assert sft["Sentiment, change there"] == "+4.0 pp" and dpo["Sentiment, cumulative there"] == "0.0 pp"
    assert dpo["Cumulative here"].startswith("+12") and found["Threefold pretrain"]["Change here"] is None


def test_its_other_tables_have_a_column_of_ours(comparison):
    models = rows(original.by_model(comparison, "original-models"))["Threefold pretrain"]
    assert models["Parameters there"] == "253M" and models["Parameters here"] == "1.05M"
    assert models["Training data here"] == "sample-text"
    assert rows(original.by_model(comparison, "original-tasks"))["GPT-2"]["Sentiment there"] == "56.0%"
    standing = rows(original.standing(comparison))
    assert standing["Bits per byte"]["Here"] == "exceeds" and standing["Sentiment"]["There"] == "lags (−6.5 pp)"
    assert standing["Generation speed"]["Difference here"] == "1.00×"
    distilled = rows(original.distilgpt2(comparison))
    assert (
        distilled["Decoding speed"]["Here"] == "1.92×" and distilled["Parameters, share of GPT-2’s"]["There"] == "66.0%"
    )
    spread = rows(original.spread(comparison))
    assert spread["Sentiment"]["Range there"] == "4.0 pp" and spread["Perplexity"]["Share of the mean there"] == "22.9%"
    cost = rows(original.efficiency(comparison))
    assert cost["Total"]["Time there"] == "27 h" and cost["Total"]["Tokens here"] == "3.3M"
    assert "(cited)" in cost["GPT-2"]["Tokens there"]


def test_statements_on_its_code_give_file_and_line(comparison):
    lines = original.statements(comparison).markdown.split("\n")
    for line, one in zip(lines, original.ORIGINAL["statement"], strict=False):
        assert all(re.fullmatch(r"[\w/]+\.py:\d+(-\d+)?|page|Radford et al\. 2019.*", place) for place in one["where"])
        assert one["where"] and all(f"`{place}`" in line for place in one["where"])
    assert "`scripts/evaluation/eval_sst2.py:76-77`" in lines[0]


def test_claimed_rerun_and_sound_stand_side_by_side(comparison):
    result = original.rerun(comparison)
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
    found = original.first_problems(comparison, "dpo")
    assert (found["value"], found["low"], found["high"], found["n"]) == statistics.wilson(int(right.sum()), 50)
    none = original.first_problems(comparison, "gpt2", count=5)
    assert none["n"] == 5


def test_what_was_not_measured_is_said(comparison):
    bare = Comparison(comparison.records)  # no per-item results
    found = original.rerun(bare).values["rows"]
    assert [row["Its protocol, rerun here"] for row in found][:6] == ["not measured"] * 6
    assert found[6]["Its protocol, rerun here"].endswith("n\u00a0=\u00a0200")
    empty = Comparison({})
    assert len(original.rerun(empty).values["rows"]) == 5
    assert rows(original.by_model(empty, "original-perplexity"))["Threefold pretrain"]["Perplexity here"] is None
    assert len(original.standing(empty).values["rows"]) == len(original.distilgpt2(empty).values["rows"]) == 4


def test_statements_give_widths_and_chance(comparison):
    text = original.statements(comparison).markdown.replace("\u00a0", " ")
    assert "50.0% [43.1, 56.9]" in text and "up to 7.1%" in text
    assert f"{100 * statistics.detectable_difference(200):.1f} points" in text and "of the same 200 items" in text


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
