"""The Jinja2 environment of prompt templates: Prompt Poet's settings in a sandbox, with placeholders for printed
values."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.prompt.values import IndentedText, TemplateText, Texts, Undefined, current_texts, plain

ESCAPE = "escape_special_characters"
RESERVED = ("token_limit", ESCAPE)  # Prompt Poet passes these to every template
_PRINT, _PRINT_ESCAPED, _LITERAL, _CAPTURE = "_print", "_print_escaped", "_template_text", "_capture"  # filters
_DICT_METHODS = frozenset(dir(dict))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Wraps every expression that a template prints.

    White space is handled as in Prompt Poet (Jinja's defaults), so the same file gives the same YAML. `functions` can
    be called by the template, with plain values; their results are values.
    """

    def __init__(self, directory: Path | None, functions: Mapping[str, Callable[..., Any]]) -> None:
        loader = jinja2.FileSystemLoader(directory) if directory is not None else None
        super().__init__(loader=loader, undefined=Undefined, autoescape=False)
        self.places: list[tuple[str, int]] = []  # (file or template, line) of every expression that prints
        self.filters[_PRINT] = lambda value, place: current_texts.get().printed(value, place)
        self.filters[_PRINT_ESCAPED] = lambda value, place: current_texts.get().printed_value(value, place)
        self.filters[_LITERAL] = _template_text
        self.filters[_CAPTURE] = _capture
        self.filters["trim"] = _of_template_text(self.filters["trim"])
        self.filters["indent"] = _indenting(_of_template_text(self.filters["indent"]))
        self.globals[ESCAPE] = lambda text: str(text) if isinstance(text, str) else text  # values need no escaping
        for name, function in functions.items():
            self.globals[name] = _of_plain_values(name, function)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in Jinja)
        """Call from a template. Macros, blocks and recursive loops return template text."""
        result = super().call(__context, __obj, *args, **kwargs)
        return TemplateText(result) if isinstance(__obj, Macro | BlockReference | LoopContext) else result

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in Jinja, with a fast path for keys of plain mappings."""
        if type(obj) is dict and attribute not in _DICT_METHODS and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        where = filename or name or "template"
        for choice in tree.find_all(nodes.CondExpr):
            if choice.expr2 is None:
                choice.expr2 = nodes.Const("", lineno=choice.lineno)  # prints nothing, not an undefined value
        for output in tree.find_all(nodes.Output):
            output.nodes = [
                child if isinstance(child, nodes.TemplateData) else self._printed(child, where)
                for child in output.nodes
            ]
        for assign in tree.find_all(nodes.Assign):
            assign.node = _with_literals(assign.node)
        for macro in tree.find_all(nodes.Macro):
            macro.defaults = [_with_literals(default) for default in macro.defaults]
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _captured(block)
        for call in tree.find_all(nodes.Call):
            call.args = [_with_literals(argument) for argument in call.args]
            for keyword in call.kwargs:
                keyword.value = _with_literals(keyword.value)
        return tree

    def _printed(self, node: Any, where: str) -> nodes.Filter:
        self.places.append((where, node.lineno))
        place = nodes.Const(len(self.places) - 1, lineno=node.lineno)
        is_call = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name)
        if is_call and node.node.name == ESCAPE and node.args:
            return nodes.Filter(node.args[0], _PRINT_ESCAPED, [place], [], None, None, lineno=node.lineno)
        return nodes.Filter(_with_literals(node), _PRINT, [place], [], None, None, lineno=node.lineno)


@jinja2.pass_context  # prevents constant folding at compile time, which would lose the type
def _template_text(_: Context, text: str) -> str:
    return TemplateText(text)


@jinja2.pass_context
def _capture(_: Context, text: str) -> str:
    return current_texts.get().captured(text)


def _of_template_text(filter_function: Callable[..., str]) -> Callable[..., str]:
    """A white space filter that returns template text for template text."""

    def apply(value: Any, *arguments: Any, **keywords: Any) -> str:
        result = filter_function(value, *arguments, **keywords)
        return TemplateText(result) if type(value) is TemplateText else result

    return apply


def _indenting(indent: Callable[..., str]) -> Callable[..., str]:
    """The filter `indent`, whose result for a value separates the value's lines from the added indentation."""

    def apply(value: Any, *arguments: Any, **keywords: Any) -> str:
        result = indent(value, *arguments, **keywords)
        if type(value) is not str or type(result) is not str:
            return result
        indented = IndentedText(result)
        indented.layout = lambda text: indent(text, *arguments, **keywords)
        indented.lines = value.splitlines() + [""] * value.endswith("\n")
        return indented

    return apply


def _of_plain_values(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        texts = current_texts.get()
        given = [_expanded(argument, texts) for argument in arguments]
        named = {key: _expanded(argument, texts) for key, argument in keywords.items()}
        return plain(function(*given, **named), f"{name}()")

    return call


def _expanded(argument: Any, texts: Texts) -> Any:
    return texts.expand(str(argument)) if isinstance(argument, str) else argument


def _with_literals(node: Any) -> Any:
    """The expression with the string literals that can be its result as template text."""
    if isinstance(node, nodes.Const) and type(node.value) is str:
        return nodes.Filter(node, _LITERAL, [], [], None, None, lineno=node.lineno)
    if isinstance(node, nodes.CondExpr):
        node.expr1 = _with_literals(node.expr1)
        node.expr2 = _with_literals(node.expr2)
    elif isinstance(node, nodes.And | nodes.Or):
        node.left, node.right = _with_literals(node.left), _with_literals(node.right)
    elif isinstance(node, nodes.List | nodes.Tuple):
        node.items = [_with_literals(item) for item in node.items]
    elif isinstance(node, nodes.Dict):
        for pair in node.items:
            pair.value = _with_literals(pair.value)
    return node


def _captured(block: nodes.AssignBlock) -> nodes.Filter:
    """The filters of a `{% set %}` block with ours innermost, so that it receives the block's text."""
    ours = nodes.Filter(None, _CAPTURE, [], [], None, None, lineno=block.lineno)
    if block.filter is None:
        return ours
    innermost = block.filter
    while isinstance(innermost.node, nodes.Filter):
        innermost = innermost.node
    innermost.node = ours
    return block.filter


def template_sources(environment: TemplateEnvironment, source: str, name: str) -> Iterator[tuple[str, nodes.Template]]:
    """The syntax tree of a template and of every file that it includes or imports by name, each once."""
    seen: set[str] = set()
    pending = [(name, source)]
    while pending:
        name, source = pending.pop()
        tree = jinja2.Environment().parse(source)
        yield name, tree
        for node in (*tree.find_all(nodes.Include), *tree.find_all((nodes.Import, nodes.FromImport))):
            named: Any = node.template  # type: ignore[attr-defined]
            included = named.value if isinstance(named, nodes.Const) else None
            if isinstance(included, str) and included not in seen and environment.loader is not None:
                seen.add(included)
                text, filename, _ = environment.loader.get_source(environment, included)
                pending.append((filename or included, text))
