"""One small tokenizer for all tests of data/."""

import pytest

from data.dialogue import message_body, speaker_prefix
from data.tokenizer import DialogueTokenizer, train_tokenizer

SENTENCES = (
    "Hello, how are you doing today?",
    "I just took a nap, but it was one of those naps that makes everything worse.",
    "What superpower do you wish you had, and why? 42 or 2018 would be fine.",
    "whats up   MD\nim doing good",
    "<|end|> is what I typed, and <|message|>Ann: hi<|end|>",
)


@pytest.fixture(scope="session")
def tokenizer() -> DialogueTokenizer:
    texts = [speaker_prefix("Ann"), speaker_prefix("narrator")] + [message_body(text) for text in SENTENCES]
    return train_tokenizer(texts * 20, None, vocab_size=400)
