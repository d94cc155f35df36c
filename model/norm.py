"""Root-mean-square normalization (arXiv 1910.07467) with a plain `x * w` weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_normalize(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight over the last dimension. PyTorch's kernel accumulates in float32 for any dtype."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class RMSNorm(nn.Module):
    """RMS normalization over the last dimension with a learned scale, initialized to `initial_scale`."""

    def __init__(self, width: int, eps: float, initial_scale: float = 1.0):
        super().__init__()
        self.eps = eps
        self.initial_scale = initial_scale
        self.weight = nn.Parameter(torch.full((width,), initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps, self.weight)
