"""A product's feedback events (data/feedback/event.py) as a source: the final conversations, without labels."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Literal

from data.clean.stable_hash import pseudonym
from data.feedback.conversation import NO_CONTEXT, LoggedTurn, join_turns
from data.feedback.event import read_event
from data.feedback.labels import conversation_dialogue
from data.format.dialogue import Dialogue
from data.sources.folder_files import find_files, unread_files
from data.sources.record import LeftOut, RecordError, Rejected, beginning
from data.sources.source import DialogueSource, read_lines
from recipes.run_identity import Location


class FeedbackEventsSource(DialogueSource):
    """One dialogue per conversation, for pre-training and SFT: the turns that lead to its end, each with the kept
    reply, as edited. Undone turns are left out and counted by line like bad ones. Conversations are joined in memory;
    use data.feedback for labels and larger logs."""

    kind: Literal["feedback_events"]
    path: Location  # a .jsonl or .jsonl.gz file, or a directory of them

    def files(self) -> list[Path]:
        self.inputs()
        return [Path(self.path)]  # read as one: the lines of a conversation may be in several files

    def inputs(self) -> list[Path]:
        return find_files(self.path)

    def unread(self) -> list[str]:
        return unread_files(self.path, self.inputs())

    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        if part:
            return
        turns: list[LoggedTurn] = []
        for file in find_files(str(path)):
            for number, line in read_lines(file):
                try:
                    turns.append(LoggedTurn(read_event(line), str(file), number))
                except RecordError as error:
                    yield Rejected(str(file), number, str(error), beginning(line))
        joined = join_turns(turns)
        yield from joined.rejected
        yield from repeat(LeftOut("a line that was logged before"), joined.n_repeated)
        yield from repeat(LeftOut(NO_CONTEXT), joined.n_without_context)
        for conversation in joined.conversations:
            taken_back = len(conversation.turns) - len(conversation.path())
            yield from repeat(LeftOut("a turn that was taken back"), taken_back)
            yield conversation_dialogue(conversation, pseudonym("feedback", conversation.user), None)
