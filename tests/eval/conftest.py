"""A pipeline in miniature: dialogues, tokenizer, shards and models with finished run directories."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.format.dialogue import Dialogue, Message
from data.format.encode import encode_dialogue
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from data.packed.cut import CutRule, cut
from data.packed.dialogue_table import dialogue_table
from data.packed.packing import EncodedCorpus, best_fit
from data.packed.shards import packed_rows
from model.config import ModelConfig, TailSharing
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from model.weights import save_model
from tests.written_data import write_dialogues, write_shards

ROW_LENGTH = 192
torch.set_num_threads(1)  # models this small only wait for each other's threads
WORDS = ["hello", "there", "how", "are", "you", "today", "fine", "thanks", "music", "walks", "yes", "no", "why", "rain"]


def make_dialogue(number: int) -> Dialogue:
    rng = np.random.default_rng(number)
    n_messages = int(rng.integers(4, 9))
    messages = [
        Message("Sam" if i % 2 == 0 else "Alex", " ".join(rng.choice(WORDS, int(rng.integers(1, 6)))))
        for i in range(n_messages)
    ]
    return Dialogue(f"dialogue-{number}", tuple(messages), "Alex", ("a", "b"))


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    return [make_dialogue(number) for number in range(40)]


@pytest.fixture(scope="session")
def tokenizer(dialogues: list[Dialogue]) -> DialogueTokenizer:
    texts = [f"{m.speaker}: {m.text}" for d in dialogues for m in d.messages]
    return train_tokenizer(texts, None, vocab_size=310)


def write_packed(
    directory: Path,
    dialogues: list[Dialogue],
    tokenizer: DialogueTokenizer,
    participants: list[list[int]] | None = None,
) -> None:
    """Shards of the dialogues; `participants` of each, by default an own one."""
    rule = CutRule(ROW_LENGTH, ROW_LENGTH // 4, tokenizer.inside_character())
    encoded = [encode_dialogue(tokenizer, dialogue) for dialogue in dialogues]
    documents = [piece for number, one in enumerate(encoded) for piece in cut(one, rule, number)]
    corpus = EncodedCorpus.of(documents, tokenizer.vocab_size)
    rows = packed_rows(corpus, best_fit(corpus.lengths, ROW_LENGTH), ROW_LENGTH)
    write_shards(
        directory,
        rows,
        row_length=ROW_LENGTH,
        vocab_size=tokenizer.vocab_size,
        rows_per_shard=64,
        tokenizer_sha256="0" * 64,
        dialogues=dialogue_table([d.id for d in dialogues], participants or [[n] for n in range(len(dialogues))]),
    )


def make_model(vocab_size: int, seed: int) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size, d_model=16, n_layers=4, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32, layers="SG",
        window=8, kv_sharing=TailSharing(kind="tail", n_layers=2), max_length=256,
    )  # fmt: skip
    return Transformer(config, seed=seed).eval()


@pytest.fixture(scope="session")
def models(tokenizer: DialogueTokenizer) -> dict[str, Transformer]:
    return {name: make_model(tokenizer.vocab_size, seed) for seed, name in enumerate(("pretrain", "sft", "dpo"))}


@pytest.fixture(scope="session")
def scorer(tokenizer: DialogueTokenizer) -> tuple[Transformer, ScalarHead]:
    head = ScalarHead(16)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.score.weight, generator=generator)
    return make_model(tokenizer.vocab_size, 9), head


@pytest.fixture
def pipeline(
    tmp_path: Path,
    dialogues: list[Dialogue],
    tokenizer: DialogueTokenizer,
    models: dict[str, Transformer],
    scorer: tuple[Transformer, ScalarHead],
) -> Path:
    """<tmp>/{data,pretrain,sft,dpo,engagement}, each finished."""
    data = tmp_path / "data"
    (data / "dialogues").mkdir(parents=True)
    tokenizer.save(data / "tokenizer.model")
    write_packed(data / "train", dialogues[:20], tokenizer)
    write_packed(data / "heldout", dialogues[20:], tokenizer)
    write_dialogues(data / "dialogues" / "heldout.jsonl", dialogues[20:])
    files = {"tokenizer.model": data / "tokenizer.model"}
    for name, model in models.items():
        save_model(tmp_path / name / "model", model.config, model.state_dict(), files=files)
    trunk, head = scorer
    save_model(tmp_path / "engagement" / "model", trunk.config, trunk.state_dict(), head.state_dict(), files)
    for name in ("data", "pretrain", "sft", "dpo", "engagement"):
        (tmp_path / name / "done.json").write_text(json.dumps({"key_figure": f"{name} is done"}))
    return tmp_path


@pytest.fixture
def dataset_of(tmp_path: Path, tokenizer: DialogueTokenizer) -> Callable[[list[Dialogue]], Path]:
    """Pack dialogues into a directory of shards."""

    def pack(some: list[Dialogue]) -> Path:
        write_packed(tmp_path / "packed", some, tokenizer)
        return tmp_path / "packed"

    return pack
