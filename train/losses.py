"""Losses as pure functions. Each returns a sum; the loop divides by the global count of what was summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.transformer import Transformer

LOGIT_CHUNK_TOKENS = 4096
"""Tokens whose logits exist at one time; beyond it a chunk's logits are recomputed in the backward pass."""


def token_logprobs(model: Transformer, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """Log-probability of each target under the model, float32, without ever holding all logits at once."""

    def chunk_logprobs(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return -F.cross_entropy(model.logits(hidden_CD).float(), targets_C, reduction="none")

    if len(targets_T) <= LOGIT_CHUNK_TOKENS:
        return chunk_logprobs(hidden_TD, targets_T)
    chunks = zip(hidden_TD.split(LOGIT_CHUNK_TOKENS), targets_T.split(LOGIT_CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(chunk_logprobs, h_CD, t_C, use_reentrant=False) for h_CD, t_C in chunks])


def next_token_loss(model: Transformer, hidden_TD: Tensor, targets_T: Tensor, counted_T: Tensor) -> Tensor:
    """Sum of -log p(target) over counted positions (nats)."""
    places_T = counted_T.nonzero()[:, 0]
    return -token_logprobs(model, hidden_TD[places_T], targets_T[places_T]).sum()


def continuation_loss(score_T: Tensor, label_T: Tensor) -> Tensor:
    """Sum of the binary cross-entropy at labelled positions; a label is 1, 0 or -1 (not labelled)."""
    places_T = (label_T >= 0).nonzero()[:, 0]
    return F.binary_cross_entropy_with_logits(score_T[places_T].float(), label_T[places_T].float(), reduction="sum")


def sequence_logprobs(logprobs_T: Tensor, sequence_T: Tensor, n_sequences: int) -> Tensor:
    """Sum of token log-probabilities per sequence; sequence_T says which sequence each token belongs to."""
    return logprobs_T.new_zeros(n_sequences).index_add(0, sequence_T, logprobs_T)


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation, equation 7 of arXiv 2305.18290; smoothing as in arXiv 2403.00409.

    Takes log-probabilities of whole replies. Returns (loss summed over pairs, implicit reward margin_B).
    """
    margin_B = beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B))
    loss_B = -(1 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)
    return loss_B.sum(), margin_B
