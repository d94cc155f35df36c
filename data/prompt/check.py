"""What in a template breaks a prefix cache: values that change from turn to turn and stand before the conversation.

The template is rendered as the conversation grows and with one value changed at a time; what changes in front of
something that stays is found in the parts themselves, not guessed from the template's text. Which values change during
a conversation no template says: those named like a clock or a counter are taken to, and `varying` names others.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
_MESSAGE_FIELDS = frozenset({"text", "content", "speaker", "author"})
_Span = list[tuple[str, int, str]]


@dataclass(frozen=True)
class Finding:
    """One thing that breaks the prefix."""

    place: str  # file:line
    part: str
    value: str
    problem: str
    advice: str


@dataclass(frozen=True)
class Check:
    """What was found, what every turn computes anew after the conversation, and what must not change during it."""

    findings: tuple[Finding, ...]
    trailing: tuple[str, ...]
    constant: tuple[str, ...]


@dataclass(frozen=True)
class _Rendered:
    parts: tuple[TemplatePart, ...]
    spans: list[_Span]


def check(template: PromptTemplate, values: Mapping[str, Any], varying: Sequence[str] = ()) -> Check:
    """Findings for a template with `values` like those of a conversation under way.

    Raises PromptError when the template cannot be rendered with them, or has no conversation that grows.
    """
    lists = _conversations(values)
    if not lists:
        raise PromptError(
            f"{template.name}: no value is a list of messages, so no conversation grows; give values that hold one"
        )
    whole = _render(template, values)
    findings: list[Finding] = []
    trailing: list[str] = []
    before = whole
    for n in (1, 2, 3):
        after = _render(template, _grown(values, lists, n))
        n_trailing, broken = _compare(before, after)
        trailing = [part.name for part in before.parts[len(before.parts) - n_trailing :]]
        if broken is not None and not findings:
            findings.append(_growth_finding(template, before, after, broken, lists))
        before = after
    n_leading = len(whole.parts) - len(trailing)
    findings += _chance_findings(template, values, whole, n_leading)
    constant: dict[str, None] = {}
    for path, other in _changed_values(values, lists):
        place = _first_difference(whole, _render(template, other))
        if place is None or place >= n_leading:
            continue
        if _looks_varying(path, _at(values, path)) or path.split(".")[0] in varying or path in varying:
            findings.append(_value_finding(template, whole, place, path))
        else:
            constant[re.sub(r"\.\d+(?=\.|$)", ".*", path)] = None
    return Check(tuple(findings), tuple(trailing), tuple(constant))


def _render(template: PromptTemplate, values: Mapping[str, Any], seed: int = 0) -> _Rendered:
    """The parts, with the outcomes of chance (the filter `random`) that `seed` gives."""
    spans: list[_Span] = []
    state = random.getstate()
    random.seed(seed)
    try:
        return _Rendered(template.parts(values, spans=spans), spans)
    finally:
        random.setstate(state)


def _compare(before: _Rendered, after: _Rendered) -> tuple[int, int | None]:
    """How many parts at the end of `before` follow the conversation, and the first part in front of them that differs
    in `after`, None when all are the same."""
    a, b = before.parts, after.parts
    n_trailing = _n_trailing(a, b)
    n_same = 0
    while n_same < min(len(a), len(b)) and _said(a[n_same]) == _said(b[n_same]):
        n_same += 1
    return n_trailing, None if n_same >= len(a) - n_trailing else n_same


def _n_trailing(before: Sequence[TemplatePart], after: Sequence[TemplatePart]) -> int:
    """The parts behind the last that may be cut; where none may be cut, the last ones that a new message leaves."""
    cut = [i for i, part in enumerate(before) if part.truncation_priority > 0]
    if cut:
        return len(before) - 1 - cut[-1]
    n = 0
    while n < min(len(before), len(after)) - 1 and before[-1 - n] == after[-1 - n]:
        n += 1
    return n


def _said(part: TemplatePart) -> tuple[Any, ...]:
    """What of a part reaches the model."""
    return part.role, part.content, part.speaker, part.text


def _first_difference(a: _Rendered, b: _Rendered) -> int | None:
    for number, (one, other) in enumerate(zip(a.parts, b.parts)):
        if _said(one) != _said(other):
            return number
    return None if len(a.parts) == len(b.parts) else min(len(a.parts), len(b.parts))


def _chance_findings(
    template: PromptTemplate, values: Mapping[str, Any], first: _Rendered, n_leading: int
) -> list[Finding]:
    """At most one: a part of the first `n_leading` that differs with the same values."""
    for seed in range(1, 9):
        again = _render(template, values, seed)
        place = _first_difference(first, again)
        if place is not None and place < n_leading:
            return [
                Finding(
                    _place(template, first, again, place, ()),
                    _part_name(first, place),
                    "",
                    "differs from rendering to rendering with the same values",
                    "leave chance out of the template; give its outcome as a value that stays",
                )
            ]
    return []


def _growth_finding(
    template: PromptTemplate, before: _Rendered, after: _Rendered, part: int, lists: Sequence[str]
) -> Finding:
    return Finding(
        _place(template, before, after, part, lists),
        _part_name(before, part),
        ", ".join(lists),
        "changes when a message is appended, and everything after it is computed anew every turn",
        "move the part behind the messages, or show every message in one form whatever follows it; leave cutting old "
        "messages to truncation_priority",
    )


def _value_finding(template: PromptTemplate, whole: _Rendered, part: int, path: str) -> Finding:
    place = _uses_of(template, path)
    return Finding(
        place,
        _part_name(whole, part),
        path,
        "changes during a conversation, and everything after it is computed anew every time",
        "move the part behind the messages, right before the reply; or give a value that changes rarely (the date "
        "instead of the time), or the time of the first message",
    )


def _place(template: PromptTemplate, before: _Rendered, after: _Rendered, part: int, names: Sequence[str]) -> str:
    """file:line of the first value that differs in a part, else of what uses one of `names`."""
    if part < len(before.spans) and part < len(after.spans):
        for (where, line, text), (_, _, other) in zip(before.spans[part], after.spans[part]):
            if text != other:
                return f"{template.name if where == 'template' else where}:{line}"
    return next((_uses_of(template, name) for name in names), template.name)


def _part_name(rendered: _Rendered, number: int) -> str:
    if number >= len(rendered.parts):
        return f"part {number}"
    return f"part {number} ({rendered.parts[number].name or 'unnamed'})"


def _uses_of(template: PromptTemplate, path: str) -> str:
    """file:line where a template first uses a value, best where it prints it."""
    key = path.split(".")[0]
    used: list[tuple[str, int]] = []
    for name, tree in template.sources():
        for output in tree.find_all(nodes.Output):
            for child in output.nodes:
                if key in _names(child):
                    return f"{name}:{child.lineno}"
        used += [(name, node.lineno) for node in tree.find_all(nodes.Name) if node.name == key]
    return f"{used[0][0]}:{used[0][1]}" if used else template.name


def _names(node: nodes.Node) -> set[str]:
    own = {node.name} if isinstance(node, nodes.Name) else set()
    return own | {name.name for name in node.find_all(nodes.Name)}


def _conversations(values: Mapping[str, Any]) -> list[str]:
    """The values that are lists of messages; where some say so by their name, only those."""
    lists = [
        key
        for key, value in values.items()
        if isinstance(value, list)
        and value
        and all(isinstance(item, Mapping) and _MESSAGE_FIELDS & item.keys() for item in value)
    ]
    return [key for key in lists if "message" in key.lower()] or lists


def _grown(values: Mapping[str, Any], lists: Sequence[str], n: int) -> dict[str, Any]:
    """The values `n` messages later; new messages take turns in the form of those there are."""
    grown = dict(values)
    for key in lists:
        said = list(values[key])
        for i in range(n):
            like = said[-2] if len(said) > 1 else said[-1]
            text = {name: _other(like[name], f" {i + 1}") for name in ("text", "content") if name in like}
            said.append({**like, **text})
        grown[key] = said
    return grown


def _changed_values(values: Mapping[str, Any], lists: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every single value outside the conversation, changed: its path, and the values with it."""
    for key, value in values.items():
        if key not in lists:
            for path, changed in _changed(value, key):
                yield path, {**values, key: changed}


def _changed(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            for at, changed in _changed(item, f"{path}.{name}"):
                yield at, {**value, name: changed}
    elif isinstance(value, list):
        for number, item in enumerate(value):
            for at, changed in _changed(item, f"{path}.{number}"):
                yield at, [*value[:number], changed, *value[number + 1 :]]
    else:
        yield path, _other(value, " (changed)")


def _other(value: Any, suffix: str) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value or ''}{suffix}"


def _at(values: Any, path: str) -> Any:
    for step in path.split("."):
        values = values[int(step)] if isinstance(values, list) else values[step]
    return values


def _looks_varying(path: str, value: Any) -> bool:
    words = re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", path).lower())
    if not _CLOCK_WORDS.isdisjoint(words):
        return True
    return isinstance(value, str) and _CLOCK_TEXT.search(value) is not None
