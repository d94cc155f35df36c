"""Messages to token ids, each encoded once: a conversation that comes back turn after turn costs look-ups."""

from collections.abc import Sequence
from operator import attrgetter
from threading import Lock

from cachetools import LRUCache, cachedmethod

from data.format.dialogue import Encoder, Message, check_speaker, encode_message, speaker_prefix

_ENTRY_TOKENS = 16  # what an entry counts beside its tokens: it costs memory even without any


def ids_cache(capacity_tokens: int) -> LRUCache:
    """A least recently used cache of token ids that holds at most `capacity_tokens`, an entry counting 16 more."""
    return LRUCache(capacity_tokens, _size)


def _size(ids: Sequence[int]) -> int:
    return len(ids) + _ENTRY_TOKENS


class MessageEncoder:
    """`encode_message` with a cache of at most `capacity_tokens`.

    The key is (speaker, text), which is all that a message's ids depend on. May be used by several threads.
    """

    def __init__(self, tokenizer: Encoder, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self._ids = ids_cache(capacity_tokens)
        self._lock = Lock()

    @cachedmethod(attrgetter("_ids"), lock=attrgetter("_lock"))
    def message(self, speaker: str, text: str) -> tuple[int, ...]:
        """`<|message|>speaker: text<|end|>`. Raises DialogueError for a name or a text that no message can have."""
        return tuple(encode_message(self.tokenizer, Message(speaker, text)))

    @cachedmethod(attrgetter("_ids"), lock=attrgetter("_lock"))
    def opening(self, speaker: str) -> tuple[int, ...]:
        """`<|message|>speaker:`, which a reply follows. Raises DialogueError for a bad name."""
        check_speaker(speaker)
        return (self.tokenizer.message_id, *self.tokenizer.encode(speaker_prefix(speaker)))

    @property
    def size(self) -> int:
        """Tokens held, an entry counting 16 more; never above the capacity."""
        return int(self._ids.currsize)
