"""Losses as pure functions. Each returns a sum; the loop divides by the global number of terms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.transformer import Transformer
from train.token_logprobs import summed_loss


def next_token_loss(
    model: Transformer, hidden_TD: Tensor, targets_T: Tensor, counted_T: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """Sum of -log p(target) over positions (nats); if `counted_T` is given, over positions where it is True.

    Adds `z_loss` times the squared logsumexp, which keeps logits from drifting (section 5 of arXiv 2204.02311).
    """
    weight_T = torch.ones_like(targets_T, dtype=torch.float32) if counted_T is None else counted_T.float()
    softcap = model.config.final_logit_softcap
    return summed_loss(hidden_TD, model.embed_tokens.weight, targets_T, weight_T, z_loss, softcap)


def continuation_loss(score_T: Tensor, label_T: Tensor) -> Tensor:
    """Sum of the binary cross-entropy at labeled positions; a label is 1, 0 or -1 (no label)."""
    places_T = (label_T >= 0).nonzero()[:, 0]
    return F.binary_cross_entropy_with_logits(score_T[places_T].float(), label_T[places_T].float(), reduction="sum")


def sequence_logprobs(logprobs_T: Tensor, sequence_T: Tensor, n_sequences: int) -> Tensor:
    """Sum of token log-probabilities of each sequence. sequence_T: sequence index of each token."""
    return logprobs_T.new_zeros(n_sequences).index_add(0, sequence_T, logprobs_T)


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Direct preference optimization, equation 7 of arXiv 2305.18290; label smoothing of arXiv 2403.00409.

    Takes log-probabilities of whole replies (nats). Returns (loss summed over pairs, implicit reward margin_B).
    """
    margin_B = beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B))
    loss_B = -(1 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)
    return loss_B.sum(), margin_B
