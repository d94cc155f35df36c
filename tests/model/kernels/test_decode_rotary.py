"""Norm and rotation of the newest tokens' queries, keys and values, and their cache slots, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels.decode_rotary import rotary_write
from model.rope import rope_tables, rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN, EPS = float("nan"), 1e-3


@pytest.mark.parametrize("owns_cache", [False, True])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "d_head", "page", "splits"), [(4, 1, 8, 4, 1), (6, 2, 12, 1, 3)])
@pytest.mark.parametrize("rows", [3, 17])
def test_heads_and_slots(
    rows: int, n_heads: int, n_kv_heads: int, d_head: int, page: int, splits: int, owns_cache: bool
) -> None:
    torch.manual_seed(rows)
    lengths_B = torch.randint(1, 13, (rows,), dtype=torch.int32)
    lengths_B[1] = 0
    table_BP = torch.full((rows, 13), -1, dtype=torch.int32)
    pages = torch.randperm(rows * 13).to(torch.int32)
    slots_B = torch.full((rows,), -1)
    for row, length in enumerate(lengths_B.tolist()):
        if length:
            column = (length - 1) // page
            table_BP[row, column] = pages[row]
            slots_B[row] = int(pages[row]) * page + (length - 1) % page
    n_all = n_heads + 2 * n_kv_heads * owns_cache
    parts_SBX = torch.randn(splits, rows, n_all * d_head, device=DEVICE)
    w_q_K, w_k_K = torch.randn(2, d_head, device=DEVICE)
    q_BHK = torch.full((rows, n_heads, d_head), NAN, device=DEVICE)
    k_SGK, v_SGK = (torch.full((rows * 13 * page, n_kv_heads, d_head), NAN, device=DEVICE) for _ in range(2))
    rope = rope_tables(torch.arange(13, device=DEVICE), d_head, 50.0)
    rotary_write(
        parts_SBX, w_q_K, w_k_K if owns_cache else None, rope, lengths_B.to(DEVICE), table_BP.to(DEVICE), page,
        q_BHK, k_SGK, v_SGK, EPS,
    )  # fmt: skip
    heads_BXK = parts_SBX.double().sum(0).view(rows, n_all, d_head)
    q, k, v = heads_BXK.split([n_heads, (n_all - n_heads) // 2, (n_all - n_heads) // 2], dim=1)
    cos_BC, sin_BC = (table_LC[(lengths_B.long() - 1).clamp(min=0).to(DEVICE)].double() for table_LC in rope)
    expected_q = rotate(F.rms_norm(q, (d_head,), w_q_K.double(), EPS), cos_BC, sin_BC)
    torch.testing.assert_close(q_BHK.double(), expected_q, rtol=1e-5, atol=1e-5)
    used = slots_B >= 0
    slots = slots_B[used].to(DEVICE)
    if owns_cache:
        expected_k = rotate(F.rms_norm(k, (d_head,), w_k_K.double(), EPS), cos_BC, sin_BC)[used.to(DEVICE)]
        expected_v = F.rms_norm(v, (d_head,), eps=EPS)[used.to(DEVICE)]
        torch.testing.assert_close(k_SGK[slots].double(), expected_k, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v_SGK[slots].double(), expected_v, rtol=1e-5, atol=1e-5)
        k_SGK[slots] = v_SGK[slots] = NAN
    assert bool(k_SGK.isnan().all()) and bool(v_SGK.isnan().all())
