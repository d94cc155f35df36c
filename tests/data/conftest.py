"""One small tokenizer and random packed rows for the tests of data/."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.dialogue import message_body, speaker_prefix
from data.packing import Document, EncodedCorpus
from data.shards import PackedRow, packed_rows, write_shards
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


def random_rows(n_rows: int, row_length: int, seed: int = 0, vocab_size: int = 400) -> list[PackedRow]:
    """Rows of random documents, the last of each with some padding."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(n_rows):
        first = int(generator.integers(1, row_length - 2))
        for n in (first, row_length - first - int(generator.integers(0, 2))):
            tokens = generator.integers(5, vocab_size, n)
            tokens[0] = 2
            trained = generator.integers(0, 2, n).astype(np.uint8)
            trained[0] = 0
            documents.append(Document(tokens, trained, generator.integers(-1, 2, n).astype(np.int8)))
    pairs = [[2 * i, 2 * i + 1] for i in range(n_rows)]
    return list(packed_rows(EncodedCorpus.of(documents, vocab_size), pairs, row_length))


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[PackedRow]]:
    """`random_rows`: tests cannot import a conftest."""
    return random_rows


WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes `random_rows` as shards under tmp_path and returns the directory."""

    def write(n_rows: int = 7, row_length: int = 16, rows_per_shard: int = 3, name: str = "d", seed: int = 0) -> Path:
        write_shards(
            tmp_path / name,
            random_rows(n_rows, row_length, seed),
            row_length=row_length,
            vocab_size=400,
            rows_per_shard=rows_per_shard,
            tokenizer_sha256="t",
        )
        return tmp_path / name

    return write
