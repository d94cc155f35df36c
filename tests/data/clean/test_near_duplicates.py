"""The chance that near-duplicates are found, by its known values, and what is compared."""

import pytest

from data.clean.near_duplicates import NearDuplicates, compared_text
from data.format.dialogue import NARRATOR, Dialogue, Message


def test_the_chance_of_the_defaults() -> None:
    """The values that datatrove's documentation gives for 14 buckets of 8 hashes."""
    rule = NearDuplicates()
    assert rule.threshold == pytest.approx(0.72, abs=0.005)
    assert rule.chance(0.8) == pytest.approx(0.924, abs=0.0005)
    assert (rule.chance(0), rule.chance(1)) == (0, 1)
    assert rule.chance(0.95) > 0.9999 and rule.chance(0.4) < 0.01


def test_names_and_times_are_not_compared() -> None:
    one = Dialogue("1", (Message("Ann", "hi", 1.0), Message("Bob", "you")), "Ann")
    other = Dialogue("2", (Message("Eve", "hi"), Message("Ian", "you", 5.0)), "Ian", ("p",))
    assert compared_text(one) == compared_text(other) == "hi\nyou"


def test_the_definition_of_a_character_is_not_compared() -> None:
    said = (Message(NARRATOR, "Ann is an old friend. " * 50), Message("Ann", "hi"), Message("Bob", "you"))
    assert compared_text(Dialogue("1", said, "Ann")) == "hi\nyou"
    assert compared_text(Dialogue("1", said, NARRATOR)).startswith("Ann is an old friend.")
