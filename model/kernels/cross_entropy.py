"""Log-probabilities of targets from logits, and the logits' gradient, which overwrites the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _capped(logits, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        logits = (1 - 2 / (1 + tl.exp(2 * logits / softcap))) * softcap  # tanh
    return logits


@triton.jit
def _normalizer(row_ptr, vocab_size, softcap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Logsumexp of a row, in one read (online softmax)."""
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        logits = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, _capped(logits, softcap, HAS_CAP), -1e30)
        larger = tl.maximum(largest, logits)
        total = total * tl.exp(largest - larger) + tl.exp(logits - larger)
        largest = larger
    overall = tl.max(largest)
    return overall + tl.log(tl.sum(total * tl.exp(largest - overall)))


@triton.jit
def _write_gradient(
    row_ptr, columns, vocab_size, target, normalizer, grad_logprob, grad_normalizer, softcap, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Overwrite logits with the gradient of grad_logprob * logprob(target) + grad_normalizer * logsumexp."""
    inside = columns < vocab_size
    capped = _capped(tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32), softcap, HAS_CAP)
    grad = tl.exp(capped - normalizer) * (grad_normalizer - grad_logprob)
    grad += tl.where(columns == target, grad_logprob, 0.0)
    if HAS_CAP:
        grad *= 1 - (capped / softcap) * (capped / softcap)
    tl.store(row_ptr + columns, grad.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, logprob_ptr, normalizer_ptr, vocab_size, softcap, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab_size
    normalizer = _normalizer(row_ptr, vocab_size, softcap, HAS_CAP, BLOCK)
    target = tl.load(row_ptr + tl.load(target_ptr + row)).to(tl.float32)
    tl.store(logprob_ptr + row, _capped(target, softcap, HAS_CAP) - normalizer)
    tl.store(normalizer_ptr + row, normalizer)


@triton.jit
def _gradient_kernel(
    logits_ptr, target_ptr, normalizer_ptr, grad_logprob_ptr, grad_normalizer_ptr, vocab_size, softcap,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _write_gradient(
        logits_ptr + row * vocab_size, columns, vocab_size, tl.load(target_ptr + row), tl.load(normalizer_ptr + row),
        tl.load(grad_logprob_ptr + row), tl.load(grad_normalizer_ptr + row), softcap, HAS_CAP,
    )  # fmt: skip


@triton.jit
def _loss_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, vocab_size, z_loss, softcap, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab_size
    target, weight = tl.load(target_ptr + row), tl.load(weight_ptr + row)
    logit = _capped(tl.load(row_ptr + target).to(tl.float32), softcap, HAS_CAP)  # before the row is overwritten
    normalizer = _normalizer(row_ptr, vocab_size, softcap, HAS_CAP, BLOCK)
    tl.store(loss_ptr + row, weight * (z_loss * normalizer * normalizer - (logit - normalizer)))
    tl.debug_barrier()
    for start in range(0, vocab_size, BLOCK):  # rereads the row, from the cache
        _write_gradient(
            row_ptr, start + tl.arange(0, BLOCK), vocab_size, target, normalizer, -weight,
            2 * z_loss * normalizer * weight, softcap, HAS_CAP,
        )  # fmt: skip


def logit_statistics(logits_CV: Tensor, targets_C: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, logsumexp), float32, of softcapped logits (nats)."""
    n_rows, vocab_size = logits_CV.shape
    logprob_C, normalizer_C = (torch.empty(n_rows, dtype=torch.float32, device=logits_CV.device) for _ in range(2))
    _statistics_kernel[(n_rows,)](
        logits_CV, targets_C, logprob_C, normalizer_C, vocab_size, softcap or 1.0,
        HAS_CAP=softcap is not None, BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)), num_warps=8,
    )  # fmt: skip
    return logprob_C, normalizer_C


def logit_gradient_(
    logits_CV: Tensor, targets_C: Tensor, normalizer_C: Tensor, grad_logprob_C: Tensor, grad_normalizer_C: Tensor,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Gradient of the logits from the gradients of both statistics; overwrites and returns the logits."""
    n_rows, vocab_size = logits_CV.shape
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    _gradient_kernel[(n_rows, triton.cdiv(vocab_size, block))](
        logits_CV, targets_C, normalizer_C, grad_logprob_C.contiguous(), grad_normalizer_C.contiguous(), vocab_size,
        softcap or 1.0, HAS_CAP=softcap is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return logits_CV


def losses_and_gradient_(
    logits_CV: Tensor, targets_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float | None
) -> Tensor:
    """loss_C = weight * (z_loss * logsumexp^2 - log-probability), float32; its gradient overwrites the logits."""
    n_rows, vocab_size = logits_CV.shape
    loss_C = torch.empty(n_rows, dtype=torch.float32, device=logits_CV.device)
    _loss_kernel[(n_rows,)](
        logits_CV, targets_C, weight_C, loss_C, vocab_size, z_loss, softcap or 1.0,
        HAS_CAP=softcap is not None, BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)), num_warps=8,
    )  # fmt: skip
    return loss_C
