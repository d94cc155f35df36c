"""Keep the weights of the best evaluation, and stop early when it does not improve."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.loader import Section
from train.deepspeed.background import on_main
from train.deepspeed.world import World

FOLDER = "best"


class KeepBest(Section):
    """The held-out figure that selects the run's final weights: `heldout_loss` (lower), `heldout_auc` (higher), ..."""

    figure: str
    better: Literal["lower", "higher"]


class FigureError(ValueError):
    """loop.keep_best names a figure that the stage does not compute."""


class BestWeightsError(ValueError):
    """The best model so far, which a checkpoint names, is missing."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, and the number of evaluations since."""

    step: int
    figures: dict[str, float]
    evaluations_since: int = 0


class BestWeights:
    """Tracks the best evaluation, and keeps its model in `best/step_N` of the run directory.

    A checkpoint stores `to_save()`. Models that checkpoints name are kept, so that a killed run finds them.
    """

    def __init__(
        self,
        settings: KeepBest | None,
        stop_after: int | None,
        run_dir: Path,
        world: World,
        write: Callable[[Path], None],
        state: Best | None,
    ):
        """`write` saves the current model to a directory (called on every rank); `state`: from the checkpoint."""
        self._settings, self._stop_after, self._world, self._write = settings, stop_after, world, write
        self._folder, self._checkpoints = run_dir / FOLDER, run_dir / "checkpoints"
        self.best = self._saved = state
        if state and not self.directory(state.step).is_dir():
            raise BestWeightsError(
                f"{self.directory(state.step)} is missing, the best model so far according to the checkpoint; restore "
                "it, or remove the folder checkpoints to start from the beginning"
            )

    @property
    def is_over(self) -> bool:
        """Whether training ends early."""
        return bool(self.best and self._stop_after and self.best.evaluations_since >= self._stop_after)

    def directory(self, step: int) -> Path:
        """Where the model of a step is kept."""
        return self._folder / f"step_{step:08d}"

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Record an evaluation, and save the model if it is the best so far (called on every rank).

        Raises FigureError when the figure is not among `figures`.
        """
        if self._settings is None:
            return
        name = self._settings.figure
        if name not in figures:
            raise FigureError(
                f"loop.keep_best.figure: found {name}, this stage computes {', '.join(sorted(figures))}; choose one"
            )
        # rank 0 decides: the ranks' figures may differ in the last bits
        (is_better,) = self._world.sum([float(self._world.is_main and self._is_better(figures[name]))])
        if not is_better:
            assert self.best is not None, "the first evaluation is the best so far"
            self.best = Best(self.best.step, self.best.figures, self.best.evaluations_since + 1)
            return
        self.best = Best(step, figures)
        self._write(self.directory(step))
        needed = {step, self._saved.step} if self._saved else {step}
        on_main(self._world, lambda: self._remove_others(needed))

    def to_save(self) -> Best | None:
        """What a checkpoint saved now stores; its model is kept until the next checkpoint."""
        self._saved = self.best
        return self.best

    def _is_better(self, value: float) -> bool:
        assert self._settings is not None
        if self.best is None:
            return True
        best = self.best.figures[self._settings.figure]
        if math.isnan(best) or math.isnan(value):
            return math.isnan(best) and not math.isnan(value)
        return value < best if self._settings.better == "lower" else value > best

    def _remove_others(self, steps: set[int]) -> None:
        """Remove all models except those of `steps` and those that checkpoints name."""
        for path in self._checkpoints.glob("step_*/state.json"):
            best = json.loads(path.read_text())["best"]
            steps |= {best["step"]} if best else set()
        for path in self._folder.glob("step_*"):
            if int(path.name.removeprefix("step_")) not in steps:
                shutil.rmtree(path)

    def figures(self, last_step: int, max_steps: int) -> dict[str, int | bool]:
        """Figures for done.json."""
        if self.best is None:
            return {}
        return {"kept_step": self.best.step, "last_step": last_step, "stopped_early": last_step < max_steps}


def best_of(content: dict[str, Any] | None) -> Best | None:
    """The inverse of `json_of`."""
    if content is None:
        return None
    figures = {name: math.nan if value is None else value for name, value in content["figures"].items()}
    return Best(**{**content, "figures": figures})


def json_of(best: Best | None) -> dict[str, Any] | None:
    """As JSON; non-finite figures become null."""
    if best is None:
        return None
    figures = {name: value if math.isfinite(value) else None for name, value in best.figures.items()}
    return {"step": best.step, "figures": figures, "evaluations_since": best.evaluations_since}
