"""A fresh model is unsure of everything, and at any depth neither explodes nor vanishes, and learns at one rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention_ops import Documents
from model.config import ModelConfig
from model.transformer import Transformer

DEPTHS = [6, 48, 96]


def model_of(n_layers: int, **changes: Any) -> Transformer:
    base = ModelConfig(
        vocab_size=61, d_model=64, n_layers=n_layers, n_heads=2, d_head=32, d_ff=128, layers="SSG", window=8,
        max_length=64,
    )  # fmt: skip
    return Transformer(ModelConfig(**{**dict(base), **changes}), attention="sdpa", seed=0)


def random_tokens(vocab_size: int) -> tuple[Tensor, Documents]:
    tokens_T = torch.randint(vocab_size, (512,), generator=torch.Generator().manual_seed(0))
    return tokens_T, Documents.from_lengths([64] * 8, row_length=64)


@pytest.mark.parametrize("n_layers", [3, 24])
@pytest.mark.parametrize(("d_model", "vocab_size"), [(64, 61), (256, 2048), (1024, 8192)])
def test_the_first_loss_is_that_of_guessing(d_model: int, vocab_size: int, n_layers: int) -> None:
    """The token just read is the danger: the output's embedding of it is what the stream began with."""
    model = model_of(n_layers, d_model=d_model, vocab_size=vocab_size)
    tokens_T, documents = random_tokens(vocab_size)
    with torch.no_grad():
        logits_TV = model.logits(model(tokens_T, documents))
    assert 0.3 < logits_TV.std() < 1
    assert float(F.cross_entropy(logits_TV[:-1], tokens_T[1:])) == pytest.approx(math.log(vocab_size), abs=0.3)


def gradients_by_layer(model: Transformer) -> dict[str, list[float]]:
    """Root mean squares of every block's output, and norms of the gradients there and of the block's matrices."""
    streams: list[Tensor] = []

    def keep(block: Any, inputs: Any, outputs: Any) -> None:
        outputs[0].retain_grad()
        streams.append(outputs[0])

    for block in model.blocks:
        block.register_forward_hook(keep)
    tokens_T, documents = random_tokens(model.config.vocab_size)
    F.cross_entropy(model.logits(model(tokens_T, documents))[:-1], tokens_T[1:]).backward()
    matrices = [torch.cat([p.grad.flatten() for p in b.parameters() if p.ndim == 2]) for b in model.blocks]
    return {
        "activations": [float(x_TD.detach().square().mean().sqrt()) for x_TD in streams],
        "gradients": [float(x_TD.grad.norm()) for x_TD in streams],
        "weights": [float(gradient.norm()) for gradient in matrices],
    }


@pytest.mark.parametrize("n_layers", DEPTHS)
def test_no_layer_explodes_or_vanishes(n_layers: int) -> None:
    """Bounds that hold at every depth: the stream grows once from the embeddings' size to the layers' sum's."""
    norms = gradients_by_layer(model_of(n_layers))
    assert min(norms["activations"]) > 0.5 and max(norms["activations"]) < 2.5
    for name, largest in (("activations", 4), ("gradients", 8), ("weights", 10)):
        assert max(norms[name]) / min(norms[name]) < largest, name


def test_the_gradients_norm_does_not_depend_on_depth() -> None:
    """So that one bound for clipping serves all models."""
    totals = []
    for n_layers in DEPTHS:
        model = model_of(n_layers)
        gradients_by_layer(model)
        totals.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))
    assert max(totals) / min(totals) < 1.3


def loss_after(n_layers: int, optimizer: str, n_steps: int) -> float:
    """Mean loss over the last ten steps of learning to say the token before the last: it takes attention."""
    model = model_of(n_layers, vocab_size=16, d_model=32, d_head=16, d_ff=64, window=4)
    documents = Documents.from_lengths([16] * 8, row_length=16)
    generator = torch.Generator().manual_seed(1)
    kinds = {"adamw": (torch.optim.AdamW, 3e-3), "sgd": (torch.optim.SGD, 0.3)}
    kind, lr = kinds[optimizer]
    step: torch.optim.Optimizer = kind(model.parameters(), lr=lr)
    losses = []
    for _ in range(n_steps):
        tokens_BL = torch.randint(16, (8, 16), generator=generator)
        logits_BLV = model.logits(model(tokens_BL.flatten(), documents)).view(8, 16, -1)
        loss = F.cross_entropy(logits_BLV[:, 1:].flatten(0, 1), tokens_BL[:, :-1].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize(("optimizer", "n_steps", "enough"), [("adamw", 60, 1.2), ("sgd", 40, 2.4)])
def test_deep_models_learn_at_the_rate_of_shallow_ones(optimizer: str, n_steps: int, enough: float) -> None:
    """From ln 16 = 2.8; without attention it would stay there. Plain SGD evens out nothing between layers."""
    deep, shallow = (loss_after(n_layers, optimizer, n_steps) for n_layers in (48, 6))
    assert deep < enough
    assert deep < shallow + 0.2
