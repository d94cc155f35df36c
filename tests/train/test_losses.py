"""Losses against plain formulas, and their independence of chunking and packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from model.attention_ops import Documents
from model.config import ModelConfig
from model.transformer import Transformer
from train import losses
from train.losses import continuation_loss, dpo_loss, next_token_loss, sequence_logprobs, token_logprobs

CONFIG = ModelConfig(
    vocab_size=23, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=16, layers="SG", window=4, max_length=64
)


def test_next_token_loss_counts_only_what_counts() -> None:
    model = Transformer(CONFIG, seed=1)
    tokens_T, targets_T = torch.randint(23, (2, 12))
    counted_T = torch.rand(12) < 0.5
    hidden_TD = model(tokens_T, Documents.from_lengths([5, 7]))
    expected = F.cross_entropy(model.logits(hidden_TD), targets_T, reduction="none")[counted_T].sum()
    torch.testing.assert_close(next_token_loss(model, hidden_TD, targets_T, counted_T), expected)


def test_chunked_logits_give_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_T, targets_T = torch.randint(23, (2, 12))
    results = []
    for chunk in (100, 5):
        monkeypatch.setattr(losses, "LOGIT_CHUNK_TOKENS", chunk)
        model = Transformer(CONFIG, seed=1)
        logprobs_T = token_logprobs(model, model(tokens_T, Documents.from_lengths([12])), targets_T)
        logprobs_T.sum().backward()
        results.append((logprobs_T.detach(), model.embed_tokens.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_continuation_loss_is_binary_cross_entropy_at_labels() -> None:
    score_T, label_T = torch.tensor([0.5, -1.0, 2.0, 9.0]), torch.tensor([1, 0, -1, -1])
    expected = -math.log(1 / (1 + math.exp(-0.5))) - math.log(1 - 1 / (1 + math.exp(1.0)))
    assert float(continuation_loss(score_T, label_T)) == pytest.approx(expected)


def test_sequence_logprobs_sum_by_sequence() -> None:
    summed = sequence_logprobs(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 3)
    assert summed.tolist() == [1.0, 0.0, 6.0]


def test_dpo_loss_is_equation_7() -> None:
    chosen, rejected = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.0])
    reference_chosen, reference_rejected = torch.tensor([-3.5, -4.0]), torch.tensor([-3.0, -3.0])
    loss, margin = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    expected_margin = [0.1 * ((-3 + 3.5) - (-4 + 3)), 0.1 * ((-5 + 4) - (-2 + 3))]
    assert margin.tolist() == pytest.approx(expected_margin)
    assert float(loss) == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in expected_margin))
    smoothed, _ = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1, label_smoothing=0.2)
    both = [(math.log(1 + math.exp(-m)), math.log(1 + math.exp(m))) for m in expected_margin]
    assert float(smoothed) == pytest.approx(sum(0.8 * win + 0.2 * lose for win, lose in both))


def test_dpo_starts_at_log_two() -> None:
    same = torch.tensor([-3.0, -5.0])
    loss, margin = dpo_loss(same, same, same, same, beta=0.3)
    assert float(loss) == pytest.approx(2 * math.log(2))
    assert margin.tolist() == [0, 0]
