"""The identity of a run: its recipe without the keys that may change and without the spelling of paths."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, PlainSerializer, SerializationInfo, SerializerFunctionWrapHandler, WrapSerializer

T = TypeVar("T")
_IDENTITY = {"identity": True}  # serialization context
_MAY_CHANGE, _LOCATION, _ABSENT = "(may change)", "(a location)", "absent"


def _without_value(value: Any, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
    return _MAY_CHANGE if info.context == _IDENTITY else handler(value)


def _without_path(value: Any, info: SerializationInfo) -> Any:
    return _LOCATION if info.context == _IDENTITY and isinstance(value, str) else value


MayChange = Annotated[T, WrapSerializer(_without_value)]
"""Type of a recipe key that may differ when an unfinished run is continued, because it does not affect the result."""

Location = Annotated[str, PlainSerializer(_without_path)]
"""Type of a recipe key that is a path. A run is identified by the content there (the digests of its inputs), not by the
path."""


def identity(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain data without `MayChange` keys, and with a constant for every `Location`."""
    plain: dict[str, Any] = _without_omitted(recipe.model_dump(mode="json", context=_IDENTITY))
    return plain


def _without_omitted(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _without_omitted(value) for key, value in plain.items() if value != _MAY_CHANGE}
    return [_without_omitted(item) for item in plain] if isinstance(plain, list) else plain


def recipe_digest(recipe: BaseModel) -> str:
    """SHA-256 of the recipe's identity: equal for two recipes that differ only in locations."""
    return hashlib.sha256(json.dumps(identity(recipe), sort_keys=True).encode()).hexdigest()


def differences(stored: dict[str, Any], recipe: BaseModel) -> list[str]:
    """Lines `key: there X, here Y` for every leaf in which a stored identity differs from `recipe`.

    A key that is absent from the stored identity counts as its default, since the schema has grown. Keys of `grown` do
    not count.
    """
    written = recipe.model_dump(mode="json", exclude_defaults=True)
    found = _differences(stored, identity(recipe), written, "")
    more = grown(stored, recipe)
    return [line for line in found if line.partition(":")[0] not in more]


def grown(stored: dict[str, Any], recipe: BaseModel) -> list[str]:
    """Keys of the recipe's `keys_that_may_grow` with a larger value than stored, which continues even a finished
    run."""
    ours = identity(recipe)
    return [key for key in getattr(recipe, "keys_that_may_grow", ()) if _number(ours, key) > _number(stored, key)]


def _number(plain: Any, key: str) -> float:
    """A dotted key's number, or infinity if there is none."""
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain if isinstance(plain, int | float) else math.inf


def _differences(stored: Any, ours: Any, written: Any, key: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(ours, dict):
        for name in [*stored, *(name for name in ours if name not in stored)]:
            is_written = isinstance(written, dict) and name in written
            if name in stored or is_written:
                inner = written[name] if is_written else None
                dotted = f"{key}.{name}" if key else name
                yield from _differences(stored.get(name, _ABSENT), ours.get(name, _ABSENT), inner, dotted)
    elif isinstance(stored, list) and isinstance(ours, list) and len(stored) == len(ours):
        inner = written if isinstance(written, list) and len(written) == len(ours) else [None] * len(ours)
        for number, items in enumerate(zip(stored, ours, inner, strict=True)):
            yield from _differences(*items, f"{key}.{number}")
    elif stored != ours:
        yield f"{key}: there {stored!r}, here {ours!r}"
