"""Messages to token ids, each encoded once: a conversation that comes back turn after turn costs look-ups."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from data.dialogue import Encoder, Message, check_speaker, encode_message, speaker_prefix

K = TypeVar("K", bound=Hashable)


class MessageEncoder:
    """`encode_message` with a memory of at most `capacity_tokens`, least recently used first out.

    The key is (speaker, text), which is all that a message's ids depend on. Not for several threads at once.
    """

    def __init__(self, tokenizer: Encoder, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self._ids: RecentIds[tuple[str, str | None]] = RecentIds(capacity_tokens)

    def message(self, speaker: str, text: str) -> tuple[int, ...]:
        """`<|message|>speaker: text<|end|>`. Raises DialogueError for a name or a text that no message can have."""
        key = (speaker, text)
        ids = self._ids.get(key)
        if ids is None:
            ids = tuple(encode_message(self.tokenizer, Message(speaker, text)))
            self._ids.put(key, ids)
        return ids

    def opening(self, speaker: str) -> tuple[int, ...]:
        """`<|message|>speaker:`, which a reply follows. Raises DialogueError for a bad name."""
        key = (speaker, None)
        ids = self._ids.get(key)
        if ids is None:
            check_speaker(speaker)
            ids = (self.tokenizer.message_id, *self.tokenizer.encode(speaker_prefix(speaker)))
            self._ids.put(key, ids)
        return ids

    @property
    def size(self) -> int:
        """Tokens held, an entry counting 16 more; never above the capacity."""
        return self._ids.size


class RecentIds(Generic[K]):
    """A least-recently-used map to ids that forgets once it holds more than `capacity_tokens`."""

    _OVERHEAD = 16  # an entry costs memory even without tokens

    def __init__(self, capacity_tokens: int):
        self._capacity = capacity_tokens
        self._ids: OrderedDict[K, tuple[int, ...]] = OrderedDict()
        self.size = 0

    def get(self, key: K) -> tuple[int, ...] | None:
        """The ids of `key`, which is then the most recently used; None when they are not known."""
        ids = self._ids.get(key)
        if ids is not None:
            self._ids.move_to_end(key)
        return ids

    def put(self, key: K, ids: tuple[int, ...]) -> None:
        """Remember `ids`, and forget the least recently used when there is no room."""
        old = self._ids.pop(key, None)
        self.size += len(ids) + self._OVERHEAD - (len(old) + self._OVERHEAD if old is not None else 0)
        self._ids[key] = ids
        while self.size > self._capacity and self._ids:
            _, oldest = self._ids.popitem(last=False)
            self.size -= len(oldest) + self._OVERHEAD
