"""Losses against plain formulas, and their independence of chunking and packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from model.attention_ops import Documents
from model.config import ModelConfig
from model.transformer import Transformer
from train import token_logprobs as token_logprobs_module
from train.losses import continuation_loss, dpo_loss, next_token_loss, sequence_logprobs
from train.token_logprobs import summed_loss, token_logprobs

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


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_token_logprobs_and_gradients_equal_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, chunk: int, softcap: float | None
) -> None:
    monkeypatch.setattr(token_logprobs_module, "LOGIT_CHUNK_ELEMENTS", chunk * 23)
    generator = torch.Generator().manual_seed(chunk)
    hidden_TD, embed_VD = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (12, 23))
    targets_T = torch.randint(23, (12,), generator=generator)
    direction_T, other_T = torch.randn(2, 12, generator=generator)

    def plain(hidden_TD: torch.Tensor, embed_VD: torch.Tensor) -> torch.Tensor:
        logits_TV = hidden_TD @ embed_VD.T
        logits_TV = logits_TV if softcap is None else torch.tanh(logits_TV / softcap) * softcap
        logprob_T = logits_TV.log_softmax(-1)[torch.arange(12), targets_T]
        return (logprob_T * direction_T + logits_TV.logsumexp(-1).square() * other_T).sum()

    def summed(hidden_TD: torch.Tensor, embed_VD: torch.Tensor) -> torch.Tensor:
        return summed_loss(hidden_TD, embed_VD, targets_T, direction_T, 0.25, softcap)

    def by_token(hidden_TD: torch.Tensor, embed_VD: torch.Tensor) -> torch.Tensor:
        logprob_T, normalizer_T = token_logprobs(hidden_TD, embed_VD, targets_T, softcap)
        return ((0.25 * normalizer_T.square() - logprob_T) * direction_T).sum()

    ours32 = (hidden_TD.float(), embed_VD.float())
    torch.testing.assert_close(
        *(torch.autograd.functional.vjp(f, ours32) for f in (summed, by_token)), rtol=1e-4, atol=1e-4
    )

    def ours(hidden_TD: torch.Tensor, embed_VD: torch.Tensor) -> torch.Tensor:
        logprob_T, normalizer_T = token_logprobs(hidden_TD, embed_VD, targets_T, softcap)
        return (logprob_T * direction_T + normalizer_T.square() * other_T).sum()

    expected, found = (
        torch.autograd.functional.vjp(function, (hidden.clone(), embed.clone()))
        for function, hidden, embed in ((plain, hidden_TD, embed_VD), (ours, hidden_TD.float(), embed_VD.float()))
    )
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_no_tokens_are_a_loss_of_nothing() -> None:
    hidden_TD = torch.randn(3, 8, requires_grad=True)
    logprob_T, _ = token_logprobs(hidden_TD[:0], torch.randn(5, 8), torch.zeros(0, dtype=torch.int64), None)
    logprob_T.sum().backward()
    assert hidden_TD.grad is not None and not hidden_TD.grad.any()


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [5, 100])
def test_z_loss_adds_the_squared_log_normalizer(
    monkeypatch: pytest.MonkeyPatch, chunk: int, softcap: float | None, z_loss: float
) -> None:
    """The stages' own loss, and its gradients, against -log p + z (log Z)^2 written out over capped logits."""
    monkeypatch.setattr(token_logprobs_module, "LOGIT_CHUNK_ELEMENTS", chunk * 23)
    model = Transformer(CONFIG.model_copy(update={"final_logit_softcap": softcap}), seed=1)
    generator = torch.Generator().manual_seed(2)
    hidden_TD = torch.randn(12, 16, generator=generator).mul(3).requires_grad_()
    targets_T = torch.randint(23, (12,), generator=generator)
    counted_T = torch.rand(12, generator=generator) < 0.7

    exact_TD = hidden_TD.detach().double().requires_grad_()
    embed_VD = model.embed_tokens.weight.detach().double().requires_grad_()
    logits_TV = exact_TD @ embed_VD.T
    if softcap is not None:
        logits_TV = softcap * (logits_TV / softcap).tanh()
    normalizer_T = logits_TV.exp().sum(-1).log()
    losses_T = normalizer_T - logits_TV[torch.arange(12), targets_T] + z_loss * normalizer_T**2
    expected = losses_T[counted_T].sum()

    found = next_token_loss(model, hidden_TD, targets_T, counted_T, z_loss)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, (hidden_TD, model.embed_tokens.weight)),
        torch.autograd.grad(3 * expected, (exact_TD, embed_VD)),
        check_dtype=False, rtol=1e-4, atol=1e-5,
    )  # fmt: skip


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


def test_the_embedding_gets_its_gradient_where_the_engine_sums_in_float32() -> None:
    """As a tied embedding does from both sides, twice, and none in `.grad`."""

    def differentiated(model: Transformer) -> Transformer:
        tokens_T, targets_T = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(2))
        hidden_TD = model(tokens_T, Documents.from_lengths([5, 7]))
        (0.3 * next_token_loss(model, hidden_TD, targets_T)).backward()
        return model

    expected = differentiated(Transformer(CONFIG, seed=1)).embed_tokens.weight.grad
    assert expected is not None
    model = Transformer(CONFIG, seed=1)
    weight = model.embed_tokens.weight
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    for _ in range(2):
        differentiated(model)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 2 * expected)
