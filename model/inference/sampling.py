"""The sampling parameters of one reply."""

from __future__ import annotations

import sys
from dataclasses import dataclass


class SamplingError(ValueError):
    """A sampling parameter out of range; the message names it."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters (nucleus sampling: arXiv 1904.09751). Raises SamplingError for a value out of range.

    temperature 0 is greedy. top_k 0 and top_p 1 disable the filters. Ties with the least likely token that a filter
    keeps are kept, and the most likely token is kept for any top_p.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # unlike float(), a comparison accepts integers of any size
        if not 0 <= self.temperature <= sys.float_info.max:
            raise SamplingError(f"temperature is {self.temperature!r}; expected a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p!r}; expected a number above 0 and at most 1")
        if self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k!r}; expected 0 (no cut) or more")
