"""The language filter: other languages go, the kept ones and what nobody can tell stay."""

import pytest
from pydantic import ValidationError

from data.clean.language import Languages, other_language
from data.format.dialogue import NARRATOR, Message

ENGLISH = "I just took a nap, but it was one of those naps that makes everything worse."
# The first article of the Universal Declaration of Human Rights.
OTHERS = {
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلًا وضميرًا.",
}


def say(*texts: str) -> list[Message]:
    return [Message("Ann" if i % 2 else "Bob", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("language", OTHERS)
def test_other_languages_are_told_by_their_codes(language: str) -> None:
    messages = say(*OTHERS[language].split(". "))
    assert other_language(messages, Languages(keep=("en",))) == language
    assert other_language(messages, Languages(keep=("en", language))) is None


def test_what_is_kept() -> None:
    rule = Languages(keep=("en",))
    assert other_language(say(ENGLISH, "lol ok"), rule) is None
    assert other_language(say("bonjour", "oui"), rule) is None, "too short to tell"
    assert other_language(say(), rule) is None
    assert other_language(say("https://example.com/a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6e7f8/raw"), rule) is None
    narrated = [Message(NARRATOR, OTHERS["de"]), *say(ENGLISH)]
    assert other_language(narrated, rule) is None, "the narrator is not asked"
    assert other_language(say(ENGLISH * 10, OTHERS["fr"]), rule) is None, "the beginning is read"


def test_what_may_be_kept_stays() -> None:
    """py3langid says pcm, sn, pcm; English comes next, with 45%, 9% and 31%."""
    for said in (
        ("Hi, how do I change an external HD from fat32 to ntfs?",),
        ("any chinese here??", "yourwelcome: #ubuntu-zh"),
        ("where can i get an mp3 plugin for totem?", "where can i find an mp3 plugin for totem?"),
    ):
        assert other_language(say(*said), Languages(keep=("en",))) is None
        assert other_language(say(*said), Languages(keep=("de",))) in ("pcm", "sn")
    assert other_language(say(OTHERS["es"]), Languages(keep=("en", "pt"))) == "es"


def test_confidence_and_letters_are_limits() -> None:
    question = say("where can i get an mp3 plugin for totem?", "where can i find an mp3 plugin for totem?")
    answers = {c: other_language(question, Languages(keep=("de",), min_confidence=c)) for c in (0.6, 0.7)}
    assert answers == {0.6: "pcm", 0.7: None}
    assert other_language(say(OTHERS["de"]), Languages(keep=("en",), min_letters=500)) is None


def test_unknown_codes_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"language 'english' is unknown; expected of .*en, .*fr"):
        Languages(keep=("english",))
