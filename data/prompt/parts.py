"""The parts in the YAML that a template renders (Prompt Poet's level: roles and contents, no tokens).

The YAML is parsed with marks in place of values, which are filled in afterwards, so values cannot add structure.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import yaml
from cachetools import LRUCache, cached

from data.format.dialogue import NARRATOR
from data.prompt.values import MARK, PromptError, Texts
from data.prompt.yaml_parts import load_records

SPACE_MARKER = "<|space|>"  # Prompt Poet's: keeps white space at the ends of a content, which is stripped
NAME, ROLE, SPEAKER, CONTENT, SECTIONS = "name", "role", "speaker", "content", "sections"
PRIORITY, EXPECTED = "truncation_priority", "expected_template_data_keys"
PART_KEYS = (NAME, ROLE, SPEAKER, CONTENT, SECTIONS, PRIORITY, EXPECTED)
_SECTION_KEYS = (NAME, CONTENT, PRIORITY)

_CACHED_CHARACTERS, _CHARACTERS_OF_AN_ENTRY = 1 << 23, 256
_END = "\ue001"  # closes the number after MARK in the YAML that is parsed
_VALUE_OR_SPACE = re.compile(f"{MARK}([0-9]+){_END}|{re.escape(SPACE_MARKER)}")
_FIRST_VALUE, _LAST_VALUE = re.compile(f"{MARK}([0-9]+){_END}"), re.compile(f"{MARK}([0-9]+){_END}\\Z")
_NAMED = re.compile(r"([^:\n]+):(?:[ \t\n]+|$)(.*)", re.DOTALL)
_FIRST_PART = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*( *)- ")
_DOCUMENT_MARK = re.compile(r"^(?:---|\.\.\.|%)", re.MULTILINE)
_INTEGER = re.compile("-?[0-9]{1,9}")


class PartSection(NamedTuple):
    """A named piece of a part's content. A priority of None is the part's."""

    name: str
    content: str
    truncation_priority: int | None


class TemplatePart(NamedTuple):
    """One part as in Prompt Poet, and its speaker.

    `content` is a text or other YAML (a number, a list of image parts, ...). `speaker` is the key of that name, else
    the name at the beginning of the content ("Ann: hi"), else the narrator for the role system, else None; `text` is
    what the speaker says, None if `content` is not a text.
    """

    name: str
    role: str
    content: Any
    truncation_priority: int
    sections: tuple[PartSection, ...]
    speaker: str | None
    text: str | None


class PartReader:
    """Reads the output of one template. `name` is the template's, for errors."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(
        self, rendered: str, texts: Texts, known_values: frozenset[str], spans: list[list[int]] | None = None
    ) -> tuple[TemplatePart, ...]:
        """The parts. Raises PromptError for invalid YAML or content, naming part and key.

        Appends to `spans`, for each part, the numbers in `texts` of the values in its YAML.
        """
        marked, numbers = texts.split(rendered)
        values = [texts.texts[number] for number in numbers]
        if any(MARK in value for value in values):
            values = [texts.expand(value) for value in values]
        try:
            parts = self._read(_chunks(marked), values, numbers, known_values, spans)
        except yaml.YAMLError:
            if spans is not None:
                spans.clear()
            try:
                parts = self._read([marked], values, numbers, known_values, spans)
            except yaml.YAMLError as error:
                raise PromptError(_explained(error, self._name, marked, values)) from None
        if not parts:
            raise PromptError(f"{self._name}: renders no part, expected a YAML list of parts")
        return tuple(parts)

    def _read(
        self,
        chunks: Sequence[str],
        values: Sequence[str],
        numbers: Sequence[int],
        known_values: frozenset[str],
        spans: list[list[int]] | None,
    ) -> list[TemplatePart]:
        parts: list[TemplatePart] = []
        first = 0
        for chunk in chunks:
            end = first + chunk.count(MARK)
            found = _parts(chunk, tuple(values[first:end]), known_values, self._name, len(parts))
            parts += found
            if spans is not None:
                spans += [list(numbers[first:end])] * len(found)
            first = end
        return parts


