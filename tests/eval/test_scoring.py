"""Tests of eval/scoring.py: batching and padding change no number."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring import batches_by_length, next_token_logprobs, reply_logprobs, score_conversations, sigmoid
from model.attention_ops import Documents
from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=50,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        d_head=8,
        d_ff=32,
        layers="SG",
        window=4,
        max_length=64,
    )
    return Transformer(config, seed=1).eval()


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 100))
def test_batches_hold_every_index_once_and_keep_the_limit(lengths: list[int], batch_tokens: int) -> None:
    batches = list(batches_by_length(lengths, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


def alone(model: Transformer, prompt: list[int], reply: list[int]) -> np.ndarray:
    tokens_T = torch.tensor(prompt + reply)
    with torch.no_grad():
        logits_TV = model.logits(model(tokens_T, Documents.from_lengths([len(tokens_T)]))).log_softmax(-1)
    return np.array([float(logits_TV[len(prompt) + j - 1, token]) for j, token in enumerate(reply)])


def test_reply_logprobs_equal_those_of_each_sequence_alone(model: Transformer) -> None:
    rng = np.random.default_rng(0)
    items = [
        (rng.integers(5, 50, rng.integers(1, 9)).tolist(), rng.integers(5, 50, rng.integers(1, 6)).tolist())
        for _ in range(11)
    ]
    seen: list[tuple[int, int]] = []
    found = reply_logprobs(model, items, batch_tokens=30, on_progress=lambda done, total: seen.append((done, total)))
    for (prompt, reply), logprobs in zip(items, found, strict=True):
        np.testing.assert_allclose(logprobs, alone(model, prompt, reply), atol=1e-5)
    assert seen[-1] == (11, 11)


def test_next_token_distributions_and_scores_ignore_the_batch(model: Transformer) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(5, 50, length).tolist() for length in (7, 1, 4, 4, 12)]
    together, single = next_token_logprobs(model, prompts, 1000), next_token_logprobs(model, prompts, 1)
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.exp().sum(1), torch.ones(5))
    head = ScalarHead(16)
    torch.nn.init.normal_(head.score.weight)
    scores = score_conversations((model, head), prompts, 1000)
    np.testing.assert_allclose(scores, score_conversations((model, head), prompts, 1), atol=1e-5)
    assert len(set(scores.round(5))) == 5


def test_sigmoid_does_not_overflow() -> None:
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
