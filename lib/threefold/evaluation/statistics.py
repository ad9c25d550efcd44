"""Intervals and paired tests behind every number of the comparison.

Proportions carry Wilson's score interval (Wilson 1927; Brown, Cai & DasGupta 2001 recommend it at small n and near 0
and 1). Means and ratios carry a percentile bootstrap over the units that were sampled: documents for perplexity,
items for tasks (clusters of rows that share an item are drawn together; Miller 2024, arXiv 2411.00640). Two models on
the same items are always compared in pairs: McNemar's exact test for right/wrong, the paired bootstrap for everything
else. All intervals are 95% intervals. Functions raise ValueError for inputs of the wrong shape and for empty ones.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

CONFIDENCE = 0.95
_Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
_CELLS = 4_000_000  # resampled counts held at a time: 32 MB


class Interval(NamedTuple):
    """An estimate and its interval. `low` and `high` are None where one unit alone leaves nothing to resample."""

    value: float
    low: float | None
    high: float | None
    n: int  # units behind it: items, documents or pairs


class PairedProportions(NamedTuple):
    """Right/wrong of two models on the same items; `difference` is b's proportion minus a's."""

    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    low: float
    high: float
    p: float


class PairedDifference(NamedTuple):
    """Difference (b minus a) of two estimates over the same units, its interval and two-sided p-value."""

    difference: float
    low: float | None
    high: float | None
    p: float
    n: int


class VarianceComponents(NamedTuple):
    """Variance of one right/wrong answer by source, in squared proportions, and the uncertainty each source causes.

    The components are unbiased and add up to `total`; a component that is truly zero may come out slightly negative and
    should be read as zero. A component is None where its factor has only one level. The standard errors are those of
    one given model's mean over the templates, draws and items of the crossing: `se_template` is what another choice of
    as many templates would change, `se_draw` and `se_item` likewise, `se_interaction` the rest.
    """

    model: float | None
    template: float | None
    draw: float | None
    item: float | None
    model_item: float | None
    residual: float  # all other interactions and what is left
    total: float
    se_template: float | None
    se_draw: float | None
    se_item: float | None
    se_interaction: float


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion. A tie may count as half a success."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"no proportion: {successes} successes in {n} trials")
    p = successes / n
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(p, low, high, n)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike = 1.0,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] = np.positive,
) -> Interval:
    """`transform(sum numerators / sum denominators)` with a percentile interval over resampled units.

    For perplexity: numerators = each document's summed nats, denominators = its scored tokens, transform = np.exp; a
    long document thus weighs as many tokens as it has, in the estimate and in every resample. With denominators of 1 it
    is a mean. Rows of one cluster (one item under several prompts, say) are resampled together.
    """
    columns_DC = _columns(clusters, numerators, denominators)
    if columns_DC[:, 1].sum() <= 0:
        raise ValueError("the denominators sum to nothing")

    def estimate(sums_BC: np.ndarray) -> np.ndarray:
        return transform(sums_BC[:, 0] / sums_BC[:, 1])

    value, low, high, _ = _bootstrap(columns_DC, estimate, resamples, seed)
    return Interval(value, low, high, len(columns_DC))


def paired_proportions(a: ArrayLike, b: ArrayLike) -> PairedProportions:
    """Difference of two proportions (right/wrong) on the same items: Bonett & Price's (2012) adjusted interval, and
    McNemar's two-sided exact p-value (binomial over the items on which only one of the two is right).
    """
    a_N, b_N = _paired(a, b, bool)
    n = len(a_N)
    only_a, only_b = int((a_N & ~b_N).sum()), int((~a_N & b_N).sum())
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = _Z * math.sqrt((p_a + p_b - (p_b - p_a) ** 2) / (n + 2))
    return PairedProportions(
        n=n,
        both=int((a_N & b_N).sum()),
        only_a=only_a,
        only_b=only_b,
        neither=int((~a_N & ~b_N).sum()),
        difference=(only_b - only_a) / n,
        low=max(-1.0, p_b - p_a - half),
        high=min(1.0, p_b - p_a + half),
        p=min(1.0, 2.0 * float(stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))),
    )


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    a_weights: ArrayLike | None = None,
    b_weights: ArrayLike | None = None,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """`sum b / sum b_weights - sum a / sum a_weights` over units drawn together for both.

    `a` and `b` are per-unit sums (a document's nats, an item's score) and the weights are what they are divided by (its
    tokens or bytes; 1 where None); `b_weights` defaults to `a_weights`. Rows sharing a value of `clusters` are drawn
    together. The p-value is twice the smaller share of resamples on one side of zero, at least 1/(resamples + 1);
    identical inputs give a difference of exactly 0 and p = 1.
    """
    a_N, b_N = _paired(a, b)
    a_weights = 1.0 if a_weights is None else a_weights
    columns_DC = _columns(clusters, a_N, a_weights, b_N, a_weights if b_weights is None else b_weights)

    def estimate(sums_BC: np.ndarray) -> np.ndarray:
        return sums_BC[:, 2] / sums_BC[:, 3] - sums_BC[:, 0] / sums_BC[:, 1]

    value, low, high, differences_B = _bootstrap(columns_DC, estimate, resamples, seed)
    tail = min(int((differences_B <= 0).sum()), int((differences_B >= 0).sum()))
    return PairedDifference(value, low, high, min(1.0, 2.0 * (tail + 1) / (len(differences_B) + 1)), len(columns_DC))


def mean_p(values: ArrayLike, *, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value that the mean of independent values is zero, for skewed values too: the larger of Student's t
    and of the equal-tailed bootstrap-t (Efron & Tibshirani 1993, section 12.5; Hall 1988).

    Student's t alone rejects too often where the values are skewed (6 to 9% instead of 5% over 60 values, 8 to 16% over
    12), the bootstrap-t alone where they have heavy tails. Unless all values are equal the result is at least
    2 / (resamples + 1). Raises ValueError for fewer than two values.
    """
    values_N = np.asarray(values, np.float64)
    n = len(values_N)
    if n < 2:
        raise ValueError("a test of a mean needs at least two values")
    mean, error = float(values_N.mean()), float(values_N.std(ddof=1)) / math.sqrt(n)
    if mean == 0 or error == 0:
        return 1.0 if mean == 0 else 0.0
    t, centred_N = mean / error, values_N - mean
    sums_BC = _resampled_sums(np.stack([centred_N, centred_N**2], axis=1), resamples, seed)
    errors_B = np.sqrt(np.maximum(0.0, sums_BC[:, 1] - sums_BC[:, 0] ** 2 / n) * n / (n - 1))
    spread_B = errors_B > 1e-12 * error  # resamples of one value alone count as infinitely far on their side
    t_B = np.where(spread_B, sums_BC[:, 0] / np.where(spread_B, errors_B, 1.0), np.copysign(np.inf, sums_BC[:, 0]))
    tail = min(int((t_B <= t).sum()), int((t_B >= t).sum()))
    return max(float(2 * stats.t.sf(abs(t), n - 1)), min(1.0, 2 * (tail + 1) / (resamples + 1)))