def _chunks(marked: str) -> list[str]:
    """The YAML of each part: split at the lines that begin an item of the top-level list. One chunk for all if that is
    not certain."""
    begin = _FIRST_PART.match(marked)
    if begin is None or _DOCUMENT_MARK.search(marked):
        return [marked]
    separator = f"\n{begin[1]}- "
    first, *others = marked.split(separator)
    return [first, *(separator[1:] + other for other in others)]


@lru_cache(1024)  # templates render the same few chunks every turn, with other values
def _load(marked: str) -> Any:
    literals = marked.split(MARK)
    numbered = "".join(f"{literal}{MARK}{i}{_END}" for i, literal in enumerate(literals[:-1])) + literals[-1]
    records = load_records(numbered, (NAME, ROLE, SPEAKER), (SECTIONS, EXPECTED))
    return [] if records is None else records


def _explained(error: yaml.YAMLError, name: str, marked: str, values: Sequence[str]) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return f"{name}: the YAML that it renders is broken: {problem}"
    lines = marked.split("\n")
    n_before = "\n".join(lines[: mark.line]).count(MARK)
    line = _with_values(lines[mark.line], values[n_before:]) if mark.line < len(lines) else ""
    return (
        f"{name}: the YAML that it renders is broken in line {mark.line + 1}, {line.strip()!r}: {problem}; text with "
        "': ' or '#' in it belongs below `content: |`"
    )


def _with_values(marked: str, values: Sequence[str]) -> str:
    first, *others = marked.split(MARK)
    return first + "".join(value + other for value, other in zip(values, others))


def _n_characters(parts: Sequence[TemplatePart]) -> int:
    return sum(_CHARACTERS_OF_AN_ENTRY + 2 * len(str(part.content)) for part in parts)


@cached(LRUCache(_CACHED_CHARACTERS, _n_characters), lock=Lock())  # earlier messages are rendered again every turn
def _parts(
    chunk: str, values: tuple[str, ...], known_values: frozenset[str], name: str, n_before: int
) -> list[TemplatePart]:
    """The parts of one chunk of YAML, in which marks stand for `values`."""
    records = _load(chunk)
    if not isinstance(records, list):
        raise PromptError(f"{name}: renders a {type(records).__name__}, expected a YAML list of parts")
    return [_part(r, f"{name}: part {n}", values, known_values) for n, r in enumerate(records, start=n_before)]


def _part(record: Any, where: str, values: Sequence[str], known_values: frozenset[str]) -> TemplatePart:
    """The part of a record in whose texts marks stand for `values`. The speaker at the beginning of a content is parsed
    before values are filled in."""
    if not isinstance(record, dict):
        raise PromptError(f"{where}: found {type(record).__name__}, expected a mapping with name, role and content")
    name = _fill(_scalar(record.get(NAME, ""), where, NAME), values)
    where = f"{where} ({name or 'unnamed'})"
    _check_keys(record, PART_KEYS, where, values)
    _check_expected(record.get(EXPECTED) or [], where, values, known_values)
    sections = _sections(record, where, values) if SECTIONS in record else ()
    content = "".join(section.content for section in sections).strip() if sections else record.get(CONTENT)
    content = "" if content is None else content
    role = _fill(_scalar(record.get(ROLE, "user"), where, ROLE), values)
    priority = _priority(_fill(_scalar(record.get(PRIORITY, 0), where, PRIORITY), values), where)
    speaker = record.get(SPEAKER)
    if speaker is not None:
        speaker = _fill(_scalar(speaker, where, SPEAKER), values)
    text = None
    if not isinstance(content, str):
        content = _fill_all(content, values)
    else:
        marked = content if sections else _unescaped(content.strip())
        text = content = _fill_text(marked, values)
        if speaker is None and role == "system":
            speaker = NARRATOR
        elif speaker is None and (named := _NAMED.match(marked)):
            speaker, text = _fill(named[1].strip(), values), _fill_text(named[2], values)
    filled = tuple(s._replace(name=_fill(s.name, values), content=_fill(s.content, values)) for s in sections)
    return TemplatePart(name, role, content, priority, filled, speaker, text)


