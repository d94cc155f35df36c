"""Incremental detokenization: ids to text, token by token. Text is returned once it is certain."""

from __future__ import annotations

from collections.abc import Sequence

from data.format.encode import WORD_JOINER
from data.format.tokenizer import DialogueTokenizer

_REPLACEMENT = "\ufffd"


class PieceTable:
    """Text or byte of every piece of a tokenizer."""

    def __init__(self, tokenizer: DialogueTokenizer):
        pieces = tokenizer.pieces()
        self.byte_of = {i: int(piece.text[3:-1], 16) for i, piece in enumerate(pieces) if piece.kind == "byte"}
        self.text_of = {i: piece.text for i, piece in enumerate(pieces) if piece.kind == "normal"}


class Detokenizer:
    """The text of one reply, as its ids arrive; in total it equals `decode_reply` of all ids, up to a stop string.

    Holds back an incomplete UTF-8 character, a U+2060 that may be half of an escape, and a possible start of a stop
    string.
    """

    def __init__(self, table: PieceTable, stop: Sequence[str] = ()):
        assert all(stop), "a stop string is not empty"
        self._table = table
        self._stop = tuple(stop)
        self._bytes = b""
        self._at_start = True
        self._after_joiner = False
        self._held = ""
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """The text that is certain with `token`. Empty after a stop string was found (`stopped`)."""
        byte = self._table.byte_of.get(token)
        if byte is None:
            # a control id has no text, but the bytes before and after it never form one character
            return self._release(self._characters(final=True) + self._table.text_of.get(token, ""), final=False)
        self._bytes += bytes([byte])
        return self._release(self._characters(final=False), final=False)

    def finish(self) -> str:
        """The text held back so far; call it after the last token."""
        return self._release(self._characters(final=True), final=True)

    def _characters(self, final: bool) -> str:
        """Decode and remove the complete characters of the pending bytes; invalid bytes become U+FFFD."""
        out = ""
        while self._bytes:
            length = _character_length(self._bytes[0])
            try:
                out += self._bytes[:length].decode()
            except UnicodeDecodeError as error:
                if not final and error.reason == "unexpected end of data":
                    break
                length = 1
                out += _REPLACEMENT
            self._bytes = self._bytes[length:]
        return out

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix(" ")
        held = self._held + self._unescaped(text)
        # the stop string that ends first, so that the cut does not depend on token boundaries
        found = min(((held.find(stop) + len(stop), stop) for stop in self._stop if stop in held), default=None)
        if found is not None:
            self.stopped = True
            n_certain = min(held.find(stop) for stop in self._stop if held.endswith(stop, 0, found[0]))
        else:
            n_certain = len(held) if final else len(held) - self._possible_stop(held)
        self._held = held[n_certain:]
        self._parts.append(held[:n_certain])
        return held[:n_certain]

    def _unescaped(self, text: str) -> str:
        """Incremental `unescape`: remembers whether the last character was the first of a pair of joiners."""
        out = []
        for character in text:
            if character == WORD_JOINER and not self._after_joiner:
                self._after_joiner = True
            else:
                out.append(character)
                self._after_joiner = False
        return "".join(out)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def _character_length(lead: int) -> int:
    """Bytes of the UTF-8 character with the first byte `lead`; 1 for an invalid first byte."""
    if lead < 0xC2 or lead > 0xF4:
        return 1
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
