"""Valid JSON for the outputs of a run: JSON has no NaN and no infinities.

A figure that is not finite is null, and `not_finite` beside it holds its value as text: {"heldout_loss": "nan"}.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE = "not_finite"


def json_text(value: Any, indent: int | None = None) -> str:
    """The value as JSON. Raises ValueError for a number that is not finite: see `finite_figures`."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def finite_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with null for each that is not finite; the original values of those are under `not_finite`."""
    found: dict[str, str] = {}
    finite = {key: _finite(value, key, found) for key, value in figures.items()}
    return {**finite, NOT_FINITE: found} if found else finite


def as_number(value: float | None) -> float:
    """A figure written by `finite_figures`; NaN if it was not finite."""
    return math.nan if value is None else float(value)


def _finite(value: Any, name: str, found: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner, f"{name}.{key}", found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner, f"{name}.{place}", found) for place, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[name] = str(value)
        return None
    return value
