"""Standard JSON: no NaN or Infinity, no number beyond a float's range, no duplicate keys."""

import json
import math
from collections import Counter
from typing import Any, NoReturn

from data.sources.record import RecordError


def parse_json(text: str, *, keeps_nulls: bool = True) -> Any:
    """The value of a JSON text, its objects without null keys unless `keeps_nulls`. Raises RecordError for invalid or
    ambiguous JSON."""
    try:
        return (_DECODER if keeps_nulls else _DECODER_WITHOUT_NULLS).decode(text)
    except RecordError:
        raise
    except RecursionError:
        raise RecordError("not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}{_remedy(text, error.pos)}") from None
    except ValueError as error:  # an integer with too many digits
        raise RecordError(f"not JSON: {error}") from None


def _remedy(text: str, place: int) -> str:
    """What to do about common mistakes, from the text before and after the place of the error."""
    before, after = text[:place].rstrip(), text[place : place + 100].lstrip()
    if before.endswith(",") and after[:1] in ("]", "}"):
        return f"; remove the comma before {after[0]}"
    if before.endswith(("}", "]")) and after[:1] == ",":
        return "; remove the comma after the record"
    if before.endswith("}") and after[:1] == "{":
        return "; several records stand one a line in a file named .jsonl"
    return "; write each record on one line" if before in ("{", "[") and not after else ""


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The record without null keys at any depth, which mean the same as absent keys: Parquet fills absent keys with
    null."""
    return {key: _without_nulls(item) for key, item in record.items() if item is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return without_nulls(value)
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise RecordError(f"the key {twice[:80]!r} is twice in an object")
    return made


def _object_without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = {key: item for key, item in pairs if item is not None}
    if len(made) != len(pairs):
        _object(pairs)  # raises for a duplicate key
    return made


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RecordError(f"the number {digits[:40]} is beyond the range of a float")
    return value


def _constant(name: str) -> NoReturn:
    raise RecordError(f"not JSON: {name} is no number")


_DECODER, _DECODER_WITHOUT_NULLS = (
    json.JSONDecoder(object_pairs_hook=hook, parse_float=_float, parse_constant=_constant)
    for hook in (_object, _object_without_nulls)
)
