"""GeGLU feed-forward (arXiv 2002.05202) with the tanh form of GELU, which all stock engines support."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig


class FeedForward(nn.Module):
    """x -> w_out(gelu(w_gate x) * w_in x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w_in = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w_out = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF = F.gelu(self.w_gate(x_TD), approximate="tanh")
        return self.w_out(gate_TF * self.w_in(x_TD))
