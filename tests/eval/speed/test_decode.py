"""Tests of eval/speed/decode.py: what is timed, and how often, in which order."""

import pytest

from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import PackedDataset
from eval.speed import decode as decode_speed
from eval.speed.decode import SpeedSection, measure_speed, speed_prompts, time_generation
from model.transformer import Transformer

SECTION = SpeedSection(prompt_tokens=20, new_tokens=5, batches=(1, 3), repeats=3, precision="float32")


def test_time_of_a_step_leaves_out_the_prompt(
    models: dict[str, Transformer], tokenizer: DialogueTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # seven seconds for the prompts, one for each step of two replies
    clock = iter([100.0, 106.0, 107.0, *(107.0 + step + reply / 8 for step in range(1, 5) for reply in (-1, 0))])
    monkeypatch.setattr(decode_speed.time, "perf_counter", lambda: next(clock))
    prompts = [[tokenizer.bos_id, 5, 6], [tokenizer.bos_id, 7]]
    assert time_generation(models["sft"], prompts, SECTION.new_tokens) == (7.0, 1.0)


def test_figures_are_of_the_batch_and_without_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def timed(model: str, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        calls.append((model, len(prompts)))
        number = sum(call == calls[-1] for call in calls)
        return 0.010, {1: 9.0, 2: 0.5, 3: 0.25, 4: 0.125}[number]

    monkeypatch.setattr(decode_speed, "time_generation", timed)
    seen: list[tuple[int, int]] = []
    figures = measure_speed({"a": "a", "b": "b"}, [[1]] * 3, SECTION, lambda *at: seen.append(at))  # type: ignore[dict-item]
    assert calls[:4] == [("a", 1), ("b", 1), ("a", 1), ("b", 1)] and calls[-1] == ("b", 3)
    assert figures["a"] == figures["b"]
    assert figures["a"][1] == {
        "batch": 3, "tokens_per_second": 12.0, "slowest": 6.0, "fastest": 24.0, "first_token_ms": 10.0
    }  # fmt: skip
    assert seen[-1] == (16, 16)


def test_prompts_are_beginnings_of_rows(dataset_of, dialogues) -> None:  # type: ignore[no-untyped-def]
    dataset = PackedDataset(dataset_of(dialogues[:4]))
    prompts = speed_prompts(dataset, SECTION)
    assert [len(prompt) for prompt in prompts] == [20, 20, 20]
    assert prompts[0] == dataset.row(0).tokens_L[:20].tolist()
