"""A tokenizer of a few sentences and a small random model, for what needs no trained ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from data.tokenizer import DialogueTokenizer, train_tokenizer
from model.config import ModelConfig, TailSharing
from model.transformer import Transformer

# tiny models run many times faster on one thread than on a crowd of them
torch.set_num_threads(1)

SENTENCES = [
    "Hello there, how are you doing today?",
    "I am fine, thank you. It rains  a lot in November!",
    "Ada: did you see the 42 ducks on the pond? Yes, all of them; they were loud.",
    "Ich weiß nicht, was soll es bedeuten, daß ich so traurig bin.",
    "user narrator Ada Bob and the other ones talk about the weather and the rain",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> DialogueTokenizer:
    return train_tokenizer(SENTENCES * 3, None, 400, character_coverage=1.0)


@pytest.fixture(scope="session")
def model(tokenizer: DialogueTokenizer) -> Transformer:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=6, n_heads=4, d_head=16, d_ff=48, layers="SSG",
        window=12, kv_sharing=TailSharing(kind="tail", n_layers=3), final_logit_softcap=30.0, max_length=256,
    )  # fmt: skip
    built = Transformer(config, attention="reference", seed=5).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return built
