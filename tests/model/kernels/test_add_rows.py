"""Sums of rows added to a vector, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from model.kernels.add_rows import add_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=12)
@given(n_rows=st.integers(0, 300), width=st.integers(1, 40), gap=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_rows_are_added_and_nothing_beside_them(n_rows: int, width: int, gap: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows_PX = torch.full((n_rows, width + gap), float("nan"), device=DEVICE)
    rows_PD = rows_PX[:, :width]
    rows_PD.copy_(torch.randn(n_rows, width))
    vector_X = torch.full((width + 2,), float("nan"), device=DEVICE)
    total_D = vector_X[1:-1]
    total_D.copy_(torch.randn(width))
    expected_D = total_D.double() + rows_PD.double().sum(0)
    add_rows(total_D, rows_PD)
    torch.testing.assert_close(total_D.double(), expected_D, rtol=1e-5, atol=1e-4)
    assert vector_X[0].isnan()
    assert vector_X[-1].isnan()
