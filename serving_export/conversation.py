"""Conversations to prompt ids: messages are encoded once, and a generated reply returns as the ids it was drawn as."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from data.dialogue import Message, check_speaker, decode_reply, encode_message, speaker_prefix
from data.tokenizer import DialogueTokenizer


class ConversationEncoder:
    """`encode_prompt` with a memory of at most `capacity_tokens` encoded messages and as many tokens of replies.

    A model may draw a text in other pieces than the tokenizer would choose. A reply given to `remember_reply` is
    spliced exactly as drawn when the same conversation comes back with its text, so its cached pages are found again;
    in any other conversation, and for any other salt, that text is encoded as usual.
    """

    def __init__(self, tokenizer: DialogueTokenizer, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self._messages = _RecentIds(capacity_tokens)
        self._replies = _RecentIds(capacity_tokens)

    def encode_prompt(self, messages: Sequence[Message], character: str, salt: str | None = None) -> list[int]:
        """The ids to generate `character`'s next message from."""
        check_speaker(character)
        ids = [self.tokenizer.bos_id]
        history = _History(salt)
        n_hashed = 0
        for message in messages:
            opening = self._opening(message.speaker)
            history.extend([*ids[n_hashed:], *opening])
            n_hashed = len(ids) + len(opening)
            drawn = self._replies.get((history.digest(), message.text))
            ids += self._encoded(message) if drawn is None else [*opening, *drawn, self.tokenizer.end_id]
        return [*ids, *self._opening(character)]

    def remember_reply(self, prompt: Sequence[int], drawn: Sequence[int], text: str, salt: str | None = None) -> bool:
        """Remember that `drawn` (without `<|end|>`) followed `prompt` and was shown as `text`; False when it cannot be.

        That is so for a text cut by a stop string, which is not what the ids say.
        """
        if any(token <= self.tokenizer.end_id for token in drawn) or decode_reply(self.tokenizer, drawn) != text:
            return False
        history = _History(salt)
        history.extend(prompt)
        self._replies.put((history.digest(), text), tuple(drawn))
        return True

    def _opening(self, speaker: str) -> tuple[int, ...]:
        ids = self._messages.get(speaker)
        if ids is None:
            ids = (self.tokenizer.message_id, *self.tokenizer.encode(speaker_prefix(speaker)))
            self._messages.put(speaker, ids)
        return ids

    def _encoded(self, message: Message) -> tuple[int, ...]:
        key = (message.speaker, message.text)
        ids = self._messages.get(key)
        if ids is None:
            ids = tuple(encode_message(self.tokenizer, message))
            self._messages.put(key, ids)
        return ids


class _History:
    """A digest of everything before a message's text."""

    def __init__(self, salt: str | None):
        self._sha256 = hashlib.sha256(hashlib.sha256(b"no salt" if salt is None else b"salt:" + salt.encode()).digest())

    def extend(self, ids: Sequence[int]) -> None:
        self._sha256.update(struct.pack(f"<{len(ids)}q", *ids))

    def digest(self) -> bytes:
        return self._sha256.digest()


class _RecentIds:
    """A least-recently-used map to ids that forgets once it holds more than `capacity_tokens`."""

    _OVERHEAD = 16  # an entry costs memory even without tokens

    def __init__(self, capacity_tokens: int):
        self._capacity = capacity_tokens
        self._ids: OrderedDict[Hashable, tuple[int, ...]] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> tuple[int, ...] | None:
        ids = self._ids.get(key)
        if ids is not None:
            self._ids.move_to_end(key)
        return ids

    def put(self, key: Hashable, ids: tuple[int, ...]) -> None:
        old = self._ids.pop(key, None)
        self._size += len(ids) + self._OVERHEAD - (len(old) + self._OVERHEAD if old is not None else 0)
        self._ids[key] = ids
        while self._size > self._capacity and self._ids:
            _, oldest = self._ids.popitem(last=False)
            self._size -= len(oldest) + self._OVERHEAD
