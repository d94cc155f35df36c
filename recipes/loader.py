"""Load a recipe: strict YAML and dotted overrides into one frozen section; all problems are reported together."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax

from recipes.problems import describe_problems
from recipes.stages import STAGES
from recipes.yaml_text import Document, YamlError, parse_yaml, to_yaml


class RecipeError(ValueError):
    """An invalid recipe. The message lists every problem with its place, key, and what was expected."""


class Section(BaseModel):
    """Base of every recipe schema: frozen, unknown keys are errors, and no value is converted except int to float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class CommandLine(Generic[S]):
    """The parsed command line of an entry point."""

    recipe: S
    recipe_path: Path
    dry_run: bool
    overrides: tuple[str, ...]


def load_recipe(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The recipe in `path` with `overrides` (`dotted.key=value`) applied. Raises RecipeError with every problem."""
    document = read_document(path, overrides)
    _check_stage(schema, document, path)
    text = json.dumps(document.data)  # JSON mode: strict, but lists become tuples and strings dates
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        problems = describe_problems(schema, document, error)
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise RecipeError(f"{path} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))


def dump_recipe(recipe: BaseModel) -> str:
    """YAML text of every key, defaults included; loading it gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def print_recipe(recipe: BaseModel, console: Console | None = None) -> None:
    """Print the resolved recipe with syntax highlighting."""
    syntax = Syntax(dump_recipe(recipe).rstrip(), "yaml", background_color="default", word_wrap=True)
    (console or Console()).print(syntax)


def parse_command_line(
    schema: type[S], argv: Sequence[str] | None = None, description: str | None = None
) -> CommandLine[S]:
    """Read `RECIPE [dotted.key=value ...] [--dry-run]`. An invalid recipe prints its error and exits with 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="replaces one value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print it resolved, and stop")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = load_recipe(schema, arguments.recipe, arguments.overrides)
    except RecipeError as error:
        print_error(error)
        sys.exit(2)
    return CommandLine(recipe, Path(arguments.recipe), arguments.dry_run, tuple(arguments.overrides))


def print_error(error: Exception, title: str | None = None) -> None:
    """Print one error message on stderr: `title`, by default the class of the error, and its text."""
    text = f"[bold red]{title or type(error).__name__}[/]: {escape(str(error))}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """The plain data of a recipe file with `overrides` applied, before validation. Raises RecipeError."""
    document = _parse(_read_text(Path(path)), str(path))
    if not isinstance(document.data, dict):
        found = "an empty file" if document.data is None else f"a {type(document.data).__name__}"
        raise RecipeError(f"{path}: found {found}, expected a mapping of keys to values; see recipes/demo/")
    for override in overrides:
        _apply(document, override)
    return document


def _parse(text: str, source: str, numbered: bool = True) -> Document:
    try:
        return parse_yaml(text, source, numbered)
    except YamlError as error:
        raise RecipeError(str(error)) from None


def _read_text(path: Path) -> str:
    if path.is_dir():
        files = ", ".join(sorted(file.name for file in path.glob("*.yaml"))) or "no YAML file"
        raise RecipeError(f"{path}: a directory, expected one recipe file; it holds {files}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        there = f"; there are {', '.join(beside)}" if beside else ""
        raise RecipeError(f"{path}: no such file{there}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _apply(document: Document, override: str) -> None:
    """Set one `dotted.key=value` in the document; missing sections on the way are created."""
    key, equals, text = override.partition("=")
    source = f"command line: {override}"
    steps: list[str] = key.split(".")
    if not equals or not all(steps):
        raise RecipeError(f"{source}: expected dotted.key=value, as in optimizer.lr=3e-4")
    if not text.strip():
        raise RecipeError(f"{source}: no value; write {key}=null or {key}=''")
    value = _parse(text, source, numbered=False)
    container: Any = document.data
    path: tuple[str | int, ...] = ()
    for number, step in enumerate(steps):
        name: Any = _index(container, step, path, source) if isinstance(container, list) else step
        if not isinstance(container, dict | list):
            _refuse_step(source, path, container, step)
        path = (*path, name)
        if number == len(steps) - 1:
            container[name] = value.data
            document.places = {at: place for at, place in document.places.items() if at[: len(path)] != path}
            document.places |= {(*path, *at): "command line" for at in value.places}
        elif isinstance(container, dict) and container.get(name) is None:
            container[name] = {}
            document.places[path] = "command line"
        container = container[name]


def _index(items: list[Any], step: str, path: tuple[str | int, ...], source: str) -> int:
    if step.isdecimal() and int(step) < len(items):
        return int(step)
    dotted = ".".join(map(str, path))
    expected = f"0 to {len(items) - 1}" if items else "no index"
    raise RecipeError(f"{source}: {dotted} is a list of {len(items)}; found {step}, expected {expected}")


def _refuse_step(source: str, path: tuple[str | int, ...], found: object, step: str) -> NoReturn:
    dotted = ".".join(map(str, path))
    raise RecipeError(f"{source}: {dotted} is {found!r}, not a section, so it has no key {step}")


def _check_stage(schema: type[BaseModel], document: Document, path: str | Path) -> None:
    """Raise one RecipeError that names the right command if the recipe is of another stage."""
    if "stage" not in schema.model_fields:
        return
    stage, expected = document.data.get("stage"), get_args(schema.model_fields["stage"].annotation)
    if isinstance(stage, str) and stage in STAGES and expected and stage not in expected:
        raise RecipeError(
            f"{document.place(('stage',))}: stage: found {stage}, expected {' or '.join(expected)}; "
            f"run this recipe with: {STAGES[stage].command(str(path))}"
        )
