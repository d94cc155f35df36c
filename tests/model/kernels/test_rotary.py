"""Normed and rotated heads in one pass, forward and backward, against the layer's own operations and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model.rope import rope_tables, rotate

pytest.importorskip("triton")
from model.kernels.rotary import normed_heads, normed_heads_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


@settings(max_examples=10)
@given(
    n_tokens=st.integers(0, 19), n_heads=st.integers(1, 4), n_kv_heads=st.integers(0, 2), half=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients(n_tokens: int, n_heads: int, n_kv_heads: int, half: int, seed: int) -> None:
    torch.manual_seed(seed)
    d_head = 2 * half
    x_TX = torch.randn(n_tokens, (n_heads + 2 * n_kv_heads) * d_head, device=DEVICE, requires_grad=True)
    w_q_K, w_k_K = (torch.randn(d_head, device=DEVICE, requires_grad=True) for _ in range(2))
    cos_TC, sin_TC = rope_tables(torch.arange(n_tokens, device=DEVICE) * 3, d_head, 100.0)
    q, k, v = x_TX.unflatten(-1, (-1, d_head)).split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    expected = (
        rotate(F.rms_norm(q, (d_head,), w_q_K, EPS), cos_TC, sin_TC),
        rotate(F.rms_norm(k, (d_head,), w_k_K, EPS), cos_TC, sin_TC),
        F.rms_norm(v, (d_head,), None, EPS),
    )
    grads = [torch.randn_like(part) for part in expected]
    total = sum((part * grad).sum() for part, grad in zip(expected, grads, strict=True))
    assert isinstance(total, torch.Tensor)
    x_grad, w_q_grad, w_k_grad = torch.autograd.grad(total, (x_TX, w_q_K, w_k_K))

    has_keys = n_kv_heads > 0
    weights = (w_q_K.detach(), w_k_K.detach() if has_keys else None)
    found = normed_heads(x_TX.detach(), *weights, cos_TC, sin_TC, n_heads, n_kv_heads, EPS)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
    x_found, w_q_found, *w_k_found = normed_heads_backward(
        x_TX.detach(), *weights, cos_TC, sin_TC, grads[0], *(grads[1:] if has_keys else (None, None)), EPS
    )
    torch.testing.assert_close(x_found, x_grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(w_q_found.sum(0), w_q_grad, rtol=1e-3, atol=1e-4)
    assert len(w_k_found) == has_keys
    for found_PK in w_k_found:
        torch.testing.assert_close(found_PK.sum(0), w_k_grad, rtol=1e-3, atol=1e-4)
