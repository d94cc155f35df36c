"""Norms around an addition in one pass, forward and backward, against PyTorch's own operations and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels.norm import add_norm, add_norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


@settings(max_examples=12)
@given(
    n_rows=st.integers(0, 9), width=st.integers(1, 70), branch=st.booleans(), normed=st.booleans(),
    remakes_y=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients(n_rows: int, width: int, branch: bool, normed: bool, remakes_y: bool, seed: int) -> None:
    normed = normed or not branch
    torch.manual_seed(seed)
    x_TD, u_TD, grad_out_TD, grad_y_TD = (torch.randn(n_rows, width, device=DEVICE) for _ in range(4))
    w_u_D, w_y_D = (torch.randn(width, device=DEVICE) for _ in range(2))
    leaves = [tensor.clone().requires_grad_() for tensor in (x_TD, u_TD, w_u_D, w_y_D)]
    out_TD = leaves[0] + F.rms_norm(leaves[1], (width,), leaves[2], EPS) if branch else leaves[0] * 1
    y_TD = F.rms_norm(out_TD, (width,), leaves[3], EPS)
    total = (out_TD * grad_out_TD).sum() + ((y_TD * grad_y_TD).sum() if normed else 0)
    x_grad, u_grad, w_u_grad, w_y_grad = torch.autograd.grad(total, leaves, allow_unused=True)

    inputs = (u_TD if branch else None, w_u_D if branch else None, w_y_D if normed else None)
    found_out_TD, found_y_TD, scales = add_norm(x_TD, *inputs, EPS)
    found = add_norm_backward(
        grad_out_TD, grad_y_TD if normed else None, x_TD, *inputs, scales, remakes_y=normed and remakes_y
    )
    torch.testing.assert_close(found_out_TD, out_TD.detach(), rtol=1e-5, atol=1e-5)
    w_u_found, w_y_found = (None if parts is None else parts.sum(0) for parts in (found.w_u_PD, found.w_y_PD))
    pairs = [(found.u_TD, u_grad, branch), (w_u_found, w_u_grad, branch), (found.x_TD, x_grad, normed)]
    pairs += [(w_y_found, w_y_grad, normed), (found_y_TD, y_TD.detach(), normed)]
    pairs += [(found.y_TD, y_TD.detach(), normed and remakes_y)]
    for ours, expected, is_there in pairs:
        assert (ours is not None) == is_there
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cuts 16-bit numbers off instead of rounding them")
def test_sixteen_bits_round_the_sum_once_and_norm_what_was_rounded() -> None:
    torch.manual_seed(0)
    x_TD, u_TD = (torch.randn(5, 48, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    w_D = torch.randn(48, device=DEVICE, dtype=torch.bfloat16)
    out_TD, y_TD, _ = add_norm(x_TD, u_TD, w_D, w_D, EPS)
    exact_TD = x_TD.double() + F.rms_norm(u_TD.double(), (48,), w_D.double(), EPS)
    assert (out_TD.double() - exact_TD).abs().max() <= exact_TD.abs().max() * 2**-8
    assert y_TD is not None
    torch.testing.assert_close(
        y_TD.double(), F.rms_norm(out_TD.double(), (48,), w_D.double(), EPS), rtol=2**-7, atol=1e-3
    )
