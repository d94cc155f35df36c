"""Rotary position embedding (arXiv 2104.09864) that pairs the two halves of a head, as stock engines do."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Float32 cosine and sine tables, each of shape (T, K / 2)."""
    exponents_C = torch.arange(0, d_head, 2, dtype=torch.float32, device=positions_T.device) / d_head
    angles_TC = positions_T.float()[:, None] * (theta**-exponents_C)[None, :]
    return angles_TC.cos(), angles_TC.sin()


def rotate(x_THK: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate every head of x by its position. C is K / 2."""
    first_THC, second_THC = x_THK.chunk(2, dim=-1)
    cos_T1C, sin_T1C = cos_TC[:, None].to(x_THK.dtype), sin_TC[:, None].to(x_THK.dtype)
    return torch.cat([first_THC * cos_T1C - second_THC * sin_T1C, second_THC * cos_T1C + first_THC * sin_T1C], dim=-1)
