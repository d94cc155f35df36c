"""Values during Jinja rendering and YAML parsing: placeholders, so that no value can add structure.

A template prints placeholders; texts replace them after the YAML is parsed. Only text by the template's author,
including string literals in expressions (`TemplateText`), is parsed as YAML.
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2

MARK = "\ue000"  # marks a placeholder in the text that is parsed
_OPEN, _CLOSE = "\ue001", "\ue002"
_NUMBER = re.compile(f"{MARK}([0-9]+){_CLOSE}")


class PromptError(ValueError):
    """An invalid template or values; the message names the template, the part and what was expected."""


_CUT = "a filter block cuts a value after it is printed; cut the value itself"


class TemplateText(str):
    """A string literal of the template, printed as template text; anything computed from it is a value."""


class IndentedText(str):
    """A value through the filter `indent`. Line breaks and indentation are template text and the lines are values, so
    YAML removes the indentation in a `content: |`, as in Prompt Poet."""

    layout: Callable[[str], str]
    lines: list[str]


class Undefined(jinja2.Undefined):
    """A missing value: it can be tested and compared, as in Jinja, but printing, iterating or attribute access is an
    error, where Jinja prints nothing."""

    __iter__ = __str__ = __len__ = jinja2.Undefined._fail_with_undefined_error


class Texts:
    """The printed values of one rendering in order, with the place in the template of each (a number)."""

    def __init__(self) -> None:
        self._nonce = str(secrets.randbits(96))  # digits: filters like `upper` do not change them
        self._begin = f"{MARK}{self._nonce}{_OPEN}"
        self.texts: list[str] = []
        self.places: list[int] = []

    def printed(self, value: Any, place: int) -> str:
        """The output for a printed value: a placeholder, or a literal of the template as it is."""
        if type(value) is not str:
            if type(value) is TemplateText:
                return value
            if type(value) is IndentedText:
                return value.layout("\n".join(self.printed(line, place) if line else "" for line in value.lines))
            value = _as_text(value)
        self.texts.append(value)
        self.places.append(place)
        return f"{self._begin}{len(self.texts) - 1}{_CLOSE}"

    def printed_value(self, value: Any, place: int) -> str:
        """`printed`, with literals of the template as values too."""
        return self.printed(str(value) if type(value) is TemplateText else value, place)

    def captured(self, text: str) -> str:
        """The value of a `{% set %}` block: template text if no value was printed in it."""
        return self.expand(text) if MARK in text else TemplateText(text)

    def expand(self, text: str) -> str:
        """`text` with all placeholders replaced, also those in the output of a macro that was printed as a value."""
        first, *others = text.split(self._begin)
        expanded = [first]
        for other in others:
            number, close, rest = other.partition(_CLOSE)
            if not (close and number.isdecimal()):
                raise PromptError(_CUT)
            expanded += (self.expand(self.texts[int(number)]), rest)
        return "".join(expanded)

    def split(self, rendered: str) -> tuple[str, list[int]]:
        """The template's output with `MARK` for each placeholder, and the numbers of their texts, in order.

        Raises PromptError if a placeholder was truncated.
        """
        whole = rendered.count(MARK) == rendered.count(self._begin)
        pieces = _NUMBER.split(rendered.replace(self._begin, MARK))
        literals = pieces[::2]
        marked = MARK.join(literals)
        if not whole or marked.count(MARK) != len(literals) - 1 or _OPEN in marked or _CLOSE in marked:
            raise PromptError(_CUT)
        return marked, [int(number) for number in pieces[1::2]]


current_texts: ContextVar[Texts] = ContextVar("texts of the rendering in progress")


def plain(value: Any, key: str) -> Any:
    """The value as plain data, so that templates cannot reach other objects; `key` names it in errors.

    Text, numbers, None, lists and mappings of them; a dataclass (a Message) is a mapping of its fields.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is dict:
        return {
            name if type(name) is str else str(name): item if type(item) in _SCALARS else plain(item, f"{key}.{name}")
            for name, item in value.items()
        }
    if kind is list:
        return [item if type(item) in _SCALARS else plain(item, key) for item in value]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return plain(dict(value), key)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({name: getattr(value, name) for name in _fields(kind)}, key)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return plain(list(value), key)
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises with the variable's name
    raise PromptError(f"value {key} is a {kind.__name__}; expected text, numbers, lists and mappings of them")


_SCALARS = frozenset({str, int, float, bool, type(None)})
_field_names: dict[type, tuple[str, ...]] = {}


def _fields(kind: type) -> tuple[str, ...]:
    if kind not in _field_names:
        _field_names[kind] = tuple(field.name for field in dataclasses.fields(kind))
    return _field_names[kind]


def _as_text(value: Any) -> str:
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises with the variable's name
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise TypeError(f"cannot print a {type(value).__name__}; print its texts one by one")
    return str(value)
