"""The character to train of a conversation, for corpora without one."""

from collections import Counter
from collections.abc import Sequence

from data.clean.stable_hash import stable_hash
from data.format.dialogue import NARRATOR, Message
from data.sources.record import RecordError


def any_speaker(identity: str, speakers: Sequence[str]) -> str:
    """One of equal speakers, chosen by a hash of the dialogue's id."""
    if not speakers:
        raise RecordError("nobody speaks")
    return speakers[stable_hash("character", identity) % len(speakers)]


def most_talkative(messages: Sequence[Message], besides: str | None = None) -> str:
    """The speaker with the most messages, not the narrator; of equals the first to speak. `besides` only if there is no
    other."""
    counts = Counter(message.speaker for message in messages if message.speaker != NARRATOR)
    if not counts:
        raise RecordError("only the narrator writes")
    if len(counts) > 1:
        counts.pop(besides or "", None)
    return max(counts, key=counts.__getitem__)
