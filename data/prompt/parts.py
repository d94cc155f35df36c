"""The YAML that a template renders, as parts: Prompt Poet's level, which knows roles and contents but no tokens.

A template renders the same few YAML shapes turn after turn, with other values in them. `PartReader` parses a shape
once and fills it from then on, and remembers the parts of late.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from data.format.dialogue import NARRATOR
from data.prompt.values import MARK, PromptError, Texts
from data.prompt.yaml_parts import load_records
from data.recent import Recent

SPACE_MARKER = "<|space|>"  # Prompt Poet's: keeps white space at the edge of a content, which is stripped
NAME, ROLE, SPEAKER, CONTENT, SECTIONS = "name", "role", "speaker", "content", "sections"
PRIORITY, EXPECTED = "truncation_priority", "expected_template_data_keys"
PART_KEYS = (NAME, ROLE, SPEAKER, CONTENT, SECTIONS, PRIORITY, EXPECTED)
_SECTION_KEYS = (NAME, CONTENT, PRIORITY)
_SHAPES_CAPACITY, _PARTS_CAPACITY, _ENTRY = 1 << 20, 1 << 23, 256  # characters; an entry counts some of its own

_END = "\ue001"  # closes the number after MARK in the YAML that is parsed
_VALUE_OR_SPACE = re.compile(f"{MARK}([0-9]+){_END}|{re.escape(SPACE_MARKER)}")
_NAMED = re.compile(r"([^:\n]+):(?:[ \t\n]+|$)(.*)", re.DOTALL)
_FIRST_PART = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*( *)- ")
_DOCUMENT_MARK = re.compile(r"^(?:---|\.\.\.|%)", re.MULTILINE)
_INTEGER = re.compile("-?[0-9]{1,9}")

Pieces = tuple[str | int, ...]  # template text, and numbers of values among those of a shape


class Section(NamedTuple):
    """A named piece of a part's content. A priority of None is its part's."""

    name: str
    content: str
    truncation_priority: int | None


class TemplatePart(NamedTuple):
    """One part as Prompt Poet has it, and who says it.

    `content` is a text, or what else YAML makes of it (a number, a list of image parts, ...). `speaker` is the key of
    that name, else the name that the content begins with ("Ann: hi"), else the narrator for the role system, else
    None; `text` is what the speaker says, None where `content` is no text.
    """

    name: str
    role: str
    content: Any
    truncation_priority: int
    sections: tuple[Section, ...]
    speaker: str | None
    text: str | None


def role_messages(parts: Sequence[TemplatePart]) -> list[dict[str, Any]]:
    """The parts as the messages of a chat API: role and content."""
    return [{"role": part.role, "content": part.content} for part in parts]


class PartReader:
    """Reads what one template renders. `name` is the template's, for errors."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shapes: Recent[str, list[_Shape]] = Recent(_SHAPES_CAPACITY)
        self._parts: Recent[tuple[str, ...], list[TemplatePart]] = Recent(_PARTS_CAPACITY)

    def read(
        self, rendered: str, texts: Texts, known_values: Collection[str], spans: list[list[int]] | None = None
    ) -> tuple[TemplatePart, ...]:
        """The parts. Raises PromptError for YAML that is broken or holds something else, naming part and key.

        `spans`, when given, receives for each part the numbers in `texts` of the values in its YAML.
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
        known_values: Collection[str],
        spans: list[list[int]] | None,
    ) -> list[TemplatePart]:
        parts: list[TemplatePart] = []
        first = 0
        for chunk in chunks:
            end = first + chunk.count(MARK)
            own = values[first:end]
            key = (chunk, *own)
            filled = self._parts.get(key)
            if filled is None:
                filled = self._filled(key, chunk, own, known_values, len(parts))
            parts += filled
            if spans is not None:
                spans += [list(numbers[first:end])] * len(filled)
            first = end
        return parts

    def _filled(
        self, key: tuple[str, ...], chunk: str, values: Sequence[str], known_values: Collection[str], n_before: int
    ) -> list[TemplatePart]:
        """The parts of one chunk of YAML, remembered unless they depend on more than the values in them."""
        shapes = self._shapes.get(chunk)
        if shapes is None:
            shapes = self._parsed(chunk, values, n_before)
        parts = []
        for number, shape in enumerate(shapes, start=n_before):
            shape.check_expected(values, known_values, f"{self._name}: part {number}")
            parts.append(shape.filled(values, self._name, number))
        if not any(shape.expected for shape in shapes):
            self._parts.put(key, parts, sum(map(len, key)) + _ENTRY)
        return parts

    def _parsed(self, chunk: str, values: Sequence[str], n_before: int) -> "list[_Shape]":
        records = _load(chunk)
        if records is None:
            records = []
        if not isinstance(records, list):
            raise PromptError(f"{self._name}: renders a {type(records).__name__}, expected a YAML list of parts")
        shapes = [_shape(record, f"{self._name}: part {n_before + i}", values) for i, record in enumerate(records)]
        self._shapes.put(chunk, shapes, len(chunk) + _ENTRY)
        return shapes


def _chunks(marked: str) -> list[str]:
    """The YAML of each part. Every line that begins a part begins an item of the top-level list, whatever precedes it
    was; where that is not plain to see, all is one chunk."""
    begin = _FIRST_PART.match(marked)
    if begin is None or _DOCUMENT_MARK.search(marked):
        return [marked]
    separator = f"\n{begin[1]}- "
    first, *others = marked.split(separator)
    return [first, *(separator[1:] + other for other in others)]


def _load(marked: str) -> Any:
    literals = marked.split(MARK)
    numbered = "".join(f"{literal}{MARK}{i}{_END}" for i, literal in enumerate(literals[:-1])) + literals[-1]
    return load_records(numbered, (NAME, ROLE, SPEAKER), (SECTIONS, EXPECTED))


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
        "': ' or '#' in it stands below `content: |`"
    )


def _with_values(marked: str, values: Sequence[str]) -> str:
    first, *others = marked.split(MARK)
    return first + "".join(value + other for value, other in zip(values, others))


@dataclass(frozen=True, slots=True)
class _Shape:
    """A part whose values are still open."""

    name: Pieces
    role: Pieces
    priority: int | Pieces
    content: Any  # Pieces, or what is no text, with marks in its texts
    is_text: bool
    sections: tuple[tuple[Pieces, Pieces, int | None], ...]
    expected: tuple[Pieces, ...]
    speaker: Pieces | None  # the key of that name
    named: tuple[Pieces, Pieces] | None  # speaker and text of a content that begins with a name

    def check_expected(self, values: Sequence[str], known_values: Collection[str], where: str) -> None:
        for key in self.expected:
            if _fill(key, values) not in known_values:
                raise PromptError(f"{where} ({_fill(self.name, values)}): the values lack {_fill(key, values)!r}")

    def filled(self, values: Sequence[str], template: str, number: int) -> TemplatePart:
        """The part with `values` in it. What it begins with and who says it was decided without them."""
        name, role = _fill(self.name, values), _fill(self.role, values)
        priority = self.priority
        if not isinstance(priority, int):
            priority = _priority(_fill(priority, values), f"{template}: part {number} ({name})")
        sections = tuple(Section(_fill(n, values), _fill(c, values), p) for n, c, p in self.sections)
        if not self.is_text:
            speaker = None if self.speaker is None else _fill(self.speaker, values)
            return TemplatePart(name, role, _fill_all(self.content, values), priority, sections, speaker, None)
        content = _fill_text(self.content, values)
        if self.speaker is not None:
            return TemplatePart(name, role, content, priority, sections, _fill(self.speaker, values), content)
        if role == "system":
            return TemplatePart(name, role, content, priority, sections, NARRATOR, content)
        if self.named is None:
            return TemplatePart(name, role, content, priority, sections, None, content)
        speaker, text = _fill(self.named[0], values), _fill_text(self.named[1], values)
        return TemplatePart(name, role, content, priority, sections, speaker, text)


def _shape(record: Any, where: str, values: Sequence[str]) -> _Shape:
    if not isinstance(record, dict):
        raise PromptError(f"{where}: found {type(record).__name__}, expected a mapping with name, role and content")
    name = _pieces(_scalar(record.get(NAME, ""), where, NAME))
    where = f"{where} ({_fill(name, values) or 'unnamed'})"
    _check_keys(record, PART_KEYS, where, values)
    sections = _sections(record, where, values) if SECTIONS in record else ()
    content = "".join(_marked(pieces) for _, pieces, _ in sections).strip() if sections else record.get(CONTENT)
    content = "" if content is None else content
    is_text = isinstance(content, str)
    if is_text and not sections:
        content = _unescaped(content.strip())
    named = _NAMED.match(content) if is_text else None
    expected = record.get(EXPECTED) or []
    if not isinstance(expected, list):
        raise PromptError(f"{where}: {EXPECTED} is {type(expected).__name__}, expected a list of names of values")
    speaker = record.get(SPEAKER)
    priority = _pieces(_scalar(record.get(PRIORITY, 0), where, PRIORITY))
    is_known = all(isinstance(piece, str) for piece in priority)
    return _Shape(
        name=name,
        role=_pieces(_scalar(record.get(ROLE, "user"), where, ROLE)),
        priority=_priority(_fill(priority, ()), where) if is_known else priority,
        content=_pieces(content) if is_text else content,
        is_text=is_text,
        sections=sections,
        expected=tuple(_pieces(str(key)) for key in expected),
        speaker=None if speaker is None else _pieces(_scalar(speaker, where, SPEAKER)),
        named=None if named is None else (_pieces(named[1].strip()), _pieces(named[2])),
    )


def _check_keys(record: dict[Any, Any], known: Sequence[str], where: str, values: Sequence[str]) -> None:
    unknown = [_fill(_pieces(str(key)), values) for key in record if key not in known]
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(known)}")


def _sections(
    record: dict[str, Any], where: str, values: Sequence[str]
) -> tuple[tuple[Pieces, Pieces, int | None], ...]:
    """Contents of sections are stripped of spaces and tabs only: their line breaks part them once they are joined."""
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
            (
                _pieces(_scalar(section[NAME], at, NAME)),
                _pieces(_unescaped(section[CONTENT].strip(" \t").replace(SPACE_MARKER, " "))),
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
    """Prompt Poet's escapes in the author's own text; values are put in later and stay as they are."""
    return marked.replace("\\n", "\n").replace("\\r", "\r")


class _MarkedSpace(str):
    """The space of Prompt Poet's marker, which nothing strips."""


