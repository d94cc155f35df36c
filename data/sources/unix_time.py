"""Times as unix seconds: validation of every time in a record, given as a number or as ISO 8601."""

import re
from datetime import UTC, datetime

EARLIEST, LATEST = -62_135_596_800, 7_258_118_400  # years 1 to 2199; milliseconds since March 1970 are larger
_ISO_8601 = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d.*)?", re.ASCII)
_FINER = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


class TimeError(ValueError):
    """An invalid time; the message says what it is and what was expected, without the name of its key."""


def unix_seconds(value: object) -> float:
    """A number of unix seconds unchanged, or an ISO 8601 date or time as unix seconds (UTC without a zone).

    Raises TimeError for anything else, such as milliseconds.
    """
    if isinstance(value, str):
        return _of_text(value)
    if (isinstance(value, int | float) and not isinstance(value, bool)) and EARLIEST <= value < LATEST:
        return value
    raise TimeError(f"{_shown(value)}: expected unix seconds from the year 1 to 2199, or ISO 8601{_hint(value)}")


def _of_text(text: str) -> float:
    try:
        if not _ISO_8601.fullmatch(text.strip()):
            raise ValueError
        moment = datetime.fromisoformat(text.strip().upper())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise TimeError(
            f"{text[:80]!r}: expected ISO 8601, as 2024-05-01T12:30:00Z, or a number of unix seconds"
        ) from None


def _hint(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        for unit, factor in _FINER.items():
            if LATEST <= value < LATEST * factor:
                return f"; in {unit} it is in {_year(value / factor)}, so divide by {factor:,}"
    return ""


def _year(seconds: float) -> int:
    return datetime.fromtimestamp(seconds, UTC).year


def _shown(value: object) -> str:
    return "an integer of many digits" if isinstance(value, int) and abs(value) >= 2**256 else repr(value)[:80]
