"""Tests of eval/statistics.py."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.statistics import (
    Bootstrap,
    cluster_index,
    minimum_detectable_effect,
    paired_tests,
    proportion,
)

FAST = Bootstrap(n_resamples=300, seed=3)


def test_mean_is_exact_and_inside_its_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 200)
    estimate = FAST.mean(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low is not None and estimate.high is not None
    assert estimate.low < values.mean() < estimate.high
    # The half width of a 95% interval of a mean is 1.96 standard errors.
    standard_error = values.std(ddof=1) / math.sqrt(values.size)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.2)
    assert "BCa" in estimate.method and estimate.n == 200


def test_clusters_widen_the_interval_when_values_depend_on_each_other() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(20), 30)
    values = rng.normal(0, 1, 20)[clusters] + rng.normal(0, 0.1, clusters.size)
    alone, clustered = FAST.mean(values), FAST.mean(values, clusters.tolist())
    assert alone.low is not None and alone.high is not None
    assert clustered.low is not None and clustered.high is not None
    assert clustered.high - clustered.low > 3 * (alone.high - alone.low)
    assert clustered.n_clusters == 20 and clustered.n == 600


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    fast = Bootstrap(n_resamples=199, confidence_level=0.9)
    covered = 0
    for _ in range(150):
        clusters = np.repeat(np.arange(25), rng.integers(1, 9, 25))
        values = rng.normal(0, 1, 25)[clusters] + rng.normal(1, 1, clusters.size)
        estimate = fast.mean(values, clusters.tolist())
        covered += not estimate.excludes(1.0)
    assert 0.78 < covered / 150 < 0.97


def test_ratio_weights_by_the_denominator_and_ignores_empty_clusters() -> None:
    estimate = FAST.ratio([2.0, 9.0, 0.0], [1.0, 3.0, 0.0], ["a", "b", "c"])
    assert estimate.value == pytest.approx(11 / 4)
    assert estimate.n == 4 and estimate.n_clusters == 2


def test_no_interval_is_invented() -> None:
    assert FAST.ratio([], []).value is None
    assert FAST.ratio([], []).note == "no observations"
    single = FAST.mean([3.0])
    assert single.value == 3.0 and not single.has_interval and "2 units" in single.note
    constant = FAST.mean([1.0] * 30)
    assert constant.value == 1.0 and not constant.has_interval and "equal" in constant.note


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(5).normal(size=50)
    assert FAST.mean(values) == FAST.mean(values)
    assert FAST.mean(values) != Bootstrap(n_resamples=300, seed=4).mean(values)


def brute_force_auc(scores: list[float], labels: list[int]) -> float:
    pairs = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive, negative in itertools.product(
            [s for s, y in zip(scores, labels, strict=True) if y == 1],
            [s for s, y in zip(scores, labels, strict=True) if y == 0],
        )
    ]
    return sum(pairs) / len(pairs)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=30))
def test_auc_equals_the_count_of_pairs_with_ties(rows: list[tuple[int, int]]) -> None:
    scores, labels = [float(s) for s, _ in rows], [y for _, y in rows]
    estimate = Bootstrap(n_resamples=20).auc(np.array(scores), np.array(labels), list(range(len(rows))))
    if len(set(labels)) < 2:
        assert estimate.value is None and "one class" in estimate.note
    else:
        assert estimate.value == pytest.approx(brute_force_auc(scores, labels))


def test_auc_interval_and_difference() -> None:
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(60), 5)
    labels = rng.integers(0, 2, 300)
    good, noise = labels + rng.normal(0, 0.8, 300), rng.normal(0, 1, 300)
    auc = FAST.auc(good, labels, clusters.tolist())
    difference = FAST.auc(good, labels, clusters.tolist(), minus_N=noise)
    noise_auc = FAST.auc(noise, labels, clusters.tolist())
    assert auc.excludes(0.5) and difference.excludes(0.0) and not noise_auc.excludes(0.5)
    assert auc.value is not None and noise_auc.value is not None
    assert difference.value == pytest.approx(auc.value - noise_auc.value)


def test_proportion_has_an_interval_at_the_edges() -> None:
    none = proportion(0, 20)
    assert none.value == 0 and none.low == pytest.approx(0, abs=1e-9)
    assert none.high == pytest.approx(0.161, abs=0.002)  # Wilson
    assert proportion(0, 0).value is None


def test_paired_tests() -> None:
    tests = paired_tests([1.0] * 9 + [-1.0] + [0.0] * 3)
    assert (tests.wins, tests.losses, tests.ties) == (9, 1, 3)
    assert tests.sign_p == pytest.approx(2 * (1 + 10) / 2**10)
    assert tests.wilcoxon_p is not None and tests.wilcoxon_p < 0.05
    assert paired_tests([0.0, 0.0]).sign_p is None


def test_minimum_detectable_effect_is_found_that_often() -> None:
    rng = np.random.default_rng(9)
    effect = minimum_detectable_effect(rng.normal(0, 1, 100))
    assert effect is not None
    found = [abs(x.mean()) > 1.96 * x.std(ddof=1) / 10 for x in rng.normal(effect, 1, (2000, 100))]
    assert np.mean(found) == pytest.approx(0.8, abs=0.1)
    assert minimum_detectable_effect([1.0]) is None


def test_cluster_index_numbers_in_order_of_appearance() -> None:
    index, n = cluster_index(["b", "a", "b"], 3)
    assert index.tolist() == [0, 1, 0] and n == 2
