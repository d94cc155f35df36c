"""Conversations to prompt ids: messages are encoded once, and a generated reply keeps the ids it was generated with."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from data.format.dialogue import Message, check_speaker
from data.format.encode import decode_reply
from data.format.message_encoder import MessageEncoder, ids_cache
from data.format.tokenizer import DialogueTokenizer


@dataclass(frozen=True)
class EncodedPrompt:
    """The ids to generate a reply from. `history` is their digest together with the cache salt; `n_left_out` counts the
    oldest messages that were dropped to fit."""

    tokens: list[int]
    history: bytes
    n_left_out: int = 0


class ConversationEncoder:
    """`encode_prompt` with a cache of `capacity_tokens` tokens of encoded messages, and as many of generated replies.

    A model may generate a text with other tokens than the tokenizer chooses. If the same conversation comes back with a
    reply given to `remember_reply`, the prompt contains the generated ids, so the cached pages are found; in any other
    conversation, and with any other salt, the text is encoded as usual. Thread-safe.
    """

    def __init__(self, tokenizer: DialogueTokenizer, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self.message_encoder = MessageEncoder(tokenizer, capacity_tokens)
        self._replies, self._lock = ids_cache(capacity_tokens), Lock()  # (digest of the history, text) to ids
        self._longest_piece = max(len(piece.text.encode()) for piece in tokenizer.pieces())

    def fewest_tokens(self, messages: Sequence[Message], character: str) -> int:
        """A lower bound of the prompt's tokens, computed from text sizes only.

        A message has `<|message|>`, a name, a space and `<|end|>`; no token has more bytes than the longest piece.
        """
        longest = self._longest_piece
        named = sum(4 + _n_bytes(m.speaker) // longest + _n_bytes(m.text) // longest for m in messages)
        return 3 + _n_bytes(character) // longest + named

    def encode_prompt(self, messages: Sequence[Message], character: str, salt: str | None = None) -> EncodedPrompt:
        """The prompt of `character`'s next message."""
        check_speaker(character)
        ids = [self.tokenizer.bos_id]
        history = _History(salt)
        n_hashed = 0
        for message in messages:
            opening = self.message_encoder.opening(message.speaker)
            history.extend([*ids[n_hashed:], *opening])
            n_hashed = len(ids) + len(opening)
            with self._lock:
                generated = self._replies.get((history.digest(), message.text))
            if generated is None:
                ids += self.message_encoder.message(message.speaker, message.text)
            else:
                ids += (*opening, *generated, self.tokenizer.end_id)
        ids += self.message_encoder.opening(character)
        history.extend(ids[n_hashed:])
        return EncodedPrompt(ids, history.digest())

    def remember_reply(self, prompt: EncodedPrompt, generated: Sequence[int], text: str) -> bool:
        """Remember that `generated` (without `<|end|>`) followed `prompt` and was shown as `text`.

        False if it is not remembered: because the ids do not decode to the text, as after a stop string, or because
        the reply is larger than the cache.
        """
        has_control = any(token <= self.tokenizer.end_id for token in generated)
        if has_control or decode_reply(self.tokenizer, generated) != text:
            return False
        with self._lock:
            try:
                self._replies[prompt.history, text] = tuple(generated)
            except ValueError:  # larger than the cache
                return False
        return True


def history_digest(tokens: Sequence[int], salt: str | None) -> bytes:
    """The `history` of a prompt with these ids."""
    history = _History(salt)
    history.extend(tokens)
    return history.digest()


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _History:
    """Incremental SHA-256 of a salt and token ids."""

    def __init__(self, salt: str | None):
        tagged = b"no salt" if salt is None else b"salt:" + salt.encode(errors="surrogatepass")
        self._sha256 = hashlib.sha256(hashlib.sha256(tagged).digest())

    def extend(self, ids: Sequence[int]) -> None:
        self._sha256.update(struct.pack(f"<{len(ids)}q", *ids))

    def digest(self) -> bytes:
        return self._sha256.digest()
