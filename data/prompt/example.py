"""Example values for a template, inferred from its syntax: loops, attributes, prints and calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import meta, nodes

from data.prompt.template import PromptTemplate

_NAMES = frozenset({"speaker", "author", "name"})


def example_values(template: PromptTemplate) -> dict[str, Any]:
    """A value for every undeclared name of the template."""
    return _uses(template).examples(template.environment.globals)


def called_functions(template: PromptTemplate) -> list[str]:
    """The functions that the template calls and that neither it nor Jinja defines."""
    uses = _uses(template)
    return sorted(uses.called - uses.own - set(template.environment.globals))


def _uses(template: PromptTemplate) -> "_Uses":
    uses = _Uses()
    for _, tree in template.sources():
        uses.add(tree)
    return uses


class _Uses:
    """The uses of values in the syntax of templates."""

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.own: set[str] = {"loop", "caller", "varargs", "kwargs", "super", "self"}  # defined by Jinja or a template
        self._lists: set[str] = set()
        self._loops: dict[str, str] = {}  # loop variable -> name of the list
        self._fields: dict[str, set[str]] = {}  # name -> attributes of it, or of its items
        self._open: list[tuple[set[str], set[str]]] = []  # of each template: undeclared names, names it sets

    def add(self, tree: nodes.Template) -> None:
        """Add the tree of a template, or of one that it includes."""
        set_here = {macro.name for macro in tree.find_all(nodes.Macro)}
        set_here.update(module.target for module in tree.find_all(nodes.Import))
        for imported in tree.find_all(nodes.FromImport):
            set_here.update(name if isinstance(name, str) else name[1] for name in imported.names)
        set_here.update(node.name for node in tree.find_all(nodes.Name) if node.ctx == "store")
        self.own |= set_here
        self._open.append((meta.find_undeclared_variables(tree), set_here))
        for loop in tree.find_all(nodes.For):
            source = _looped_over(loop)
            if source is not None:
                self._lists.add(source)
                if isinstance(loop.target, nodes.Name):
                    self._loops[loop.target.name] = source
        self.called.update(call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name))
        for attribute in tree.find_all(nodes.Getattr):
            if isinstance(attribute.node, nodes.Name):
                self._fields.setdefault(attribute.node.name, set()).add(attribute.attr)
        for item in tree.find_all(nodes.Getitem):
            is_key = isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str)
            if isinstance(item.node, nodes.Name) and not is_key:
                self._lists.add(item.node.name)

    def examples(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A value for every undeclared name."""
        for variable, name in self._loops.items():
            self._fields.setdefault(name, set()).update(self._fields.get(variable, ()))
        names: set[str] = set()
        for number, (outside, _) in enumerate(self._open):
            elsewhere = [set_there for other, (_, set_there) in enumerate(self._open) if other != number]
            names |= outside.difference(*elsewhere)  # without names that the including template sets
        return {name: self._example(name) for name in sorted(names - set(given) - self.called - {"token_limit"})}

    def _example(self, name: str) -> Any:
        fields = sorted(self._fields.get(name, ()))
        if name in self._lists:
            return [self._item(fields, number) for number in range(4)]
        return self._item(fields, 0) if fields else f"{name} 0"

    @staticmethod
    def _item(fields: Sequence[str], number: int) -> Any:
        if not fields:
            return f"item {number}"
        return {
            name: ("Ann", "Ben")[number % 2] if name in _NAMES
            else f"{name} {number}"
            for name in fields
        }  # fmt: skip


def _looped_over(loop: nodes.For) -> str | None:
    """The name that a loop iterates over, through filters, slices and functions."""
    source: Any = loop.iter
    while isinstance(source, nodes.Filter | nodes.Getitem | nodes.Call):
        source = source.args[0] if isinstance(source, nodes.Call) and source.args else source.node
    return source.name if isinstance(source, nodes.Name) else None
