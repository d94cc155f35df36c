"""The identity of a run: its recipe without the keys that may change and without the spelling of paths."""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel

T = TypeVar("T")


class _MayChange:
    """Marks a key in a schema."""


class _Location:
    """Marks a key in a schema."""


MayChange = Annotated[T, _MayChange()]
"""Type of a recipe key that may differ when an unfinished run is continued, because it does not affect the result."""

Location = Annotated[str, _Location()]
"""Type of a recipe key that is a path. A run is identified by the content there (the digests of its inputs), not by the
path."""

_LOCATION = "(a location)"
_ABSENT = "absent"


def identity(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain data without `MayChange` keys, and with a constant for every `Location`."""
    return _known_by(recipe, recipe.model_dump(mode="json"), type(recipe))


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


def _known_by(value: Any, plain: Any, annotation: Any, marks: tuple[Any, ...] = ()) -> Any:
    """`plain` (the JSON form of `value`) with locations replaced; `marks` are the metadata of its field."""
    if isinstance(value, BaseModel):
        return {
            name: _known_by(getattr(value, name), plain[name], field.annotation, tuple(field.metadata))
            for name, field in type(value).model_fields.items()
            if name in plain and not any(isinstance(mark, _MayChange) for mark in field.metadata)
        }
    if isinstance(value, list | tuple):
        inner = _item_type(annotation, (list, tuple))
        return [_known_by(item, other, inner) for item, other in zip(value, plain, strict=True)]
    if isinstance(value, dict):
        inner = _item_type(annotation, (dict,))
        return {name: _known_by(item, plain[name], inner) for name, item in value.items()}
    if isinstance(value, str) and any(isinstance(mark, _Location) for mark in (*marks, *_marks(annotation))):
        return _LOCATION
    return plain


def _members(annotation: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(type, metadata) of every member of a union, or of the one type."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from ((member, (*found, *metadata)) for member, found in _members(inner))
    elif get_origin(annotation) in (Union, types.UnionType):
        yield from (found for member in get_args(annotation) for found in _members(member))
    else:
        yield annotation, ()


def _marks(annotation: Any) -> list[Any]:
    return [mark for member, metadata in _members(annotation) if member is str for mark in metadata]


def _item_type(annotation: Any, containers: tuple[type, ...]) -> Any:
    """The type of the items of a list, tuple or dict."""
    for member, _ in _members(annotation):
        if get_origin(member) in containers and (arguments := get_args(member)):
            return arguments[-1] if dict in containers else arguments[0]
    return Any


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
