"""Finds what in a template breaks a prefix cache: values before the conversation that change from turn to turn.

The template is rendered as the conversation grows and with one value changed at a time, and the parts are compared.
Values named like a clock or a counter are assumed to change during a conversation; `varying` names others.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from jinja2 import nodes

from data.prompt.parts import TemplatePart
from data.prompt.template import PromptTemplate
from data.prompt.values import PromptError

_CLOCK_WORDS = {
    *("now", "today", "tonight", "date", "day", "hour", "minute", "second", "time", "timestamp", "datetime", "clock"),
    *("weekday", "utc", "epoch", "elapsed", "ago", "random", "seed", "nonce", "uuid", "session", "request"),
    *("turn", "turns", "count", "counter"),
}
_CLOCK_TEXT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d|\b\d\d?:\d\d(?::\d\d)?\b")
_GROWS = (
    "changes when a message is appended, so everything after it is recomputed every turn",
    "move the part after the messages, or render every message independently of what follows it; leave "
    "cutting old messages to truncation_priority",
)
_VARIES = (
    "changes during a conversation, so everything after it is recomputed each time",
    "move the part after the messages, right before the reply; or give a value that changes rarely "
    "(the date instead of the time), or the time of the first message",
)
_RANDOM = (
    "differs from rendering to rendering with the same values",
    "do not use random choices in the template; give the choice as a constant value",
)
_MESSAGE_FIELDS = frozenset({"text", "content", "speaker", "author"})


@dataclass(frozen=True)
class Finding:
    """One cause of prefix cache misses."""

    place: str  # file:line
    part: str
    value: str
    problem: str
    advice: str


@dataclass(frozen=True)
class Check:
    """The findings, the parts after the conversation (recomputed every turn), and the values that must stay
    constant."""

    findings: tuple[Finding, ...]
    trailing: tuple[str, ...]
    constant: tuple[str, ...]


@dataclass(frozen=True)
class _Rendered:
    parts: tuple[TemplatePart, ...]
    spans: list[list[tuple[str, int, str]]]


def check(template: PromptTemplate, values: Mapping[str, Any], varying: Sequence[str] = ()) -> Check:
    """Findings for a template with example `values` of a conversation.

    Raises PromptError if the template cannot be rendered with them, or has no conversation that grows.
    """
    lists = _conversations(values)
    if not lists:
        raise PromptError(
            f"{template.name}: no value is a list of messages, so no conversation grows; give values with one"
        )

    def compare(
        before: _Rendered, after: _Rendered, n_leading: int, names: Sequence[str], value: str, why: tuple[str, str]
    ) -> list[Finding]:
        """A finding if one of the first `n_leading` parts differs."""
        changed = _first_difference(before, after)
        if changed is None or changed >= n_leading:
            return []
        place = _place(template, before, after, changed, names)
        return [Finding(place, _part_name(before, changed), value, *why)]

    turns = [_render(template, _grown(values, lists, n)) for n in range(4)]
    grown, n_trailing = list[Finding](), 0
    for before, after in pairwise(turns):
        n_trailing = _n_trailing(before.parts, after.parts)
        grown += compare(before, after, len(before.parts) - n_trailing, lists, ", ".join(lists), _GROWS)
    whole, n_leading = turns[0], len(turns[0].parts) - n_trailing
    again = (_render(template, values, seed) for seed in range(1, 9))
    random_choices = (found for other in again for found in compare(whole, other, n_leading, (), "", _RANDOM))
    findings = [*grown[:1], *islice(random_choices, 1)]
    constant: dict[str, None] = {}
    for path, value, other in _changed({key: value for key, value in values.items() if key not in lists}):
        name = ".".join(path)
        found = compare(whole, _render(template, {**values, **other}), n_leading, path[:1], name, _VARIES)
        if _looks_varying(name, value) or path[0] in varying or name in varying:
            findings += found
        elif found:
            constant[".".join("*" if step.isdecimal() else step for step in path)] = None
    last = turns[-2].parts
    return Check(tuple(findings), tuple(part.name for part in last[len(last) - n_trailing :]), tuple(constant))


def _render(template: PromptTemplate, values: Mapping[str, Any], seed: int = 0) -> _Rendered:
    """Render the parts; `seed` determines the filter `random`."""
    spans: list[list[tuple[str, int, str]]] = []
    state = random.getstate()
    random.seed(seed)
    try:
        return _Rendered(template.parts(values, spans=spans), spans)
    finally:
        random.setstate(state)


def _n_trailing(before: Sequence[TemplatePart], after: Sequence[TemplatePart]) -> int:
    """The number of parts after the last one that may be cut; if none may be cut, of the last parts that a new message
    does not change."""
    cut = [i for i, part in enumerate(before) if part.truncation_priority > 0]
    if cut:
        return len(before) - 1 - cut[-1]
    n = 0
    while n < min(len(before), len(after)) - 1 and before[-1 - n] == after[-1 - n]:
        n += 1
    return n


def _first_difference(a: _Rendered, b: _Rendered) -> int | None:
    """The number of the first part that differs in what the model reads."""
    said = [[(part.role, part.content, part.speaker, part.text) for part in each.parts] for each in (a, b)]
    for number, (one, other) in enumerate(zip(*said)):
        if one != other:
            return number
    return None if len(a.parts) == len(b.parts) else min(len(a.parts), len(b.parts))


def _place(template: PromptTemplate, before: _Rendered, after: _Rendered, part: int, names: Sequence[str]) -> str:
    """file:line of the first value that differs in a part, or else of the first use of one of `names`."""
    if part < len(before.spans) and part < len(after.spans):
        for (where, line, text), (_, _, other) in zip(before.spans[part], after.spans[part]):
            if text != other:
                return f"{template.name if where == 'template' else where}:{line}"
    for name, tree in template.sources():
        for node in tree.find_all(nodes.Name):
            if node.name in names:
                return f"{name}:{node.lineno}"
    return template.name


def _part_name(rendered: _Rendered, number: int) -> str:
    if number >= len(rendered.parts):
        return f"part {number}"
    return f"part {number} ({rendered.parts[number].name or 'unnamed'})"


def _conversations(values: Mapping[str, Any]) -> list[str]:
    """The values that are lists of messages; if some have "message" in their names, only those."""
    lists = [
        key
        for key, value in values.items()
        if isinstance(value, list)
        and value
        and all(isinstance(item, Mapping) and _MESSAGE_FIELDS & item.keys() for item in value)
    ]
    return [key for key in lists if "message" in key.lower()] or lists


def _grown(values: Mapping[str, Any], lists: Sequence[str], n: int) -> dict[str, Any]:
    """The values after `n` more messages, modeled on the existing ones."""
    grown = dict(values)
    for key in lists:
        said = list(values[key])
        for i in range(n):
            like = said[-2] if len(said) > 1 else said[-1]
            text = {name: _other(like[name], f" {i + 1}") for name in ("text", "content") if name in like}
            said.append({**like, **text})
        grown[key] = said
    return grown


def _changed(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """For every scalar in `value`: its path, the scalar, and a copy of `value` with another scalar in its place."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            for at, old, changed in _changed(item, (*path, str(name))):
                yield at, old, {**value, name: changed}
    elif isinstance(value, list):
        for number, item in enumerate(value):
            for at, old, changed in _changed(item, (*path, str(number))):
                yield at, old, [*value[:number], changed, *value[number + 1 :]]
    else:
        yield path, value, _other(value, " (changed)")


def _other(value: Any, suffix: str) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value or ''}{suffix}"


def _looks_varying(path: str, value: Any) -> bool:
    words = re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", path).lower())
    return not _CLOCK_WORDS.isdisjoint(words) or (isinstance(value, str) and _CLOCK_TEXT.search(value) is not None)
