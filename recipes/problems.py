"""Pydantic's validation errors as recipe errors: place, dotted key, what was found, what was expected, "did you
mean"."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from recipes.yaml_text import Document, Path


def describe_problems(schema: type[BaseModel], document: Document, error: ValidationError) -> list[str]:
    """One line for each key with a problem, in file order."""
    messages: dict[Path, list[str]] = {}
    order: dict[Path, tuple[str, int]] = {}
    for detail in error.errors():
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # a consequence of invalid items, which are reported themselves
        path, section, value = _follow(schema, detail["loc"])
        place = document.place(path)
        source, _, line = place.rpartition(":")
        order.setdefault(path, (source, int(line)) if line.isdecimal() else ("~", 0))
        messages.setdefault(path, []).append(_explain(detail, path, section, value, schema))
    lines = []
    for path in sorted(messages, key=lambda path: order[path]):
        key = ".".join(map(str, path))
        lines.append(f"{document.place(path)}: {key + ': ' if key else ''}{_merge(messages[path])}")
    return lines


def _merge(messages: list[str]) -> str:
    """One text for a value that fits no member of a union: what was found, and each expectation."""
    unique = list(dict.fromkeys(messages))
    heads = {message.split(", expected ")[0] for message in unique}
    if len(heads) == 1 and all(", expected " in message for message in unique):
        return f"{heads.pop()}, expected " + " or ".join(message.split(", expected ", 1)[1] for message in unique)
    return "; ".join(unique)


def _explain(detail: Any, path: Path, section: list[Any], value: list[Any], schema: type[BaseModel]) -> str:
    """The problem of one key: `section` are the possible types of the section it is in, `value` those of its value."""
    kind, given, found = detail["type"], detail["input"], _show(detail["input"])
    if kind == "extra_forbidden":
        return f"unknown key (found {found}){_meant_key(path, section, schema)}"
    if kind == "missing":
        return f"missing, expected {_expectation(section, str(path[-1]))}"
    if kind in ("value_error", "assertion_error"):
        reason = str(detail["ctx"]["error"])
        return reason if isinstance(given, dict | list) else f"found {found}: {reason}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_kind(given, [str(tag) for model in _models(value) for tag in _kinds(model)])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"found {found}, expected {_name(value)}"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    for theirs, ours in (("a valid integer", "an integer"), ("a valid array", "a list"), ("a valid ", "a ")):
        expected = expected.replace(theirs, ours)
    if kind == "literal_error" and isinstance(given, str):
        choices = [str(choice) for member in value if get_origin(member) is Literal for choice in get_args(member)]
        expected += _meant(given, choices)
    if kind == "bool_type" and str(given).lower() in ("yes", "no", "on", "off"):
        expected += f"; did you mean {str(given.lower() in ('yes', 'on')).lower()}?"
    return f"found {found}, expected {expected}"


def _explain_kind(given: object, kinds: list[str]) -> str:
    expected = " or ".join(kinds)
    if not isinstance(given, dict):
        return f"found {_show(given)}, expected a section with kind: {expected}"
    if "kind" not in given:
        return f"no key kind in this section, expected kind: {expected}"
    return f"found kind {_show(given['kind'])}, expected {expected}{_meant(str(given['kind']), kinds)}"


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _meant(found: str, known: list[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _meant_key(path: Path, section: list[Any], schema: type[BaseModel]) -> str:
    """The closest key of the same section, else the same key in another section, else the known keys."""
    known = [key for model in _models(section) for key in model.model_fields]
    found, whole = str(path[-1]), ".".join(map(str, path))
    if meant := _meant(found, known):
        return meant
    elsewhere = [key for key in _dotted_keys(schema) if key.rpartition(".")[2] == found and key != whole]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(known)}"


def _expectation(section: list[Any], key: str) -> str:
    """What a missing key should hold."""
    fields = [model.model_fields[key] for model in _models(section) if key in model.model_fields]
    if not fields:
        return "a value"
    annotation = fields[0].annotation
    return _name(_members(annotation)) + (" or null" if type(None) in get_args(annotation) else "")


_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _name(members: list[Any]) -> str:
    if kinds := [str(kind) for model in _models(members) for kind in _kinds(model)]:
        return f"a section with kind: {' or '.join(kinds)}"
    names: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            names += map(str, get_args(member))
        elif isinstance(member, type) and issubclass(member, BaseModel):
            names.append(f"a section with {', '.join(member.model_fields)}")
        elif get_origin(member) in (list, tuple):
            names.append("a list")
        else:
            names.append(_WORDS.get(member, "a section" if get_origin(member) is dict else str(member)))
    return " or ".join(names)


def _follow(schema: type[BaseModel], location: tuple[str | int, ...]) -> tuple[Path, list[Any], list[Any]]:
    """The data path of an error's location, the possible types of its section, and those of its value.

    Pydantic inserts a label into the location for each union it passes; labels are not part of the path.
    """
    path: list[str | int] = []
    section: list[Any] = []
    here: list[Any] = [schema]
    for step in location:
        if len(here) > 1:  # a label: the tag of a tagged union, or the name of a member
            named = [model for model in _models(here) if step in _kinds(model) or step == model.__name__]
            here = named or [member for member in here if member not in _models(here)]
            continue
        section, at = here, here[0] if here else None
        if isinstance(at, type) and issubclass(at, BaseModel):
            here = _members(at.model_fields[str(step)].annotation) if step in at.model_fields else []
        elif get_origin(at) in (list, tuple, dict):
            arguments = get_args(at)
            here = _members(arguments[0] if get_origin(at) is list or arguments[-1] is ... else arguments[-1])
        else:
            here = []
        path.append(step)
    return tuple(path), section, here


def _members(annotation: Any) -> list[Any]:
    """The types a value may have, without None; annotations and nested unions are flattened."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for member in get_args(annotation) for found in _members(member)]
    return [] if annotation in (None, type(None)) else [annotation]


def _models(members: list[Any]) -> list[type[BaseModel]]:
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for model in _models(_members(field.annotation)):
            yield from _dotted_keys(model, f"{prefix}{name}.")
