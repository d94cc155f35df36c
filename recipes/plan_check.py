"""Checks of a plan before anything is trained: each recipe's `check_plan(plan)` asks what it needs of earlier
stages."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from recipes.loader import RecipeError
from recipes.run_directory import damage, read_done

if TYPE_CHECKING:
    from recipes.pipeline import PlannedStage


@dataclass(frozen=True)
class _Alone:
    """A recipe that is checked without a pipeline."""

    recipe: Any
    recipe_path: Path
    nproc_per_node: int

    @property
    def name(self) -> str:
        return self.recipe_path.stem

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def written(self) -> dict[str, Any]:
        return {"stage": self.recipe.stage, **self.recipe.model_dump(mode="json")}


def check_alone(recipe: Any, recipe_path: Path, console: Console, n_ranks: int = 1) -> None:
    """Run `check_plan` of one recipe, whose missing inputs may still be written; print settings that will be adjusted.

    Raises RecipeError with all problems.
    """
    plan = PlanCheck([_Alone(recipe, recipe_path, n_ranks)], reads_sources=True, is_whole=False)
    try:
        plan.check()
    finally:
        for note in plan.notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)


class PlanCheck:
    """Answers questions about the run directories of other stages: from their content or, if a stage has not run yet,
    from its recipe and sources. Collects all problems, and notes about settings that will be adjusted.

    `reads_sources`: whether to read the sources of data that is not prepared yet. `is_whole`: whether what is missing
    must come from one of these stages.
    """

    def __init__(self, stages: Sequence[PlannedStage | _Alone], reads_sources: bool, is_whole: bool = True) -> None:
        self.stages, self.reads_sources, self._is_whole = stages, reads_sources, is_whole
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._planned = {os.path.realpath(one.run_dir): one for one in stages if _is_to_run(one.run_dir)}
        self._data: dict[str, Any] = {}
        self._at = stages[0]

    def check(self) -> None:
        """Load every recipe and run its `check_plan`. Raises RecipeError with all problems."""
        for stage in self.stages:
            self._at = stage
            try:
                look = getattr(stage.recipe, "check_plan", None)
            except RecipeError as error:
                self.problems.append(str(error))  # names the file itself
                continue
            if look is not None:
                with self.finding():
                    look(self)
        if self.problems:
            raise RecipeError("\n".join(dict.fromkeys(self.problems)))

    def problem(self, text: str) -> None:
        """Record an error that the current stage would raise."""
        line = f"{self._at.recipe_path}: {text}"
        if not any(known.endswith(f": {text}") for known in self.problems):
            self.problems.append(line)

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Record an error raised inside as a problem of the current stage, and continue."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problem(str(error))

    def note(self, text: str) -> None:
        """Record a setting that the current stage will adjust."""
        self.notes.append(f"{self._at.name}: {text}")

    @property
    def n_ranks(self) -> int:
        """The number of processes of the current stage."""
        return self._at.nproc_per_node

    def data(self, run_dir: str) -> Any:
        """data.packed.planned.DataFacts of a data directory, or None if nothing is known yet. Errors that preparation
        would raise are recorded once."""
        place = os.path.realpath(run_dir)
        if place not in self._data:
            self._data[place] = None
            with self.finding():
                self._data[place] = self._facts(run_dir)
        return self._data[place]

    def _facts(self, run_dir: str) -> Any:
        module, planned = importlib.import_module("data.packed.planned"), self._planned.get(os.path.realpath(run_dir))
        if planned is None:
            return module.facts_of_run(run_dir)
        recipe = self._recipe(planned) if planned.written["stage"] == "data" else None
        if recipe is None:
            return None
        facts = module.facts_of_recipe(recipe)
        if not self.reads_sources or not self._is_there(planned):
            return facts
        selected, problems = module.sides_of_recipe(recipe)
        for problem in problems:
            self.problem(problem)
        return facts if selected is None else replace(facts, train=selected.train, heldout=selected.heldout)

    def config(self, run_dir: str) -> Any:
        """The architecture (ModelConfig) of a run's model, or None if it is not known yet."""
        if (planned := self._planned.get(os.path.realpath(run_dir))) is not None:
            before = planned.written.get("init_from")
            own = getattr(self._recipe(planned), "model", None)
            return own if own is not None else self.config(before) if isinstance(before, str) else None
        initial = importlib.import_module("train.initial_model").find_initial_model(run_dir)
        return None if initial is None else initial.config()

    def check_reward_model(self, key: str, run_dir: str) -> None:
        """Record a run directory that a stage other than engagement has written or will write, as far as is known."""
        planned = self._planned.get(os.path.realpath(run_dir))
        stage = planned.written["stage"] if planned else (read_done(run_dir) or {}).get("stage")
        if stage not in (None, "engagement"):
            self.problem(f"{key}: {run_dir} is a run of stage {stage}; expected a reward model, of stage engagement")

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Record inputs that are neither there nor written by a stage that has not run yet."""
        for name, path in inputs.items():
            if self.is_to_come(path):
                continue
            if not _is_finished(Path(path)):
                what = "holds no finished run" if Path(path).exists() else "does not exist"
                self.problem(f"{name}: {path} {what}, and no stage of this pipeline writes it")

    def is_to_come(self, path: str) -> bool:
        """Whether a stage that has not run yet writes the path."""
        if not self._is_whole and not _is_finished(Path(path)):
            return True
        return any(Path(os.path.realpath(path)).is_relative_to(run_dir) for run_dir in self._planned)

    def _recipe(self, planned: PlannedStage | _Alone) -> Any:
        """None for an invalid recipe, which is reported with its own stage."""
        try:
            return planned.recipe
        except RecipeError:
            return None

    def _is_there(self, planned: PlannedStage | _Alone) -> bool:
        """Whether no source is written by a stage that has not run yet."""
        return not any(map(self.is_to_come, _locations(planned.written.get("sources"))))


def _is_finished(path: Path) -> bool:
    """Whether it is a file, or the directory of a finished run."""
    return path.exists() and (not path.is_dir() or read_done(path) is not None)


def _is_to_run(run_dir: Path) -> bool:
    """Whether the directory holds no finished run, or a damaged one."""
    return read_done(run_dir) is None or bool(damage(run_dir))


def _locations(node: Any) -> list[str]:
    if isinstance(node, dict | list):
        return [path for value in (node.values() if isinstance(node, dict) else node) for path in _locations(value)]
    return [node] if isinstance(node, str) and "/" in node else []
