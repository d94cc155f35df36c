"""Joins logged turns to conversations: the order of turns, and the context of each candidate."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data.feedback.event import FeedbackEvent
from data.format.dialogue import Message, n_opening_messages
from data.sources.record import Rejected, beginning

NO_CONTEXT = "what it continues is not in the log, or is quarantined"


@dataclass(frozen=True, slots=True)
class LoggedTurn:
    """An event and its place in the log."""

    event: FeedbackEvent
    file: str
    line: int


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A turn with complete context. `before` is the turn that it continues, `edited_before` the nearest earlier one
    with an edited reply; `opening` is the narrator's opening of the conversation."""

    event: FeedbackEvent
    messages: tuple[Message, ...]
    before: "Turn | None"
    edited_before: "Turn | None"
    opening: tuple[Message, ...]

    def edits_seen(self, time: float) -> int:
        """The number of edits of earlier replies by `time`: two candidates of a turn have the same context if and only
        if this number is equal."""
        count, turn = 0, self.edited_before
        while turn is not None:
            assert turn.event.edit is not None
            count += turn.event.edit.time <= time
            turn = turn.edited_before
        return count

    def context(self, time: float, max_messages: int | None) -> tuple[Message, ...]:
        """The messages before this turn's reply as of `time`: the opening, and the last `max_messages`."""
        limit = None if max_messages is None else max_messages + len(self.opening)
        backwards: list[Message] = []
        turn: Turn | None = self
        while turn is not None and (limit is None or len(backwards) < limit):
            backwards += reversed(turn.messages)
            turn = turn.before
            if turn is not None:
                backwards.append(turn.kept_reply(time))
        messages = tuple(reversed(backwards))
        if max_messages is None or (turn is None and limit is not None and len(messages) <= limit):
            return messages
        return (*self.opening, *messages[len(messages) - max_messages :])

    def kept_reply(self, time: float) -> Message:
        """The reply that the conversation continued with, as of `time`."""
        event = self.event
        kept = event.candidates[event.kept]
        is_edited = event.edit is not None and event.edit.time <= time
        return Message(event.character, event.edit.text if event.edit and is_edited else kept.text, kept.time)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a conversation, each after the one that it continues."""

    user: str
    id: str
    turns: tuple[Turn, ...]

    def path(self) -> list[Turn]:
        """The turns of the final conversation: those that lead to the latest one. Others were undone."""
        turn: Turn | None = max(self.turns, key=lambda turn: (turn.event.candidates[-1].time, turn.event.turn))
        path = []
        while turn is not None:
            path.append(turn)
            turn = turn.before
        return path[::-1]


@dataclass(slots=True)
class Joined:
    """The conversations of a log, and the lines that are in none."""

    conversations: list[Conversation] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    n_without_context: int = 0
    n_repeated: int = 0  # lines logged twice


def join_turns(logged: Iterable[LoggedTurn]) -> Joined:
    """Conversations sorted by user and id, independent of the order of the lines. If a turn is logged twice with
    different content, the first line is used and the others are rejected."""
    joined = Joined()
    groups: dict[tuple[str, str], list[LoggedTurn]] = defaultdict(list)
    for turn in logged:
        groups[turn.event.user, turn.event.conversation].append(turn)
    for (user, identity), lines in sorted(groups.items()):
        if turns := _tree(_distinct(lines, joined), joined):
            joined.conversations.append(Conversation(user, identity, tuple(turns)))
    return joined


def _distinct(lines: Sequence[LoggedTurn], joined: Joined) -> dict[str, LoggedTurn]:
    distinct: dict[str, LoggedTurn] = {}
    for line in lines:
        first = distinct.setdefault(line.event.turn, line)
        if first is line:
            continue
        if first.event == line.event:
            joined.n_repeated += 1
        else:
            place = f"{first.file}:{first.line}"
            joined.rejected.append(_rejected(line, f"turn {line.event.turn!r} is logged with other content at {place}"))
    return distinct


def _tree(lines: dict[str, LoggedTurn], joined: Joined) -> list[Turn]:
    """The turns that can be reached from a first one; others are counted."""
    following: dict[str | None, list[LoggedTurn]] = defaultdict(list)
    for line in sorted(lines.values(), key=lambda line: (line.event.candidates[0].time, line.event.turn)):
        following[line.event.after].append(line)
    turns: list[Turn] = []
    waiting: list[tuple[LoggedTurn, Turn | None]] = [(line, None) for line in reversed(following.pop(None, []))]
    while waiting:
        line, before = waiting.pop()
        if problem := _problem(line.event, before):
            joined.rejected.append(_rejected(line, problem))
            continue
        turns.append(turn := _turn(line.event, before))
        waiting += [(child, turn) for child in reversed(following.pop(line.event.turn, []))]
    for line in _in_circles(following, lines):
        joined.rejected.append(_rejected(line, "the turns that it continues lead back to itself"))
    joined.n_without_context += sum(map(len, following.values()))
    return turns


def _turn(event: FeedbackEvent, before: Turn | None) -> Turn:
    messages = tuple(Message(message.speaker, message.text, message.time) for message in event.messages)
    if before is None:
        return Turn(event, messages, None, None, messages[: n_opening_messages(messages)])
    edited_before = before if before.event.edit else before.edited_before
    return Turn(event, messages, before, edited_before, before.opening)


def _problem(event: FeedbackEvent, before: Turn | None) -> str | None:
    if before is None:
        return None
    first = event.messages[0].time if event.messages else event.candidates[0].time
    last = before.event.candidates[-1].time
    if first < last:
        return f"it begins at {first:.3f}, before the previous reply was shown, at {last:.3f}"
    return None


def _in_circles(following: dict[str | None, list[LoggedTurn]], lines: dict[str, LoggedTurn]) -> list[LoggedTurn]:
    """Remove from `following` (the lines not reached from a first turn) and return those that continue themselves."""
    state: dict[str, bool] = {}  # of visited turns: whether they are in a cycle
    for start in [line.event.turn for group in following.values() for line in group]:
        walk: list[str] = []
        at: str | None = start
        while at is not None and at in lines and at not in state:
            state[at] = False
            walk.append(at)
            at = lines[at].event.after
        if at in walk:
            state.update(dict.fromkeys(walk[walk.index(at) :], True))
    circling = {turn for turn, is_circling in state.items() if is_circling}
    for after, group in following.items():
        following[after] = [line for line in group if line.event.turn not in circling]
    return [lines[turn] for turn in sorted(circling)]


def _rejected(line: LoggedTurn, reason: str) -> Rejected:
    return Rejected(line.file, line.line, reason, beginning(line.event.model_dump_json(exclude_none=True)))
