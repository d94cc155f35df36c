"""The command of a stage that runs in one process (data, feedback, evaluation, export): from the command line to a
finished run directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.interrupt import print_interrupt
from recipes.loader import RecipeError, Section, parse_command_line, print_recipe
from recipes.plan_check import check_alone
from recipes.run_directory import RunDirectoryError, RunState, finish_run, prepare_run_directory, read_done
from recipes.stage_errors import run_entry


@dataclass(frozen=True)
class Made:
    """The result of a run: its key figure, the figures of done.json, and a function that prints the report, given its
    seconds."""

    key_figure: str
    report: Callable[[float, Console], None]
    figures: dict[str, Any] = field(default_factory=dict)


def text_report(text: str) -> Callable[[float, Console], None]:
    """A report that prints `text`."""
    return lambda seconds, console: console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class StageCommand:
    """A command. After one of `recipe_errors`, all `files` are removed so that a corrected recipe can use the
    directory."""

    schema: type[Section]
    description: str | None
    make: Callable[[Any, Console], Made]  # writes all files except done.json
    dry_run: Callable[[Any, Console], None]
    files: tuple[str, ...]  # everything that it writes, folders too
    outputs: tuple[str, ...] = ()  # read by later stages
    by_size: tuple[str, ...] = ()  # outputs that are too large to hash
    replaces_at_end: bool = False  # damaged outputs stay until whole ones replace them
    recipe_errors: tuple[type[Exception], ...] = ()
    other_errors: tuple[type[Exception], ...] = (ValueError,)
    passed_on: tuple[type[Exception], ...] = ()  # raised by main
    after_interrupt: str = "run the same command again"
    is_whole: Callable[[Path], bool] = lambda run_dir: True  # of outputs whose sizes match
    remove_work: Callable[[Path], None] = lambda run_dir: None  # the state that an interrupted run resumes from

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command; the exit code is 0, 2 for a user error, 130 for Ctrl-C."""
        command = parse_command_line(self.schema, argv, self.description)
        recipe: Any = command.recipe
        console = Console()
        errors = (*self.recipe_errors, *self.other_errors, RecipeError, RunDirectoryError)
        try:
            if command.dry_run:
                return run_entry(lambda: self._dry_run(recipe, command.recipe_path, console), recipe.run_dir, errors)
            return run_entry(lambda: self.run(recipe, console), recipe.run_dir, errors, self.passed_on)
        except KeyboardInterrupt:
            return print_interrupt(self.after_interrupt)

    def _dry_run(self, recipe: Any, recipe_path: Path, console: Console) -> None:
        print_recipe(recipe, console)
        self.dry_run(recipe, console)
        check_alone(recipe, recipe_path, console)
        console.print("dry run: nothing was written")

    def run(self, recipe: Any, console: Console) -> None:
        """Make the outputs of a recipe, unless they are finished."""
        run_dir, inputs = Path(recipe.run_dir), recipe.inputs()
        with prepare_run_directory(run_dir, recipe, inputs) as state:
            if state is RunState.FINISHED and self.is_whole(run_dir):
                self.remove_work(run_dir)  # left if the run was killed at its end
                done = read_done(run_dir) or {}
                console.print(f"{run_dir} is finished: {done['key_figure']}", highlight=False, soft_wrap=True)
                return
            if state in (RunState.FINISHED, RunState.DAMAGED):
                console.print(f"{run_dir}: its data is damaged; making it again", style="yellow", highlight=False)
                self._remove(run_dir, ("done.json", *(() if self.replaces_at_end else self.outputs)))
            began = time.monotonic()
            try:
                made = self.make(recipe, console)
            except self.recipe_errors:
                self._remove(run_dir, ("recipe.yaml", "run.json", *self.files))
                raise
            seconds = time.monotonic() - began
            finish_run(run_dir, recipe, inputs, made.key_figure, seconds, made.figures, self.outputs, self.by_size)
            self.remove_work(run_dir)
        made.report(seconds, console)

    def _remove(self, run_dir: Path, names: Sequence[str]) -> None:
        self.remove_work(run_dir)
        for path in (run_dir / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
