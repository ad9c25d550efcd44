import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from threefold.evaluation import statistics


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_statsmodels(case):
    successes, n = case
    interval = statistics.wilson(successes, n)
    low, high = proportion_confint(successes, n, method="wilson")
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)
    assert interval.low <= interval.value <= interval.high


def test_wilson_of_nothing_right_is_zero_and_not_missing():
    interval = statistics.wilson(0, 1319)
    assert interval.value == 0.0 and interval.low == 0.0
    assert 0.0 < interval.high < 0.003


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError):
        statistics.wilson(3, 2)
    with pytest.raises(ValueError):
        statistics.wilson(0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_equals_statsmodels(pairs):
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert statistics.paired_proportions(a, b).p == pytest.approx(float(mcnemar(table, exact=True).pvalue), abs=1e-12)


def test_paired_proportions():
    a = np.array([1] * 50 + [1] * 5 + [0] * 20 + [0] * 25, bool)
    b = np.array([1] * 50 + [0] * 5 + [1] * 20 + [0] * 25, bool)
    result = statistics.paired_proportions(a, b)
    assert (result.both, result.only_a, result.only_b, result.neither) == (50, 5, 20, 25)
    assert result.difference == pytest.approx(b.mean() - a.mean())
    # Bonett & Price 2012: (f12+1)/(n+2) ... by hand
    p12, p21 = 6 / 102, 21 / 102
    half = 1.959964 * np.sqrt((p12 + p21 - (p21 - p12) ** 2) / 102)
    assert (result.low, result.high) == pytest.approx((p21 - p12 - half, p21 - p12 + half), abs=1e-6)
    swapped = statistics.paired_proportions(b, a)
    assert (swapped.difference, swapped.low, swapped.high) == pytest.approx(
        (-result.difference, -result.high, -result.low)
    )


def test_paired_proportions_cover():
    """At n = 60 the 95% interval holds the true difference in 93 to 98% of 2,000 simulated studies."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(2000):
        u = rng.random(60)
        a, b = u < 0.5, (u > 0.1) & (u < 0.7)  # 0.5 against 0.6, correlated
        result = statistics.paired_proportions(a, b)
        hits += result.low <= 0.1 <= result.high
    assert 0.93 < hits / 2000 < 0.98


def test_bootstrap_mean_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=120)
    ours = statistics.bootstrap_ratio(values, resamples=20_000, seed=1)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width and abs(ours.high - theirs.high) < 0.05 * width


def test_bootstrap_ratio_is_token_weighted_and_agrees_with_scipy():
    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 2000, size=60)
    nats = tokens * rng.normal(3.2, 0.2, size=60)
    ours = statistics.bootstrap_ratio(nats, tokens, resamples=20_000, seed=1, transform=np.exp)
    assert ours.value == pytest.approx(float(np.exp(nats.sum() / tokens.sum())))
    theirs = scipy_stats.bootstrap(
        (nats, tokens),
        lambda x, y, axis=-1: np.exp(x.sum(axis=axis) / y.sum(axis=axis)),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width and abs(ours.high - theirs.high) < 0.05 * width


def test_bootstrap_is_deterministic_whatever_the_chunking(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    once = statistics.bootstrap_ratio(values, resamples=999, seed=7)
    again = statistics.bootstrap_ratio(values, resamples=999, seed=7)
    monkeypatch.setattr(statistics, "_CELLS", 50 * 10)
    chunked = statistics.bootstrap_ratio(values, resamples=999, seed=7)
    assert once == again
    assert (once.low, once.high) == pytest.approx((chunked.low, chunked.high))
    assert once != statistics.bootstrap_ratio(values, resamples=999, seed=8)


def test_one_document_has_no_interval():
    interval = statistics.bootstrap_ratio([10.0], [5], transform=np.exp)
    assert interval.value == pytest.approx(np.exp(2.0)) and interval.low is None and interval.high is None


def test_clusters_widen_the_interval():
    """The same 40 items under 25 identical prompts are 40 observations, not 1,000."""
    items = np.random.default_rng(0).integers(0, 2, size=40)
    rows, clusters = np.repeat(items, 25), np.repeat(np.arange(40), 25)
    clustered = statistics.bootstrap_ratio(rows, clusters=clusters, resamples=4000)
    single = statistics.bootstrap_ratio(items, resamples=4000)
    naive = statistics.bootstrap_ratio(rows, resamples=4000)
    assert clustered.n == 40 and naive.n == 1000
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high))
    assert clustered.high - clustered.low > 4 * (naive.high - naive.low)


def test_paired_bootstrap_same_model_is_exactly_zero():
    nats, tokens = np.random.default_rng(0).gamma(5, size=30), np.full(30, 7)
    result = statistics.paired_bootstrap(nats, nats, tokens)
    assert (result.difference, result.low, result.high, result.p) == (0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 1000, size=60)
    hardness = rng.normal(4.0, 0.5, size=60)  # documents differ by far more than the models do
    a, b = tokens * hardness, tokens * (hardness - 0.05 + rng.normal(0, 0.02, size=60))
    result = statistics.paired_bootstrap(a, b, tokens, resamples=4000)
    assert result.high < 0 and result.p < 0.01
    first, second = (statistics.bootstrap_ratio(x, tokens, resamples=4000) for x in (a, b))
    assert second.high > first.low, "the two single intervals overlap widely"
    swapped = statistics.paired_bootstrap(b, a, tokens, resamples=4000)
    assert swapped.difference == pytest.approx(-result.difference)


def test_paired_bootstrap_without_weights_is_that_of_means_over_clusters():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 40))
    ones = np.ones(40)
    assert statistics.paired_bootstrap(a, b, None, None) == statistics.paired_bootstrap(a, b, ones, ones)
    doubled = [np.repeat(column, 2) for column in (a, b)]
    result = statistics.paired_bootstrap(*doubled, None, clusters=np.repeat(np.arange(40), 2))
    assert tuple(result) == pytest.approx(tuple(statistics.paired_bootstrap(a, b)))


def test_paired_bootstrap_p_is_uniform_enough_under_no_difference():
    rng = np.random.default_rng(1)
    p = [
        statistics.paired_bootstrap(rng.normal(size=80), rng.normal(size=80), resamples=400, seed=i).p
        for i in range(400)
    ]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09


def test_holm_equals_statsmodels():
    rng = np.random.default_rng(0)
    for _ in range(3):  # statsmodels collects garbage at every call: a second each
        p = rng.choice([0.0, 0.01, 0.04, 1.0, *rng.random(8)], size=rng.integers(5, 15))  # with ties
        assert statistics.holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_detectable_difference_has_the_power_it_says():
    n, discordant = 200, 0.3
    delta = statistics.detectable_difference(n, discordant)
    rng = np.random.default_rng(0)
    share_b = (discordant + delta) / 2
    found = 0
    for _ in range(1500):
        u = rng.random(n)
        b_only, a_only = u < share_b, (u >= share_b) & (u < discordant)
        found += statistics.paired_proportions(a_only, b_only).p < 0.05
    assert 0.70 < found / 1500 < 0.88  # the exact test is a little conservative
    assert statistics.detectable_difference(10_000) < statistics.detectable_difference(100)


@pytest.mark.parametrize("n", [30, 100, 300, 1319])
@pytest.mark.parametrize("discordant", [0.0, 0.02, 0.1, 0.3, 0.5])
def test_minimum_detectable_differences_are_those_of_the_exact_test(n, discordant):
    """By simulation: McNemar's exact test rejects in four of five samples at that difference, in fewer below it."""
    delta = statistics.detectable_difference(n, discordant)

    def power(true, trials=20_000):
        every = max(discordant, true)
        shares = [(every + true) / 2, (every - true) / 2, 1 - every]
        b_only, a_only, _ = np.random.default_rng(1).multinomial(n, shares, trials).T
        p = 2 * scipy_stats.binom.cdf(np.minimum(a_only, b_only), a_only + b_only, 0.5)
        return float((p < 0.05).mean())

    assert power(delta) == pytest.approx(0.8, abs=0.015)
    assert power(0.9 * delta) < 0.78


def test_a_model_with_six_items_more_right_is_the_least_that_can_be_told_apart():
    """Without a discordant item seen, six in one direction are needed: 7.8 points of 100 items, 25 of 30."""
    assert statistics.detectable_difference(100, 0.0) == pytest.approx(0.078, abs=0.0005)
    assert statistics.detectable_difference(30, 0.0) == pytest.approx(0.251, abs=0.001)
    assert statistics.detectable_difference(5, 0.0) == 1.0  # no result of five items is significant


@pytest.mark.parametrize("n", [3, 6, 12, 60])
def test_minimum_detectable_shifts_are_those_of_students_test(n):
    shift = statistics.detectable_errors(n - 1) / n**0.5
    samples_TN = np.random.default_rng(2).normal(shift, 1.0, (20_000, n))
    assert (scipy_stats.ttest_1samp(samples_TN, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.015)


# Variance components -------------------------------------------------------------------------------------------------


def test_variance_components_equal_a_hand_made_anova():
    """Three crossed factors (one draw): statsmodels' mean squares, expected mean squares solved by hand."""
    M, T, N = 3, 2, 5
    y = np.random.default_rng(0).integers(0, 2, size=(M, T, 1, N)).astype(float)
    m, t, _, i = (axis.ravel() for axis in np.indices(y.shape))
    fit = ols("y ~ C(m) * C(t) * C(i)", pd.DataFrame({"y": y.ravel(), "m": m, "t": t, "i": i})).fit()
    table = anova_lm(fit, typ=1)
    MS = (table["sum_sq"] / table["df"]).to_dict()
    m, t, i, mt, mi, ti, mti = (
        MS[key] for key in ("C(m)", "C(t)", "C(i)", "C(m):C(t)", "C(m):C(i)", "C(t):C(i)", "C(m):C(t):C(i)")
    )
    got = statistics.variance_components(y)
    assert got.model == pytest.approx((m - mt - mi + mti) / (T * N))
    assert got.template == pytest.approx((t - mt - ti + mti) / (M * N))
    assert got.item == pytest.approx((i - mi - ti + mti) / (M * T))
    assert got.model_item == pytest.approx((mi - mti) / T)
    assert got.residual == pytest.approx((mt - mti) / N + (ti - mti) / M + mti)
    assert got.draw is None and got.se_draw is None
    over = [max(0.0, value) for value in (got.item, got.model_item)]
    assert got.se_item == pytest.approx(np.sqrt(sum(over) / N))


def test_variance_components_are_unbiased():
    """Mean of 300 simulated crossings with known components; standard errors against the spread of one model's mean."""
    M, T, D, N = 4, 5, 5, 30
    known = {"model": 0.04, "template": 0.03, "draw": 0.02, "item": 0.10, "model_item": 0.05, "residual": 0.2 + 0.06}
    axes = {"model": (M, 1, 1, 1), "template": (1, T, 1, 1), "draw": (1, 1, D, 1), "item": (1, 1, 1, N)}
    axes |= {"model_item": (M, 1, 1, N)}
    rng = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(300):
        y = rng.normal(0, np.sqrt(0.2), (M, T, D, N)) + rng.normal(0, np.sqrt(0.06), (M, T, 1, 1))
        for name, shape in axes.items():
            y = y + rng.normal(0, np.sqrt(known[name]), shape)
        got = statistics.variance_components(y)
        found.append([getattr(got, name) for name in known])
        errors.append([got.se_template**2, got.se_draw**2, got.se_item**2])
        assert got.total == pytest.approx(sum(found[-1]))
    means, sems = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(300)
    assert np.all(np.abs(means - list(known.values())) < 4 * sems), means
    # One model's mean: templates bring sigma2(template) and sigma2(model x template), over T, and so on.
    assert np.mean(errors, axis=0) == pytest.approx([0.09 / T, 0.02 / D, 0.15 / N], rel=0.15)


def test_variance_components_of_one_source():
    """Answers that depend on one factor alone: the variance of its levels is all there is."""
    levels = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    y = np.broadcast_to(levels[None, :, None, None], (3, 5, 2, 40))
    got = statistics.variance_components(y)
    assert got.template == pytest.approx(levels.var(ddof=1)) and got.total == pytest.approx(got.template)
    assert got.se_template == pytest.approx(levels.std(ddof=1) / np.sqrt(5))
    for name in ("model", "draw", "item", "model_item", "residual", "se_draw", "se_item", "se_interaction"):
        assert getattr(got, name) == pytest.approx(0.0, abs=1e-12), name


def test_variance_components_of_identical_models():
    """The same weights twice: no variance between models, and none of models by items."""
    y = np.random.default_rng(0).integers(0, 2, size=(1, 5, 5, 50)).repeat(2, axis=0)
    got = statistics.variance_components(y)
    assert got.model_item == pytest.approx(0.0, abs=1e-12) and got.model == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("bad", [np.zeros((2, 3, 4)), np.zeros((1, 1, 1, 1)), np.full((2, 2, 2, 2), np.nan)])
def test_variance_components_need_a_full_crossing(bad):
    with pytest.raises(ValueError, match="variance components need"):
        statistics.variance_components(bad)


# Imports -------------------------------------------------------------------------------------------------------------


def test_comparison_imports_no_torch():
    """Readers of records start in a second: what they use of the evaluation is its statistics."""
    code = (
        "import importlib, pkgutil, sys, study.comparison as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "assert 'threefold.evaluation.statistics' in sys.modules\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_median_of_pairs_has_the_interval_of_order_statistics():
    """Against scipy's exact interval of a quantile (binomial, distribution-free)."""
    generator = np.random.default_rng(8)
    for n in (6, 9, 15, 40):
        a, b = generator.normal(size=n), generator.standard_t(2, size=n) + 0.5
        found = statistics.paired_median(a, b)
        assert found.difference == pytest.approx(np.median(b - a))
        ordered = np.sort(b - a)
        k = int(np.flatnonzero(ordered == found.low)[0]) + 1
        assert found.high == ordered[n - k]
        assert scipy_stats.binom.cdf(k - 1, n, 0.5) <= 0.025 < scipy_stats.binom.cdf(k, n, 0.5)
        expected = scipy_stats.quantile_test(b - a, q=0, p=0.5)
        assert found.p == pytest.approx(expected.pvalue)
        low, high = expected.confidence_interval(0.95)
        assert found.low == pytest.approx(low) and found.high == pytest.approx(high)
    few = statistics.paired_median([0.0] * 5, [1.0] * 5)
    assert few.low is None and few.p == 1.0 and few.difference == 1.0
    assert statistics.paired_median([0.0] * 8, [0.0] * 8).p == 1.0
    with pytest.raises(ValueError, match="same units"):
        statistics.paired_median([1.0], [1.0, 2.0])


def test_the_median_interval_covers_at_least_as_often_as_it_says():
    generator = np.random.default_rng(9)
    hits = 0
    for _ in range(1000):
        found = statistics.paired_median(np.zeros(15), generator.exponential(size=15) - np.log(2))
        hits += found.low <= 0 <= found.high
    assert hits >= 950 - 3 * np.sqrt(1000 * 0.05 * 0.95)


SKEWED = {  # draws of mean zero: (generator, shape) -> values
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "exponential": lambda generator, shape: generator.exponential(size=shape) - 1,
    "lognormal": lambda generator, shape: generator.lognormal(0, 1, shape) - np.exp(0.5),
    "heavy tails": lambda generator, shape: generator.standard_t(3, shape),
}


@pytest.mark.parametrize("name", SKEWED)
def test_a_mean_of_sixty_documents_is_tested_at_5_percent_whatever_their_shape(name):
    values_RN = SKEWED[name](np.random.default_rng(0), (2000, 60))
    rejected = np.mean([statistics.mean_p(v_N, resamples=399, seed=i) < 0.05 for i, v_N in enumerate(values_RN)])
    assert 0.02 < rejected <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000), rejected  # two standard errors of the simulation


def test_students_t_alone_rejects_skewed_documents_too_often():
    values_RN = SKEWED["lognormal"](np.random.default_rng(0), (2000, 60))
    assert np.mean(scipy_stats.ttest_1samp(values_RN, 0, axis=1).pvalue < 0.05) > 0.07


def test_a_mean_has_the_p_of_student_where_values_are_normal_and_many():
    values_N = np.random.default_rng(1).normal(0.1, 1, 400)
    student = scipy_stats.ttest_1samp(values_N, 0).pvalue
    assert student <= statistics.mean_p(values_N) < 1.3 * student


def test_a_mean_of_equal_values_and_one_of_too_few():
    assert statistics.mean_p([0.0, 0.0, 0.0]) == statistics.mean_p([1.0, -1.0]) == 1.0
    assert statistics.mean_p([0.5, 0.5, 0.5]) == 0.0
    with pytest.raises(ValueError, match="at least two"):
        statistics.mean_p([1.0])
