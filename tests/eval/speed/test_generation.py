"""Tests of eval/speed/generation.py: the floor counted by hand, the peer's cases, tables, no GPU."""

from __future__ import annotations

import ast
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from eval.speed import generation
from eval.speed.generation import CASES, Case, decode_floor, main, print_gaps, print_table
from model.config import ModelConfig, TailSharing

PEER = Path(generation.__file__).with_name("vllm_peer.py")


def test_the_peer_runs_the_same_cases() -> None:
    (cases,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(PEER.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES"
    )
    assert cases == tuple(map(astuple, CASES))


def test_the_floor_reads_weights_once_and_what_each_layer_sees() -> None:
    config = ModelConfig(
        vocab_size=100, d_model=16, n_layers=4, n_heads=2, d_head=8, d_ff=32, layers="SG", window=10,
        kv_sharing=TailSharing(kind="tail", n_layers=2), max_length=64,
    )  # fmt: skip
    # halfway through 20 new tokens two layers see 10 keys, two see 40; a key and a value of 8 numbers of 2 bytes each
    n_bytes = 2 * config.n_parameters + 3 * (2 * 10 + 2 * 40) * 2 * 8 * 2
    assert decode_floor(config, Case(3, 30, 20)) == pytest.approx(3 * 3020e9 / n_bytes)


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    figure = {"median": 1000.0, "least": 900.0, "most": 1100.0}
    row: dict[str, object] = {"batch": 1, "prompt": 512, "new": 256, "floor": 1353.2, "first_token_s": figure}
    row |= dict.fromkeys(("prefill_tokens_a_second", "decode_tokens_a_second"), figure)
    print_table("m", [row], [{"batch": 1, "prompt": 512, "decode_tokens_a_second": 500.0}])
    shown = capsys.readouterr().out
    assert "1,000 (900 to 1,100)" in shown and "1,353" in shown and "2.00" in shown
    print_gaps("m", [{"budget": 256, "alone_median_ms": 2.0, "beside_median_ms": 3.0, "beside_p99_ms": 5.0}])
    assert "2.50" in capsys.readouterr().out


def test_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["recipes/bench/mqa_1b_global.yaml"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert main(["recipes/bench/mqa_1b_global.yaml", "--dry-run"]) == 0
    assert "1,353" in capsys.readouterr().out