def _check_keys(record: dict[Any, Any], known: Sequence[str], where: str, values: Sequence[str]) -> None:
    unknown = [_fill(str(key), values) for key in record if key not in known]
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(known)}")


def _check_expected(expected: Any, where: str, values: Sequence[str], known_values: frozenset[str]) -> None:
    if not isinstance(expected, list):
        raise PromptError(f"{where}: {EXPECTED} is {type(expected).__name__}, expected a list of names of values")
    for key in expected:
        if (name := _fill(str(key), values)) not in known_values:
            raise PromptError(f"{where}: the values lack {name!r}")


def _sections(record: dict[str, Any], where: str, values: Sequence[str]) -> tuple[PartSection, ...]:
    """The sections, with marks. Only spaces and tabs are stripped from their contents, because line breaks separate
    them when joined."""
    found = record[SECTIONS]
    if CONTENT in record:
        raise PromptError(f"{where}: has content and sections, expected one of them")
    if not isinstance(found, list) or not found:
        raise PromptError(f"{where}: sections is {found!r}, expected a list of mappings with name and content")
    sections = []
    for number, section in enumerate(found):
        at = f"{where}, section {number}"
        if not isinstance(section, dict) or NAME not in section or not isinstance(section.get(CONTENT), str):
            raise PromptError(f"{at}: expected a mapping with name and a content that is text")
        _check_keys(section, _SECTION_KEYS, at, values)
        priority = section.get(PRIORITY)
        sections.append(
            PartSection(
                _scalar(section[NAME], at, NAME),
                _unescaped(section[CONTENT].strip(" \t").replace(SPACE_MARKER, " ")),
                None if priority is None else _priority(str(priority), at),
            )
        )
    return tuple(sections)


def _scalar(value: Any, where: str, key: str) -> str:
    is_read = key != PRIORITY and not isinstance(value, str)  # from a merged mapping, or with a tag
    if isinstance(value, list | dict) or value is None or is_read:
        raise PromptError(f"{where}: {key} is {value!r}, expected a text; write it in quotes")
    return str(value)


def _priority(text: str, where: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise PromptError(f"{where}: {PRIORITY} is {text!r}, expected a whole number")
    return int(text)


def _unescaped(marked: str) -> str:
    """Apply Prompt Poet's escapes to the author's text; values are filled in later and not unescaped."""
    return marked.replace("\\n", "\n").replace("\\r", "\r")


def _fill(marked: str, values: Sequence[str]) -> str:
    """Fill in the values, and spaces for Prompt Poet's space markers."""
    if MARK not in marked and SPACE_MARKER not in marked:
        return marked
    return _VALUE_OR_SPACE.sub(lambda found: " " if found[1] is None else values[int(found[1])], marked)


def _fill_text(marked: str, values: Sequence[str]) -> str:
    """`_fill`, and strip the template's white space next to empty values at the ends."""
    while (first := _FIRST_VALUE.match(marked)) and not values[int(first[1])]:
        marked = marked[first.end() :].lstrip()
    while (last := _LAST_VALUE.search(marked)) and not values[int(last[1])]:
        marked = marked[: last.start()].rstrip()
    return _fill(marked, values)


def _fill_all(content: Any, values: Sequence[str]) -> Any:
    """Fill in the values of a content that is not a text."""
    if isinstance(content, str):
        return _fill(content, values)
    if isinstance(content, list):
        return [_fill_all(item, values) for item in content]
    if isinstance(content, dict):
        return {_fill_all(key, values): _fill_all(item, values) for key, item in content.items()}
    return content
