"""Tests of eval/parts/dialogue_quality.py."""

import numpy as np
import pytest

from data.format.dialogue import Message
from eval.context import Reply, ReplyContext
from eval.parts.dialogue_quality import copied_share, diversity, repeated_share, summarize_quality, words
from eval.statistics import Bootstrap


def test_words_of_any_script() -> None:
    assert words("Don't STOP, Zoë!") == ["don't", "stop", ",", "zoë", "!"]
    assert words("") == [] and words("你好 мир") == ["你好", "мир"]


def test_repetition_within_a_reply() -> None:
    assert repeated_share(words("ha ha ha ha")) == pytest.approx(2 / 3)
    assert repeated_share(words("one two three")) == 0 and repeated_share(words("one")) == 0


def test_copying_from_the_context() -> None:
    context = words("i like long walks in the rain")
    assert copied_share(words("i like long walks"), context) == 1
    assert copied_share(words("you like long walks"), context) == 0.5
    assert copied_share(words("ok"), context) is None


def test_distinct_does_not_depend_on_how_many_replies_there_are() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(200)]
    many = [list(rng.choice(vocabulary, 8)) for _ in range(400)]
    figures = diversity({"few": many[:100], "many": many}, 0.95, seed=0)
    assert figures["few"]["distinct_1"].value == pytest.approx(figures["many"]["distinct_1"].value, abs=0.03)
    assert figures["few"]["distinct_2"].low <= figures["few"]["distinct_2"].value <= figures["few"]["distinct_2"].high


def test_a_dull_system_is_less_diverse() -> None:
    rng = np.random.default_rng(1)
    rich = [list(rng.choice([f"w{i}" for i in range(99)], 6)) for _ in range(50)]
    dull = [["i", "do", "not", "know", "what", "to"] for _ in range(50)]
    figures = diversity({"rich": rich, "dull": dull}, 0.95, seed=0)
    for key in ("distinct_1", "distinct_2", "distinct_3", "word_entropy_bits"):
        assert figures["dull"][key].value < 0.5 * figures["rich"][key].value
    assert figures["dull"]["word_entropy_bits"].value == pytest.approx(np.log2(6), abs=0.01)


def test_a_silent_system_leaves_diversity_undefined() -> None:
    figures = diversity({"silent": [[]], "other": [["hi"]]}, 0.95, seed=0)
    assert figures["other"]["distinct_1"].value is None


def test_summary_of_known_replies() -> None:
    context = ReplyContext("d", (Message("Sam", "Hello there!"),), "Alex", "hi", 2, (1,), (1,), 0)
    texts = ["hello there!", "i do not know", "i do not know", ""]
    replies = [Reply(text, (9,) * (i + 1), i != 1) for i, text in enumerate(texts)]
    figures = summarize_quality([context] * 4, {"model": replies, "human": replies}, Bootstrap(n_resamples=50))["model"]
    assert figures["length_words"].value == pytest.approx((3 + 4 + 4 + 0) / 4)
    assert figures["length_tokens"].value == 2.5
    assert figures["stop_rate"].value == 0.75 and figures["empty_rate"].value == 0.25
    assert figures["echo_rate"].value == 0.25 and figures["same_as_another_reply"].value == 0.5
    assert figures["commonest"] == [["i do not know", 2]]
