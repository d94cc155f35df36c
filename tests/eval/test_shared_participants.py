"""What people in several dialogues do to a variance, against the sums written out."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, t

import eval.shared_participants
from eval.shared_participants import Dependence, SharedParticipants


def plainly(crowds: list[set[int]], influence: list[float]) -> Dependence:
    """The docstrings' formulas over all ordered pairs of dialogues."""
    counts = Counter(person for crowd in crowds for person in crowd)
    linking = {person for person, count in counts.items() if 1 < count < len(crowds)}
    if not linking:
        return Dependence()
    sizes = [counts[person] for person in linking] + [1] * sum(not crowd & linking for crowd in crowds)
    n_people = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    own = sum(one**2 for one in influence)
    if own == 0:
        return Dependence(1.0, n_people)
    total = 0.0
    for i, (crowd, here) in enumerate(zip(crowds, influence, strict=True)):
        for j, (others, there) in enumerate(zip(crowds, influence, strict=True)):
            total += here * there * (i == j or bool(crowd & others & linking))
    return Dependence(max(1.0, total * n_people / (n_people - 1) / own), n_people)


@given(
    participants=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=12),
    data=st.data(),
    at_once=st.sampled_from([1, 5, 4_000_000]),
)
def test_the_dependence_is_the_sum_over_pairs_that_share_somebody(
    participants: list[list[int]], data: st.DataObject, at_once: int
) -> None:
    numbers = data.draw(st.lists(st.sampled_from(range(len(participants))), min_size=1, unique=True))
    influence = [float(data.draw(st.integers(-3, 3))) for _ in numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval.shared_participants, "_PAIRS_AT_ONCE", at_once)
        found = SharedParticipants(participants).dependence(np.array(influence), np.array(numbers))
    expected = plainly([set(participants[number]) for number in numbers], influence)
    assert (found.variance_factor, found.n_people) == pytest.approx((expected.variance_factor, expected.n_people))


def test_one_person_in_two_of_three_dialogues() -> None:
    """By hand: sizes 2 and 1 are 9 / 5 people; of the sum (1 + 2)^2 + 3^2 = 18 over 14, times 1.8 / 0.8."""
    found = SharedParticipants([[7], [7, 8], [9]]).dependence(np.array([1.0, 2.0, 3.0]), np.arange(3))
    assert (found.variance_factor, found.n_people) == pytest.approx((18 / 14 * 1.8 / 0.8, 1.8))


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("n_people", [1.2, 3.0, 40.0])
def test_the_width_grows_with_the_variance_and_with_few_people(level: float, n_people: float) -> None:
    upper = (1 + level) / 2
    wide = t.ppf(upper, max(1.0, n_people - 1)) / norm.ppf(upper)
    assert Dependence(1.0, n_people).width_factor(level) == pytest.approx(wide)
    assert Dependence(4.0, n_people).width_factor(level) == pytest.approx(2 * wide)
    assert Dependence(1.0, math.inf).width_factor(level) == 1
