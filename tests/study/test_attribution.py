"""The attribution chain: its variants, the effect of each link over the seeds, the table, the words, the figure."""

import numpy as np
import pytest
from report_fixtures import cell, make_run, notebook, output
from scipy import stats

from study.comparison import Comparison, attribution, claims, figures, findings
from study.preset import AblationConfig, ablation_base, attribution_chain, load_preset, parse_overrides
from threefold.evaluation.statistics import holm
from threefold.training.variants import all_configs

CHAIN = "ablations.chain=['optimizer=adamw,learning_rate=2e-3', 'norm=layer', 'ffn=gelu', 'bias=true']"
LOSSES = {
    "optimizer=adamw,learning_rate=2e-3,norm=layer,ffn=gelu": [5.00, 5.02, 5.05],
    "norm=layer,ffn=gelu": [4.61, 4.60, 4.66],
    "ffn=gelu": [4.60, 4.61, 4.64],
    "base": [4.41, 4.40, 4.47],
    "d_model=192": [4.30, 4.31, 4.35],
}


@pytest.fixture(scope="module")
def chain():
    parts = ("optimizer=adamw,learning_rate=2e-3", "norm=layer", "ffn=gelu")
    return attribution_chain(AblationConfig(steps=9, chain=parts, scale="d_model=192"))


@pytest.fixture(scope="module")
def variants():
    return {
        name: {"heldout_loss": loss, "seeds": [1, 2, 3], "parameters": 1000 + place, "tokens": 300_000}
        for place, (name, loss) in enumerate(LOSSES.items())
    }


@pytest.fixture(scope="module")
def links(variants, chain):
    return attribution.links(variants, chain)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, links):
    folder = make_run(tmp_path_factory.mktemp("runs") / "fake", ablations=False)
    cells = [cell("x", output(attribution.record_name(one), one, "x")) for one in reversed(links)]
    notebook(folder / "notebooks" / "05_ablations.ipynb", *cells)
    return Comparison.load(folder)


def test_a_chain_goes_from_gpt2s_recipe_through_one_part_after_another_to_the_base_and_beyond(chain):
    assert chain == dict(zip(("recipe", "optimizer", "norm", "ffn", "scale"), LOSSES, strict=True))
    assert attribution_chain(AblationConfig()) == {}


def test_the_links_of_a_chain_differ_in_their_part_alone_at_equal_feed_forward_parameters():
    preset = load_preset("smoke", parse_overrides(CHAIN))
    base, train = ablation_base(preset), preset.ablations.train
    chain = attribution_chain(preset.ablations)
    configs = all_configs(base, train, [one for one in chain.values() if one != "base"])
    made = [configs[variant] for variant in chain.values()]
    assert made[0][1].optimizer == "adamw" and made[0][1].learning_rate == 2e-3
    assert made[1] == (made[0][0], train) and made[-1] == configs["base"]
    assert [model.norm for model, _ in made] == ["layer", "layer", "rms", "rms", "rms"]
    assert [model.ffn for model, _ in made] == ["gelu", "gelu", "gelu", "swiglu", "swiglu"]
    assert [model.d_ff * (2 if model.ffn == "gelu" else 3) for model, _ in made] == [3 * base.d_ff] * 5
    assert [model.bias for model, _ in made] == [True, True, True, True, False]


def test_effects_are_paired_over_seeds_and_agree_with_scipy(links, chain):
    single = attribution.single(links)
    assert [one["link"] for one in single] == ["optimizer", "norm", "ffn", "scale"]
    losses = [np.array(LOSSES[variant]) for variant in chain.values()]
    for one, before, after in zip(single, losses, losses[1:], strict=False):
        test = stats.ttest_rel(after, before)
        interval = test.confidence_interval()
        expected = ((after - before).mean(), interval.low, interval.high, test.pvalue)
        assert [one[key] for key in ("difference", "low", "high", "p")] == pytest.approx(expected)
        assert one["n"] == 3 and one["tokens"] == 300_000 and one["seeds"] == [1, 2, 3]
    assert [one["p_adjusted"] for one in single] == pytest.approx(list(holm([one["p"] for one in single])))
    assert [one["parameters"] for one in single] == [1001, 1002, 1003, 1004]


