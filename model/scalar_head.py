"""The reward model's head: one logit per position."""

from __future__ import annotations

from torch import Tensor, nn


class ScalarHead(nn.Module):
    """hidden_TD -> score_T: the logit of the scored event at each position. Initialized to zero (probability 0.5)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.score = nn.Linear(d_model, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.score(hidden_TD.float() if self.score.weight.dtype.itemsize == 4 else hidden_TD).squeeze(-1)
