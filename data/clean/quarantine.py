"""The quarantine of bad records, scrubbed of personal data by the recipe's rule."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import IO

from data.clean.ledger import Ledger
from data.clean.scrub import Scrub, scrub_id, scrub_text
from data.sources.record import Rejected, beginning
from recipes.json_text import json_text

NOT_SHOWN = "(not shown: scrub.ids)"
_SHOWN = len(beginning("." * 10_000))  # characters kept of a record
_MOST_QUOTED = 40  # characters that a reason may quote; sources truncate longer quotes anywhere

_QUOTED = re.compile(r"(?<!\w)b?'(?:[^'\\]|\\.)*(?:'|\Z)|(?<!\w)b?\"(?:[^\"\\]|\\.)*(?:\"|\Z)", re.DOTALL)
_FOUND = re.compile(r"(?<=found ).+\Z", re.DOTALL)  # values that are not in quotes
_NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", re.IGNORECASE)
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|[bfnrt])")  # of JSON and of Python, also doubled
# The last word, up to the longest address, and the digits before it.
_CUT_END = re.compile(r"[\d\W]*\S{0,320}\Z")


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Counts the bad records of a source and writes them as JSON lines, scrubbed by `rule`. Replacements are counted
    apart from those in dialogues, as "email in quarantine"."""

    file: IO[str]
    source: str
    ledger: Ledger
    rule: Scrub | None = None

    def add(self, record: Rejected) -> None:
        """Count and write one record."""
        self.ledger.quarantined += 1
        if self.rule:
            record, counts = scrub_rejected(record, self.rule)
            self.ledger.scrubbed.update({f"{kind} in quarantine": count for kind, count in counts.items()})
        self.file.write(json_text({"source": self.source, **asdict(record)}) + "\n")


def general_reason(reason: str) -> str:
    """The reason without its values: quotes become '..', numbers N."""
    return _NUMBER.sub("N", _without_quotes(reason, 0))


def scrub_rejected(rejected: Rejected, settings: Scrub) -> tuple[Rejected, Counter[str]]:
    """The rejection without personal data, and how many values of each kind were replaced.

    A value that is cut off matches no pattern, so the end of a long record is dropped, and long quotes in a reason.
    With hashed ids the record is not shown and the reason has no values, because ids in a broken record cannot be
    recognized. File and line are kept to find the record.
    """
    counts: Counter[str] = Counter()
    reason, record = rejected.reason, NOT_SHOWN
    if settings.ids:
        reason = general_reason(_FOUND.sub("..", reason))
    else:
        reason = _without_quotes(_FOUND.sub(lambda match: _short(match, ".."), reason), _MOST_QUOTED)
        record = _without_escapes(rejected.record)
        if len(rejected.record) >= _SHOWN:
            record = _CUT_END.sub("", record)
        record = scrub_text(record, settings, counts)
    line = scrub_id(rejected.line, settings, counts) if isinstance(rejected.line, str) else rejected.line
    reason = scrub_text(_without_escapes(reason), settings, counts)
    return replace(rejected, line=line, reason=reason, record=record), +counts


def _without_quotes(reason: str, longest: int) -> str:
    """Replace quotes of more than `longest` characters by '..'."""
    return _QUOTED.sub(lambda match: _short(match, "'..'", longest), reason)


def _short(match: re.Match[str], otherwise: str, longest: int = _MOST_QUOTED) -> str:
    return match[0] if len(match[0]) <= longest else otherwise


def _without_escapes(text: str) -> str:
    r"""Replace escapes by their characters: patterns do not match `
    4155550132` or `ann\u0040example.org`."""

    def meant(match: re.Match[str]) -> str:
        character = chr(int(match[1] or match[2] or "20", 16))
        return match[0] if "\ud800" <= character <= "\udfff" else character

    return _ESCAPE.sub(meant, text)
