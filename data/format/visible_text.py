"""Blank texts: only white space, controls, invisible characters, or combining marks."""

import unicodedata

import regex

# White space and invisible characters: controls, format characters (joiners, zero-width spaces, tags), variation
# selectors, Hangul and Khmer fillers, the empty braille cell, the null notehead, and the object replacement character.
# The format characters in Prepended_Concatenation_Mark are visible.
_UNSEEN = (
    r"[[\p{White_Space}\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800\U0001D159\uFFFC]"
    r"--\p{Prepended_Concatenation_Mark}]"
)
_unseen = regex.compile(f"(?V1){_UNSEEN}+")
_something = regex.compile(rf"(?V1)[^{_UNSEEN}\p{{M}}]")  # a mark alone is not visible


def says_nothing(text: str) -> bool:
    """Whether the text is blank. An emoji is not, whatever joiners it is made of."""
    return not ("!" <= text[:1] <= "~") and _something.search(text) is None


def visible(text: str) -> str:
    """The text in NFC without white space and invisible characters, for comparing texts by what is visible."""
    return unicodedata.normalize("NFC", _unseen.sub("", text))
