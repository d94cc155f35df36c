"""Tests of eval/statistics.py."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t, wilcoxon

from eval.shared_participants import SharedParticipants
from eval.statistics import (
    FROM_0_TO_1,
    Bootstrap,
    FloatArray,
    _WeightedAuc,
    cluster_index,
    minimum_detectable_effect,
    paired_tests,
    wilson_interval,
)
from tests.eval.estimates import excludes, has_interval

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
        covered += not excludes(estimate, 1.0)
    assert 0.78 < covered / 150 < 0.97


def test_ratio_weights_by_the_denominator_and_ignores_empty_clusters() -> None:
    estimate = FAST.ratio([2.0, 9.0, 0.0], [1.0, 3.0, 0.0], ["a", "b", "c"])
    assert estimate.value == pytest.approx(11 / 4)
    assert estimate.n == 4 and estimate.n_clusters == 2


def test_no_interval_is_invented() -> None:
    assert FAST.ratio([], []).value is None
    assert FAST.ratio([], []).note == "no observations"
    single = FAST.mean([3.0])
    assert single.value == 3.0 and not has_interval(single) and "2 units" in single.note
    constant = FAST.mean([1.0] * 30)
    assert constant.value == 1.0 and not has_interval(constant) and "equal" in constant.note


def test_two_units_have_the_width_of_students_interval() -> None:
    """The resamples of two units reach from one to the other, Student's interval 6.35 times as far to each side."""
    estimate = FAST.mean([1.0, 2.0])
    reach = 0.5 * math.sqrt(2) * t.isf(0.025, 1) / norm.isf(0.025)
    assert (estimate.low, estimate.high) == pytest.approx((1.5 - reach, 1.5 + reach))
    assert t.interval(0.95, 1, 1.5, 0.5)[0] < 1.5 - reach < 1.5 - 0.7 * t.isf(0.025, 1) * 0.5
    assert FAST.mean([1.0, 2.0], limits=(0.0, 2.0)).low == 0 and FAST.mean([1.0, 2.0], limits=(0.0, 2.0)).high == 2


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_of_few_units_cover_the_truth(n: int) -> None:
    """Without Student's width 54%, 74%, 85% and 89% of these 95% intervals hold it."""
    rng = np.random.default_rng(n)
    found = [Bootstrap(n_resamples=200, seed=trial).mean(rng.normal(1, 1, n)) for trial in range(200)]
    assert sum(not excludes(estimate, 1.0) for estimate in found) / len(found) > 0.9


def test_many_units_have_the_bootstraps_interval() -> None:
    assert FAST.few_clusters_factor(1000) == pytest.approx(1, abs=0.002)
    assert FAST.few_clusters_factor(10) == pytest.approx(math.sqrt(10 / 9) * 2.262 / 1.96, rel=1e-3)
    assert Bootstrap(confidence_level=0.5).few_clusters_factor(2) == pytest.approx(math.sqrt(2) / 0.6745, rel=1e-3)