def _pieces(marked: str) -> Pieces:
    pieces: list[str | int] = []
    end = 0
    for found in _VALUE_OR_SPACE.finditer(marked):
        if found.start() > end:
            pieces.append(marked[end : found.start()])
        pieces.append(_MarkedSpace(" ") if found[1] is None else int(found[1]))
        end = found.end()
    if end < len(marked) or not pieces:
        pieces.append(marked[end:])
    return tuple(pieces)


def _marked(pieces: Pieces) -> str:
    return "".join(piece if isinstance(piece, str) else f"{MARK}{piece}{_END}" for piece in pieces)


def _fill(pieces: Pieces, values: Sequence[str]) -> str:
    if len(pieces) == 1:
        only = pieces[0]
        return only if isinstance(only, str) else values[only]
    return "".join([piece if isinstance(piece, str) else values[piece] for piece in pieces])


def _fill_text(pieces: Pieces, values: Sequence[str]) -> str:
    """As `_fill`; where the values at an edge are empty, the template's white space beside them goes too."""
    if len(pieces) > 1 and (_is_empty(pieces[0], values) or _is_empty(pieces[-1], values)):
        pieces = _stripped(pieces, values)
    return _fill(pieces, values)


def _is_empty(piece: str | int, values: Sequence[str]) -> bool:
    return isinstance(piece, int) and not values[piece]


def _stripped(pieces: Pieces, values: Sequence[str]) -> Pieces:
    rest = list(pieces)
    for edge, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while rest:
            piece = rest[edge]
            if isinstance(piece, str):
                rest[edge] = stripped = piece if isinstance(piece, _MarkedSpace) else strip(piece)
                if stripped:
                    break
            elif values[piece]:
                break
            del rest[edge]
    return tuple(rest) or ("",)


def _fill_all(content: Any, values: Sequence[str]) -> Any:
    """A content that is no text, with the values in the texts of it."""
    if isinstance(content, str):
        return _fill(_pieces(content), values)
    if isinstance(content, list):
        return [_fill_all(item, values) for item in content]
    if isinstance(content, dict):
        return {_fill_all(key, values): _fill_all(item, values) for key, item in content.items()}
    return content
