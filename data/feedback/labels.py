"""Engagement labels for the scorer from what users did after a reply, and the dialogues with these labels.

Every shown reply gets a verdict: 1, 0, or no label with a reason. A reply in the final conversation has its label
there; one that was swiped away or rewritten becomes a short dialogue of its own.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from data.clean.ledger import Ledger
from data.feedback.conversation import Conversation, Turn
from data.feedback.event import FeedbackEvent
from data.feedback.pairs import smallest_hashes
from data.format.dialogue import LABEL_KEY, NO_LABEL, TRAINED_KEY, Dialogue, Message
from data.format.visible_text import says_nothing, visible
from data.sources.preferences import SAYS_NOTHING
from recipes.loader import Section

Unwanted = Literal["negative", "unlabeled"]
_POSITIVE, _NEGATIVE = 1, 0
_EVER = float("inf")


class LabelSettings(Section):
    """A reply is positive if the user kept it without asking for another, and wrote again."""

    # A later message begins a new session; without a message for this time the user is gone.
    within_seconds: float = Field(gt=0)
    # A reply is positive if at least this many messages of the user follow it in its session, so that the last ones of
    # a session are not (Chai, arXiv 2303.06135, used 1 and 2).
    last_replies: int = Field(default=1, ge=1)
    last_replies_are: Unwanted = "negative"
    # Replies that were swiped away, or rejected for an earlier one. One swiped away before `min_seen_seconds` was not
    # read and has no label.
    not_kept_are: Unwanted = "negative"
    min_seen_seconds: float = Field(default=0.0, ge=0)
    # Replies that the user rewrote.
    edited_are: Unwanted = "negative"
    # If there are more, those with the smallest hash.
    max_per_user: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The label of a shown reply, or the reason why it has none."""

    turn: Turn
    number: int
    label: int | None
    reason: str = ""

    @property
    def text(self) -> str:
        return self.turn.event.candidates[self.number].text


@dataclass(slots=True)
class LabelCounts:
    """Counts of shown replies by outcome, and the characters of those with each label."""

    ledger: Ledger = field(default_factory=Ledger)
    n_by_label: Counter[int] = field(default_factory=Counter)
    characters_by_label: Counter[int] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        self.ledger.read += 1
        if verdict.label is None:
            self.ledger.filtered[verdict.reason] += 1
            return
        self.ledger.kept += 1
        self.n_by_label[verdict.label] += 1
        self.characters_by_label[verdict.label] += len(verdict.text)

    def mean_characters(self, label: int) -> float | None:
        n = self.n_by_label[label]
        return round(self.characters_by_label[label] / n, 1) if n else None


def continues(event: FeedbackEvent, within_seconds: float) -> bool | None:
    """Whether the user wrote again in time; None if observation ended earlier."""
    shown = event.candidates[-1].time
    if event.wrote_again is not None:
        return event.wrote_again - shown <= within_seconds
    return False if event.closed - shown >= within_seconds else None


def session_label(path: Sequence[Turn], number: int, settings: LabelSettings) -> tuple[int | None, str]:
    """The label of the turn `path[number]` by what follows in its session, or None and the reason."""
    for turn in path[number : number + settings.last_replies]:
        outcome = continues(turn.event, settings.within_seconds)
        if outcome is None:
            return None, "not watched long enough"
        if not outcome:
            is_negative = settings.last_replies_are == "negative"
            return (_NEGATIVE, "") if is_negative else (None, "among the last replies of a session")
    if number + settings.last_replies > len(path):
        return None, "the log ends too early"
    return _POSITIVE, ""


def kept_label(path: Sequence[Turn], number: int, settings: LabelSettings) -> tuple[int | None, str]:
    """The verdict on the reply that the conversation continued with at `path[number]`."""
    turn = path[number]
    event = turn.event
    if event.edit is not None:
        return (_NEGATIVE, "") if settings.edited_are == "negative" else (None, "edited")
    if event.kept + 1 < len(event.candidates):
        return None, "kept after looking at others"
    if turn.edits_seen(event.candidates[event.kept].time) < turn.edits_seen(_EVER):
        return None, "an earlier reply was edited later"
    return session_label(path, number, settings)


def other_label(event: FeedbackEvent, number: int, settings: LabelSettings) -> tuple[int | None, str]:
    """The verdict on a reply that was shown and not kept."""
    if settings.not_kept_are == "unlabeled":
        return None, "not kept"
    if visible(event.candidates[number].text) == visible(event.candidates[event.kept].text):
        return None, "the same text as the kept reply"
    seen = event.seen_seconds(number)
    if seen is not None and seen < settings.min_seen_seconds:
        return None, "swiped away unread"
    return _NEGATIVE, ""


