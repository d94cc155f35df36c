"""Root-mean-square normalisation (arXiv 1910.07467) with a plain `x * w` weight, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension; float32 inside, the dtype of x outside."""
    x_float = x.float()
    return (x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS normalisation of the last dimension with a learned scale, started at `initial_scale`."""

    def __init__(self, width: int, eps: float, initial_scale: float = 1.0):
        super().__init__()
        self.eps = eps
        self.initial_scale = initial_scale
        self.weight = nn.Parameter(torch.full((width,), initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        normalized = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normalized * self.weight.float()).to(x.dtype)