def student_half_width(error: float, freedom: float) -> float:
    """Half the width of Student's interval around an estimate with this standard error."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error


def paired_student(a: ArrayLike, b: ArrayLike) -> PairedDifference:
    """Mean of `b - a` over pairs (a change seed by seed, say) with Student's interval and p-value at n - 1 degrees of
    freedom. For a single pair, or pairs that all differ by the same amount, there is no interval and p = 1.
    """
    a_N, b_N = _paired(a, b)
    n, mean = len(a_N), float((b_N - a_N).mean())
    error = float((b_N - a_N).std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if error <= 1e-12 * abs(mean):  # rounding is not spread
        return PairedDifference(mean, None, None, 1.0, n)
    half = student_half_width(error, n - 1)
    return PairedDifference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def paired_median(a: ArrayLike, b: ArrayLike) -> PairedDifference:
    """Median of `b - a` over pairs (times of the same rounds, say) with the interval of order statistics and the sign
    test's exact p-value (Conover 1999, sections 3.2 and 3.4), both robust against outliers.

    The interval is [x(k), x(n + 1 - k)] of the sorted differences for the largest k with P(Binomial(n, 1/2) < k) at
    most 2.5%. Below six pairs there is no interval, and p = 1.
    """
    a_N, b_N = _paired(a, b)
    sorted_N = np.sort(b_N - a_N)
    n, median = len(sorted_N), float(np.median(sorted_N))
    k = int(stats.binom.ppf(0.5 - CONFIDENCE / 2, n, 0.5))
    if k < 1:
        return PairedDifference(median, None, None, 1.0, n)
    above, below = int((sorted_N > 0).sum()), int((sorted_N < 0).sum())
    p = float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0
    return PairedDifference(median, float(sorted_N[k - 1]), float(sorted_N[n - k]), p, n)


def crossed_mean(values_SN: ArrayLike) -> Interval:
    """Mean over seeds x streams, both drawn at random and crossed, with Student's interval; n counts the cells.

    The variance of the mean is that of the seeds' means over their number plus that of the streams' (two-way
    clustering, Cameron, Gelbach & Miller 2011, without subtracting the part that both contain: conservative); its
    degrees of freedom are Welch and Satterthwaite's. A factor of one level adds nothing: the interval is then
    conditional on that level. There is no interval where neither factor varies.
    """
    y = np.asarray(values_SN, np.float64)
    if y.ndim != 2 or y.size == 0:
        raise ValueError(f"a crossed mean needs [seeds, streams], got shape {y.shape}")
    mean = float(y.mean())
    means = [y.mean(axis=axis) for axis in (0, 1) if y.shape[1 - axis] > 1]
    parts = [(float(m.var(ddof=1)) / len(m), len(m) - 1) for m in means]
    variance = sum(part for part, _ in parts)
    if math.sqrt(variance) <= 1e-12 * abs(mean):
        return Interval(mean, None, None, y.size)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = student_half_width(math.sqrt(variance), freedom)
    return Interval(mean, mean - half, mean + half, y.size)


def deviation(values: ArrayLike) -> Interval:
    """Standard deviation (n - 1) of normal values with its exact interval: (n - 1) s^2 / sigma^2 is chi-square with
    n - 1 degrees of freedom (Snedecor & Cochran 1989, section 5.11). Values that are all equal have no interval.
    """
    values_N = np.asarray(values, np.float64)
    n = len(values_N)
    if n < 2:
        raise ValueError("a standard deviation needs at least two values")
    s = float(values_N.std(ddof=1))
    if s <= 1e-12 * float(np.abs(values_N).max()):
        return Interval(0.0, None, None, n)
    most, least = stats.chi2.ppf([0.5 + CONFIDENCE / 2, 0.5 - CONFIDENCE / 2], n - 1) / (n - 1)
    return Interval(s, s / math.sqrt(most), s / math.sqrt(least), n)


def deviation_p(s: float, n: int, sigma: float) -> float:
    """Two-sided chi-square p-value that n normal values with standard deviation `s` come from one of `sigma`."""
    x = (n - 1) * (s / sigma) ** 2
    return min(1.0, 2.0 * float(min(stats.chi2.cdf(x, n - 1), stats.chi2.sf(x, n - 1))))


def standard_error(low: float, high: float) -> float:
    """Standard error behind a 95% interval: half its width over the normal quantile."""
    return (high - low) / (2 * _Z)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the order given: family-wise error at most alpha where adjusted
    <= alpha.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


@cache
def detectable_difference(n: int, discordant: float = 0.2, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Minimum detectable difference of two paired proportions: the smallest that McNemar's exact test over `n` items
    finds with the given power; 1 where even the largest is found less often.

    `discordant` is the share of items on which exactly one of the two models is right. A difference cannot exceed it:
    from there on every discordant item is taken to favour the same model. The power is the test's own, summed over the
    number of discordant items; Connor's (1987) normal approximation is too small where few are discordant.
    """

    def reached(delta: float) -> float:
        every = max(discordant, delta)
        fewest, most = stats.binom.ppf((1e-12, 1 - 1e-12), n, every)
        counts_K = np.arange(fewest, most + 1)  # discordant items
        critical_K = stats.binom.ppf(alpha / 2, counts_K, 0.5) - 1  # the most that may favour the worse model; -1: none
        worse_K = stats.binom.cdf(critical_K, counts_K, (every - delta) / (2 * every))
        return float(stats.binom.pmf(counts_K, n, every) @ worse_K)

    low, high = 0.0, 1.0
    if reached(high) < power:
        return high
    for _ in range(40):
        delta = (low + high) / 2
        low, high = (low, delta) if reached(delta) >= power else (delta, high)
    return high


