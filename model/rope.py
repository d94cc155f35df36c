"""Rotary position embedding (arXiv 2104.09864), halves rotated against each other as the stock engines do."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables in float32, each of shape (T, K)."""
    exponents_K = torch.arange(0, d_head, 2, dtype=torch.float32, device=positions_T.device) / d_head
    angles_TK = positions_T.float()[:, None] * (theta**-exponents_K)[None, :]
    angles_TK = torch.cat([angles_TK, angles_TK], dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate every head of x by its position."""
    first, second = x_THK.chunk(2, dim=-1)
    turned_THK = torch.cat([-second, first], dim=-1)
    cos_T1K, sin_T1K = cos_TK[:, None].to(x_THK.dtype), sin_TK[:, None].to(x_THK.dtype)
    return x_THK * cos_T1K + turned_THK * sin_T1K
