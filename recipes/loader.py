"""Recipes: one YAML file into one frozen, typed object, with every problem of the file in one message."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

STAGE_COMMANDS = {
    "data": "python -m data.prepare",
    "pretrain": "torchrun --standalone -m train.pretrain",
    "sft": "torchrun --standalone -m train.sft",
    "engagement": "torchrun --standalone -m train.engagement",
    "dpo": "torchrun --standalone -m train.dpo",
    "eval": "python -m eval.run",
    "export": "python -m serving_export.export",
}
"""How a recipe of each stage is run."""

MAX_BYTES = 1 << 20


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every problem with its place."""


class Section(BaseModel):
    """Base of every recipe schema: unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class CommandLine:
    """What an entry point was asked to do."""

    recipe: Any
    recipe_path: Path
    dry_run: bool
    overrides: tuple[str, ...]


def load_recipe(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, apply `dotted.key=value` overrides, validate against `schema`.

    Raises RecipeError with one line a problem: file:line, key, what was found, what was expected.
    """
    path = Path(path)
    tree = _read(path)
    _check_stage(schema, tree, path)
    overridden = {_override(tree, text): text for text in overrides}
    try:
        return schema.model_validate(_plain(tree))
    except ValidationError as error:
        problems = [_problem(schema, tree, path, detail, overridden) for detail in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def dump_recipe(recipe: BaseModel) -> str:
    """YAML text that loads to an equal recipe."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 4096
    yaml.dump(_listed(recipe.model_dump(mode="python")), stream)
    return stream.getvalue()


def parse_command_line(
    schema: type[BaseModel], argv: Sequence[str] | None = None, description: str | None = None
) -> CommandLine:
    """The recipe an entry point was called with. A recipe that cannot be used prints its problems and exits with 2."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to change, by dotted key")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe, run nothing")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = load_recipe(schema, arguments.recipe, arguments.overrides)
    except RecipeError as error:
        Console(stderr=True).print(f"[bold red]recipe error[/]\n{_markup_safe(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    return CommandLine(recipe, Path(arguments.recipe), arguments.dry_run, tuple(arguments.overrides))


def read_stage(path: str | Path) -> str:
    """The `stage` a recipe file is for. Raises RecipeError when it names none of those known."""
    tree = _read(Path(path))
    stage = tree.get("stage")
    if stage not in STAGE_COMMANDS:
        raise RecipeError(f"{path}: stage: found {stage!r}, expected one of {', '.join(STAGE_COMMANDS)}")
    return str(stage)


def _read(path: Path) -> CommentedMap:
    if path.is_dir():
        raise RecipeError(f"{path} is a directory; expected a YAML file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}){_near(path)}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: {len(content):,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    yaml = YAML(typ="rt")
    yaml.version = (1, 2)
    try:
        tree = yaml.load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = str(error.problem or error.context or error).split("\n")[0]
        raise RecipeError(f"{path}:{line}: not valid YAML: {what}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, CommentedMap):
        found = "nothing" if tree is None else type(tree).__name__
        raise RecipeError(f"{path}: found {found}, expected keys and values")
    _check_keys(tree, path, ())
    return tree


def _near(path: Path) -> str:
    """A hint at a file of nearly this name."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _check_keys(node: Any, path: Path, seen: tuple[int, ...]) -> None:
    """Anchors may not loop, and keys must be text."""
    if id(node) in seen:
        raise RecipeError(f"{path}: an alias refers to what contains it")
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            if not isinstance(key, str):
                raise RecipeError(f"{path}:{node.lc.key(key)[0] + 1}: key {key!r} is {type(key).__name__}, expected text")
            _check_keys(value, path, (*seen, id(node)))
    elif isinstance(node, CommentedSeq):
        for value in node:
            _check_keys(value, path, (*seen, id(node)))


def _check_stage(schema: type[BaseModel], tree: CommentedMap, path: Path) -> None:
    field = schema.model_fields.get("stage")
    if field is None or "stage" not in tree:
        return
    (expected,) = typing.get_args(field.annotation)
    found = tree["stage"]
    if found != expected:
        command = STAGE_COMMANDS.get(found)
        hint = f"; this recipe is run by: {command} {path}" if command else ""
        raise RecipeError(f"{path}:{_line(tree, ('stage',))}: stage: found {found!r}, expected {expected!r}{hint}")


def _override(tree: CommentedMap, text: str) -> tuple[str, ...]:
    """Set one `a.b.0.c=value` in the tree; missing maps are made, so that an unknown key is reported as one."""
    key, separator, value_text = text.partition("=")
    steps = tuple(key.split("."))
    if not separator or not all(steps):
        raise RecipeError(f"command line: found {text!r}, expected dotted.key=value")
    try:
        value = YAML(typ="safe").load(value_text)
    except YAMLError:
        raise RecipeError(f"command line: {key}: {value_text!r} is not a YAML value") from None
    node: Any = tree
    for depth, step in enumerate(steps):
        is_last = depth == len(steps) - 1
        if isinstance(node, list):
            if not step.isdigit() or int(step) >= len(node):
                raise RecipeError(f"command line: {key}: {step!r} is not a place in a list of {len(node)}")
            if is_last:
                node[int(step)] = value
            else:
                node = node[int(step)]
        elif isinstance(node, dict):
            if is_last:
                node[step] = value
            else:
                node = node.setdefault(step, CommentedMap())
        else:
            raise RecipeError(f"command line: {key}: {'.'.join(steps[:depth])} is {node!r}, it has no keys")
    return steps


def _plain(node: Any) -> Any:
    """The tree without ruamel's round-trip types: strict validation takes only Python's own."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _listed(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _listed(value) for key, value in node.items()}
    return [_listed(value) for value in node] if isinstance(node, list | tuple) else node


def _problem(
    schema: type[BaseModel], tree: CommentedMap, path: Path, detail: ErrorDetails, overridden: dict[tuple[str, ...], str]
) -> str:
    """One line for one of pydantic's errors."""
    steps = _steps_in(tree, detail["loc"])
    key = ".".join(str(step) for step in steps) or "the recipe"
    names = tuple(str(step) for step in steps)
    touching = [text for changed, text in overridden.items() if changed[: len(names)] == names or names[: len(changed)] == changed]
    place = f"command line ({touching[0]})" if touching and names else f"{path}:{_line(tree, steps)}"
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        known = _known_keys(schema, tree, steps[:-1])
        close = difflib.get_close_matches(str(steps[-1]), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(sorted(known))}"
        return f"{place}: {key}: unknown key{hint}"
    if kind == "missing":
        return f"{place}: {key}: missing, and it has no default"
    if kind == "value_error":
        where = "" if key == "the recipe" else f"{key}: "
        return f"{place}: {where}{message.removeprefix('Value error, ')}"
    found = detail["input"]
    expected = message[0].lower() + message[1:]
    shown = f"a {type(found).__name__}" if isinstance(found, dict | list) else repr(found)
    return f"{place}: {key}: found {shown}, expected: {expected}"


def _steps_in(tree: Any, location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic's location without the tags of union members, which are no keys of the file."""
    steps: list[int | str] = []
    node = tree
    for number, step in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(node, dict) and (step in node or is_last):
            steps.append(step)
            node = node.get(step)
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            steps.append(step)
            node = node[step]
    return tuple(steps)


def _line(tree: Any, steps: tuple[int | str, ...]) -> int:
    """The line of a key, or of the nearest thing around it that the file has."""
    node, line = tree, 1
    for step in steps:
        try:
            if isinstance(node, CommentedMap):
                line = node.lc.key(step)[0] + 1
            elif isinstance(node, CommentedSeq):
                line = node.lc.item(step)[0] + 1
            node = node[step]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return line


def _known_keys(schema: type[BaseModel], tree: Any, steps: tuple[int | str, ...]) -> list[str]:
    """Keys the schema knows at `steps`; of a tagged union, those of the variant the file chose."""
    models: list[type[BaseModel]] = [schema]
    node = tree
    for step in steps:
        node = node[step]
        if isinstance(step, int):
            continue
        fields = [model.model_fields[step].annotation for model in models if step in model.model_fields]
        models = [model for annotation in fields for model in _models_in(annotation)]
        if isinstance(node, dict) and "kind" in node:
            chosen = [m for m in models if node["kind"] in typing.get_args(m.model_fields["kind"].annotation)]
            models = chosen or models
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _markup_safe(text: str) -> str:
    return text.replace("[", r"\[")
