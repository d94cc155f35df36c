"""What eval.run and eval.ablation share: from the command line to a finished run directory with a report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eval.report import to_json
from eval.workspace import print_inputs
from recipes.loader import Section, dump_recipe, parse_command_line
from recipes.run_directory import RunState, finish_run, prepare_run_directory, read_done
from recipes.stage_errors import run_entry


@dataclass(frozen=True)
class Entry:
    """An entry point: its recipe, how its report is made and written, and the files that it writes."""

    schema: type[Section]
    description: str | None
    evaluate: Callable[[Any, Console], dict[str, Any]]
    key_figure: Callable[[dict[str, Any]], str]  # of a report as plain JSON values
    write: Callable[[Path, dict[str, Any]], str]  # writes the report and returns what is printed at the end
    files: tuple[str, ...]
    print_plan: Callable[[Any, Console], None] = lambda recipe, console: None

    def main(self) -> int:
        """Run the command; the exit code is 0, or 2 for a user error."""
        command = parse_command_line(self.schema, description=self.description)
        recipe: Any = command.recipe
        action = self.dry_run if command.dry_run else self.run
        return run_entry(lambda: action(recipe, Console()), recipe.run_dir)

    def dry_run(self, recipe: Any, console: Console) -> None:
        """Print the recipe, which of its inputs exist, and what a run would do."""
        console.print(dump_recipe(recipe), highlight=False, markup=False)
        print_inputs(recipe.inputs(), console)
        self.print_plan(recipe, console)

    def run(self, recipe: Any, console: Console) -> None:
        """Evaluate into recipe.run_dir unless it is finished."""
        started, run_dir = time.monotonic(), Path(recipe.run_dir)
        with prepare_run_directory(run_dir, recipe, recipe.inputs()) as state:
            if state is RunState.FINISHED:
                figure = (read_done(run_dir) or {}).get("key_figure")
                console.print(f"{run_dir} is finished: {figure}", highlight=False, soft_wrap=True)
                return
            if recipe.threads is not None:
                torch.set_num_threads(recipe.threads)
            report = to_json(self.evaluate(recipe, console))
            told = self.write(run_dir, report)
            seconds = time.monotonic() - started
            finish_run(run_dir, recipe, recipe.inputs(), self.key_figure(report), seconds, by_size=self.files)
        console.print(told, highlight=False, markup=False, soft_wrap=True)
