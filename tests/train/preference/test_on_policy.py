"""Which sampled replies make a pair, and why a context gives none."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data.format.dialogue import Message
from data.format.encode import encode_reply
from data.format.tokenizer import DialogueTokenizer
from data.sources.preferences import PreferencePair
from data.sources.record import LeftOut
from eval.context import ReplyContext
from model.config import ModelConfig
from model.inference.generate import Completion
from model.inference.scheduler import FinishReason
from model.transformer import Transformer
from train.deepspeed.world import World
from train.preference import on_policy
from train.preference.on_policy import (
    EQUAL_SCORES,
    TOO_CLOSE,
    TOO_UNEVEN,
    UNFINISHED,
    NoPairsError,
    OnPolicyPairs,
    _advice,
    distinct_replies,
    extremes,
    sample_pairs,
)

CONTEXT = ReplyContext("d", (Message("Ann", "hi"),), "Ben", "yes", 2, (), (), 0)


def completion(tokenizer: DialogueTokenizer, text: str, finish_reason: FinishReason = "stop") -> Completion:
    tokens = encode_reply(tokenizer, text)
    return Completion(tokens, [0.0] * len(tokens), finish_reason)


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> DialogueTokenizer:
    return DialogueTokenizer.load(data_dir)


def test_replies_that_say_nothing_or_the_same_are_no_candidates(tokenizer: DialogueTokenizer) -> None:
    texts = ["tea", "", " ", "\u200b", "tea ", "t ea", "no", "no\u3164"]
    found = distinct_replies([completion(tokenizer, text) for text in texts], tokenizer)
    assert [reply.tokens for reply in found] == [encode_reply(tokenizer, text) for text in ("tea", "no")]
    assert distinct_replies([completion(tokenizer, "tea", "length")], tokenizer) == []


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        ([0.1, 0.3, 0.2], {}, ("no", "tea")),
        ([0.2, 0.2, 0.2], {}, EQUAL_SCORES),
        ([float("nan")] * 3, {}, EQUAL_SCORES),
        ([0.1, 0.3, 0.2], {"min_score_difference": 0.25}, TOO_CLOSE),
        ([0.1, 0.2, 0.3], {"max_length_ratio": 1.5}, TOO_UNEVEN),
    ],
)
def test_the_extremes_or_the_reason(
    tokenizer: DialogueTokenizer, scores: list[float], settings: dict[str, float], expected: Any
) -> None:
    replies = [completion(tokenizer, text) for text in ("tea", "no", "why do you want so much of it, my friend")]
    asked = OnPolicyPairs(
        kind="on_policy", scorer="s", n_contexts=1, max_context_tokens=9, max_new_tokens=9, **settings  # type: ignore[arg-type]
    )  # fmt: skip
    found = extremes(CONTEXT, replies, scores, asked, tokenizer)
    if isinstance(expected, str):
        assert found == LeftOut(expected)
    else:
        assert isinstance(found, PreferencePair) and (found.chosen, found.rejected) == expected


def test_lengths_at_the_largest_ratio_make_a_pair(tokenizer: DialogueTokenizer) -> None:
    replies = [Completion(encode_reply(tokenizer, "tea")[:1] * n, [0.0] * n, "stop") for n in (2, 3)]
    for ratio, expected in ((1.5, PreferencePair), (1.49, LeftOut)):
        asked = OnPolicyPairs(
            kind="on_policy", scorer="s", n_contexts=1, max_context_tokens=9, max_new_tokens=9, max_length_ratio=ratio
        )
        assert isinstance(extremes(CONTEXT, replies, [0.1, 0.2], asked, tokenizer), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_each_file_of_contexts_is_sampled_with_its_own_seed_whatever_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    seeds: dict[str, int] = {}

    def made(part: Any, settings: Any, policy: Any, trunk: Any, head: Any, tokenizer: Any, seed: int) -> Any:
        seeds[part[0]] = seed
        assert not policy_module.training
        return [PreferencePair(one, (Message("Ann", one),), "Ben", "yes", "no", "test") for one in part]

    contexts = [f"c{number}" for number in range(5)]
    monkeypatch.setattr(on_policy, "CONTEXTS_A_FILE", 2)
    monkeypatch.setattr(on_policy, "read_dialogues", lambda path: [])
    monkeypatch.setattr(on_policy, "select_contexts", lambda *given, **left_out: contexts)
    monkeypatch.setattr(on_policy, "load_scorer", lambda *given: (None, None))
    monkeypatch.setattr(on_policy, "_pairs_of", made)
    monkeypatch.setattr(World, "barrier", lambda self: None)
    policy_module: Any = Transformer(
        ModelConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, layers="G", max_length=16)
    )
    asked = OnPolicyPairs(kind="on_policy", scorer="s", n_contexts=5, max_context_tokens=9, max_new_tokens=9)
    for rank in reversed(range(size)):  # the last one to end reads all files
        world, unused = World(rank, size, torch.device("cpu")), Console(quiet=True)
        if rank:
            monkeypatch.setattr(on_policy, "read_pairs", lambda path: [])
            monkeypatch.setattr(Path, "read_text", lambda self, encoding: "{}")
        with suppress(NoPairsError):
            sample_pairs(asked, policy_module, tmp_path, None, 7, tmp_path / "pairs", world, unused)  # type: ignore[arg-type]
        assert policy_module.training, "it is trained next"
    assert seeds == {"c0": 7, "c2": 9, "c4": 11}


def test_replies_are_sampled_with_the_recipes_settings(tokenizer: DialogueTokenizer) -> None:
    given: list[Any] = []

    class Recorder:
        def generate(self, prompts: Any, sampling: Any, n_samples: int) -> list[list[Completion]]:
            given.append((prompts, sampling, n_samples))
            return [[] for _ in prompts]

    asked = OnPolicyPairs(
        kind="on_policy", scorer="s", n_contexts=1, n_candidates=5, max_context_tokens=9, max_new_tokens=7,
        temperature=0.7, top_p=0.8,
    )  # fmt: skip
    none: Any = None
    made = on_policy._pairs_of([CONTEXT], asked, Recorder(), none, none, tokenizer, seed=11)  # type: ignore[arg-type]
    assert made == [LeftOut(UNFINISHED)]
    ((prompts, sampling, n_samples),) = given
    assert (prompts, n_samples) == ([CONTEXT.prompt], 5)
    assert (sampling.seed, sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (11, 7, 0.7, 0.8)
    assert sampling.stop_ids == (tokenizer.end_id,) and sampling.forbidden_ids == tokenizer.forbidden_in_reply


def test_the_advice_names_the_keys_of_the_commonest_reasons_first() -> None:
    told = _advice(Counter({TOO_CLOSE: 1, UNFINISHED: 9}))
    assert told.index("max_new_tokens") < told.index("min_score_difference")
    assert "data.inspect" in _advice(Counter({"the character answers nobody after 2 messages": 4}))
