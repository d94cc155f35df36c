"""Synthetic-Persona-Chat (CC-BY-4.0): generated conversations of two people with written personas."""

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.character import any_speaker
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource
from data.sources.csv_rows import check_row, csv_rows
from data.sources.first_names import first_names
from data.sources.record import RecordError

_TURN = re.compile(r"[*\s]*(User [12])[*\s]*:[*\s]*(.*?)[*\s]*")  # some rows have Markdown stars around names and texts
_SCENE = re.compile(r"\[.*\]|\(.*\)")  # "[Later]", on its own line
_CALLED = re.compile(r"\[user ([12])(?:'s)? name\]|\buser ([12])\b", re.IGNORECASE)
_COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
_USERS = ("User 1", "User 2")


class SyntheticPersonaChatSource(RecordSource):
    """The speakers get first names by a hash of the row, also in texts that say "User 1". The character is one of them;
    the narrator begins with only the character's persona, because a serving prompt has no other, and gives what is in
    brackets on its own line. Both personas are in the metadata."""

    suffixes: ClassVar = (".csv",)

    kind: Literal["synthetic_persona_chat"]

    def records(self, file: CorpusFile) -> Iterator[tuple[int, dict[str, str]]]:
        return csv_rows(file, _COLUMNS, 1)

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, str]) -> Dialogue:
        check_row(record)
        identity = f"{file.stem}:{place}"
        seats = {user: f"{identity} {user}" for user in _USERS}
        given = first_names(seats.values())
        names = {user: given[seat] for user, seat in seats.items()}
        personas = {names[user]: record[f"{user.lower()} personas"].split("\n") for user in _USERS}
        character = names[any_speaker(identity, _USERS)]
        persona = Message(NARRATOR, f"About {character}: {' '.join(personas[character])}")
        said = _messages(record["Best Generated Conversation"], names)
        return Dialogue(identity, (persona, *said), character, (), {"personas": personas})


def _messages(conversation: str, names: dict[str, str]) -> list[Message]:
    """One message for each "User 1: ..." and the lines after it, and the narrator's for each line in brackets."""
    written: list[tuple[str, str]] = []
    for line in conversation.split("\n"):
        if turn := _TURN.fullmatch(line):
            written.append((names[turn[1]], turn[2]))
        elif _SCENE.fullmatch(line.strip()):
            written.append((NARRATOR, line.strip()[1:-1]))
        elif line.strip(" *\r"):
            if not written:
                raise RecordError(f"the conversation begins with {line[:60]!r}, expected 'User 1: ...'")
            speaker, text = written[-1]
            written[-1] = (speaker, f"{text}\n{line}")
    return [Message(speaker, _with_names(text, names)) for speaker, text in written]


def _with_names(text: str, names: dict[str, str]) -> str:
    return _CALLED.sub(lambda called: names[f"User {called[1] or called[2]}"], text)
