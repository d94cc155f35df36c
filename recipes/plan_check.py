"""What a stage needs of the stages before it, asked before anything is trained: `Recipe.check_plan(plan)`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.loader import RecipeError
from recipes.run_directory import read_done

if TYPE_CHECKING:
    from recipes.pipeline import Planned


class PlanCheck:
    """Answers what a stage will find in the run directories of others: from what they hold, or, where a stage is still
    to run, from its recipe and its sources. Collects the problems, and notes of what will be done otherwise than asked.

    `reads_sources`: whether the sources of data that is still to be prepared are read for it.
    """

    def __init__(self, stages: Sequence[Planned], reads_sources: bool) -> None:
        self.stages, self.reads_sources = stages, reads_sources
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._planned = {os.path.realpath(one.run_dir): one for one in stages if read_done(one.run_dir) is None}
        self._data: dict[str, Any] = {}
        self._at = stages[0]

    def check(self) -> None:
        """Ask every stage. Raises RecipeError with all problems."""
        for stage in self.stages:
            self._at = stage
            try:
                if (look := getattr(self._at.recipe, "check_plan", None)) is not None:
                    look(self)
            except (ValueError, OSError) as error:
                self.problem(str(error))
        if self.problems:
            raise RecipeError("\n".join(dict.fromkeys(self.problems)))

    def problem(self, text: str) -> None:
        """The stage that is asked would end in this error."""
        line = f"{self._at.recipe_path}: {text}"
        if not any(known.endswith(f": {text}") for known in self.problems):
            self.problems.append(line)

    def note(self, text: str) -> None:
        """The stage that is asked will do something otherwise than its recipe says."""
        self.notes.append(f"{self._at.name}: {text}")

    @property
    def n_ranks(self) -> int:
        """Processes that the stage that is asked runs on."""
        return self._at.nproc_per_node

    def data(self, run_dir: str) -> Any:
        """data.packed.planned.DataFacts of a data directory, or None where nothing can be told of it yet."""
        place = os.path.realpath(run_dir)
        if place not in self._data:
            self._data[place] = None  # an error is told once
            planned, module = self._planned.get(place), importlib.import_module("data.packed.planned")
            if planned is None:
                self._data[place] = module.facts_of_run(run_dir)
            elif planned.written["stage"] == "data":
                reads = self.reads_sources and self._is_there(planned)
                self._data[place] = module.facts_of_recipe(planned.recipe, reads)
        return self._data[place]

    def config(self, run_dir: str) -> Any:
        """The architecture (ModelConfig) of a run's model, or None where nothing can be told of it yet."""
        planned = self._planned.get(os.path.realpath(run_dir))
        if planned is not None:
            own, before = getattr(planned.recipe, "model", None), getattr(planned.recipe, "init_from", None)
            return own if own is not None else self.config(before) if before else None
        initial = importlib.import_module("train.initial_model").find_initial_model(run_dir)
        return None if initial is None else initial.config()

    def is_to_come(self, path: str) -> bool:
        """Whether a stage that is still to run writes it."""
        return any(Path(os.path.realpath(path)).is_relative_to(run_dir) for run_dir in self._planned)

    def _is_there(self, planned: Planned) -> bool:
        """Whether no source is written by a stage that is still to run."""
        return not any(map(self.is_to_come, _locations(planned.written.get("sources"))))


def _locations(node: Any) -> list[str]:
    if isinstance(node, dict | list):
        return [path for value in (node.values() if isinstance(node, dict) else node) for path in _locations(value)]
    return [node] if isinstance(node, str) and "/" in node else []
