"""Whether a text says anything: white space, controls and invisible characters say nothing, nor do marks alone."""

import unicodedata

import regex

# White space and what has no ink: controls, format characters (joiners, zero-width spaces, tags), variation selectors,
# fillers of Hangul and Khmer, the empty braille cell, the null notehead, and the stand-in for an object that was not
# copied. The signs of Prepended_Concatenation_Mark are format characters with ink.
_UNSEEN = (
    r"[[\p{White_Space}\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800\U0001D159\uFFFC]"
    r"--\p{Prepended_Concatenation_Mark}]"
)
_unseen = regex.compile(f"(?V1){_UNSEEN}+")
_something = regex.compile(rf"(?V1)[^{_UNSEEN}\p{{M}}]")  # a mark needs something to stand on


def says_nothing(text: str) -> bool:
    """Whether nothing in the text can be seen. An emoji says something, whatever joiners it is made with."""
    return not ("!" <= text[:1] <= "~") and _something.search(text) is None


def visible(text: str) -> str:
    """The text without white space and invisible characters, composed: equal for texts that differ in these only."""
    return unicodedata.normalize("NFC", _unseen.sub("", text))
