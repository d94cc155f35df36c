"""YAML 1.2 to plain data and back. Keeps the line of every key; unsupported YAML is an error that names the line."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

Path = tuple[str | int, ...]

_SCALARS = {f"tag:yaml.org,2002:{name}": name for name in ("null", "bool", "int", "float", "str", "timestamp")}


class YamlError(ValueError):
    """Text that is not a mapping of plain values; the message begins with the place."""


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None), and the place (`file:line`) of every path in it."""

    data: Any
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """The place of `path`; for a missing key, that of the section that lacks it."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places[path]


def parse_yaml(text: str, source: str, numbered: bool = True) -> Document:
    """Parse one YAML document. Places are `source:line`, or `source` alone if not `numbered`."""
    place = (lambda line: f"{source}:{line + 1}") if numbered else (lambda line: source)
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"{place(mark.line if mark else 0)}: {_explain(error)}") from None
    except YAMLError as error:
        line = text[: getattr(error, "position", 0)].count("\n")
        raise YamlError(f"{place(line)}: not readable as YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise YamlError(f"{place(0)}: nested too deeply to be a recipe") from None
    document = Document(None, {(): place(0)})
    if node is not None:
        document.data = _Reader(yaml, place, document.places).value(node, ())
    return document


def _explain(error: MarkedYAMLError) -> str:
    problem = (error.problem or error.context or "not readable as YAML").strip()
    if "\\t" in problem:
        return "a tab; YAML is indented with spaces only"
    if "found another document" in problem:
        return "a second document (---); a recipe is one document"
    return f"not readable as YAML: {problem}"


class _Reader:
    """Converts composed nodes to plain data, recording the place of each path."""

    def __init__(self, yaml: YAML, place: Any, places: dict[Path, str]):
        self._yaml, self._place, self._places = yaml, place, places

    def value(self, node: Node, path: Path) -> Any:
        key = ".".join(map(str, path)) or "the document"
        if node.anchor:
            self._refuse(node, f"{key}: anchor &{node.anchor}; recipes have no aliases: write the value out each time")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            items = []
            for index, child in enumerate(node.value):
                self._places[(*path, index)] = self._place(child.start_mark.line)
                items.append(self.value(child, (*path, index)))
            return items
        assert isinstance(node, ScalarNode), node
        return self._scalar(node, key)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, child in node.value:
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or str(key_node.tag) != "tag:yaml.org,2002:str":
                shown = key if isinstance(key, str) else "a collection"
                merge = "; recipes have no merge keys: write the values out" if shown == "<<" else "; quote it"
                self._refuse(key_node, f"key {'.'.join(map(str, (*path, shown)))}: not a string{merge}")
            here = (*path, key)
            if key in data:
                dotted = ".".join(map(str, here))
                self._refuse(key_node, f"{dotted}: given twice, first at {self._places[here]}; keep one")
            self._places[here] = self._place(key_node.start_mark.line)
            data[key] = self.value(child, here)
        return data

    def _scalar(self, node: ScalarNode, key: str) -> Any:
        kind = _SCALARS.get(str(node.tag))
        if kind is None:
            self._refuse(node, f"{key}: tag {node.tag}; recipes hold plain values only")
        if kind == "null":
            return None
        if kind in ("bool", "int", "float"):
            try:
                value = getattr(self._yaml.constructor, f"construct_yaml_{kind}")(node)
            except (ValueError, KeyError):
                self._refuse(node, f"{key}: {node.value!r} is not of type {kind}")
            if isinstance(value, float) and not math.isfinite(value):
                self._refuse(node, f"{key}: found {node.value}, expected a finite number")
            return value
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            self._refuse(node, f"{key}: a lone surrogate, which is not valid text")
        return node.value

    def _refuse(self, node: Node, message: str) -> NoReturn:
        raise YamlError(f"{self._place(node.start_mark.line)}: {message}")


def to_yaml(data: Mapping[str, Any]) -> str:
    """Block-style YAML that `parse_yaml` reads back to equal data."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 2**31
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    stream = io.StringIO()
    yaml.dump(_quoted(data), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """Double-quote strings that are not printable ASCII on one line, so that every character survives."""
    if isinstance(value, Mapping):
        return {_quoted(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(item) for item in value]
    if isinstance(value, str) and not (value.isascii() and value.isprintable()):
        return DoubleQuotedScalarString(value)
    return value
