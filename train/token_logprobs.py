"""Log-probabilities of tokens from hidden states, in chunks: the full logits are never materialized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.matrix_product import add_product, product, scaled_gradient

LOGIT_CHUNK_ELEMENTS = 2**27
"""Logits of a chunk (256 MiB in bfloat16)."""


class _TokenLogprobs(torch.autograd.Function):
    """hidden_TD, embed_VD, targets_T -> logprob_T and logsumexp_T, float32.

    With more than one chunk, the backward pass recomputes each chunk's logits (a third more FLOPs). The gradient of the
    embedding accumulates in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, embed_VD: Tensor, targets_T: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        ctx.n_tokens = max(LOGIT_CHUNK_ELEMENTS // len(embed_VD), 1)
        ctx.softcap, ctx.kept_CV = softcap, None
        outputs = []
        for hidden_CD, targets_C in zip(hidden_TD.split(ctx.n_tokens), targets_T.split(ctx.n_tokens), strict=True):
            logits_CV = hidden_CD @ embed_VD.T
            outputs.append(_statistics(logits_CV, targets_C, softcap))
        if len(outputs) == 1:
            ctx.kept_CV = logits_CV
        logprob_T, normalizer_T = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        ctx.save_for_backward(hidden_TD, embed_VD, targets_T, normalizer_T)
        return logprob_T, normalizer_T

    @staticmethod
    def backward(ctx: Any, *gradients_T: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_TD, embed_VD, targets_T, normalizer_T = ctx.saved_tensors
        hidden_gradient_TD = torch.empty_like(hidden_TD)
        embed_gradient_VD = torch.zeros_like(embed_VD, dtype=torch.float32)
        chunks = (x.split(ctx.n_tokens) for x in (hidden_TD, hidden_gradient_TD, targets_T, normalizer_T, *gradients_T))
        for hidden_CD, hidden_gradient_CD, targets_C, normalizer_C, *gradients_C in zip(*chunks, strict=True):
            logits_CV = hidden_CD @ embed_VD.T if ctx.kept_CV is None else ctx.kept_CV
            logprob_gradient_C, normalizer_gradient_C = gradients_C
            gradient_CV = _logit_gradient_(
                logits_CV, targets_C, normalizer_C, logprob_gradient_C, normalizer_gradient_C, ctx.softcap
            )
            torch.mm(gradient_CV, embed_VD, out=hidden_gradient_CD)
            add_product(embed_gradient_VD, gradient_CV.T, hidden_CD)
        return hidden_gradient_TD, embed_gradient_VD.to(embed_VD.dtype), None, None


class _SummedLoss(torch.autograd.Function):
    """Sum over tokens of weight * (z_loss * logsumexp^2 - logprob).

    The gradient is known up to a scalar factor, so the forward pass computes it while a chunk's logits are live, and
    nothing is recomputed (as in Liger, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, embed_VD: Tensor, targets_T: Tensor, weight_T: Tensor, z_loss: float,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        n_tokens = max(LOGIT_CHUNK_ELEMENTS // len(embed_VD), 1)
        differentiate = any(ctx.needs_input_grad[:2])
        hidden_gradient_TD = torch.empty_like(hidden_TD) if differentiate else None
        embed_gradient_VD = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        for start in range(0, len(targets_T), n_tokens):
            chunk = slice(start, start + n_tokens)
            logits_CV, targets_C, weight_C = hidden_TD[chunk] @ embed_VD.T, targets_T[chunk], weight_T[chunk]
            if hidden_gradient_TD is not None:
                loss_C, gradient_CV = _losses_and_gradient_(logits_CV, targets_C, weight_C, z_loss, softcap)
                torch.mm(gradient_CV, embed_VD, out=hidden_gradient_TD[chunk])
                if embed_gradient_VD is None:
                    embed_gradient_VD = product(gradient_CV.T, hidden_TD[chunk])
                else:
                    add_product(embed_gradient_VD, gradient_CV.T, hidden_TD[chunk])
            else:
                loss_C = _losses(*_statistics(logits_CV, targets_C, softcap), weight_C, z_loss)
            total += loss_C.sum()
        ctx.embed_VD = embed_VD
        ctx.save_for_backward(hidden_gradient_TD, embed_gradient_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_TD, embed_gradient_VD = ctx.saved_tensors
        scale = gradients[0]
        embed_gradient_VD = scaled_gradient(ctx.embed_VD, embed_gradient_VD, scale)
        return hidden_gradient_TD * scale.to(hidden_gradient_TD.dtype), embed_gradient_VD, None, None, None, None


def summed_loss(
    hidden_TD: Tensor, embed_VD: Tensor, targets_T: Tensor, weight_T: Tensor, z_loss: float, softcap: float | None
) -> Tensor:
    """Sum of weight_T * (-logprob + z_loss * logsumexp^2), float32, of logits hidden_TD @ embed_VD.T (nats)."""
    if not len(targets_T):
        return hidden_TD.float().sum() * 0  # keeps the graph: every rank must run the same backward pass
    return _SummedLoss.apply(hidden_TD, embed_VD, targets_T, weight_T, z_loss, softcap)


def token_logprobs(
    hidden_TD: Tensor, embed_VD: Tensor, targets_T: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, logsumexp), float32, of logits hidden_TD @ embed_VD.T (nats)."""
    if not len(targets_T):
        nothing = hidden_TD.float().sum() * 0  # keeps the graph: every rank must run the same backward pass
        return nothing.expand(0), nothing.expand(0)
    return _TokenLogprobs.apply(hidden_TD, embed_VD, targets_T, softcap)


def _losses(logprob_C: Tensor, normalizer_C: Tensor, weight_C: Tensor, z_loss: float) -> Tensor:
    return (z_loss * normalizer_C.square() - logprob_C) * weight_C


def _losses_and_gradient_(
    logits_CV: Tensor, targets_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Weighted losses, and their gradient with respect to the logits, which are overwritten."""
    if logits_CV.is_cuda:
        from model.kernels.cross_entropy import losses_and_gradient_

        return losses_and_gradient_(logits_CV, targets_C, weight_C, z_loss, softcap), logits_CV
    logprob_C, normalizer_C = _statistics(logits_CV, targets_C, softcap)
    gradient_CV = _logit_gradient_(
        logits_CV, targets_C, normalizer_C, -weight_C, 2 * z_loss * normalizer_C * weight_C, softcap
    )
    return _losses(logprob_C, normalizer_C, weight_C, z_loss), gradient_CV


def _statistics(logits_CV: Tensor, targets_C: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, logsumexp), float32."""
    if logits_CV.is_cuda:
        from model.kernels.cross_entropy import logit_statistics

        return logit_statistics(logits_CV, targets_C, softcap)
    capped_CV = _cap(logits_CV, softcap)
    normalizer_C = capped_CV.logsumexp(-1)
    return capped_CV.gather(-1, targets_C[:, None])[:, 0] - normalizer_C, normalizer_C


def _logit_gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    normalizer_C: Tensor,
    logprob_gradient_C: Tensor,
    normalizer_gradient_C: Tensor,
    softcap: float | None,
) -> Tensor:
    """Gradient of the logits from those of logprob (one-hot - softmax) and logsumexp (softmax). Overwrites them."""
    if logits_CV.is_cuda:
        from model.kernels.cross_entropy import logit_gradient_

        return logit_gradient_(logits_CV, targets_C, normalizer_C, logprob_gradient_C, normalizer_gradient_C, softcap)
    capped_CV = _cap(logits_CV, softcap)
    probability_CV = (capped_CV - normalizer_C[:, None]).exp()
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C[:, None]
    gradient_CV = probability_CV * (normalizer_gradient_C - logprob_gradient_C)[:, None]
    gradient_CV = gradient_CV + torch.where(is_target_CV, logprob_gradient_C[:, None], 0.0)
    if softcap is not None:
        gradient_CV = gradient_CV * (1 - (capped_CV / softcap).square())
    return gradient_CV.to(logits_CV.dtype)


def _cap(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV.float() if softcap is None else torch.tanh(logits_CV.float() / softcap) * softcap
