"""Repetition: each measure at its limit, against fractions counted by hand, and as datatrove computes them."""

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.clean.repetition import Repetition, repeated
from data.format.dialogue import Message
from data.pipeline.minhash import UnicodeWords
from recipes.loader import Section, dump_recipe, load_recipe


def say(*texts: str) -> list[Message]:
    return [Message("Ann", text) for text in texts]


def only(**limits: object) -> Repetition:
    """One measure alone, whatever the length."""
    none: dict[str, object] = {"max_repeated_messages": None, "max_repeated_message_characters": None}
    return Repetition.model_validate(
        {"min_words": 1, **none, "max_top_n_gram": {}, "max_repeated_n_grams": {}} | limits
    )


def test_repeated_messages() -> None:
    messages = say("yes", "no", "yes ", "yes")  # 2 of 4 repeat, 6 of 11 characters
    assert repeated(messages, only(max_repeated_messages=0.5)) is None
    assert repeated(messages, only(max_repeated_messages=0.49)) == "repeated messages"
    assert repeated(messages, only(max_repeated_message_characters=6 / 11)) is None
    assert repeated(messages, only(max_repeated_message_characters=0.54)) == "characters of repeated messages"


def test_the_most_frequent_n_gram_counts_when_it_stands_more_than_once() -> None:
    once, twice = say("do you like it"), say("do you like it", "do you not")  # "do you" twice: 12 of 24 characters
    assert repeated(once, only(max_top_n_gram={2: 0.01})) is None
    assert repeated(twice, only(max_top_n_gram={2: 0.5})) is None
    assert repeated(twice, only(max_top_n_gram={2: 0.49})) == "one 2-gram"


def test_repeated_n_grams() -> None:
    messages = say("one two three four five six", "one two three four five six seven eight")
    assert repeated(messages, only(max_repeated_n_grams={5: 0.4})) is None
    assert repeated(messages, only(max_repeated_n_grams={5: 0.2})) == "repeated 5-grams"


def test_short_dialogues_are_kept() -> None:
    messages = say(*["hello you"] * 24)
    assert repeated(messages, Repetition()) is None
    assert repeated([*messages, *messages], Repetition()) == "repeated messages"


@given(
    st.lists(
        st.lists(st.sampled_from(("a", "b", "c", "dd", "ee", "fff")), min_size=1, max_size=12).map(" ".join), min_size=1
    )
)
def test_of_repeated_n_grams_we_say_what_datatrove_says(texts: list[str]) -> None:
    limits = {5: 0.15, 7: 0.13, 10: 0.10}
    text = "".join(texts)  # it counts line breaks as characters; there are none
    theirs = GopherRepetitionFilter(None, None, None, None, (), tuple(limits.items()), language=UnicodeWords())
    assert (repeated(say(text), only(max_repeated_n_grams=limits)) is None) == (
        theirs.filter(Document(text, "d")) is True
    )


def test_limits_are_keys_of_a_recipe(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Recipe(Section):
        repetition: Repetition

    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text('repetition:\n  max_top_n_gram: {"2": 0.3}\n')
    recipe = load_recipe(Recipe, path)
    assert recipe.repetition.max_top_n_gram == {2: 0.3}
    path.write_text(dump_recipe(recipe))
    assert load_recipe(Recipe, path) == recipe
    with pytest.raises(ValidationError, match=r"found 2: 1\.5; expected words in a row"):
        Repetition(max_top_n_gram={2: 1.5})
    with pytest.raises(ValidationError, match="every measure is left out"):
        only()
