"""Training curves and spikes from the metrics.jsonl of runs."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveFloat

from recipes.json_text import as_number
from recipes.loader import Section

METRICS = "metrics.jsonl"
MAX_POINTS = 400


class MetricsError(ValueError):
    """An invalid metrics.jsonl."""


def training_curves(run_dirs: Mapping[str, str]) -> dict[str, dict[str, list[float]]]:
    """Loss and held-out loss over steps, for the run directories that have them in a metrics.jsonl."""
    curves = {}
    for name, run_dir in run_dirs.items():
        path = Path(run_dir) / METRICS
        if path.is_file():
            curve = read_curve(path)
            if curve["step"] or curve["heldout_step"]:
                curves[name] = curve
    return curves


def read_curve(path: Path) -> dict[str, list[float]]:
    """step and loss (thinned by averaging to at most MAX_POINTS), heldout_step and heldout_loss."""
    training: list[tuple[float, float]] = []
    heldout: list[tuple[float, float]] = []
    for step, record in read_records(path):
        for key, points in (("loss", training), ("heldout_loss", heldout)):
            value = record.get(key)
            if value is not None and math.isfinite(value):
                points.append((step, float(value)))
    thinned = _thin(training)
    return {
        "step": [step for step, _ in thinned],
        "loss": [loss for _, loss in thinned],
        "heldout_step": [step for step, _ in heldout],
        "heldout_loss": [loss for _, loss in heldout],
    }


def read_records(path: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    """(step, values) of every line of a metrics.jsonl. Raises MetricsError for an invalid line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsError(f"{path}:{number}: expected a JSON object with `step`, found {line[:80]!r}") from error
        yield step, record


class SpikeSection(Section):
    """A step is a spike if its value exceeds the mean of the `window` steps before by `sigma` standard deviations."""

    window: Annotated[int, Field(ge=2)] = 128
    sigma: PositiveFloat = 6.0


@dataclass(frozen=True)
class Spikes:
    """Spikes among the `n_steps` steps with a full window before them; the largest ratio of value and window mean."""

    n_steps: int
    count: int
    max_ratio: float | None


def spikes_of_run(path: Path, section: SpikeSection) -> dict[str, Spikes]:
    """Spikes of the training loss and of the gradient norm in a metrics.jsonl with a line for every step.

    Raises MetricsError if steps are missing, since spikes there would not be counted.
    """
    series: dict[str, list[float]] = {"loss": [], "gradient_norm": []}
    steps: list[float] = []
    for step, record in read_records(path):
        if "loss" in record and "gradient_norm" in record:
            steps.append(step)
            for key, values in series.items():
                values.append(as_number(record[key]))
    if steps and steps != [float(step) for step in range(1, len(steps) + 1)]:
        raise MetricsError(
            f"{path}: not every step is logged, so spikes cannot be counted; train with loop.log_every=1"
        )
    return {key: find_spikes(values, section) for key, values in series.items()}


def find_spikes(values: Sequence[float], section: SpikeSection) -> Spikes:
    """Spikes of a series, one value a step. A non-finite value is a spike and is not part of a window."""
    value_T = np.asarray(values, dtype=np.float64)
    if value_T.size <= section.window:
        return Spikes(0, 0, None)
    finite_T = np.where(np.isfinite(value_T), value_T, np.nan)
    before_TW = np.lib.stride_tricks.sliding_window_view(finite_T, section.window)[:-1]
    mean_T, deviation_T = np.nanmean(before_TW, axis=1), np.nanstd(before_TW, axis=1)
    now_T = finite_T[section.window :]
    is_spike_T = np.isnan(now_T) | (now_T > mean_T + section.sigma * deviation_T)
    ratios = now_T / mean_T
    return Spikes(now_T.size, int(is_spike_T.sum()), float(np.nanmax(ratios)) if np.isfinite(ratios).any() else None)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of groups of successive points, at most MAX_POINTS."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
