"""Confidence intervals by clustered bootstrap, paired tests, AUC.

Tokens and turns of a dialogue are dependent, so intervals resample *clusters* (whole dialogues, not the pieces of a
long one), not single values; if people take part in several dialogues, intervals are widened
(eval/shared_participants.py). With few clusters the bootstrap's intervals are too narrow (of two, half of the 95%
intervals of a mean miss it), so they get the width of Student's t. A statistic is a function of the cluster weights
(how often each cluster was drawn); `scipy.stats.bootstrap` does the resampling.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.shared_participants import Dependence, SharedParticipants

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# From the weights of clusters (R replicates, C clusters) to the statistic of each replicate (R).
WeightedStatistic = Callable[[FloatArray], FloatArray]

BATCH_ELEMENTS = 4_000_000  # of one (replicates, values) array: bounds the memory of a bootstrap to about 100 MB
MAX_VALUES_HELD = 100_000  # statistics hold at most this many values per replicate (an AUC holds each turn)
Limits = tuple[float, float]
ANY_NUMBER: Limits = (-math.inf, math.inf)
NOT_NEGATIVE: Limits = (0.0, math.inf)  # losses, lengths, divergences
FROM_0_TO_1: Limits = (0.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. `low` and `high` are None if there is no interval; `note` says why."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    n_clusters: int
    method: str
    confidence_level: float = 0.95
    note: str = ""
    variance_factor: float = 1.0
    """The variance relative to that of clusters without shared participants."""


@dataclass(frozen=True)
class Bootstrap:
    """Settings of intervals: number of resamples, confidence level in (0, 1), seed. With `people`, clusters are indices
    of dialogues, and intervals are widened for shared participants."""

    n_resamples: int = 2000
    confidence_level: float = 0.95
    seed: int = 0
    people: SharedParticipants | None = None

    def interval(
        self,
        statistic: WeightedStatistic,
        clusters_C: NDArray[Any] | None,
        n_clusters: int,
        n: int,
        limits: Limits,
    ) -> Estimate:
        """BCa interval of `statistic` over clusters, widened for few clusters (`few_clusters_factor`) and for shared
        participants. `n` is the number of single values, recorded in the estimate; `limits` bound the statistic.

        If BCa is undefined (no spread on one side), the percentile interval is used, and `method` says so.
        """
        point = _finite(float(statistic(np.ones((1, n_clusters)))[0]))
        if point is None:
            return Estimate(None, None, None, n, n_clusters, "none", self.confidence_level, "undefined on this sample")
        if n_clusters < 2:
            return Estimate(point, None, None, n, n_clusters, "none", self.confidence_level, "needs at least 2 units")
        low, high, method = self._limits(statistic, n_clusters, n)
        if low is None:
            return Estimate(point, None, None, n, n_clusters, "none", self.confidence_level, method)
        assert high is not None
        dependence = self._dependence(statistic, clusters_C, n_clusters)
        factor, alone = dependence.width_factor(self.confidence_level), self.few_clusters_factor(n_clusters)
        if factor > alone:
            method += ", widened for shared participants"
        factor = max(factor, alone)
        low, high = max(limits[0], point - (point - low) * factor), min(limits[1], point + (high - point) * factor)
        return Estimate(point, low, high, n, n_clusters, method, self.confidence_level, "", dependence.variance_factor)

    def few_clusters_factor(self, n_clusters: int) -> float:
        """The width of Student's interval of a mean of independent clusters relative to the bootstrap's, which takes
        normal quantiles and divides the variance by n instead of n - 1 (Hesterberg 2015, "What Teachers Should Know
        About the Bootstrap", section 4.1)."""
        from scipy.stats import norm, t

        tail = (1 - self.confidence_level) / 2
        return float(math.sqrt(n_clusters / (n_clusters - 1)) * t.isf(tail, n_clusters - 1) / norm.isf(tail))

    def _dependence(self, statistic: WeightedStatistic, clusters_C: NDArray[Any] | None, n_clusters: int) -> Dependence:
        """The effect of shared participants on the variance of the statistic, by the jackknife."""
        if self.people is None or clusters_C is None:
            return Dependence()
        left_out_C = np.empty(n_clusters)
        step = max(1, BATCH_ELEMENTS // MAX_VALUES_HELD)
        for start in range(0, n_clusters, step):
            numbers = np.arange(start, min(start + step, n_clusters))
            weight_RC = np.ones((numbers.size, n_clusters))
            weight_RC[np.arange(numbers.size), numbers] = 0
            left_out_C[numbers] = statistic(weight_RC)
        left_out_C = np.where(np.isfinite(left_out_C), left_out_C, np.nanmean(left_out_C))
        return self.people.dependence(left_out_C.mean() - left_out_C, np.asarray(clusters_C, dtype=np.int64))

    def _limits(self, statistic: WeightedStatistic, n_clusters: int, n: int) -> tuple[float | None, float | None, str]:
        """Lower and upper limit and the method, or (None, None, the reason)."""
        from scipy.stats import DegenerateDataWarning, bootstrap

        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", DegenerateDataWarning)  # handled below
            result = bootstrap(
                (np.arange(n_clusters),),
                lambda index_RC, axis: statistic(_draw_counts(index_RC, n_clusters)).reshape(index_RC.shape[:-1]),
                n_resamples=self.n_resamples,
                batch=max(1, BATCH_ELEMENTS // max(n_clusters, min(n, MAX_VALUES_HELD))),
                vectorized=True,
                confidence_level=self.confidence_level,
                method="BCa",
                rng=np.random.default_rng(self.seed),
            )
        draws_R = np.asarray(result.bootstrap_distribution, dtype=np.float64).reshape(-1)
        usable_R = draws_R[np.isfinite(draws_R)]
        if usable_R.size < 0.9 * draws_R.size:
            return None, None, "too few resamples are defined"
        if np.ptp(usable_R) == 0:
            return None, None, "all units are equal: the bootstrap gives no interval"
        low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
        if math.isfinite(low) and math.isfinite(high):
            return low, high, "BCa bootstrap over clusters"
        tail = (1 - self.confidence_level) / 2
        low, high = np.quantile(usable_R, [tail, 1 - tail])
        return float(low), float(high), "percentile bootstrap over clusters"

    def mean(
        self,
        values_N: Sequence[float] | FloatArray,
        clusters: Sequence[object] | IntArray | None = None,
        limits: Limits = ANY_NUMBER,
    ) -> Estimate:
        """Mean of `values_N`, which lie within `limits`; `clusters` is the cluster of each value (default: one
        each)."""
        values = np.asarray(values_N, dtype=np.float64)
        return self.ratio(values, np.ones_like(values), clusters, limits)

    def share(
        self, values_N: Sequence[float] | FloatArray, clusters: Sequence[object] | IntArray | None = None
    ) -> Estimate:
        """Mean of values from 0 to 1. If all are 0 or all are 1, resampling shows no spread, and the interval is that
        of `proportion`."""
        values = np.asarray(values_N, dtype=np.float64)
        is_constant = values.size > 0 and values[0] in (0, 1) and bool((values == values[0]).all())
        return self.proportion(values == 1, clusters) if is_constant else self.mean(values, clusters, FROM_0_TO_1)

    def ratio(
        self,
        numerators_N: Sequence[float] | FloatArray,
        denominators_N: Sequence[float] | FloatArray,
        clusters: Sequence[object] | IntArray | None = None,
        limits: Limits = ANY_NUMBER,
    ) -> Estimate:
        """sum(numerators) / sum(denominators), such as nats over tokens, which lies within `limits`; `n` is the sum of
        the denominators."""
        top, bottom = np.asarray(numerators_N, dtype=np.float64), np.asarray(denominators_N, dtype=np.float64)
        assert top.shape == bottom.shape
        if bottom.sum() == 0:
            return Estimate(None, None, None, 0, 0, "none", self.confidence_level, "no observations")
        index, n_clusters, found = cluster_index(clusters, top.size)
        top_C = np.bincount(index, weights=top, minlength=n_clusters)
        bottom_C = np.bincount(index, weights=bottom, minlength=n_clusters)
        present_C = bottom_C > 0  # a cluster without observations is not in the sample
        top_C, bottom_C = top_C[present_C], bottom_C[present_C]

        def statistic(weight_RC: FloatArray) -> FloatArray:
            return np.asarray((weight_RC @ top_C) / (weight_RC @ bottom_C))

        return self.interval(
            statistic,
            None if found is None else found[present_C],
            top_C.size,
            round(float(bottom.sum())),
            limits,
        )

    def proportion(
        self, successes_N: Sequence[bool] | NDArray[np.bool_], clusters: Sequence[object] | IntArray | None = None
    ) -> Estimate:
        """Share of successes with the Wilson interval, which is valid at 0 and 1, on the effective number of
        independent trials of the clusters (`_effective_trials`)."""
        successes = np.asarray(successes_N, dtype=np.float64)
        if successes.size == 0:
            return Estimate(None, None, None, 0, 0, "none", self.confidence_level, "no observations")
        share = float(successes.mean())
        index, n_clusters, found = cluster_index(clusters, successes.size)
        influence_C = np.bincount(index, weights=successes - share, minlength=n_clusters) / successes.size
        n_trials = self._effective_trials(successes.size, share, influence_C)
        dependence = Dependence()
        if self.people is not None and found is not None:
            dependence = self.people.dependence(influence_C, np.asarray(found, dtype=np.int64))
        width = dependence.width_factor(self.confidence_level)
        low, high = wilson_interval(share, n_trials / width**2, self.confidence_level)
        is_plain = n_trials == successes.size and width == 1
        method = "Wilson" if is_plain else "Wilson on the effective number of trials"
        return Estimate(
            share, low, high, successes.size, n_clusters, method, self.confidence_level, "",
            dependence.variance_factor,
        )  # fmt: skip

    def _effective_trials(self, n: int, share: float, influence_C: FloatArray) -> float:
        """The number of independent trials with the variance that the influences of the clusters show.

        A single cluster, and trials that all end alike, show no variance between clusters: each cluster is one trial.
        For few clusters the variance is multiplied as in `few_clusters_factor`, but a cluster remains one trial.
        """
        n_clusters = influence_C.size
        if n_clusters == n:
            return n
        if n_clusters == 1 or share in (0, 1):
            return n_clusters
        factor = max(1.0, float((influence_C**2).sum()) * n / (share * (1 - share)))
        return max(min(n_clusters, n / factor), n / (factor * self.few_clusters_factor(n_clusters) ** 2))

    def paired_tests(
        self, differences_N: Sequence[float] | FloatArray, clusters: Sequence[object] | IntArray | None = None
    ) -> "PairedTests":
        """Exact sign test and Wilcoxon signed-rank test of paired differences, one a cluster.

        For shared participants, the normal scores of the p values are divided by the factor by which they increase the
        standard error of the mean sign.
        """
        tests = paired_tests(differences_N)
        sign = self.mean(np.sign(np.asarray(differences_N, dtype=np.float64)), clusters)
        if sign.variance_factor == 1 or tests.sign_p is None or tests.wilcoxon_p is None:
            return tests
        scale = math.sqrt(sign.variance_factor)
        return replace(tests, sign_p=_tempered(tests.sign_p, scale), wilcoxon_p=_tempered(tests.wilcoxon_p, scale))

    def auc(
        self,
        scores_N: FloatArray,
        labels_N: IntArray,
        clusters: Sequence[object] | IntArray,
        minus_N: FloatArray | None = None,
    ) -> Estimate:
        """AUC with ties counted half; with `minus_N` the difference of the AUCs of `scores_N` and `minus_N`."""
        labels = np.asarray(labels_N)
        if len(set(labels.tolist())) < 2:
            note = "only one class is present: AUC is undefined"
            return Estimate(None, None, None, labels.size, len(set(clusters)), "none", self.confidence_level, note)
        index, n_clusters, found = cluster_index(clusters, labels.size)
        first = _WeightedAuc(scores_N, labels, index)
        second = None if minus_N is None else _WeightedAuc(minus_N, labels, index)

        def statistic(weight_RC: FloatArray) -> FloatArray:
            return first(weight_RC) if second is None else first(weight_RC) - second(weight_RC)

        limits = FROM_0_TO_1 if second is None else (-1.0, 1.0)
        return self.interval(statistic, found, n_clusters, labels.size, limits)


class _WeightedAuc:
    """Mann-Whitney AUC as a function of cluster weights."""

    def __init__(self, scores_N: FloatArray, labels_N: IntArray, index_N: IntArray) -> None:
        order_N = np.argsort(scores_N, kind="stable")
        sorted_N = np.asarray(scores_N, dtype=np.float64)[order_N]
        # start of each group of equal scores
        self.starts_U = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
        self.positive_N = np.asarray(labels_N)[order_N] == 1
        self.index_N = index_N[order_N]

    def __call__(self, weight_RC: FloatArray) -> FloatArray:
        weight_RN = weight_RC[:, self.index_N]
        positive_RU = np.add.reduceat(weight_RN * self.positive_N, self.starts_U, axis=1)
        negative_RU = np.add.reduceat(weight_RN * ~self.positive_N, self.starts_U, axis=1)
        below_RU = np.cumsum(negative_RU, axis=1) - 0.5 * negative_RU
        with np.errstate(invalid="ignore", divide="ignore"):
            pairs_R = positive_RU.sum(axis=1) * negative_RU.sum(axis=1)
            return np.asarray((positive_RU * below_RU).sum(axis=1) / pairs_R)


def wilson_interval(share: float, n_trials: float, confidence_level: float) -> tuple[float, float]:
    """Wilson score interval of a share of `n_trials` independent trials (not necessarily an integer)."""
    from scipy.stats import norm

    z2 = float(norm.isf((1 - confidence_level) / 2)) ** 2
    middle = (share + z2 / (2 * n_trials)) / (1 + z2 / n_trials)
    half = math.sqrt(z2 * (share * (1 - share) / n_trials + z2 / (4 * n_trials**2))) / (1 + z2 / n_trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def _tempered(p: float, scale: float) -> float:
    """The two-sided p value with the normal score of `p` divided by `scale`."""
    from scipy.stats import norm

    return float(2 * norm.sf(norm.isf(p / 2) / scale))


@dataclass(frozen=True)
class PairedTests:
    """Two-sided tests of paired differences. The sign test omits ties, Wilcoxon's keeps them (Pratt)."""

    wins: int
    losses: int
    ties: int
    sign_p: float | None  # exact binomial
    wilcoxon_p: float | None


def paired_tests(differences_N: Sequence[float] | FloatArray) -> PairedTests:
    """Exact sign test and Wilcoxon signed-rank test of independent paired differences."""
    from scipy.stats import binomtest, wilcoxon

    differences = np.asarray(differences_N, dtype=np.float64)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    ties = differences.size - wins - losses
    if wins + losses == 0:
        return PairedTests(wins, losses, ties, None, None)
    sign_p = float(binomtest(wins, wins + losses, 0.5).pvalue)
    return PairedTests(wins, losses, ties, sign_p, float(wilcoxon(differences, zero_method="pratt").pvalue))


def minimum_detectable_effect(
    values_N: Sequence[float] | FloatArray,
    power: float = 0.8,
    significance: float = 0.05,
    variance_factor: float = 1.0,
) -> float | None:
    """Smallest true shift of the mean that a two-sided z-test on `values_N` detects with probability `power`; None for
    values without spread. `variance_factor` multiplies the variance of the mean of independent values."""
    from scipy.stats import norm

    values = np.asarray(values_N, dtype=np.float64)
    if values.size < 2 or np.ptp(values) == 0:
        return None
    standard_error = float(values.std(ddof=1)) * math.sqrt(variance_factor / values.size)
    return float(norm.ppf(1 - significance / 2) + norm.ppf(power)) * standard_error


def cluster_index(clusters: Sequence[object] | IntArray | None, n: int) -> tuple[IntArray, int, NDArray[Any] | None]:
    """Number the clusters 0..C-1: (index of each value's cluster, C, the clusters in that order)."""
    if clusters is None:
        return np.arange(n), n, None
    assert len(clusters) == n
    if isinstance(clusters, np.ndarray):
        found, index_N = np.unique(clusters, return_inverse=True)
        return index_N, found.size, found
    numbers: dict[object, int] = {}
    index_N = np.fromiter((numbers.setdefault(cluster, len(numbers)) for cluster in clusters), np.int64, n)
    return index_N, len(numbers), np.array(list(numbers))


def _draw_counts(index_RC: IntArray, n_clusters: int) -> FloatArray:
    """How often each cluster occurs in each row of resampled cluster indices."""
    rows = index_RC.reshape(-1, index_RC.shape[-1])
    offset_R1 = np.arange(rows.shape[0])[:, None] * n_clusters
    flat = np.bincount((rows + offset_R1).reshape(-1), minlength=rows.shape[0] * n_clusters)
    return flat.reshape(rows.shape[0], n_clusters).astype(np.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
