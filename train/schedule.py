"""Learning rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from recipes.loader import Section

Fraction = Annotated[float, Field(ge=0, le=1)]


class WSD(Section):
    """Warmup, constant, then linear decay over the last `decay_fraction` of the steps (arXiv 2404.06395)."""

    kind: Literal["wsd"]
    warmup_steps: NonNegativeInt = 0
    decay_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.0

    def stable_steps(self, max_steps: int) -> int:
        """Number of initial steps whose learning rate is the same in any longer run."""
        return min(max_steps, math.floor(max_steps - self.decay_fraction * max_steps) + 1)

    def multiplier(self, step: int, max_steps: int) -> float:
        """Fraction of the peak learning rate at `step` of `max_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_steps = self.decay_fraction * max_steps
        into_decay = step - (max_steps - decay_steps)
        if into_decay <= 0 or not decay_steps:
            return 1.0
        return 1 - (1 - self.final_fraction) * min(into_decay / decay_steps, 1)


class Cosine(Section):
    """Warmup, then cosine decay to `final_fraction` (arXiv 1608.03983)."""

    kind: Literal["cosine"]
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = 0.1

    def stable_steps(self, max_steps: int) -> int:
        """0: the whole curve depends on the number of steps."""
        return 0

    def multiplier(self, step: int, max_steps: int) -> float:
        """Fraction of the peak learning rate at `step` of `max_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(max_steps - self.warmup_steps, 1), 1)
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


Schedule = Annotated[WSD | Cosine, Field(discriminator="kind")]
