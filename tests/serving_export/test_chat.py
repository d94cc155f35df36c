"""The terminal chat: what it prints, and the values it refuses."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from data.format.tokenizer import DialogueTokenizer
from model.inference.sampling import SamplingError
from model.transformer import Transformer
from serving_export.bundle import Bundle, SamplingDefaults
from serving_export.chat import Chat
from serving_export.export.manifest import Defaults
from serving_export.server.engine import Engine
from serving_export.server.reply import Replier

OPTIONS: dict[str, Any] = {
    "character": None, "user": None, "scene": "A pond.", "temperature": None, "top_p": None, "max_tokens": 5, "seed": 1,
}  # fmt: skip


@pytest.fixture
def replier(model: Transformer, tokenizer: DialogueTokenizer) -> Iterator[Replier]:
    engine = Engine(model, n_pages=64, page_size=4)
    engine.start()
    yield Replier(engine, tokenizer)
    engine.stop()


def chat(replier: Replier, printed: io.StringIO, **options: Any) -> Chat:
    bundle = Bundle("m", replier.engine.model, replier.tokenizer, Defaults("Bob", "Ada", 256),
                    SamplingDefaults(1.0, 0, 1.0))  # fmt: skip
    return Chat(bundle, replier, Console(file=printed, width=200), argparse.Namespace(**{**OPTIONS, **options}))


def test_long_conversation_goes_on_and_says_what_it_leaves_out(replier: Replier) -> None:
    printed = io.StringIO()
    talk = chat(replier, printed)
    for number in range(9):
        talk.say(f"It rains a lot in November, said the duck number {number} on the pond!")
    assert len(talk.messages) == 1 + 18
    assert "oldest messages do not fit the model's context and were left out" in printed.getvalue()
    assert "too long" not in printed.getvalue()
    talk.say("ducks " * 300)
    assert "the newest message is too long" in printed.getvalue()
    assert len(talk.messages) == 1 + 18


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", float("nan")), ("temperature", -1.0), ("top_p", 0.0), ("max_tokens", 0)]
)
def test_values_without_meaning_are_refused_at_the_start(replier: Replier, option: str, value: float) -> None:
    with pytest.raises(SamplingError, match=option.replace("_", ".")):
        chat(replier, io.StringIO(), **{option: value})
