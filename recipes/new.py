"""Inspect conversations and write a folder of recipes that fits them.

    python -m recipes.new runs/mine --data logs/
    python -m recipes.pipeline runs/mine

The recipes are those of `--like` (demo or mqa_1b) with values adapted to the data. Prints what was found and the reason
of every choice. Stages that the data cannot support are left out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.interrupt import print_interrupt
from recipes.loader import RecipeError, load_recipe
from recipes.new_recipes import Choices, choose, write_recipes
from recipes.pipeline import PIPELINE_FILE, print_problems, schema_of
from recipes.stage_errors import USER_ERROR, print_os_error

RECIPES = Path(__file__).parent
LIKE = ("demo", "mqa_1b")


def print_found(found: Any, data: Path, console: Console) -> None:
    """Print what was read, the speakers, and the first bad records with their reasons."""
    look = importlib.import_module("data.inspect.folder")
    dialogues = found.dialogues
    lengths = [len(dialogue.messages) for dialogue in dialogues]
    names = found.names
    speakers = {name for partners in names.partners.values() for name in partners} | set(names.characters)
    of_all = f" (of {found.n_bytes / 2**20:,.0f} MiB the first {found.n_records:,} records)" if found.is_sample else ""
    table = Table("found", f"{data}{of_all}", show_lines=False)
    table.add_row("read as", f"{found.source['kind']}" + (f" of {found.kind}" if "format" in found.source else ""))
    table.add_row("files", f"{len(found.files):,} ({found.n_bytes / 2**20:,.1f} MiB)")
    if found.unread:
        folder_files = importlib.import_module("data.sources.folder_files")
        table.add_row("", Text(folder_files.describe_unread(found.unread), "yellow"))
    counts = f"{len(dialogues):,} dialogues, {len(found.bad):,} bad, {found.n_left_out:,} left out"
    table.add_row("records", f"{found.n_records:,}: {counts}")
    table.add_row("messages", f"{sum(lengths):,}, {look.median(lengths):.0f} a dialogue, at most {max(lengths)}")
    characters = ", ".join(f"{name} ({n:,})" for name, n in names.characters.most_common(4))
    table.add_row("characters", characters + (" ..." if len(names.characters) > 4 else ""))
    table.add_row("speakers", f"{len(speakers):,}")
    table.add_row("times", "yes" if found.has_times else "no")
    table.add_row("participants", "named" if any(dialogue.participants for dialogue in dialogues) else "not named")
    console.print(table)
    for bad in found.bad[:3]:
        console.print(f"bad: {bad.file}:{bad.line}: {bad.reason}", highlight=False, markup=False, soft_wrap=True)


def run(folder: Path, data: Path, like: str) -> tuple[Any, Choices]:
    """Inspect, choose and write; returns what was found, and the recipes. Prints nothing, so that a closed pipe cannot
    interrupt it. Raises RecipeError or the readers' errors, with nothing written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists and is not empty; choose another folder, or remove it")
    look = importlib.import_module("data.inspect.folder")
    found = look.find_source(data)
    choices = choose(found, RECIPES / like, os.path.normpath(folder))
    write_recipes(choices, folder)
    for stage in choices.stages:
        load_recipe(schema_of(choices.recipes[stage]["stage"]), folder / f"{stage}.yaml")
    return found, choices


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 2 for a user error, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to write; the runs go into it too")
    parser.add_argument("--data", type=Path, required=True, help="a file or a folder of conversations")
    parser.add_argument("--like", choices=LIKE, default="demo", help="the recipes to start from (default demo)")
    arguments = parser.parse_args(argv)
    try:
        found, choices = run(arguments.folder, arguments.data, arguments.like)
    except KeyboardInterrupt:
        return print_interrupt("nothing was written")
    except OSError as error:
        print_os_error(error, arguments.folder)
        return USER_ERROR
    except ValueError as error:
        print_problems(error)
        return USER_ERROR
    print_result(found, choices, arguments, Console())
    return 0


def print_result(found: Any, choices: Choices, arguments: argparse.Namespace, console: Console) -> None:
    """Print what was found, chosen and written, and the next command."""
    print_found(found, arguments.data, console)
    files = ", ".join([PIPELINE_FILE, *(f"{stage}.yaml" for stage in choices.stages)])
    for line in (
        *(f"- {line}" for line in choices.reasons),
        *(f"warning: {line}" for line in choices.warnings),
        f"wrote {files} into {arguments.folder}",
        f"run them: python -m recipes.pipeline {arguments.folder}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
