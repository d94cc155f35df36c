"""Tests of eval/parts/user_sensitivity.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.format.dialogue import Dialogue
from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from eval.context import select_contexts
from eval.parts.user_sensitivity import evaluate_user_sensitivity, kl_divergence, replaced_prompts
from eval.statistics import Bootstrap
from model.attention_ops import Documents
from model.transformer import Transformer

BOOTSTRAP = Bootstrap(n_resamples=50)


def test_each_change_replaces_one_message(dialogues: list[Dialogue], tokenizer: DialogueTokenizer) -> None:
    contexts = select_contexts(dialogues, tokenizer, 10, seed=0, max_prompt_tokens=80)
    changes = replaced_prompts(contexts, tokenizer, seed=1)
    assert {side for _, _, side, _ in changes} == {"user", "character"}
    for number, distance, side, prompt in changes:
        context = contexts[number]
        message = context.messages[-distance]
        assert side == ("character" if message.speaker == context.character else "user")
        texts = {
            other.text
            for n, elsewhere in enumerate(contexts)
            for other in elsewhere.messages
            if n != number and (other.speaker == elsewhere.character) == (side == "character")
        }
        place = len(context.messages) - distance
        possible = {
            tuple(encode_prompt(tokenizer, (*context.messages[:place], replace(message, text=text),
                                            *context.messages[place + 1 :]), context.character))
            for text in texts
        }  # fmt: skip
        assert prompt != context.prompt and prompt in possible
    assert changes == replaced_prompts(contexts, tokenizer, seed=1)


def test_kl_divergence() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert kl_divergence(p, p)[0] == 0


class Deaf(Transformer):
    """A model that sees the last token only, as one whose cache lost the user's messages would."""

    def forward(self, tokens_T: torch.Tensor, documents: Documents) -> torch.Tensor:
        return super().forward(tokens_T, Documents.from_lengths([1] * len(tokens_T)))


def test_a_deaf_model_is_found_out(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, models: dict[str, Transformer]
) -> None:
    contexts = select_contexts(dialogues, tokenizer, 8, seed=0, max_prompt_tokens=80)
    deaf = Deaf(models["sft"].config, seed=1).eval()
    both = {"hears": models["sft"], "deaf": deaf}
    figures = evaluate_user_sensitivity(both, tokenizer, contexts, 0, 500, BOOTSTRAP)
    assert figures["deaf"]["ignored_last_user_messages"] == figures["deaf"]["n_last_user_messages"] == 8
    assert figures["deaf"]["user"]["kl"].value == pytest.approx(0, abs=1e-9)
    assert figures["hears"]["ignored_last_user_messages"] == 0
    assert figures["hears"]["user"]["kl"].value > 1e-4
    assert len(figures["hears"]["character"]["by_distance"]) == 4
