"""Batched sampling: one random number a token, parameters and random numbers as tensors on the model's device.

A row's token depends on its logits, its parameters, its seed and its position only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.inference.rows import FORBIDDEN, STOP, Rows

NO_TOKEN = -1
CONTINUES, STOPPED, FULL, FAILED = range(4)
"""What becomes of a reply: it goes on, ends with a stop token, has its length, or has no next token."""

_MORE_SORTED = 16
"""Factor of the tokens that are sorted where the first ones do not make up top_p."""

_BLOCK = 256
"""Tokens whose weights are summed together before the inverse transform looks into one block."""


def uniform(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Float64 random numbers in [0, 1) of seeds and token positions: SplitMix64 (doi 10.1145/2660193.2660195)."""
    z_B = seed_B + (position_B.long() + 1) * _signed(0x9E3779B97F4A7C15)
    z_B = (z_B ^ _shifted(z_B, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_B = (z_B ^ _shifted(z_B, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z_B ^ _shifted(z_B, 31), 11).double() * 2.0**-53


def _signed(bits: int) -> int:
    return bits - (1 << 64)


def _shifted(z_B: Tensor, count: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (z_B >> count) & ((1 << (64 - count)) - 1)


def sample(logits_BV: Tensor, rows: Rows, wants_logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
    """(token_B int32, logprob_B): the next token of each row by inverse transform sampling.

    Log-probabilities are the model's own (temperature 1, no filters). A row gets NO_TOKEN if it has a non-finite logit
    or all its tokens are forbidden. Ties with the k-th most likely token are kept, as are ties with the last of the
    tokens that make up top_p; the most likely token is kept for any top_p.
    """
    logits_BV = logits_BV.float()
    allowed_BV = logits_BV.masked_fill((rows.flags_RV & FORBIDDEN).bool(), -torch.inf)
    best_B, token_B = allowed_BV.max(-1)
    if not rows.all_greedy:
        # halved, so that no difference of finite numbers overflows
        temperature_B1 = torch.where(rows.temperature_R > 0, rows.temperature_R, 1.0)[:, None]
        weights_BV = ((0.5 * allowed_BV - 0.5 * best_B[:, None]) / temperature_B1).mul_(2).exp_()
        if rows.filtered:
            _cut(allowed_BV, weights_BV, rows)
        drawn_B = _inverse_cumulative(weights_BV, uniform(rows.seed_R, rows.n_drawn_R))
        token_B = torch.where(rows.temperature_R > 0, drawn_B, token_B)
    is_drawn_B = logits_BV.isfinite().all(-1) & (best_B > -torch.inf)
    token_B = token_B.where(is_drawn_B, NO_TOKEN).int()
    if not wants_logprobs:
        return token_B, None
    chosen_B = logits_BV.gather(1, token_B.clamp(min=0).long()[:, None])[:, 0]
    largest_B = logits_BV.amax(-1)
    logprob_B = (chosen_B - largest_B) - (logits_BV - largest_B[:, None]).exp_().sum(-1).log_()
    return token_B, logprob_B.where(is_drawn_B, torch.nan)


def _cut(allowed_BV: Tensor, weights_BV: Tensor, rows: Rows) -> None:
    """Set to 0 the weights of the tokens that top_k or top_p excludes."""
    index = rows.filtered
    every = len(index) == len(allowed_BV)
    some_BV, their_weights_BV = (x_BV if every else x_BV[index] for x_BV in (allowed_BV, weights_BV))
    top_k_B = rows.top_k_R if every else rows.top_k_R[index]
    top_p_B = rows.top_p_R if every else rows.top_p_R[index]
    threshold_B = _threshold(some_BV, their_weights_BV, top_k_B, top_p_B.double(), rows.n_sorted)
    their_weights_BV = their_weights_BV.masked_fill(some_BV < threshold_B[:, None], 0)
    weights_BV[index] = their_weights_BV


def _threshold(allowed_BV: Tensor, weights_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, n_sorted: int) -> Tensor:
    """The least logit that each row keeps. n_sorted: most likely tokens that are sorted first, at least top_k."""
    n_sorted = min(n_sorted, allowed_BV.shape[1])
    best_BN, place_BN = allowed_BV.topk(n_sorted)
    kth_B = best_BN.gather(1, (top_k_B.long() - 1).clamp(0, n_sorted - 1)[:, None])[:, 0]
    kth_B = kth_B.where((top_k_B > 0) & (top_k_B <= n_sorted), -torch.inf)
    # the total is of what top_k leaves
    total_B = weights_BV.masked_fill(allowed_BV < kth_B[:, None], 0).sum(-1, dtype=torch.float64)
    sorted_BN = weights_BV.gather(1, place_BN).masked_fill(best_BN < kth_B[:, None], 0)
    mass_BN = sorted_BN.cumsum(-1, dtype=torch.float64)
    n_before_B = (mass_BN < (top_p_B * total_B)[:, None]).sum(-1)
    last_B = best_BN.gather(1, n_before_B.clamp(max=n_sorted - 1)[:, None])[:, 0]
    threshold_B = torch.maximum(kth_B, last_B.where(top_p_B < 1, -torch.inf))
    more = ((n_before_B == n_sorted) & (top_p_B < 1)).nonzero()[:, 0]
    if n_sorted < allowed_BV.shape[1] and len(more):
        threshold_B[more] = _threshold(
            allowed_BV[more], weights_BV[more], top_k_B[more], top_p_B[more], _MORE_SORTED * n_sorted
        )
    return threshold_B


def _inverse_cumulative(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Each row's first token whose cumulative weight exceeds its random share of the total; none of weight 0."""
    weights_BNC = F.pad(weights_BV, (0, -weights_BV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    cumulative_BN = weights_BNC.sum(-1, dtype=torch.float64).cumsum(-1)
    total_B1 = cumulative_BN[:, -1:]
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    block_B1 = (cumulative_BN <= target_B1).sum(-1, keepdim=True).clamp(max=cumulative_BN.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, cumulative_BN.gather(1, (block_B1 - 1).clamp(min=0)), 0)
    weights_BC = weights_BNC.take_along_dim(block_B1[:, :, None], 1)[:, 0]
    has_weight_BC = weights_BC > 0
    above_BC = has_weight_BC & (before_B1 + weights_BC.cumsum(-1, dtype=torch.float64) > target_B1)
    # the block's own sum may round below the target: then its last token
    last_B = (has_weight_BC * torch.arange(_BLOCK, device=weights_BC.device)).argmax(-1)
    return block_B1[:, 0] * _BLOCK + torch.where(above_BC.any(-1), above_BC.byte().argmax(-1), last_B)


def advance(rows: Rows, token_B: Tensor) -> Tensor:
    """Append each row's token, in place; ended rows become idle. finish_B (int32): CONTINUES, STOPPED, FULL, FAILED."""
    flags_B = rows.flags_RV.gather(1, token_B.clamp(min=0).long()[:, None])[:, 0]
    rows.n_left_R.sub_(1)
    rows.n_drawn_R.add_(1)
    finish_B = torch.where(rows.n_left_R <= 0, FULL, CONTINUES)
    finish_B = finish_B.masked_fill((flags_B & STOP).bool(), STOPPED).masked_fill(token_B == NO_TOKEN, FAILED).int()
    rows.token_R.copy_(token_B)
    rows.length_R.copy_((rows.length_R + 1).where(finish_B == CONTINUES, 0))
    return finish_B
