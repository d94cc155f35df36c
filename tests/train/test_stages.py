"""Every stage from the one before, on tiny data: scorer, fine-tuning, and preferences from samples and from a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.feedback.__main__ import main as convert_feedback
from data.format.dialogue import Message
from data.format.encode import decode_reply, encode_prompt, encode_reply
from data.format.tokenizer import DialogueTokenizer
from data.prepare import main as prepare_data
from data.prompt.fit import NEWEST_TOO_LONG, REPLY_TOO_LONG
from data.sources.preferences import PreferencePair, read_pairs, write_pairs
from model.attention_ops import Documents
from model.weights import load_model, load_scorer
from train.dpo import DPORecipe
from train.preference.pair_rows import EncodedPair, PairRows, encode_pairs, reply_logprobs

ROOT = Path(__file__).parents[2]
LOOP = (
    "loop: {max_steps: 6, rows_per_step: 4, rows_per_micro_batch: 2, evaluate_every: 3, save_every: 3, keep: 1}\n"
    "optimizer: {kind: adamw, lr: 1e-3}\nschedule: {kind: cosine}\nengine: {precision: float32}\n"
    "wandb: {mode: disabled}\nthreads: 1\n"
)


def run(stage: str, recipe: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"train.{stage}", str(recipe)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def finished(stage: str, folder: Path, body: str) -> dict[str, float]:
    recipe = folder / f"{stage}.yaml"
    recipe.write_text(f"stage: {stage}\nrun_dir: {folder / stage}\n{body}{LOOP}")
    done = run(stage, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / stage / "done.json").read_text())["figures"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A folder with a finished pre-training run."""
    folder = tmp_path_factory.mktemp("runs")
    body = (
        f"data: {data_dir}\nevaluation_rows: 8\nmodel: {{vocab_size: 320, d_model: 32, n_layers: 3, n_heads: 2, "
        "d_head: 16, d_ff: 48, layers: SSG, window: 8, max_length: 128}\n"
    )
    figures = finished("pretrain", folder, body)
    assert {"unigram", "bigram_add_one", "bigram_kneser_ney"} == set(figures["baselines"])  # type: ignore[arg-type]
    return folder


def test_fine_tuning_scoring_and_preferences(runs: Path, data_dir: Path) -> None:
    common = f"init_from: {runs / 'pretrain'}\ndata: {data_dir}\nevaluation_rows: 8\n"
    assert finished("sft", runs, common)["heldout_loss"] > 0
    assert 0 <= finished("engagement", runs, common)["heldout_auc"] <= 1
    _, head = load_scorer(runs / "engagement" / "model")
    assert head.score.weight.abs().sum().item() > 0

    pairs = [
        PreferencePair(f"p{i}", (Message("Ann", f"the {'cat ' * i}"),), "Ben", "yes tea", "no", source="test")
        for i in range(12)
    ]
    write_pairs(runs / "pairs.jsonl", pairs)
    body = (
        f"init_from: {runs / 'sft'}\ndata: {data_dir}\nmax_pair_tokens: 128\nheldout_fraction: 0.2\npairs:\n"
        f"  - {{kind: on_policy, scorer: {runs / 'engagement'}, n_contexts: 40, n_candidates: 6,"
        " max_context_tokens: 40, max_new_tokens: 80}\n"
        f"  - {{kind: file, path: {runs / 'pairs.jsonl'}}}\n"
    )
    figures = finished("dpo", runs, body)
    assert figures["training_pairs"] + figures["heldout_pairs"] > 12, "some of the sampled ones"
    assert {*DPORecipe.heldout_figures, "heldout_length_only_accuracy"} <= figures.keys()
    low, high = figures["heldout_accuracy_interval"]
    assert low is None or low <= figures["heldout_accuracy"] <= high
    assert list((runs / "dpo" / "reference").glob("reference_*.safetensors"))
    before, after = load_model(runs / "sft" / "model"), load_model(runs / "dpo" / "model")
    assert not torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)
    again = run("dpo", runs / "dpo.yaml")
    assert again.returncode == 0
    assert "finished already" in again.stdout


