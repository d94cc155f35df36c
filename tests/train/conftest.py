"""A tiny data directory and recipe, so that a whole training run takes seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.format.dialogue import Dialogue, Message
from data.format.encode import encode_dialogue
from data.format.tokenizer import train_tokenizer
from data.packed.cut import CutRule, cut
from data.packed.dialogue_table import dialogue_table
from data.packed.packing import EncodedCorpus, best_fit
from data.packed.shards import packed_rows
from tests.written_data import write_dialogues, write_shards

ROOT = Path(__file__).parents[2]
ROW_LENGTH, VOCAB_SIZE = 64, 320
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "hill", "then", "saw", "me", "you", "we", "like", "tea", "why", "no"]

PRETRAIN = """\
stage: pretrain
run_dir: {run_dir}
data: {data}
seed: 1
model: {{vocab_size: 320, d_model: 32, n_layers: 3, n_heads: 2, d_head: 16, d_ff: 48, layers: SSG, window: 8,
  kv_sharing: {{kind: none}}, max_length: 64}}
threads: 1
loop: {{max_steps: 12, rows_per_step: 4, rows_per_micro_batch: 2, evaluate_every: 4, save_every: 2, keep: 2}}
optimizer: {{kind: adamw, lr: 3e-3}}
schedule: {{kind: wsd, warmup_steps: 2}}
engine: {{precision: float32, zero_stage: 1}}
evaluation_rows: 8
wandb: {{mode: disabled}}
"""


def make_dialogues(count: int, seed: int) -> list[Dialogue]:
    """Made-up conversations of uneven length between two speakers."""
    rng = random.Random(seed)
    dialogues = []
    for number in range(count):
        messages = tuple(
            Message(("Ann", "Ben")[turn % 2], " ".join(rng.choices(WORDS, k=rng.randint(1, 6))), float(turn * 10))
            for turn in range(rng.randint(2, 12))
        )
        dialogues.append(Dialogue(f"d{number}", messages, rng.choice(("Ann", "Ben")), ("ann", "ben")))
    return dialogues


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data directory: tokenizer, packed train and held-out rows, dialogues."""
    out = tmp_path_factory.mktemp("data")
    parts = {"train": make_dialogues(150, 0), "heldout": make_dialogues(40, 1)}
    tokenizer = train_tokenizer((m.text for d in parts["train"] for m in d.messages), out, VOCAB_SIZE)
    (out / "dialogues").mkdir()
    for name, dialogues in parts.items():
        write_dialogues(out / "dialogues" / f"{name}.jsonl", dialogues)
        rule = CutRule(ROW_LENGTH, ROW_LENGTH // 4, tokenizer.inside_character())
        encoded = [encode_dialogue(tokenizer, dialogue, 60.0) for dialogue in dialogues]
        documents = [piece for number, one in enumerate(encoded) for piece in cut(one, rule, number)]
        corpus = EncodedCorpus.of(documents, VOCAB_SIZE)
        rows = packed_rows(corpus, best_fit(corpus.lengths, ROW_LENGTH), ROW_LENGTH)
        write_shards(
            out / name, rows, row_length=ROW_LENGTH, vocab_size=VOCAB_SIZE, rows_per_shard=16, tokenizer_sha256="t",
            dialogues=dialogue_table([d.id for d in dialogues], [[]] * len(dialogues)),
        )  # fmt: skip
    (out / "done.json").write_text(json.dumps({"stage": "data"}))
    return out


@pytest.fixture
def pretrain_recipe(tmp_path: Path, data_dir: Path) -> Path:
    """A pre-training recipe of twelve steps on that data, in a run directory of its own."""
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN.format(run_dir=tmp_path / "run", data=data_dir))
    return path


@pytest.fixture(scope="session")
def steps_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Run the cases of steps_on_ranks.py on one process a rank; what each of them wrote."""

    def run(ranks: int, cases: dict[str, Any]) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("ranks")
        (out / "cases.json").write_text(json.dumps(cases))
        program = [str(Path(__file__).with_name("steps_on_ranks.py")), str(out / "cases.json"), str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program],
            cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(out / f"rank_{rank}.pt", weights_only=True) for rank in range(ranks)]

    return run
