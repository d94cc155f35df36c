"""Encodes messages with a cache: the earlier messages of a growing conversation are dictionary lookups."""

from collections.abc import Sequence
from operator import attrgetter
from threading import Lock

from cachetools import LRUCache, cachedmethod

from data.format.dialogue import Message
from data.format.encode import Encoder, encode_header, encode_message

_ENTRY_TOKENS = 16  # overhead of an entry


def ids_cache(capacity_tokens: int) -> LRUCache:
    """An LRU cache of token ids of at most `capacity_tokens`, counting 16 for the overhead of each entry."""
    return LRUCache(capacity_tokens, _size)


def _size(ids: Sequence[int]) -> int:
    return len(ids) + _ENTRY_TOKENS


class MessageEncoder:
    """`encode_message` with a cache of at most `capacity_tokens`.

    The key is (speaker, text), which determines a message's ids. Thread-safe.
    """

    def __init__(self, tokenizer: Encoder, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self._ids = ids_cache(capacity_tokens)
        self._lock = Lock()

    @cachedmethod(attrgetter("_ids"), lock=attrgetter("_lock"))
    def message(self, speaker: str, text: str) -> tuple[int, ...]:
        """`<|message|>speaker: text<|end|>`. Raises DialogueError for an invalid name or text."""
        return tuple(encode_message(self.tokenizer, Message(speaker, text)))

    @cachedmethod(attrgetter("_ids"), lock=attrgetter("_lock"))
    def opening(self, speaker: str) -> tuple[int, ...]:
        """`<|message|>speaker:`. Raises DialogueError for an invalid name."""
        return tuple(encode_header(self.tokenizer, speaker))

    @property
    def size(self) -> int:
        """Cached tokens, counting 16 for the overhead of each entry; never above the capacity."""
        return int(self._ids.currsize)