def test_what_users_did_trains_preferences_and_the_scorer(
    runs: Path, data_dir: Path, make_feedback_log: Callable[..., Any]
) -> None:
    """From a (made-up) log of feedback events, by the recipes' entry points alone, to both models."""
    events = [json.dumps(event) + "\n" for event in make_feedback_log(5, 40).events]
    (runs / "events.jsonl").write_text("".join(events))
    feedback = {
        "stage": "feedback", "run_dir": f"{runs / 'feedback'}", "seed": 0, "events": f"{runs / 'events.jsonl'}",
        "pairs": {"rules": [{"kind": "kept_over_regenerated", "wrote_again_within_seconds": 3600}]},
        "labels": {"within_seconds": 3600}, "max_context_messages": 6,
    }  # fmt: skip
    (runs / "feedback.yaml").write_text(json.dumps(feedback))
    assert convert_feedback([str(runs / "feedback.yaml")]) == 0
    pairs = read_pairs(runs / "feedback" / "pairs.jsonl")
    tokenizer = DialogueTokenizer.load(runs / "pretrain" / "model")
    assert len(pairs) > 20
    for pair, encoded in zip(pairs, encode_pairs(pairs, tokenizer, 10**6)[0], strict=True):
        assert encoded.prompt == encode_prompt(tokenizer, pair.messages, pair.character)
        for text, reply in ((pair.chosen, encoded.chosen), (pair.rejected, encoded.rejected)):
            assert decode_reply(tokenizer, reply[:-1]) == text

    sources = [{"kind": "chat_jsonl", "path": f"{runs / 'feedback' / name}.jsonl"} for name in ("dialogues", "replies")]
    data = {
        "stage": "data", "run_dir": f"{runs / 'feedback_data'}", "seed": 0, "sources": sources, "row_length": 64,
        "split": {"kind": "fraction", "heldout": 0.2}, "continue_within_seconds": None,
        "tokenizer": {"kind": "file", "path": f"{data_dir}"},
    }  # fmt: skip
    (runs / "feedback_data.yaml").write_text(json.dumps(data))
    assert prepare_data([str(runs / "feedback_data.yaml")]) == 0

    out = runs / "from_feedback"
    out.mkdir()
    common = f"init_from: {runs / 'pretrain'}\n"
    body = f"data: {runs / 'feedback_data'}\nevaluation_rows: 200\n"
    assert 0 <= finished("engagement", out, common + body)["heldout_auc"] <= 1
    source = f"{{kind: file, path: {runs / 'feedback' / 'pairs.jsonl'}}}"
    figures = finished("dpo", out, f"{common}data: {data_dir}\nmax_pair_tokens: 96\npairs: [{source}]\n")
    assert figures["training_pairs"] > 10 and 0 <= figures["heldout_accuracy"] <= 1


def test_both_sides_of_a_pair_are_scored_as_if_alone(runs: Path) -> None:
    model = load_model(runs / "pretrain" / "model")
    tokenizer = DialogueTokenizer.load(runs / "pretrain" / "model")
    prompt = encode_prompt(tokenizer, [Message("Ann", "the cat sat")], "Ben")
    pairs = [
        EncodedPair(prompt, encode_reply(tokenizer, "tea"), encode_reply(tokenizer, "you and me")),
        EncodedPair(prompt[:4], encode_reply(tokenizer, "no no no"), encode_reply(tokenizer, "why")),
    ]
    together = reply_logprobs(model, PairRows(pairs).collate(torch.arange(2).numpy()))
    replies = [(pairs[0].prompt, pairs[0].chosen), (pairs[1].prompt, pairs[1].chosen)]
    replies += [(pairs[0].prompt, pairs[0].rejected), (pairs[1].prompt, pairs[1].rejected)]
    for logprob, (context, reply) in zip(together, replies, strict=True):
        tokens = torch.tensor([*context, *reply])
        logprobs_TV = model.logits(model(tokens, Documents.from_lengths([len(tokens)]))).log_softmax(-1)
        alone = sum(logprobs_TV[len(context) - 1 + i, token] for i, token in enumerate(reply))
        assert float(logprob) == pytest.approx(float(alone), rel=1e-4)  # type: ignore[arg-type]


def test_long_prompts_lose_their_oldest_messages(runs: Path) -> None:
    tokenizer = DialogueTokenizer.load(runs / "pretrain" / "model")
    messages = tuple(Message("Ann", f"the cat sat {'tea ' * i}") for i in range(6))
    pair = PreferencePair("p", messages, "Ben", "yes", "no no no", source="test")
    ((encoded,), left_out) = encode_pairs([pair], tokenizer, 60)
    assert not left_out
    assert len(encoded.prompt) + max(len(encoded.chosen), len(encoded.rejected)) <= 60
    kept = next(n for n in range(7) if encode_prompt(tokenizer, messages[n:], "Ben") == encoded.prompt)
    assert 0 < kept < 6
    assert encode_pairs([pair], tokenizer, 5) == ([], {REPLY_TOO_LONG: 1})
    newest = len(encode_prompt(tokenizer, messages[-1:], "Ben")) + max(len(encoded.chosen), len(encoded.rejected))
    assert len(encode_pairs([pair], tokenizer, newest)[0]) == 1
    assert encode_pairs([pair], tokenizer, newest - 1) == ([], {NEWEST_TOO_LONG: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("init_from: {runs}/nowhere", "init_from"),
        ("evaluation_rows: 8\nevaluation_row: 8", "did you mean"),
        ("data: {runs}/nodata", "nodata"),
    ],
)
def test_wrong_recipes_end_in_one_clear_message(runs: Path, data_dir: Path, change: str, message: str) -> None:
    values = {"init_from": f"{runs / 'pretrain'}", "data": f"{data_dir}", "evaluation_rows": "8"}
    lines = [f"{key}: {value}" for key, value in values.items() if not change.startswith(f"{key}:")]
    recipe = runs / "wrong.yaml"
    body = "\n".join([*lines, change.format(runs=runs)])
    recipe.write_text(f"stage: sft\nrun_dir: {runs / 'wrong'}\n{body}\n{LOOP}")
    done = run("sft", recipe)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
