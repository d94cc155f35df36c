"""Products of one row, or of the sandwich norm of one, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels.decode_vector_product import SandwichNorm, VectorTiles, vector_product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 8e-3 if DEVICE.type == "cuda" else 2e-6
EPS = 1e-3


@settings(max_examples=20)
@given(data=st.data())
def test_norm_product_and_gate(data: st.DataObject) -> None:
    n_out, n_in = data.draw(st.integers(1, 40), "outputs"), 8 * data.draw(st.integers(1, 12), "inputs / 8")
    norms = data.draw(st.sampled_from(["none", "one", "sandwich"]), "norms")
    gated = data.draw(st.booleans(), "gated")
    block_k = 128 if norms != "none" else data.draw(st.sampled_from([16, 32, 128]), "block_k")
    n_programs = data.draw(st.sampled_from([1, 3, 100]), "programs")
    tiles = VectorTiles(data.draw(st.sampled_from([1, 4, 8]), "block_n"), block_k, n_programs, n_warps=4)
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    x_D, w_u_D, w_x_D = (torch.randn(n_in, device=DEVICE, dtype=DTYPE) for _ in range(3))
    u_D = torch.randn(n_in, device=DEVICE)
    w_NK = torch.randn(n_out * (1 + gated), n_in, device=DEVICE, dtype=DTYPE)
    out_N, x_out_D = (torch.full((width,), float("nan"), device=DEVICE) for width in (n_out, n_in))
    x_out_D = x_out_D.to(DTYPE)
    row: torch.Tensor | SandwichNorm = x_D
    exact_D = x_D.double()
    if norms == "sandwich":
        row = SandwichNorm(x_D, w_x_D, EPS, u_D, w_u_D, x_out_D)
        exact_D = exact_D + F.rms_norm(u_D.double(), (n_in,), w_u_D.double(), EPS)
    elif norms == "one":
        row = SandwichNorm(x_D, w_x_D, EPS)
    added_D = exact_D
    if norms != "none":
        exact_D = F.rms_norm(exact_D, (n_in,), w_x_D.double(), EPS)
    vector_product(row, w_NK, out_N, tiles, gated)
    expected_N = w_NK[:n_out].double() @ exact_D
    if gated:
        expected_N = F.gelu(expected_N, approximate="tanh") * (w_NK[n_out:].double() @ exact_D)
    assert float((out_N.double() - expected_N).abs().max()) < TOLERANCE * float(exact_D.norm() * w_NK.norm()) ** (
        2 if gated else 1
    )
    if norms == "sandwich":
        torch.testing.assert_close(x_out_D.double(), added_D, rtol=1e-2 if DEVICE.type == "cuda" else 1e-5, atol=1e-5)


def test_softcap() -> None:
    torch.manual_seed(3)
    x_K, w_NK = torch.randn(32, device=DEVICE, dtype=DTYPE), torch.randn(9, 32, device=DEVICE, dtype=DTYPE)
    out_N, capped_N = torch.empty(9, device=DEVICE), torch.empty(9, device=DEVICE)
    vector_product(x_K, w_NK, out_N, VectorTiles(4, 32, 2, n_warps=4))
    vector_product(x_K, w_NK, capped_N, VectorTiles(4, 32, 2, n_warps=4), cap=2.0)
    torch.testing.assert_close(capped_N, 2 * torch.tanh(out_N / 2), rtol=1e-4, atol=1e-5)
