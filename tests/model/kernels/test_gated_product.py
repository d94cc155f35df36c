"""The feed-forward's first half in one kernel against its parts; without that kernel it is its parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from model.kernels.gated_product import _obstacle, gated_product, why_not_in_one
from model.kernels.geglu import geglu_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("n_tokens", "width", "d_ff"), [(0, 16, 16), (1, 64, 40), (300, 72, 1000), (513, 256, 296), (5, 12, 7)]
)
def test_values_and_gradients_against_float64(n_tokens: int, width: int, d_ff: int) -> None:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    bound = 0.01 if DEVICE.type == "cuda" else 1e-5
    torch.manual_seed(d_ff)
    x_TD = torch.randn(n_tokens, width, device=DEVICE, dtype=dtype)
    w_XD = torch.randn(2 * d_ff, width, device=DEVICE, dtype=dtype) / width**0.5
    both_TX = F.linear(x_TD.double(), w_XD.double()).requires_grad_()
    gate_TF, linear_TF = both_TX.chunk(2, dim=1)
    expected_TF = F.gelu(gate_TF, approximate="tanh") * linear_TF
    grad_TF = torch.randn(n_tokens, d_ff, device=DEVICE, dtype=dtype)
    (expected_TX,) = torch.autograd.grad((expected_TF * grad_TF.double()).sum(), both_TX)

    gate_in_TX, interleaved, product_TF = gated_product(x_TD, w_XD)
    is_in_one = why_not_in_one(DEVICE, dtype) is None
    assert interleaved == (is_in_one and n_tokens > 0 and width % 8 == 0 and d_ff % 8 == 0)
    assert (product_TF.double() - expected_TF).norm() <= bound * expected_TF.norm()
    found_TX = geglu_backward(gate_in_TX, grad_TF, interleaved, remakes_product=False)
    assert (found_TX.double() - expected_TX).norm() <= bound * expected_TX.norm()


def test_a_kernel_that_fails_or_is_wrong_is_found_out() -> None:
    def fails(x_TD: torch.Tensor, w_XD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise KeyError("no such key\nin many lines")

    def forgets_to_interleave(x_TD: torch.Tensor, w_XD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both_TX = F.linear(x_TD, w_XD)
        gate_TF, linear_TF = both_TX.chunk(2, dim=1)
        return both_TX, F.gelu(gate_TF, approximate="tanh") * linear_TF

    def is_right(x_TD: torch.Tensor, w_XD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both_TX, product_TF = forgets_to_interleave(x_TD, w_XD)
        return torch.stack(both_TX.chunk(2, dim=1), dim=-1).flatten(1), product_TF

    failed, wrong = (_obstacle(kernel, DEVICE, torch.bfloat16) for kernel in (fails, forgets_to_interleave))
    assert failed is not None and failed.words == "KeyError: 'no such key\\nin many lines'"
    assert wrong is not None and "wrong results" in wrong.words
    assert _obstacle(is_right, DEVICE, torch.bfloat16) is None


def test_there_is_none_but_on_a_gpu_in_sixteen_bits() -> None:
    for device, dtype in ((torch.device("cpu"), torch.bfloat16), (DEVICE, torch.float32)):
        obstacle = why_not_in_one(device, dtype)
        assert obstacle is not None and obstacle.kind == "unfit"
