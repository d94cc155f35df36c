"""The gated product and its gradient in one pass each, against PyTorch's GELU and autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels.geglu import geglu, geglu_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("remakes_product", [True, False])
@pytest.mark.parametrize(("n_tokens", "d_ff"), [(0, 8), (1, 1), (5, 1025), (3, 2048)])
def test_values_and_gradients(n_tokens: int, d_ff: int, remakes_product: bool, interleaved: bool) -> None:
    torch.manual_seed(n_tokens + d_ff)
    gate_in_TX = (4 * torch.randn(n_tokens, 2 * d_ff, device=DEVICE)).requires_grad_()
    gate_TF, linear_TF = gate_in_TX.chunk(2, dim=1)
    product_TF = F.gelu(gate_TF, approximate="tanh") * linear_TF
    grad_TF = torch.randn_like(product_TF)
    (expected_TX,) = torch.autograd.grad((product_TF * grad_TF).sum(), gate_in_TX)

    torch.testing.assert_close(geglu(gate_in_TX.detach()), product_TF.detach(), rtol=1e-4, atol=1e-4)
    found_TX, found_TF = gate_in_TX.detach().clone(), grad_TF.clone()
    if interleaved:
        found_TX = torch.stack(found_TX.chunk(2, dim=1), dim=-1).flatten(1)
    found_TX = geglu_backward(found_TX, found_TF, interleaved, remakes_product)
    torch.testing.assert_close(found_TX, expected_TX, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_TF, product_TF.detach() if remakes_product else grad_TF, rtol=1e-4, atol=1e-4)


def test_large_gates_saturate() -> None:
    gate_in_TX = torch.tensor([[90.0, -90.0, 3.0, 5.0]], device=DEVICE)
    assert geglu(gate_in_TX).tolist() == [[270.0, 0.0]]
    grad_TF = torch.ones(1, 2, device=DEVICE)
    assert geglu_backward(gate_in_TX, grad_TF, interleaved=False, remakes_product=False) is gate_in_TX
    assert gate_in_TX.tolist() == [[3.0, 0.0, 90.0, 0.0]]
