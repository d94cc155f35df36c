"""Log-probabilities and the logits' gradient, against log-softmax and autograd."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from model.kernels.cross_entropy import logit_gradient_, logit_statistics, losses_and_gradient_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("n_rows", "vocab_size"), [(1, 2), (7, 61), (4, 4097), (3, 9000)])
def test_values_and_gradients(n_rows: int, vocab_size: int, softcap: float | None) -> None:
    torch.manual_seed(vocab_size)
    logits_CV = (20 * torch.randn(n_rows, vocab_size, device=DEVICE)).requires_grad_()
    targets_C = torch.randint(vocab_size, (n_rows,), device=DEVICE)
    capped_CV = logits_CV if softcap is None else torch.tanh(logits_CV / softcap) * softcap
    normalizer_C = capped_CV.logsumexp(-1)
    logprob_C = capped_CV.log_softmax(-1).gather(-1, targets_C[:, None])[:, 0]
    grad_logprob_C, grad_normalizer_C = (torch.randn(n_rows, device=DEVICE) for _ in range(2))
    total = (logprob_C * grad_logprob_C).sum() + (normalizer_C * grad_normalizer_C).sum()
    (expected_CV,) = torch.autograd.grad(total, logits_CV)

    found_logprob_C, found_normalizer_C = logit_statistics(logits_CV.detach(), targets_C, softcap)
    torch.testing.assert_close(found_logprob_C, logprob_C.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found_normalizer_C, normalizer_C.detach(), rtol=1e-5, atol=1e-5)
    buffer_CV = logits_CV.detach().clone()
    found_CV = logit_gradient_(buffer_CV, targets_C, found_normalizer_C, grad_logprob_C, grad_normalizer_C, softcap)
    assert found_CV is buffer_CV
    torch.testing.assert_close(found_CV, expected_CV, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("n_rows", "vocab_size"), [(1, 2), (7, 61), (4, 4097), (3, 9000)])
def test_losses_with_their_gradient(n_rows: int, vocab_size: int, softcap: float | None, z_loss: float) -> None:
    torch.manual_seed(vocab_size)
    logits_CV = (20 * torch.randn(n_rows, vocab_size, device=DEVICE, dtype=torch.float64)).requires_grad_()
    targets_C = torch.randint(vocab_size, (n_rows,), device=DEVICE)
    weight_C = torch.randn(n_rows, device=DEVICE)
    capped_CV = logits_CV if softcap is None else torch.tanh(logits_CV / softcap) * softcap
    logprob_C = capped_CV.log_softmax(-1).gather(-1, targets_C[:, None])[:, 0]
    expected_C = weight_C * (z_loss * capped_CV.logsumexp(-1).square() - logprob_C)
    (expected_CV,) = torch.autograd.grad(expected_C.sum(), logits_CV)

    found_CV = logits_CV.detach().float()
    found_C = losses_and_gradient_(found_CV, targets_C, weight_C, z_loss, softcap)
    torch.testing.assert_close(found_C.double(), expected_C.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found_CV.double(), expected_CV, rtol=1e-3, atol=1e-5)


def test_a_logit_that_is_not_finite_reaches_the_loss() -> None:
    """Whatever is wrong must be seen by the check that refuses the step."""
    logits_CV = torch.zeros(2, 5, device=DEVICE)
    logits_CV[0, 3] = float("nan")
    logprob_C, _ = logit_statistics(logits_CV, torch.tensor([0, 1], device=DEVICE), None)
    assert logprob_C.isnan().tolist() == [True, False]
