"""Conversations to prompt ids: messages are encoded once, and a generated reply returns as the ids it was drawn as."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from threading import Lock

from data.format.dialogue import Message, check_speaker
from data.format.encode import decode_reply
from data.format.message_encoder import MessageEncoder, ids_cache
from data.format.tokenizer import DialogueTokenizer


class ConversationEncoder:
    """`encode_prompt` with a memory of at most `capacity_tokens` encoded messages and as many tokens of replies.

    A model may draw a text in other pieces than the tokenizer would choose. A reply given to `remember_reply` is
    spliced exactly as drawn when the same conversation comes back with its text, so its cached pages are found again;
    in any other conversation, and for any other salt, that text is encoded as usual. May be used by several threads.
    """

    def __init__(self, tokenizer: DialogueTokenizer, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self.message_encoder = MessageEncoder(tokenizer, capacity_tokens)
        self._replies, self._lock = ids_cache(capacity_tokens), Lock()  # (digest of what is before, text) to ids
        self._longest_piece = max(len(piece.text.encode()) for piece in tokenizer.pieces())

    def fewest_tokens(self, messages: Sequence[Message], character: str) -> int:
        """A number of tokens that the prompt for `character`'s reply has at least, told by sizes alone.

        A message has `<|message|>`, a name, a space and `<|end|>`; no token holds more bytes than the longest piece.
        """
        longest = self._longest_piece
        named = sum(4 + _n_bytes(m.speaker) // longest + _n_bytes(m.text) // longest for m in messages)
        return 3 + _n_bytes(character) // longest + named

    def encode_prompt(self, messages: Sequence[Message], character: str, salt: str | None = None) -> list[int]:
        """The ids to generate `character`'s next message from."""
        check_speaker(character)
        ids = [self.tokenizer.bos_id]
        history = _History(salt)
        n_hashed = 0
        for message in messages:
            opening = self.message_encoder.opening(message.speaker)
            history.extend([*ids[n_hashed:], *opening])
            n_hashed = len(ids) + len(opening)
            with self._lock:
                drawn = self._replies.get((history.digest(), message.text))
            if drawn is None:
                ids += self.message_encoder.message(message.speaker, message.text)
            else:
                ids += (*opening, *drawn, self.tokenizer.end_id)
        return [*ids, *self.message_encoder.opening(character)]

    def remember_reply(self, prompt: Sequence[int], drawn: Sequence[int], text: str, salt: str | None = None) -> bool:
        """Remember that `drawn` (without `<|end|>`) followed `prompt` and was shown as `text`; False when it cannot be.

        That is so for a text cut by a stop string, which is not what the ids say.
        """
        if any(token <= self.tokenizer.end_id for token in drawn) or decode_reply(self.tokenizer, drawn) != text:
            return False
        history = _History(salt)
        history.extend(prompt)
        with self._lock:
            try:
                self._replies[history.digest(), text] = tuple(drawn)
            except ValueError:  # larger than the cache
                return False
        return True


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _History:
    """A digest of everything before a message's text."""

    def __init__(self, salt: str | None):
        tagged = b"no salt" if salt is None else b"salt:" + salt.encode(errors="surrogatepass")
        self._sha256 = hashlib.sha256(hashlib.sha256(tagged).digest())

    def extend(self, ids: Sequence[int]) -> None:
        self._sha256.update(struct.pack(f"<{len(ids)}q", *ids))

    def digest(self) -> bytes:
        return self._sha256.digest()