def test_a_figure_that_most_resamples_lack_has_no_interval() -> None:
    """The one positive is in 63% of them."""
    estimate = FAST.auc(np.arange(20.0), np.arange(20) // 19, np.arange(20))
    assert estimate.value == 1 and not has_interval(estimate) and "too few resamples" in estimate.note


def test_the_percentile_interval_where_no_resample_reaches_the_point() -> None:
    """The share of distinct clusters among n draws: its mean is 1 - 1/e, n times its variance 1/e - 2/e^2."""

    def distinct(weight_RC: FloatArray) -> FloatArray:
        return np.asarray((weight_RC > 0).mean(axis=1))

    found = Bootstrap(n_resamples=4000, seed=1).interval(distinct, None, 400, 400, (0.0, 1.0))
    assert found.low is not None and found.high is not None and found.method.startswith("percentile")
    deviation = math.sqrt((math.exp(-1) - 2 * math.exp(-2)) / 400)
    assert (found.low + found.high) / 2 == pytest.approx(1 - math.exp(-1), abs=0.004)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * deviation, rel=0.07)


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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_a_cluster_that_was_drawn_twice_counts_twice(rows: list[tuple[int, int, int]], data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    again = [row for row in rows for _ in range(drawn[row[2]])]
    score_N, label_N, index_N = (np.array(column) for column in zip(*rows, strict=True))
    (found,) = _WeightedAuc(score_N.astype(float), label_N, index_N)(np.array([drawn], dtype=float))
    if len({label for _, label, _ in again}) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(brute_force_auc([float(s) for s, _, _ in again], [y for _, y, _ in again]))


def test_a_dialogue_without_which_there_is_no_figure_has_no_influence() -> None:
    people = SharedParticipants([[number // 2] for number in range(8)])

    def mean(weight_RC: FloatArray) -> FloatArray:
        mean_R = weight_RC @ np.arange(8.0) / weight_RC.sum(axis=1)
        return np.asarray(np.where(weight_RC[:, 3] == 0, np.nan, mean_R))

    found = Bootstrap(people=people)._dependence(mean, np.arange(8), 8)
    influence_C = np.where(np.arange(8) == 3, 0, np.arange(8) - (28 - 3) / 7)
    assert found.variance_factor == pytest.approx(people.dependence(influence_C, np.arange(8)).variance_factor)


def test_auc_interval_and_difference() -> None:
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(60), 5)
    labels = rng.integers(0, 2, 300)
    good, noise = labels + rng.normal(0, 0.8, 300), rng.normal(0, 1, 300)
    auc = FAST.auc(good, labels, clusters.tolist())
    difference = FAST.auc(good, labels, clusters.tolist(), minus_N=noise)
    noise_auc = FAST.auc(noise, labels, clusters.tolist())
    assert excludes(auc, 0.5) and excludes(difference, 0.0) and not excludes(noise_auc, 0.5)
    assert auc.value is not None and noise_auc.value is not None
    assert difference.value == pytest.approx(auc.value - noise_auc.value)


def test_the_difference_of_two_areas_is_paired() -> None:
    """Two scores that are almost the same: their difference is known far better than either area."""
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 2, 300)
    score = labels + rng.normal(0, 1.5, 300)
    area = FAST.auc(score, labels, np.arange(300))
    difference = FAST.auc(score, labels, np.arange(300), minus_N=score + rng.normal(0, 0.05, 300))
    assert area.low is not None and area.high is not None
    assert difference.low is not None and difference.high is not None
    assert difference.high - difference.low < 0.2 * (area.high - area.low)


@pytest.mark.parametrize("sign", [1, -1])
def test_paired_tests_are_two_sided(sign: int) -> None:
    """As likely to find a loss as a win: seven of one sign have p = 2 / 2**7 in both exact tests."""
    tests = paired_tests([sign * size for size in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)])
    assert (tests.sign_p, tests.wilcoxon_p) == pytest.approx((2 / 2**7, 2 / 2**7))


def test_proportion_has_an_interval_at_the_edges() -> None:
    none = FAST.proportion([False] * 20)
    assert none.value == 0 and none.low == pytest.approx(0, abs=1e-9)
    assert none.high == pytest.approx(0.161, abs=0.002)  # Wilson
    assert FAST.proportion([]).value is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_has_an_interval_at_the_edges_too(value: float) -> None:
    clusters = np.arange(20) // 2
    assert FAST.share([value] * 20, clusters) == FAST.proportion([value == 1] * 20, clusters)
    some = np.array([value] * 19 + [0.5])
    assert FAST.share(some, clusters) == FAST.mean(some, clusters, FROM_0_TO_1)
    assert FAST.share([]).value is None and not has_interval(FAST.share([0.5] * 20))


def test_paired_tests() -> None:
    tests = paired_tests([1.0] * 9 + [-1.0] + [0.0] * 3)
    assert (tests.wins, tests.losses, tests.ties) == (9, 1, 3)
    assert tests.sign_p == pytest.approx(2 * (1 + 10) / 2**10)
    assert tests.wilcoxon_p is not None and tests.wilcoxon_p < 0.05
    assert paired_tests([0.0, 0.0]).sign_p is None


@pytest.mark.parametrize(("k", "n", "level"), [(0, 5, 0.95), (3, 8, 0.9), (40, 41, 0.95), (7, 7, 0.5)])
def test_wilson_interval(k: int, n: int, level: float) -> None:
    expected = binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson_interval(k / n, n, level) == pytest.approx((expected.low, expected.high))


def test_equal_trials_of_a_cluster_are_one_trial() -> None:
    often = FAST.proportion(np.repeat(np.arange(10) % 2 == 0, 20), np.repeat(np.arange(10), 20))
    once = FAST.proportion(np.arange(10) % 2 == 0)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    assert (often.n, often.n_clusters) == (200, 10)


@pytest.mark.parametrize("successes", [0, 20])
def test_trials_that_all_end_alike_count_once_a_cluster(successes: int) -> None:
    """They show no variance, neither within clusters nor between them."""
    often = FAST.proportion(np.arange(20) < successes, np.arange(20) // 5)
    once = FAST.proportion(np.arange(4) < successes)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.method != once.method == "Wilson"


def test_the_trials_of_a_single_cluster_are_one_trial() -> None:
    found = FAST.proportion([True, True, False, True], [7, 7, 7, 7])
    assert (found.low, found.high) == pytest.approx(wilson_interval(0.75, 1, 0.95))


def test_independent_trials_in_few_clusters_are_widened() -> None:
    """Two clusters of 100 trials with 50 successes each: equal shares do not prove that trials are independent."""
    found = FAST.proportion(np.arange(200) % 2 == 0, np.arange(200) // 100)
    factor = 2 * (t.isf(0.025, 1) / norm.isf(0.025)) ** 2
    assert (found.low, found.high) == pytest.approx(wilson_interval(0.5, 200 / factor, 0.95))


def test_ties_count_in_the_signed_ranks() -> None:
    differences = [3.0, 2.0, -1.0, 0.0, 0.0, 4.0, 5.0, -2.5, 6.0]
    found = paired_tests(differences).wilcoxon_p
    assert found == pytest.approx(wilcoxon(differences, zero_method="pratt").pvalue)
    assert found != pytest.approx(wilcoxon(differences, zero_method="wilcox").pvalue)


def test_minimum_detectable_effect_of_two_values() -> None:
    """Their deviation is 1 / sqrt(2), the mean's 1 / 2."""
    quantiles = norm.ppf(0.975) + norm.ppf(0.8)
    assert minimum_detectable_effect([0.0, 1.0]) == pytest.approx(quantiles / 2)
    assert minimum_detectable_effect([0.0, 1.0], variance_factor=4.0) == pytest.approx(quantiles)
    assert minimum_detectable_effect([0.0, 1.0], 0.9, 0.1) == pytest.approx((norm.ppf(0.95) + norm.ppf(0.9)) / 2)


def test_minimum_detectable_effect_is_found_that_often() -> None:
    rng = np.random.default_rng(9)
    effect = minimum_detectable_effect(rng.normal(0, 1, 100))
    assert effect is not None
    found = [abs(x.mean()) > 1.96 * x.std(ddof=1) / 10 for x in rng.normal(effect, 1, (2000, 100))]
    assert np.mean(found) == pytest.approx(0.8, abs=0.1)
    assert minimum_detectable_effect([1.0]) is None


def test_values_without_spread_have_no_detectable_effect() -> None:
    """All replies tied, or all won: nothing is known about the spread of other samples."""
    assert minimum_detectable_effect([0.5] * 30) is None


def test_cluster_index_numbers_in_order_of_appearance() -> None:
    index, n, found = cluster_index(["b", "a", "b"], 3)
    assert index.tolist() == [0, 1, 0] and n == 2
    assert found is not None and found.tolist() == ["b", "a"]


def coverage(participants: list[list[int]], clustered: bool, n_trials: int = 150) -> float:
    """How often a 95% interval of a mean over dialogues holds the truth, when every person has an own level."""
    n_people = 1 + max(person for people in participants for person in people)
    members = [np.array(people) for people in participants]
    people = SharedParticipants(participants) if clustered else None
    numbers, hits = np.arange(len(participants)), 0
    for seed in range(n_trials):
        rng = np.random.default_rng(seed)
        level_P = rng.normal(size=n_people)
        values_N = np.array([level_P[m].sum() for m in members]) + rng.normal(size=len(members))
        estimate = Bootstrap(n_resamples=200, seed=seed, people=people).mean(values_N, numbers)
        assert estimate.low is not None and estimate.high is not None
        hits += estimate.low <= 0 <= estimate.high
    return hits / n_trials


def test_intervals_cover_when_people_have_several_dialogues() -> None:
    """Nominal is 0.95; of 150 trials two standard errors are 0.036."""
    one_person = [[number // 8] for number in range(240)]
    assert coverage(one_person, clustered=False) < 0.7
    assert coverage(one_person, clustered=True) > 0.89
    rng = np.random.default_rng(5)
    pairs = [rng.choice(60, 2, replace=False).tolist() for _ in range(240)]  # all linked: one component
    assert coverage(pairs, clustered=False) < 0.8
    assert coverage(pairs, clustered=True) > 0.89


def test_pieces_of_a_dialogue_are_one_unit() -> None:
    """Ten dialogues in 200 pieces, whose values depend on each other within a dialogue."""
    rng = np.random.default_rng(0)
    dialogue_N = np.repeat(np.arange(10), 20)
    values_N = rng.normal(size=10)[dialogue_N] + 0.3 * rng.normal(size=200)
    pieces, whole = FAST.mean(values_N), FAST.mean(values_N, dialogue_N)
    assert (pieces.n_clusters, whole.n_clusters) == (200, 10)
    assert whole.high - whole.low > 2.5 * (pieces.high - pieces.low)  # type: ignore[operator]


def test_nobody_shared_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    values_N = rng.normal(size=80)
    alone = SharedParticipants([[number, 80] for number in range(80)])  # 80 is in all: the character's own id
    for people in (alone, SharedParticipants([[]] * 80)):
        assert Bootstrap(300, seed=3, people=people).mean(values_N, np.arange(80)) == FAST.mean(values_N, np.arange(80))


def test_shared_people_widen_every_statistic() -> None:
    rng = np.random.default_rng(2)
    person_N = np.arange(200) // 20
    people = SharedParticipants(person_N[:, None].tolist())
    level_N = rng.normal(size=10)[person_N]
    score_N, numbers = level_N + 0.2 * rng.normal(size=200), np.arange(200)
    label_N = (level_N + 0.2 * rng.normal(size=200) > 0).astype(np.int64)
    linked = Bootstrap(300, seed=3, people=people)
    for of in (
        lambda b: b.proportion(label_N == 1, numbers),
        lambda b: b.auc(np.where(label_N, score_N, level_N[::-1]), label_N, numbers),
        lambda b: b.mean(score_N, numbers),
    ):
        wide, narrow = of(linked), of(FAST)
        assert wide.value == narrow.value and wide.variance_factor > 2
        assert wide.high - wide.low > 1.4 * (narrow.high - narrow.low)
        assert narrow.variance_factor == 1
    assert linked.proportion(label_N == 1, numbers).low >= 0
    tests, plain = linked.paired_tests(score_N + 0.3, numbers), FAST.paired_tests(score_N + 0.3, numbers)
    assert tests.wins == plain.wins and tests.sign_p > plain.sign_p  # type: ignore[operator]


def test_the_interval_is_widened_by_what_the_sums_over_pairs_say() -> None:
    """Of a mean, a dialogue's influence is its distance from it."""
    values_N, numbers = np.random.default_rng(4).normal(size=30), np.arange(30)
    for linked in (10, 24):
        people = SharedParticipants([[0] if number < linked else [number] for number in range(30)])
        wide, narrow = Bootstrap(300, seed=3, people=people).mean(values_N, numbers), FAST.mean(values_N, numbers)
        dependence = people.dependence(values_N - values_N.mean(), numbers)
        assert wide.variance_factor == pytest.approx(dependence.variance_factor)
        factor = dependence.width_factor(0.95) / FAST.few_clusters_factor(30)
        assert factor > 1 and "widened" in wide.method
        assert wide.value is not None and wide.low is not None and wide.high is not None
        assert narrow.low is not None and narrow.high is not None
        assert wide.low == pytest.approx(wide.value - (wide.value - narrow.low) * factor)
        assert wide.high == pytest.approx(wide.value + (narrow.high - wide.value) * factor)


@pytest.mark.parametrize("top", [False, True])
def test_a_widened_interval_stays_within_what_the_figure_can_be(top: bool) -> None:
    people = Bootstrap(300, seed=3, people=SharedParticipants([[number // 10] for number in range(40)]))
    values_N = (np.arange(40) < 8) == (not top)
    estimate = people.share(values_N.astype(float), np.arange(40))
    assert (estimate.high if top else estimate.low) == top


def test_a_difference_of_areas_may_be_negative() -> None:
    people = Bootstrap(300, seed=3, people=SharedParticipants([[number // 10] for number in range(40)]))
    label_N = np.arange(40) % 2
    noise_N = np.random.default_rng(0).normal(size=40)
    found = people.auc(noise_N, label_N, np.arange(40), minus_N=label_N + 0.1 * noise_N)
    assert found.value is not None and found.low is not None and found.high is not None
    assert -1 <= found.low < found.value < found.high < 0


def test_shared_people_temper_shares_and_tests() -> None:
    numbers = np.arange(60)
    people = SharedParticipants([[number // 6] for number in range(60)])
    linked = Bootstrap(300, seed=3, people=people)
    wins_N = (numbers // 6) % 3 > 0
    dependence = people.dependence(wins_N - wins_N.mean(), numbers)
    share = linked.proportion(wins_N, numbers)
    width = dependence.width_factor(0.95)
    assert dependence.variance_factor > 3
    assert (share.low, share.high) == pytest.approx(wilson_interval(wins_N.mean(), 60 / width**2, 0.95))
    differences_N = np.where(wins_N, 2.0, -1.0)
    tests, plain = linked.paired_tests(differences_N, numbers), paired_tests(differences_N)
    for tempered, p in ((tests.sign_p, plain.sign_p), (tests.wilcoxon_p, plain.wilcoxon_p)):
        assert p is not None
        score = norm.isf(p / 2) / math.sqrt(dependence.variance_factor)
        assert tempered == pytest.approx(2 * norm.sf(score))