def test_shares_are_means_over_seeds_and_add_up(links):
    single, total = attribution.single(links), attribution.of(links, "total")
    groups = [attribution.of(links, group) for group in attribution.GROUPS]
    whole = np.subtract(LOSSES["d_model=192"], LOSSES["optimizer=adamw,learning_rate=2e-3,norm=layer,ffn=gelu"])
    first = np.subtract(LOSSES["norm=layer,ffn=gelu"], LOSSES["optimizer=adamw,learning_rate=2e-3,norm=layer,ffn=gelu"])
    assert single[0]["share"] == pytest.approx((first / whole).mean())
    for family in (single, groups):
        assert sum(one["difference"] for one in family) == pytest.approx(total["difference"])
        assert sum(one["share"] for one in family) == pytest.approx(1)
    assert groups[1]["difference"] == pytest.approx(single[1]["difference"] + single[2]["difference"])
    assert total["share"] == 1 and total["difference"] == pytest.approx(whole.mean())


def test_no_shares_are_given_where_the_whole_difference_may_be_zero(chain, variants):
    last = {**variants["d_model=192"], "heldout_loss": [5.1, 4.9, 5.06]}
    found = attribution.links({**variants, "d_model=192": last}, chain)
    assert {one["share"] for one in found} == {None}
    assert "no shares are given" in attribution.summary(found).markdown


def test_one_seed_has_effects_without_intervals(chain, variants):
    one_seed = {name: {**values, "heldout_loss": values["heldout_loss"][:1]} for name, values in variants.items()}
    found = attribution.links(one_seed, chain)
    assert [one["difference"] for one in found[:2]] == pytest.approx([-0.39, -0.01])
    assert {one["low"] for one in found} == {one["share"] for one in found} == {None}
    assert figures.attribution_waterfall(found).values["drawn"] == ["optimizer", "norm", "ffn", "scale"]


def test_table_words_and_figure_follow_from_the_records(comparison, links):
    found = attribution.found(comparison)
    assert found == links
    rows = attribution.effects(found).values["rows"]
    assert [row["Replaced"] for row in rows] == [
        *("Optimizer", "Normalisation", "Feed-forward", "Scale"),
        *("Training pipeline", "Architecture", "Scale", "Total"),
    ]
    assert rows[0]["Difference (nats per token)"].startswith("−0.4000 [")
    said = attribution.summary(found).markdown
    assert "over 3 seeds" in said and "training pipeline 57%" in said
    (reason,) = findings.reasons(comparison)
    assert "training pipeline 57% [" in reason.sentence and "scale" in reason.sentence
    assert len(reason.sentence.split()) <= findings.LONGEST and set(reason.evidence) <= set(comparison.records)
    assert reason in findings.findings(comparison)
    result = figures.attribution_waterfall(found)
    assert result.values["start"] == pytest.approx(np.mean([5.00, 5.02, 5.05])) and "Optimizer −0.400" in result.text
    assert result.values["end"] == pytest.approx(np.mean([4.30, 4.31, 4.35]))


def test_claims_about_the_three_reasons_are_read_off_the_chain(comparison):
    verdicts = claims.judge(comparison, "attribution-architecture", "attribution-scale", "attribution-pipeline")
    assert {key: one.verdict for key, one in verdicts.items()} == dict.fromkeys(verdicts, claims.SUPPORTED_HERE)
    assert "of the whole difference" in verdicts["attribution-pipeline"].measured
    scope = verdicts["attribution-scale"].finding.scope
    assert (scope.parameters, scope.tokens, scope.basis) == (1004, 300_000, "3 seeds")


def test_a_run_without_a_chain_says_so(tmp_path):
    comparison = Comparison.load(make_run(tmp_path / "fake", ablations=False))
    assert attribution.found(comparison) == [] == attribution.links({}, {})
    assert attribution.summary([]).markdown == "No attribution was made in this run."
    assert claims.judge(comparison, "attribution-scale")["attribution-scale"].verdict == claims.NOT_MEASURED
    assert figures.attribution_waterfall([]).values == {"drawn": []}
