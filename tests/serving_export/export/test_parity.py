"""The parity checks see a difference when there is one, and what they choose to compare is spread and fits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from data.format.dialogue import Dialogue, Message
from data.format.encode import CONTROL_SURFACES, encode_dialogue, encode_prompt
from data.format.tokenizer import DialogueTokenizer
from model.attention_ops import Documents
from model.transformer import Transformer
from serving_export.export.parity import (
    HOSTILE_TEXTS,
    ParityError,
    check_logits,
    choose_conversations,
    longer_than,
    reply_place,
    top_two_gap,
)


def talk(n: int) -> Dialogue:
    return Dialogue(str(n), tuple(Message(("Bob", "Ada")[i % 2], f"Hello there {i}") for i in range(n)), "Ada")


class Peer:
    """Stands for transformers' model: another copy of ours, greedy by full forwards."""

    def __init__(self, model: Transformer):
        self.model = model

    def __call__(self, tokens_BT: torch.Tensor, **_: Any) -> Any:
        hidden_TD = self.model(tokens_BT[0], Documents.from_lengths([tokens_BT.shape[1]]))
        return type("Output", (), {"logits": self.model.logits(hidden_TD)[None]})

    @torch.no_grad()
    def generate(self, tokens_BT: torch.Tensor, max_new_tokens: int, eos_token_id: int, **_: Any) -> torch.Tensor:
        for _ in range(max_new_tokens):
            logits_V = self(tokens_BT).logits[0, -1]
            logits_V[list(DialogueTokenizer.forbidden_in_reply)] = -torch.inf
            token = logits_V.argmax()
            tokens_BT = torch.cat([tokens_BT, token[None, None]], dim=1)
            if token == eos_token_id:
                break
        return tokens_BT


def test_equal_models_agree(tokenizer: DialogueTokenizer, model: Transformer) -> None:
    parity = check_logits(model, Peer(model), tokenizer, [talk(2), talk(6)], limit=1e-4)
    assert parity.n_conversations == 2
    assert parity.n_longer_than_window >= 1
    assert parity.n_greedy_tokens > 0
    assert parity.max_logit_difference <= 1e-4


@pytest.mark.parametrize("damage", [1e-2, float("nan")])
def test_a_changed_weight_is_seen(tokenizer: DialogueTokenizer, model: Transformer, damage: float) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.final_norm.weight[3] += damage
    with pytest.raises(ParityError, match="logits differ"):
        check_logits(model, Peer(other), tokenizer, [talk(6)], limit=1e-4)


def test_other_greedy_tokens_are_seen(tokenizer: DialogueTokenizer, model: Transformer) -> None:
    class Liar(Peer):
        def generate(self, tokens_BT: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.cat([tokens_BT, torch.full((1, 24), 7)], dim=1)

    with pytest.raises(ParityError, match="greedy tokens differ at"):
        check_logits(model, Liar(model), tokenizer, [talk(6)], limit=1e-4)


def test_short_conversations_alone_are_refused(tokenizer: DialogueTokenizer, model: Transformer) -> None:
    short = Dialogue("short", (Message("Ada", ""),), "Ada")
    with pytest.raises(ParityError, match="window of 12"):
        check_logits(model, Peer(model), tokenizer, [short], limit=1e-4)


def test_the_gap_is_between_the_two_best(model: Transformer) -> None:
    hidden_TD = model(torch.tensor([2, 3, 9]), Documents.from_lengths([3]))
    best = sorted(model.logits(hidden_TD[-1:])[0].tolist())
    assert top_two_gap(model, [2, 3, 9]) == pytest.approx(best[-1] - best[-2], abs=1e-6)


def test_chosen_from_shortest_to_longest(tokenizer: DialogueTokenizer) -> None:
    dialogues = [talk(n) for n in (5, 2, 9, 7, 3)]
    assert [d.id for d in choose_conversations(tokenizer, dialogues, 3)] == ["2", "5", "9"]
    assert len(choose_conversations(tokenizer, dialogues, 6)) == 5, "all, where there are fewer"
    with pytest.raises(ParityError, match="no held-out dialogue"):
        choose_conversations(tokenizer, [], 6)


def test_a_short_dialogue_is_said_over_until_it_passes_the_window(tokenizer: DialogueTokenizer) -> None:
    n_tokens = [len(encode_dialogue(tokenizer, longer_than(tokenizer, talk(3), limit)).tokens) for limit in (1, 400)]
    assert n_tokens[0] == len(encode_dialogue(tokenizer, talk(3)).tokens)
    assert 400 < n_tokens[1] < 400 + n_tokens[0]


def test_reply_place_is_the_last_that_fits(tokenizer: DialogueTokenizer) -> None:
    dialogue = talk(8)
    lengths = {i: len(encode_prompt(tokenizer, dialogue.messages[:i], "Ada")) for i in (1, 3, 5, 7)}
    for limit in (*lengths.values(), *(length + 1 for length in lengths.values()), 10_000):
        fitting = [i for i, length in lengths.items() if length <= limit]
        assert reply_place(tokenizer, dialogue, limit) == max(fitting, default=None)
    assert reply_place(tokenizer, dialogue, lengths[1] - 1) is None
    assert reply_place(tokenizer, Dialogue("x", (Message("Ada", "Hello"),), "Ada"), 10_000) is None


def test_hostile_texts_hold_what_they_promise() -> None:
    joined = "\0".join(HOSTILE_TEXTS)
    assert all(surface in HOSTILE_TEXTS for surface in CONTROL_SURFACES)
    for needle in ("{{", "\u2581", "\u2060", "\n", "\U0001f926", "- name:"):
        assert needle in joined
    assert max(len(text) for text in HOSTILE_TEXTS) >= 10_000
