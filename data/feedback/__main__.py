"""Convert a product's feedback log to preference pairs and scorer labels.

python -m data.feedback recipes/feedback/feedback.yaml

data/feedback/event.py documents the log, data/feedback/pairs.py and data/feedback/labels.py the rules. Writes into
run_dir: `pairs.jsonl` for train.dpo; `dialogues.jsonl` (the final conversations) and `replies.jsonl` (replies that were
not kept), with labels for the scorer in the metadata of messages, for data.prepare (kind chat_jsonl); `report.json`;
`quarantine.jsonl`.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pydantic import Field
from rich.console import Console

from data.clean.ledger import Ledger, reasons_text
from data.clean.quarantine import Quarantine
from data.clean.records import CleanError, check_bad_fraction
from data.clean.scrub import Scrub
from data.clean.stable_hash import pseudonym
from data.feedback.conversation import NO_CONTEXT, Conversation, LoggedTurn, join_turns
from data.feedback.event import read_event
from data.feedback.labels import (
    LabelCounts,
    LabelSettings,
    Verdict,
    capped,
    conversation_dialogue,
    reply_dialogue,
    stands_alone,
    verdicts,
)
from data.feedback.pairs import PairSettings, RuleCounts, select_pairs, to_pair
from data.feedback.parts import Line, UserParts, user_of
from data.feedback.report import Counts, key_figure, print_report, to_report
from data.feedback.scrub import scrub_turns
from data.format.dialogue import Dialogue
from data.format.dialogue_json import message_to_record
from data.pipeline.progress import Steps
from data.pipeline.report import print_unread_of
from data.sources.folder_files import find_files, unread_files
from data.sources.preferences import pair_to_json
from data.sources.record import RecordError, Rejected, SourceError, beginning
from data.sources.source import parse_object, read_lines
from recipes.files import atomic_file, write_json
from recipes.loader import Section
from recipes.run_identity import Location
from recipes.run_inputs import names_below
from recipes.stage_command import Made, StageCommand

PAIRS_FILE, DIALOGUES_FILE, REPLIES_FILE = "pairs.jsonl", "dialogues.jsonl", "replies.jsonl"
REPORT_FILE, QUARANTINE_FILE = "report.json", "quarantine.jsonl"
OUTPUTS = (PAIRS_FILE, DIALOGUES_FILE, REPLIES_FILE, REPORT_FILE, QUARANTINE_FILE)
_SOURCE = "feedback_events"
_PARTS_DIRECTORY = "parts"


class FeedbackRecipe(Section):
    """A recipe of data.feedback."""

    stage: Literal["feedback"]
    run_dir: Location
    seed: int
    # A .jsonl or .jsonl.gz file, or a directory of them; the lines of a conversation may be in several files.
    events: Location
    pairs: PairSettings
    labels: LabelSettings
    # Context of a pair or reply: the narrator's opening and this many newest messages; null: all.
    max_context_messages: int | None = Field(default=None, ge=1)
    # Replace personal data in texts, names and ids by placeholders and hashes; null: keep it.
    scrub: Scrub | None = None
    # A larger fraction of quarantined lines is an error.
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    # The log is processed in this many parts, by user; the largest determines the memory.
    parts: int = Field(default=16, ge=1, le=256)

    def inputs(self) -> dict[str, Path]:
        """The files that it reads. Raises SourceError if there are none."""
        return names_below("events", self.events, find_files(self.events))


@dataclass(frozen=True, slots=True)
class Outputs:
    """The open output files."""

    pairs: IO[str]
    dialogues: IO[str]
    replies: IO[str]
    quarantine: Quarantine


def convert(recipe: FeedbackRecipe, steps: Steps) -> Counts:
    """Write all outputs of the recipe below its run_dir except done.json. A killed run starts over."""
    run_dir = Path(recipe.run_dir)
    files = find_files(recipe.events)
    counts = Counts(pairs={rule.kind: RuleCounts() for rule in recipe.pairs.rules})
    with ExitStack() as opened:
        names = (PAIRS_FILE, DIALOGUES_FILE, REPLIES_FILE, QUARANTINE_FILE)
        pairs, dialogues, replies, bad = (opened.enter_context(atomic_file(run_dir / name, "w")) for name in names)
        outputs = Outputs(pairs, dialogues, replies, Quarantine(bad, _SOURCE, counts.lines, recipe.scrub))
        parts = opened.enter_context(UserParts(run_dir / _PARTS_DIRECTORY, recipe.parts))
        with steps.following("reading", "lines", lambda: counts.lines.read):
            _divide(files, parts, outputs, counts.lines)
        n_good, n_converted = counts.lines.read - counts.lines.quarantined, 0
        with steps.following("converting", "lines", lambda: n_converted, lambda: n_good):
            for part in range(recipe.parts):
                for user, lines in parts.users(part, files):
                    _convert_user(user, lines, recipe, outputs, counts)
                    n_converted += len(lines)
    kept_quarantine = run_dir.with_name(f"{run_dir.name}.{QUARANTINE_FILE}")
    check_bad_fraction({_SOURCE: counts.lines}, recipe.max_bad_fraction, run_dir / QUARANTINE_FILE, kept_quarantine)
    counts.balance()
    if not counts.lines.kept:
        left_out = +Counter(counts.lines.filtered | {"is quarantined": counts.lines.quarantined})
        why = f" ({reasons_text(left_out)})" if left_out else ""
        raise CleanError(f"{recipe.events}: no usable turn in {counts.lines.read:,} lines{why}; check the log")
    write_json(run_dir / REPORT_FILE, to_report(counts))
    return counts


def _divide(files: Sequence[Path], parts: UserParts, outputs: Outputs, lines: Ledger) -> None:
    """Distribute the lines to parts by user; lines that are not JSON objects go to quarantine."""
    for file_number, path in enumerate(files):
        for number, content in read_lines(path):
            lines.read += 1
            try:
                parts.add(user_of(parse_object(content)), file_number, number, content)
            except RecordError as error:
                outputs.quarantine.add(Rejected(str(path), number, str(error), beginning(content)))


def _convert_user(user: str, lines: Sequence[Line], recipe: FeedbackRecipe, outputs: Outputs, counts: Counts) -> None:
    """Write the pairs, dialogues and replies of one user."""
    logged = list(_events(lines, outputs.quarantine))
    if recipe.scrub:
        replaced: Counter[str] = Counter()
        logged = scrub_turns(logged, recipe.scrub, replaced)
        counts.lines.scrubbed.update(replaced)
    joined = join_turns(logged)
    for rejected in joined.rejected:
        outputs.quarantine.add(rejected)
    counts.lines.duplicates += joined.n_repeated
    if joined.n_without_context:
        counts.lines.filtered[NO_CONTEXT] += joined.n_without_context
    counts.lines.kept += sum(len(conversation.turns) for conversation in joined.conversations)
    counts.n_users += bool(joined.conversations)
    counts.n_conversations += len(joined.conversations)
    participant = _participant(user, recipe.scrub)
    turns = (turn for conversation in joined.conversations for turn in conversation.turns)
    most = recipe.max_context_messages
    for comparison in select_pairs(turns, recipe.pairs, user, recipe.seed, counts.pairs, most):
        pair = to_pair(comparison, participant, most)
        outputs.pairs.write(pair_to_json(pair) + "\n")
    _write_labels(joined.conversations, user, participant, recipe, outputs, counts.labels)


def _participant(user: str, rule: Scrub | None) -> str:
    salt = (rule.ids.salt,) if rule and rule.ids else ()
    return pseudonym(*salt, "feedback", user)


def _events(lines: Iterable[Line], quarantine: Quarantine) -> Iterator[LoggedTurn]:
    for line in lines:
        try:
            yield LoggedTurn(read_event(line.content), line.file, line.number)
        except RecordError as error:
            quarantine.add(Rejected(line.file, line.number, str(error), beginning(line.content)))


def _write_labels(
    conversations: Sequence[Conversation],
    user: str,
    participant: str,
    recipe: FeedbackRecipe,
    outputs: Outputs,
    counts: LabelCounts,
) -> None:
    settings = recipe.labels
    by_conversation = [list(verdicts(conversation, settings)) for conversation in conversations]
    flat = iter(capped([v for part in by_conversation for v in part], settings.max_per_user, user, recipe.seed))
    for conversation, part in zip(conversations, by_conversation, strict=True):
        final: list[Verdict] = [next(flat) for _ in part]
        labels = {(v.turn.event.turn, v.number): v.label for v in final if v.label is not None}
        outputs.dialogues.write(_chat_line(conversation_dialogue(conversation, participant, labels)))
        for verdict in final:
            counts.add(verdict)
            if stands_alone(verdict):
                outputs.replies.write(_chat_line(reply_dialogue(verdict, participant, recipe.max_context_messages)))


def _chat_line(dialogue: Dialogue) -> str:
    """A line of chat_jsonl."""
    record = {
        "id": dialogue.id,
        "character": dialogue.character,
        "messages": [message_to_record(message) for message in dialogue.messages],
        "participants": list(dialogue.participants),
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _dry_run(recipe: FeedbackRecipe, console: Console) -> None:
    good = bad = 0
    files = find_files(recipe.events)
    for path in files:
        for number, content in read_lines(path):
            try:
                read_event(content)
                good += 1
            except RecordError as error:
                bad += 1
                if bad == 1:
                    console.print(f"first bad line: {path}:{number}: {error}", markup=False, soft_wrap=True)
    console.print(f"{recipe.events}: {good + bad:,} lines in {len(files)} file(s), {bad:,} bad", soft_wrap=True)
    print_unread_of(recipe.events, unread_files(recipe.events, files), console)


def _make(recipe: FeedbackRecipe, console: Console) -> Made:
    with Steps(console) as steps:
        counts = convert(recipe, steps)

    def report(seconds: float, console: Console) -> None:
        print_report(counts, console)
        print_unread_of(recipe.events, unread_files(recipe.events, find_files(recipe.events)), console)
        console.print(f"{recipe.run_dir}: {key_figure(counts)}, {seconds:.1f} s", highlight=False, soft_wrap=True)

    return Made(key_figure(counts), report, to_report(counts))


COMMAND = StageCommand(
    FeedbackRecipe,
    __doc__,
    make=_make,
    dry_run=_dry_run,
    files=(_PARTS_DIRECTORY, *OUTPUTS),
    outputs=(PAIRS_FILE, DIALOGUES_FILE, REPLIES_FILE),
    by_size=OUTPUTS,
    recipe_errors=(SourceError, CleanError, OSError),
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
