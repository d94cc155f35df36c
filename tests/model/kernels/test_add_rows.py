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
@given(
    n_vectors=st.integers(1, 2), n_rows=st.integers(0, 1100), width=st.integers(1, 40), gap=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_rows_are_added_and_nothing_beside_them(
    n_vectors: int, n_rows: int, width: int, gap: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rows_NPX = torch.full((n_vectors, n_rows, width + gap), float("nan"), device=DEVICE)
    rows_NPX[..., :width] = torch.randn(n_vectors, n_rows, width)
    vectors_NX = torch.full((n_vectors, width + 2), float("nan"), device=DEVICE)
    vectors_NX[:, 1:-1] = torch.randn(n_vectors, width)
    expected_ND = vectors_NX[:, 1:-1].double() + rows_NPX[..., :width].double().sum(1)
    add_rows(list(vectors_NX[:, 1:-1]), list(rows_NPX[..., :width]))
    torch.testing.assert_close(vectors_NX[:, 1:-1].double(), expected_ND, rtol=1e-5, atol=1e-4)
    assert vectors_NX[:, [0, -1]].isnan().all()
