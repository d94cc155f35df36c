"""Language identification of dialogues by py3langid (naive Bayes over byte n-grams; the model is part of the
package)."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from pydantic import Field, field_validator

from data.format.dialogue import NARRATOR, Message
from recipes.loader import Section

_CHARACTERS_READ = 500  # more text hardly changes the result and costs time
_TIMES_AS_LIKELY = 10  # py3langid scores a short English question up to six times as likely Nigerian Pidgin or Shona
_NO_LANGUAGE = "zxx"  # such as addresses and listings


class Languages(Section):
    """Filter dialogues that are clearly in another language. Ambiguous ones are kept: too little text, or a mixture.
    Only the first 500 characters of a dialogue are read."""

    # ISO 639-1 codes.
    keep: tuple[str, ...] = Field(min_length=1)
    # A dialogue is left out if another language has at least this probability and ten times that of all of these.
    min_confidence: float = Field(default=0.5, gt=0, le=1)
    # Dialogues with fewer letters are kept.
    min_letters: int = Field(default=30, ge=1)

    @field_validator("keep")
    @classmethod
    def _known(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        known = sorted(_identifier().labels)
        for language in languages:
            if language not in known:
                raise ValueError(f"language {language!r} is unknown; expected of {', '.join(known)}")
        return languages


def other_language(messages: Sequence[Message], rule: Languages) -> str | None:
    """The code of the dialogue's language if it is clearly none of `keep`."""
    text = _beginning(message.text for message in messages if message.speaker != NARRATOR)
    if sum(map(str.isalpha, text)) < rule.min_letters:
        return None
    ranked = _identifier().rank(text)
    language, confidence = ranked[0]
    kept = sum(likelihood for code, likelihood in ranked if code in rule.keep)
    is_other = language != _NO_LANGUAGE and confidence >= max(rule.min_confidence, _TIMES_AS_LIKELY * kept)
    return language if is_other else None


def _beginning(texts: Iterable[str]) -> str:
    # islice: at most one text per character is needed
    return "\n".join(text[:_CHARACTERS_READ] for text in islice(texts, _CHARACTERS_READ))[:_CHARACTERS_READ]


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
