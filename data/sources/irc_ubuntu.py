"""#ubuntu IRC logs (CC-BY-4.0) with annotated reply links that separate the conversations of a channel."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from data.clean.stable_hash import pseudonym
from data.format.dialogue import Dialogue, DialogueError, Message, check_times
from data.sources.character import most_talkative
from data.sources.corpus_file import CorpusFile, read_corpus_files
from data.sources.corpus_source import CorpusSource
from data.sources.record import LeftOut, RecordError, Rejected, SourceError, read_record, rejected

_LOG, _LINKS = ".ascii.txt", ".annotation.txt"
_SAID = re.compile(r"\[([01]\d|2[0-3]):([0-5]\d)\] (?:<([^>]+)> ?(.*)| \* (\S+) ?(.*))", re.DOTALL)
_LINK = re.compile(r"(\d{1,9}) (\d{1,9}) -\s*", re.ASCII)
_OF_SERVER = ("===", "[")  # "=== ann has joined"; "[05:12] -service:#ubuntu- a notice", which is not a message
_DAY = 86_400


class IrcUbuntuSource(CorpusSource):
    """Lines connected by reply links are a dialogue; lines without links are left out and counted, and the server's
    lines ("=== ann has joined") are not records. The character is who writes most besides the one who began: the
    helper. An action ("* ann waves") is written as typed, "/me waves". Times are minutes of the log's clock, 12-hour in
    some logs: valid within a log, not across logs. The participants are nicknames hashed with the log's date, since
    another person may have a nickname on another day. If a log and its links are files in a folder, the log is read
    with its links, and the links give nothing by themselves."""

    suffixes: ClassVar = (_LOG, _LINKS)

    kind: Literal["irc_ubuntu"]

    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        beside = _other_file(path)
        if part > 0 or (beside and _LINKS in path.name):
            return
        waiting: dict[str, CorpusFile] = {}  # of a log and its links, the first one found
        for file in read_corpus_files([path, *([beside] if beside else [])], self.suffixes):
            name = file.name.removesuffix(_LOG).removesuffix(_LINKS)
            other = waiting.pop(name, None)
            if other is None:
                waiting[name] = file
            else:
                log, links = (file, other) if file.name.endswith(_LOG) else (other, file)
                yield from _conversations(log, links)
        for file in waiting.values():
            raise SourceError(f"{file.place}: alone; expected a {_LOG} and an {_LINKS} file of every log")


def _other_file(path: Path) -> Path | None:
    """The links of a log, or the log of links, if unpacked in the same folder."""
    name = path.name.removesuffix(".gz")
    end, other = (_LOG, _LINKS) if name.endswith(_LOG) else (_LINKS, _LOG)
    stem = name.removesuffix(end)
    beside = (path.with_name(f"{stem}{other}{compression}") for compression in ("", ".gz"))
    return next((file for file in beside if file.is_file()), None) if name.endswith(end) else None


def _conversations(log: CorpusFile, links: CorpusFile) -> Iterator[Dialogue | LeftOut | Rejected]:
    lines = [line.removesuffix("\r") for line in log.text().split("\n")]
    said = _messages(log, lines)
    pairs: list[tuple[int, int]] = []
    for number, line in enumerate(links.text().split("\n"), start=1):
        if not line.strip():
            continue
        matched = _LINK.fullmatch(line)
        pair = (int(matched[1]), int(matched[2])) if matched else (-1, -1)
        if min(pair) >= 0 and max(pair) < len(lines):
            pairs.append(pair)
        else:
            reason = f"expected 'N M -', two lines of the log's {len(lines):,} that belong together"
            yield rejected(links.place, number, reason, line)
    linked = {number for pair in pairs for number in pair}
    for number, message in said.items():
        if number not in linked and isinstance(message, Message):
            yield LeftOut("a line without reply links")
        elif number not in linked and lines[number]:
            yield rejected(log.place, number + 1, str(message), lines[number])
    for numbers in _connected(pairs):
        spoken = [number for number in numbers if number in said]
        if spoken:
            make = partial(_dialogue, log, spoken[0], [said[number] for number in spoken])
            yield read_record(make, log.place, lambda first=spoken[0] + 1: first, lines[spoken[0]])  # type: ignore[misc]


def _messages(log: CorpusFile, lines: list[str]) -> dict[int, Message | RecordError]:
    """The messages by line number (from 0, as in links), or the reason why a line is not a message; without server
    lines."""
    try:
        day = datetime.fromisoformat(log.stem[:10]).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise SourceError(f"{log.place}: expected a name that begins with a date, as 2005-06-27_12{_LOG}") from None
    said: dict[int, Message | RecordError] = {}
    latest = 0.0
    for number, line in enumerate(lines):
        if matched := _SAID.fullmatch(line):
            hour, minute, writer, text, actor, action = matched.groups()
            time = day + int(hour) * 3600 + int(minute) * 60
            while time < latest - _DAY / 4:  # 23:59 to 00:00, or 12:59 to 01:00 on a 12-hour clock
                day += _DAY / 2
                time += _DAY / 2
            latest = time
            try:
                said[number] = Message(writer or actor, text if writer else f"/me {action}", time)
            except DialogueError as error:
                said[number] = RecordError(f"line {number + 1}: {error}")
        elif not line.startswith(_OF_SERVER):
            said[number] = RecordError(f"line {number + 1}: expected '[hh:mm] <name> text', found {line[:60]!r}")
    return said


def _connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The lines of each conversation in order, ordered by their first lines."""
    root: dict[int, int] = {}

    def find(line: int) -> int:
        root.setdefault(line, line)
        while root[line] != line:
            root[line] = line = root[root[line]]
        return line

    for pair in pairs:
        first, other = sorted(map(find, pair))
        root[other] = first
    conversations: dict[int, list[int]] = defaultdict(list)
    for line in sorted(root):
        conversations[find(line)].append(line)
    return list(conversations.values())


def _dialogue(log: CorpusFile, first: int, lines: list[Message | RecordError]) -> Dialogue:
    messages = []
    for line in lines:
        if isinstance(line, RecordError):
            raise line
        messages.append(line)
    check_times(messages)
    return Dialogue(
        id=f"{log.name.rsplit('/', 1)[-1].removesuffix(_LOG)}:{first + 1}",
        messages=tuple(messages),
        character=most_talkative(messages, besides=messages[0].speaker),
        participants=tuple(sorted({pseudonym("irc_ubuntu", log.stem, message.speaker) for message in messages})),
    )
