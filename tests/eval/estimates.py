"""Questions that tests ask of an estimate."""

from eval.statistics import Estimate


def has_interval(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None


def excludes(estimate: Estimate, value: float) -> bool:
    """Whether the interval is entirely on one side of `value`."""
    return estimate.low is not None and estimate.high is not None and not estimate.low <= value <= estimate.high
