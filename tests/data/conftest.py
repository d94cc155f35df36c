"""One small tokenizer, random packed rows and a recipe on generated chats for the tests of data/."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.format.encode import message_body, speaker_prefix
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from data.packed.packing import Document, EncodedCorpus
from data.packed.shards import PackedRow, packed_rows
from tests.written_data import write_shards

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


WORDS = tuple("hello you how are doing today fine thanks what nap good yes no why me".split())  # noqa: SIM905


def write_chats_to(path: Path, n: int = 40) -> None:
    """`n` distinct dialogues of Ann and Bob, each by a person who writes two of them."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            messages = [
                {
                    "speaker": "Ann" if k % 2 else "Bob",
                    "text": f"{WORDS[(i + k) % 15]} {WORDS[i * k % 15]} {k} {i // 45}",
                    "time": k,
                }
                for k in range(3 + i % 9)
            ]
            file.write(json.dumps({"id": f"chat {i}", "messages": messages, "participants": [f"u{i // 2}"]}) + "\n")


@pytest.fixture(scope="session")
def write_chats() -> Callable[..., None]:
    """`write_chats_to`."""
    return write_chats_to


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe of 40 chats with the run_dir tmp_path/run."""
    write_chats_to(tmp_path / "chats.jsonl")
    path = tmp_path / "data.yaml"
    path.write_text(
        f"""\
stage: data
run_dir: {tmp_path}/run
seed: 0
sources: [{{kind: chat_jsonl, path: {tmp_path}/chats.jsonl}}]
split: {{kind: fraction, heldout: 0.2}}
tokenizer: {{kind: train, vocab_size: 305}}
row_length: 64
continue_within_seconds: 10
rows_per_shard: 3
"""
    )
    return path


def outputs_of(run_dir: Path) -> dict[str, bytes]:
    """Every output; what names a moment or this very recipe is left out."""
    other = {"done.json", "environment.json", "recipe.yaml", "run.json", ".lock", ".digests.json"}
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in other
    }


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """`outputs_of`."""
    return outputs_of
