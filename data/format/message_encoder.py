"""Messages to token ids, each encoded once: a conversation that comes back turn after turn costs look-ups."""

from data.format.dialogue import Encoder, Message, check_speaker, encode_message, speaker_prefix
from data.recent import Recent

ENTRY_TOKENS = 16  # what an entry of a memory counts beside its tokens: it costs memory even without any


class MessageEncoder:
    """`encode_message` with a memory of at most `capacity_tokens`, least recently used first out.

    The key is (speaker, text), which is all that a message's ids depend on. May be used by several threads.
    """

    def __init__(self, tokenizer: Encoder, capacity_tokens: int = 1_000_000):
        self.tokenizer = tokenizer
        self._ids: Recent[tuple[str, str | None], tuple[int, ...]] = Recent(capacity_tokens)

    def message(self, speaker: str, text: str) -> tuple[int, ...]:
        """`<|message|>speaker: text<|end|>`. Raises DialogueError for a name or a text that no message can have."""
        key = (speaker, text)
        ids = self._ids.get(key)
        if ids is None:
            ids = tuple(encode_message(self.tokenizer, Message(speaker, text)))
            self._ids.put(key, ids, len(ids) + ENTRY_TOKENS)
        return ids

    def opening(self, speaker: str) -> tuple[int, ...]:
        """`<|message|>speaker:`, which a reply follows. Raises DialogueError for a bad name."""
        key = (speaker, None)
        ids = self._ids.get(key)
        if ids is None:
            check_speaker(speaker)
            ids = (self.tokenizer.message_id, *self.tokenizer.encode(speaker_prefix(speaker)))
            self._ids.put(key, ids, len(ids) + ENTRY_TOKENS)
        return ids

    @property
    def size(self) -> int:
        """Tokens held, an entry counting 16 more; never above the capacity."""
        return self._ids.weight
