"""Skip optimizer steps with a non-finite or spiking loss or gradient norm, and give up after too many."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, NoReturn

import numpy as np
from pydantic import Field, PositiveFloat

from recipes.files import write_text
from recipes.json_text import json_text
from recipes.loader import Section
from train.deepspeed.world import World

NOT_FINITE, SPIKE = "a non-finite loss or gradient", "a spike of the loss or gradient norm"
NO_TARGET = "no target token in any row"
_ADVICE = {
    NOT_FINITE: "Lower optimizer.lr, or inspect these rows",
    SPIKE: "If the loss has only moved to another level, raise loop.skip_spikes.sigma (in a new run); otherwise lower "
    "optimizer.lr, or inspect these rows",
    NO_TARGET: "Raise loop.rows_per_step, or prepare data with more targets",
}


class TrainingError(RuntimeError):
    """Training cannot continue."""


class SkipSpikes(Section):
    """Skip steps whose loss or gradient norm is more than `sigma` standard deviations above that of the last `window`.

    Like SkipStepOptimizer of https://github.com/allenai/OLMo-core, with its defaults, but the window holds accepted
    steps only: a spike does not widen its own threshold.
    """

    sigma: PositiveFloat = 6.0
    window: Annotated[int, Field(ge=4)] = 128


class RecentSteps:
    """Losses and gradient norms of the last accepted steps, which decide whether the next step is accepted.

    Until half of `window` is filled, every step is accepted. Decisions depend on `state` alone, which checkpoints
    keep. Without settings it records nothing.
    """

    def __init__(self, settings: SkipSpikes | None, world: World, state: dict[str, list[float]] | None = None):
        self._settings, self._world = settings, world
        self._values: dict[str, deque[float]] = {}
        if settings:
            state = state or {"loss": [], "gradient_norm": []}
            self._values = {name: deque(values, settings.window) for name, values in state.items()}
        self.refusal: str | None = None
        """Why the last step was skipped."""

    def state(self) -> dict[str, list[float]] | None:
        """A copy of the windows, oldest first, for `__init__`."""
        return {name: list(values) for name, values in self._values.items()} or None

    def check(self, means: Callable[[], dict[str, float]], n_targets: float = 1) -> Callable[[float], bool] | None:
        """The `accepts` argument of `TrainingEngine.step`; all ranks give the same answer.

        `means` gives the step's "loss" over all ranks, and is called once the norm is known. A step without targets
        (on all ranks) is always skipped: momentum and weight decay alone would move the weights.
        """
        self.refusal = None
        if not n_targets:
            self.refusal = NO_TARGET
            return lambda gradient_norm: False
        if not self._settings:
            return None

        def accepts(gradient_norm: float) -> bool:
            found = {"loss": means()["loss"], "gradient_norm": gradient_norm}
            reasons = [reason for name, value in found.items() if (reason := self._reason(name, value))]
            # values could differ in the last bit, and one rank alone would take the step
            (n_rejecting,) = self._world.sum([float(bool(reasons))])
            if n_rejecting:
                self.refusal = "; ".join(reasons) or "rejected by another rank"
                return False
            for name, value in found.items():
                self._values[name].append(value)
            return True

        return accepts

    def _reason(self, name: str, value: float) -> str | None:
        assert self._settings
        values = self._values[name]
        if len(values) < self._settings.window // 2:
            return None
        mean, deviation = fmean(values), stdev(values)
        if value <= mean + self._settings.sigma * deviation:
            return None
        above = f"{(value - mean) / deviation:.1f}" if deviation else "infinitely many"
        return f"{name} {value:.4g} is {above} standard deviations above the mean {mean:.4g} of {len(values)} steps"


class SkippedSteps:
    """Counts skipped steps, and ends training after too many in a row."""

    def __init__(self, most_in_a_row: int, run_dir: Path, world: World, total: int, in_a_row: Sequence[str] = ()):
        self._most_in_a_row, self._run_dir, self._world = most_in_a_row, run_dir, world
        self.total = total
        self._in_a_row = list(in_a_row)
        self._reason = ""

    def note(self, taken: bool, refusal: str | None) -> str | None:
        """Record a step. Returns why it was skipped: `refusal` (of `RecentSteps`) or non-finite; None: it was taken."""
        if taken:
            self._in_a_row.clear()
            return None
        self.total += 1
        self._in_a_row.append(NO_TARGET if refusal == NO_TARGET else SPIKE if refusal else NOT_FINITE)
        self._reason = refusal or NOT_FINITE
        return self._reason

    @property
    def in_a_row(self) -> tuple[str, ...]:
        """Kinds of the skipped steps since the last one taken, for `__init__`."""
        return tuple(self._in_a_row)

    @property
    def too_many(self) -> bool:
        return len(self._in_a_row) > self._most_in_a_row

    def give_up(self, step: int, rows: np.ndarray) -> NoReturn:
        """Write the last step's data rows to bad_step.json and raise TrainingError with what to do."""
        path = self._run_dir / "bad_step.json"
        if self._world.is_main:
            write_text(path, json_text({"step": step, "rows": rows.tolist(), "reason": self._reason}) + "\n")
        had = " and ".join(f"{n} had {kind}" for kind, n in Counter(self._in_a_row).items())
        raise TrainingError(
            f"{len(self._in_a_row)} consecutive steps were skipped: {had}. The last was step {step} ({self._reason}); "
            f"its data rows are in {path}. {_ADVICE[self._in_a_row[-1]]}. The last checkpoint is not affected"
        )
