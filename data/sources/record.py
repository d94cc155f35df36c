"""What reading a source gives beside dialogues: records left out, records rejected, and sources that cannot be read."""

from dataclasses import dataclass


class SourceError(ValueError):
    """A source that cannot be read at all; the message names the file or package and says what to do."""


class RecordError(ValueError):
    """One record that cannot be a dialogue; the message says why. The record is quarantined."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A whole record that is not to be trained on; counted by its reason, a few words."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not become a dialogue: where it stands, why, and how it begins."""

    file: str
    line: int | str  # the line of a text file, or the key of the record
    reason: str
    record: str
