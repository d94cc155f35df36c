"""Numbers as text for reports: signs, percent, intervals, p values, and how many decimals show a difference."""

from collections.abc import Iterable, Mapping
from typing import Any

MOST_DIGITS = 6


def telling_digits(values: Iterable[float | None], digits: int, percent: bool = False) -> int:
    """The fewest decimals, from `digits` to MOST_DIGITS, with which no two different values look equal."""
    scaled = sorted({100 * value if percent else value for value in values if value is not None})
    for enough in range(digits, MOST_DIGITS):
        if len({round(value, enough) for value in scaled}) == len(scaled):
            return enough
    return MOST_DIGITS if len(scaled) > 1 else digits


def estimate_digits(estimate: Mapping[str, Any], digits: int, percent: bool = False) -> int:
    """The fewest decimals, at least `digits`, with which the ends of the interval differ and a value other than 0 does
    not look like 0."""
    value, scale = estimate["value"], 100 if percent else 1
    least = telling_digits((estimate["low"], estimate["high"]), digits, percent)
    while value and least < MOST_DIGITS and round(scale * value, least) == 0:
        least += 1
    return least


def number_text(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """`0.31`, `31.0%`, or an en dash for None."""
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f}" if percent else f"{value:.{digits}f}"
    is_zero = float(text) == 0
    text = text.removeprefix("-") if is_zero else text.replace("-", "−")
    return text + "%" if percent else text


def signed_text(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """Like `number_text`, with a plus or a true minus sign."""
    if value is None:
        return "–"
    sign = "−" if value < 0 else "+"
    return sign + number_text(abs(value), digits, percent)


def interval_text(estimate: Mapping[str, Any], digits: int = 2, percent: bool = False) -> str:
    """`[0.24, 0.39]`, or an empty string without an interval."""
    if estimate["low"] is None:
        return ""
    scale = 100 if percent else 1
    return f"[{number_text(scale * estimate['low'], digits)}, {number_text(scale * estimate['high'], digits)}]"


def estimate_text(estimate: Mapping[str, Any], digits: int = 2, percent: bool = False, is_signed: bool = False) -> str:
    """`0.31 [0.24, 0.39]` with the decimals of `estimate_digits`."""
    digits = estimate_digits(estimate, digits, percent)
    number = (signed_text if is_signed else number_text)(estimate["value"], digits, percent)
    return f"{number} {interval_text(estimate, digits, percent)}".strip()


def p_value_text(value: float | None) -> str:
    """`p = 0.032`, `p < 0.001`."""
    if value is None:
        return "p undefined"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
