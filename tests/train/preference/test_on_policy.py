"""Which sampled replies make a pair, and why a context gives none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.format.dialogue import Message
from data.format.encode import encode_reply
from data.format.tokenizer import DialogueTokenizer
from data.sources.preferences import PreferencePair
from data.sources.record import LeftOut
from eval.context import ReplyContext
from model.inference.generate import Completion, FinishReason
from train.preference.on_policy import (
    EQUAL_SCORES,
    TOO_CLOSE,
    TOO_UNEVEN,
    UNFINISHED,
    OnPolicyPairs,
    _advice,
    distinct_replies,
    extremes,
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


def test_the_advice_names_the_keys_of_the_commonest_reasons_first() -> None:
    told = _advice(Counter({TOO_CLOSE: 1, UNFINISHED: 9}))
    assert told.index("max_new_tokens") < told.index("min_score_difference")
    assert "data.inspect" in _advice(Counter({"the character answers nobody after 2 messages": 4}))
