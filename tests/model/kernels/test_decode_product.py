"""Products of a decoding step's rows with weights, in parts, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels import decode_product
from model.kernels.decode_product import Tiles, product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 6e-3 if DEVICE.type == "cuda" else 2e-6


@settings(max_examples=15)
@given(data=st.data())
def test_any_division(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 20), "rows")
    n_out, n_in = data.draw(st.integers(1, 70), "outputs"), 8 * data.draw(st.integers(1, 12), "inputs / 8")
    gated = data.draw(st.booleans(), "gated")
    block_n = data.draw(st.sampled_from([16, 32]), "block_n")
    tiles = Tiles(
        block_n, data.draw(st.sampled_from([16, 32]), "block_k"),
        splits=1 if gated else data.draw(st.integers(1, 3), "splits"), n_stages=3, prefetch=64,
        rows_a_block=data.draw(st.sampled_from([None, 11, 16]), "rows of a block"),
    )  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    x_BK = torch.randn(rows, n_in, device=DEVICE, dtype=DTYPE)
    w_NK = torch.randn(n_out * (1 + gated), n_in, device=DEVICE, dtype=DTYPE)
    out_SBN = torch.full((tiles.splits, rows, n_out), float("nan"), device=DEVICE)
    product(x_BK, w_NK, out_SBN, tiles, gated)
    expected_BN = x_BK.double() @ w_NK[:n_out].double().T
    if gated:
        expected_BN = F.gelu(expected_BN, approximate="tanh") * (x_BK.double() @ w_NK[n_out:].double().T)
    error = (out_SBN.double().sum(0) - expected_BN).norm() / expected_BN.norm()
    assert float(error) < TOLERANCE


def test_parts_are_of_their_columns_and_softcap() -> None:
    torch.manual_seed(1)
    x_BK, w_NK = (torch.randn(rows, 48, device=DEVICE, dtype=DTYPE) for rows in (3, 20))
    out_SBN = torch.empty(2, 3, 20, device=DEVICE)
    product(x_BK, w_NK, out_SBN, Tiles(16, 16, splits=2))
    for part, columns in enumerate((slice(0, 32), slice(32, 48))):
        expected_BN = x_BK[:, columns].double() @ w_NK[:, columns].double().T
        torch.testing.assert_close(out_SBN[part].double(), expected_BN, rtol=1e-2, atol=1e-4)
    capped_BN = torch.empty(1, 3, 20, device=DEVICE)
    product(x_BK, w_NK, capped_BN, Tiles(16, 16), cap=3.0)
    torch.testing.assert_close(capped_BN[0], 3 * torch.tanh(out_SBN.sum(0) / 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_cublas_gives_the_same(gated: bool) -> None:
    torch.manual_seed(2)
    x_BK, w_NK = (torch.randn(rows, 64, device=DEVICE, dtype=DTYPE) for rows in (5, 32))
    ours_BN, cublas_BN = (torch.empty(1, 5, 16 if gated else 32, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product(x_BK, w_NK, ours_BN, Tiles(16, 32), gated)
    product(x_BK, w_NK, cublas_BN, None, gated)
    torch.testing.assert_close(ours_BN, cublas_BN, rtol=2e-2 if DEVICE.type == "cuda" else 1e-5, atol=1e-3)


def test_rows_beyond_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    x_BK, w_NK = (torch.randn(rows, 32, device=DEVICE, dtype=DTYPE) for rows in (37, 20))
    whole_SBN, blocks_SBN = (torch.full((2, 37, 20), float("nan"), device=DEVICE) for _ in range(2))
    product(x_BK, w_NK, whole_SBN, Tiles(16, 16, splits=2))
    monkeypatch.setattr(decode_product, "MOST_ROWS", 16)
    product(x_BK, w_NK, blocks_SBN, Tiles(16, 16, splits=2))
    torch.testing.assert_close(blocks_SBN, whole_SBN, rtol=1e-5, atol=1e-5)
