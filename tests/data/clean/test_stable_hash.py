"""Hashes that must never change: splits, names and characters depend on them."""

from data.clean.stable_hash import pseudonym, stable_hash


def test_values_are_fixed() -> None:
    assert stable_hash("a", 1) == 14_991_208_848_150_225_567
    assert stable_hash("a1") != stable_hash("a", "1") != stable_hash("", "a1")
    assert pseudonym("corpus", "W1") == "2bc93e07f4c87262"
