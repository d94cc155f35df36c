"""How many decimals a figure needs, so that different figures do not look the same."""

from collections.abc import Iterable, Mapping
from typing import Any

MOST_DIGITS = 6


def telling_digits(values: Iterable[float | None], digits: int, percent: bool = False) -> int:
    """The fewest decimals, at least `digits` and at most MOST_DIGITS, that tell every two different values apart."""
    scaled = sorted({100 * value if percent else value for value in values if value is not None})
    for enough in range(digits, MOST_DIGITS):
        if len({round(value, enough) for value in scaled}) == len(scaled):
            return enough
    return MOST_DIGITS if len(scaled) > 1 else digits


def estimate_digits(estimate: Mapping[str, Any], digits: int, percent: bool = False) -> int:
    """The fewest decimals, at least `digits`, at which the ends of the interval differ and a value that is not 0 does
    not look like it."""
    value, scale = estimate["value"], 100 if percent else 1
    if not value:
        return digits
    least = telling_digits((estimate["low"], estimate["high"]), digits, percent)
    while least < MOST_DIGITS and round(scale * value, least) == 0:
        least += 1
    return least