def verdicts(conversation: Conversation, settings: LabelSettings) -> Iterator[Verdict]:
    """One verdict for each shown reply of the conversation."""
    path = conversation.path()
    places = {id(turn): number for number, turn in enumerate(path)}
    character = _character(path)
    for turn in conversation.turns:
        event = turn.event
        for number, candidate in enumerate(event.candidates):
            is_kept = number == event.kept
            label: int | None = None
            if says_nothing(candidate.text):
                reason = SAYS_NOTHING
            elif not is_kept:
                label, reason = other_label(event, number, settings)
            elif id(turn) not in places:
                reason = "taken back"
            elif event.character != character and event.edit is None:
                reason = "by another character than the dialogue's"
            else:
                label, reason = kept_label(path, places[id(turn)], settings)
            yield Verdict(turn, number, label, reason)


def capped(given: Sequence[Verdict], most: int | None, user: str, seed: int) -> list[Verdict]:
    """A user's verdicts with at most `most` labels, chosen by a hash; other replies become unlabeled."""
    labeled = [number for number, verdict in enumerate(given) if verdict.label is not None]
    if most is None or len(labeled) <= most:
        return list(given)
    identities = []
    for number in labeled:
        event = given[number].turn.event
        identities.append(f"label/{seed}/{user}/{event.conversation}/{event.turn}/{given[number].number}")
    chosen = {labeled[place] for place in smallest_hashes(identities, most)}
    return [
        verdict
        if verdict.label is None or number in chosen
        else replace(verdict, label=None, reason="over max_per_user")
        for number, verdict in enumerate(given)
    ]


def conversation_dialogue(
    conversation: Conversation, participant: str, labels: Mapping[tuple[str, int], int] | None
) -> Dialogue:
    """The final conversation. With `labels` of the kept replies, by (turn, candidate), each message of the character
    has its label or an explicit absence of one, so that none is inferred; an edited reply has the edited text and no
    label. Without `labels`, messages have no label metadata."""
    path = conversation.path()
    character = _character(path)
    messages: list[Message] = []
    for turn in path:
        event = turn.event
        reply = replace(turn.kept_reply(_EVER), metadata=_known_of(event, event.kept))
        if event.edit:
            reply = replace(reply, metadata={**(reply.metadata or {}), "edited": True})
        if labels is None:
            messages += (*turn.messages, reply)
        else:
            label = None if event.edit else labels.get((event.turn, event.kept))
            messages += (_labeled(message, character, None) for message in turn.messages)
            messages.append(_labeled(reply, character, label))
    return Dialogue(f"{participant}/{conversation.id}", tuple(messages), character, (participant,))


def reply_dialogue(verdict: Verdict, participant: str, max_context_messages: int | None) -> Dialogue:
    """A reply that is not in the final conversation, with its context: labeled for the scorer, excluded from SFT."""
    event, number = verdict.turn.event, verdict.number
    candidate = event.candidates[number]
    context = verdict.turn.context(candidate.time, max_context_messages)
    reply = Message(event.character, candidate.text, candidate.time, _known_of(event, number))
    messages = [_labeled(message, event.character, None, trained=False) for message in context]
    messages.append(_labeled(reply, event.character, verdict.label, trained=False))
    identity = f"{participant}/{event.conversation}/{event.turn}/{number}"
    return Dialogue(identity, tuple(messages), event.character, (participant,))


def stands_alone(verdict: Verdict) -> bool:
    """Whether a labeled reply needs its own dialogue, because the conversation continued with another text."""
    return verdict.label is not None and (
        verdict.number != verdict.turn.event.kept or verdict.turn.event.edit is not None
    )


def _labeled(message: Message, character: str, label: int | None, trained: bool = True) -> Message:
    """The message with its label, if the character wrote it."""
    if message.speaker != character:
        return message
    untrained = {} if trained else {TRAINED_KEY: False}
    known = {LABEL_KEY: NO_LABEL if label is None else label, **untrained}
    return replace(message, metadata={**known, **(message.metadata or {})})


def _known_of(event: FeedbackEvent, number: int) -> dict[str, Any]:
    candidate = event.candidates[number]
    return {"model": candidate.model} | ({"stars": candidate.stars} if candidate.stars is not None else {})


def _character(path: Sequence[Turn]) -> str:
    """Who replies most in the final conversation; of equals the first."""
    return Counter(turn.event.character for turn in path).most_common(1)[0][0]
