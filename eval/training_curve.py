"""Training curves for the report, read from the metrics.jsonl of each stage that kept one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
MAX_POINTS = 400


class MetricsError(ValueError):
    """A metrics.jsonl that cannot be read."""


def training_curves(run_dirs: Mapping[str, str]) -> dict[str, dict[str, list[float]]]:
    """Loss and held-out loss over steps of every run directory that has a metrics.jsonl with losses."""
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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsError(f"{path}:{number}: expected a JSON object with `step`, found {line[:80]!r}") from error
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


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal runs of points: the noise of single steps goes, the shape stays."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
