"""Repetition filters of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1).

datatrove's filter is for web pages: its most frequent n-gram may occur once, which would reject every short dialogue.
Messages take the place of lines and paragraphs.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Self

from pydantic import Field, field_validator, model_validator

from data.format.dialogue import Message
from recipes.loader import Section


class Repetition(Section):
    """Leave out dialogues with more repetition; null or {} disables a measure. The defaults are Gopher's for web pages,
    except for repeated messages: people say "yes" more than once."""

    # Shorter dialogues are kept: in them a few repeated words are a large share.
    min_words: int = Field(default=50, ge=1)
    # Share of messages that repeat an earlier one.
    max_repeated_messages: float | None = Field(default=0.5, gt=0, le=1)
    # The same by characters.
    max_repeated_message_characters: float | None = Field(default=0.3, gt=0, le=1)
    # Share of characters in the most frequent n-gram, which must occur more than once; n is quoted in a recipe:
    # {"2": 0.2}.
    max_top_n_gram: dict[int, float] = Field(default={2: 0.20, 3: 0.18, 4: 0.16})
    # Share of characters in all repeated n-grams.
    max_repeated_n_grams: dict[int, float] = Field(default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})

    @field_validator("max_top_n_gram", "max_repeated_n_grams")
    @classmethod
    def _fractions(cls, limits: dict[int, float]) -> dict[int, float]:
        for n, limit in limits.items():
            if n < 1 or not 0 < limit <= 1:
                raise ValueError(f"found {n}: {limit}; expected words in a row: a fraction over 0 and up to 1")
        return limits

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        of_messages = (self.max_repeated_messages, self.max_repeated_message_characters)
        if of_messages == (None, None) and not self.max_top_n_gram and not self.max_repeated_n_grams:
            raise ValueError("every measure is left out, so all would pass; leave the section out")
        return self


def repeated(messages: Sequence[Message], limits: Repetition) -> str | None:
    """The measure that exceeds its limit, or None."""
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_duplicates

    texts = [message.text.strip() for message in messages]
    words = [word for text in texts for word in text.split()]
    if len(words) < limits.min_words:
        return None
    n_characters = max(1, sum(map(len, texts)))
    n_repeated, repeated_characters = find_duplicates(texts)
    if limits.max_repeated_messages is not None and n_repeated > limits.max_repeated_messages * len(texts):
        return "repeated messages"
    limit = limits.max_repeated_message_characters
    if limit is not None and repeated_characters > limit * n_characters:
        return "characters of repeated messages"
    for n, limit in limits.max_top_n_gram.items():
        if _characters_of_top(words, n) > limit * n_characters:
            return f"one {n}-gram"
    for n, limit in limits.max_repeated_n_grams.items():
        if find_all_duplicate(words, n) > limit * n_characters:
            return f"repeated {n}-grams"
    return None


def _characters_of_top(words: Sequence[str], n: int) -> int:
    """Characters of all occurrences of the most frequent n-gram (the longest of equals)."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    most = max(counts.values(), default=1)
    if most == 1:
        return 0
    return most * max(len(" ".join(n_gram)) for n_gram, count in counts.items() if count == most)
