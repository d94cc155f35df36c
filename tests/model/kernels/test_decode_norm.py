"""Embedding and sandwich norms of a decoding step against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels.decode_norm import add_norm_of_parts, embed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-3


@pytest.mark.parametrize("width", [1, 24, 129])
def test_embedding_reads_no_token_of_a_padded_row(width: int) -> None:
    torch.manual_seed(width)
    embed_VD, w_D = torch.randn(11, width, device=DEVICE), torch.randn(width, device=DEVICE)
    tokens_B = torch.tensor([10, 1 << 30, 0, -1], dtype=torch.int32, device=DEVICE)
    lengths_B = torch.tensor([3, 0, 1, 0], dtype=torch.int32, device=DEVICE)
    x_BD, y_BD = (torch.full((4, width), float("nan"), device=DEVICE) for _ in range(2))
    embed(tokens_B, lengths_B, embed_VD, 1.5, x_BD, w_D, y_BD, EPS)
    expected_BD = torch.zeros(4, width, device=DEVICE)
    expected_BD[0], expected_BD[2] = 1.5 * embed_VD[10], 1.5 * embed_VD[0]
    torch.testing.assert_close(x_BD, expected_BD)
    torch.testing.assert_close(y_BD, F.rms_norm(expected_BD, (width,), w_D, EPS), rtol=1e-5, atol=1e-5)
    alone_BD = torch.full_like(x_BD, float("nan"))
    embed(tokens_B, lengths_B, embed_VD, 1.5, alone_BD)
    assert torch.equal(alone_BD, x_BD)


@pytest.mark.parametrize(("splits", "width"), [(1, 40), (3, 129)])
def test_norms_around_the_addition_of_parts(splits: int, width: int) -> None:
    torch.manual_seed(splits)
    x_BD, parts_SBD = torch.randn(5, width, device=DEVICE), torch.randn(splits, 5, width, device=DEVICE)
    w_u_D, w_y_D = torch.randn(2, width, device=DEVICE)
    expected_BD = x_BD.double() + F.rms_norm(parts_SBD.double().sum(0), (width,), w_u_D.double(), EPS)
    y_BD = torch.full_like(x_BD, float("nan"))
    add_norm_of_parts(x_BD, parts_SBD, w_u_D, w_y_D, y_BD, EPS)
    torch.testing.assert_close(x_BD.double(), expected_BD, rtol=1e-5, atol=1e-5)
    expected_BD = F.rms_norm(expected_BD, (width,), w_y_D.double(), EPS)
    torch.testing.assert_close(y_BD.double(), expected_BD, rtol=1e-5, atol=1e-5)
