"""The facts of the recall probe: kinds of facts, their statements and questions, and lists of values.

The values are common words, most of them one token in a small vocabulary; eval/parts/recall.py selects the usable
ones for a tokenizer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """One speaker says `statement` and later `question`; the other says `answer` and the value."""

    statement: str  # with {value} after a space
    question: str
    answer: str


@dataclass(frozen=True)
class FactKind:
    """A kind of fact. `words`: its values, separated by spaces, each valid in every statement and answer."""

    name: str
    words: str
    wordings: tuple[Wording, ...]

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.words.split())


_PEOPLE = (
    "John Mary Peter Sarah David Michael Robert Emma Daniel Thomas James Paul George Mark Steven Kevin Brian Frank "
    "Jack Anna Julia Laura Alice Susan Linda Karen Lisa Maria Helen Nancy Rachel Diane"
)
_PLACES = (
    "London Boston Chicago Seattle Texas Florida California Denver Dallas Houston Canada Japan China Atlanta Rome "
    "England Brazil Paris Germany Spain Italy France India Mexico Russia Miami Portland Australia Toronto Berlin"
)

FACT_KINDS = (
    FactKind(
        "brother",
        _PEOPLE,
        (
            Wording("My brother's name is {value}.", "Do you remember my brother's name?", "Your brother's name is"),
            Wording("I have a brother called {value}.", "What is my brother called?", "Your brother is called"),
        ),
    ),
    FactKind(
        "color",
        "red blue green yellow orange pink black white brown grey gold purple gray silver",
        (
            Wording("My favorite color is {value}.", "What is my favorite color?", "Your favorite color is"),
            Wording("The color I like most is {value}.", "Which color do I like most?", "The color you like most is"),
        ),
    ),
    FactKind(
        "food",
        "pizza pasta chicken steak fish bread cheese chocolate cake cookies fruit sushi rice soup salad burgers "
        "bacon turkey salmon potatoes eggs beef pork beans corn tacos",
        (
            Wording("My favorite food is {value}.", "What is my favorite food?", "Your favorite food is"),
            Wording("What I eat most is {value}.", "What do I eat most?", "What you eat most is"),
        ),
    ),
    FactKind(
        "home",
        _PLACES,
        (
            Wording("I live in {value}.", "Where do I live?", "You live in"),
            Wording("I grew up in {value}.", "Do you remember where I grew up?", "You grew up in"),
        ),
    ),
    FactKind(
        "job",
        "teacher doctor nurse writer driver cook singer student manager lawyer farmer dancer painter waiter baker "
        "soldier chef programmer mechanic librarian plumber secretary pilot firefighter bartender dentist",
        (
            Wording("I work as a {value}.", "What do I work as?", "You work as a"),
            Wording("My sister is a {value}.", "What does my sister do?", "Your sister is a"),
        ),
    ),
    FactKind(
        "hobby",
        "football soccer baseball basketball tennis hockey guitar piano violin cards golf chess drums poker "
        "volleyball cricket rugby",
        (
            Wording("I love to play {value}.", "What do I love to play?", "You love to play"),
            Wording("On weekends I play {value}.", "What do I play on weekends?", "On weekends you play"),
        ),
    ),
)