@cache
def detectable_errors(freedom: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference, in standard errors, that Student's two-sided test with so many degrees of freedom
    finds with the given power (noncentral t distribution); 2.80 for many, more for few."""
    critical = float(stats.t.ppf(1 - alpha / 2, freedom))
    return float(optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - power, 0.0, 10 * critical))


def variance_components(correct_MTDI: np.ndarray) -> VarianceComponents:
    """Variance of correctness over a full crossing of models, templates, demonstration draws and items.

    correct_MTDI: right (1) or wrong (0), or any score, [models, templates, draws, items], one answer a cell. All four
    factors are random and crossed (every model and template sees the same draws). Analysis of variance by the method of
    moments: for a set S of factors with mean square MS_S, E[MS_S] = sum over U containing S of n_U sigma2_U, where n_U
    is the number of cells for each level of U (Cornfield & Tukey 1956; Searle, Casella & McCulloch 1992, ch. 4;
    Brennan 2001, "Generalizability Theory", ch. 3), which inverts to sigma2_S = sum over U containing S of (-1)^(|U| -
    |S|) MS_U / n_S. A factor of one level is left out of the model. A standard error takes the components of a source
    and of its interaction with the model, negative ones as zero, over the levels they are averaged over.
    Raises ValueError for another number of axes, for fewer than two cells, or for values that are not finite.
    """
    y = np.asarray(correct_MTDI, np.float64)
    if y.ndim != 4 or y.size < 2:
        raise ValueError(f"variance components need [models, templates, draws, items], got shape {y.shape}")
    if not np.isfinite(y).all():
        raise ValueError("variance components need a full crossing: a value is missing or not finite")
    factors = [axis for axis in range(4) if y.shape[axis] > 1]
    subsets = [frozenset(s) for size in range(1, len(factors) + 1) for s in combinations(factors, size)]
    cells = {s: math.prod(y.shape[axis] for axis in range(4) if axis not in s) for s in subsets}  # n_S
    square = {s: _mean_square(y, s) for s in subsets}
    sigma2 = {s: sum((-1) ** (len(u) - len(s)) * square[u] for u in subsets if u >= s) / cells[s] for s in subsets}
    model, template, draw, item = (frozenset({axis}) for axis in range(4))
    named = (model, template, draw, item, model | item)

    def error(sources: list[frozenset]) -> float:
        """Standard error of one model's mean from these components: each over its levels other than models."""
        levels = [math.prod(y.shape[axis] for axis in s if axis) for s in sources]
        return math.sqrt(sum(max(0.0, sigma2[s]) / n for s, n in zip(sources, levels, strict=True)))

    alone = [[s for s in subsets if s - model == source] for source in (template, draw, item)]
    return VarianceComponents(
        *(sigma2.get(s) for s in named),
        sum(sigma2[s] for s in subsets if s not in named),
        sum(sigma2.values()),
        *(error(sources) if sources else None for sources in alone),
        error([s for s in subsets if len(s - model) > 1]),
    )


def _mean_square(y: np.ndarray, factors: frozenset[int]) -> float:
    """Mean square of the interaction of these axes (of the main effect, for one)."""
    effect = y.mean(axis=tuple(axis for axis in range(y.ndim) if axis not in factors), keepdims=True)
    for axis in factors:  # centring along every axis leaves the interaction alone
        effect = effect - effect.mean(axis=axis, keepdims=True)
    freedom = math.prod(y.shape[axis] - 1 for axis in factors)
    return float((effect**2).sum()) * (y.size / effect.size) / freedom


def _paired(a: ArrayLike, b: ArrayLike, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    a_N, b_N = np.asarray(a, dtype), np.asarray(b, dtype)
    if a_N.shape != b_N.shape or a_N.ndim != 1 or len(a_N) == 0:
        raise ValueError("paired measures need the same units in the same order, and at least one")
    return a_N, b_N


def _columns(clusters: ArrayLike | None, *columns: ArrayLike) -> np.ndarray:
    """The columns as one array [D, C], a number standing for a constant column; rows of one cluster are summed, in
    sorted order of the clusters.
    """
    columns_ND = np.column_stack(np.broadcast_arrays(*(np.asarray(column, np.float64) for column in columns)))
    if clusters is None:
        return columns_ND
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.column_stack([np.bincount(index, weights=column) for column in columns_ND.T])


def _bootstrap(
    columns_DC: np.ndarray, estimate: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> tuple[float, float | None, float | None, np.ndarray]:
    """(estimate, low, high, the estimate of every resample) from `estimate` of column sums [B, C]; odd columns are
    denominators. A single row cannot be resampled: no interval, no resamples.
    """
    value = float(estimate(columns_DC.sum(axis=0, keepdims=True))[0])
    if len(columns_DC) < 2:
        return value, None, None, np.empty(0)
    sums_BC = _resampled_sums(columns_DC, resamples, seed)
    # A resample of units without a single scored token holds no ratio.
    estimates_B = estimate(sums_BC[(sums_BC[:, 1::2] > 0).all(axis=1)])
    low, high = np.quantile(estimates_B, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2]).tolist()
    return value, low, high, estimates_B


def _resampled_sums(columns_DC: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Column sums of `resamples` draws of D rows with replacement -> [resamples, C]. Deterministic in the seed."""
    generator = np.random.default_rng(seed)
    n = len(columns_DC)
    chunk = max(1, _CELLS // n)
    sums = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        draws_BD = generator.integers(0, n, size=(rows, n), dtype=np.int32)
        flat = (draws_BD + np.arange(rows, dtype=np.int64)[:, None] * n).ravel()
        sums.append(np.bincount(flat, minlength=rows * n).reshape(rows, n) @ columns_DC)
    return np.concatenate(sums)
