"""Tests of eval/parts/recall.py: distances are what they say, and a model whose memory is known scores what it must."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.format.dialogue import Dialogue, Message
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from eval.parts.recall import (
    RecallProbe,
    RecallSection,
    build_probes,
    candidate_logprobs,
    first_ranks,
    gains,
    summarize_recall,
    usable_values,
)
from eval.parts.recall_fact import FACT_KINDS
from eval.scoring import reply_logprobs
from eval.statistics import Bootstrap
from model.attention_ops import Documents

SECTION = RecallSection(n_items=6, n_candidates=4, distances=(32, 64, 96))
STRENGTH = 5.0


@pytest.fixture(scope="module")
def fact_tokenizer(dialogues: list[Dialogue]) -> DialogueTokenizer:
    """A tokenizer that knows the facts' words as whole tokens."""
    texts = [m.text for d in dialogues for m in d.messages]
    for kind in FACT_KINDS:
        for wording in kind.wordings:
            for value in kind.values:
                texts += [wording.statement.format(value=value), f"{wording.question} {wording.answer} {value}"]
    return train_tokenizer(texts, None, vocab_size=900)


@pytest.fixture(scope="module")
def probes(dialogues: list[Dialogue], fact_tokenizer: DialogueTokenizer) -> list[RecallProbe]:
    return build_probes(dialogues, fact_tokenizer, SECTION, seed=3)


class Copying(nn.Module):
    """A model whose logit is raised by STRENGTH for every token among the last `window` of its document.

    `prior`: how much more it likes some tokens than others, whatever was said.
    """

    def __init__(self, vocab_size: int, window: int, prior: float = 0.0):
        super().__init__()
        self.prior_V = prior * (torch.arange(vocab_size) % 7)
        self.embed_tokens = nn.Embedding(1, 1)
        self.window = window
        self.config = type("Config", (), {"vocab_size": vocab_size})

    def forward(self, tokens_T: Tensor, documents: Documents) -> Tensor:
        hidden_TV = torch.zeros(len(tokens_T), self.config.vocab_size)
        start = 0
        for length in documents.lengths.tolist():
            for t in range(start, start + length):
                hidden_TV[t, tokens_T[max(start, t + 1 - self.window) : t + 1]] = STRENGTH
            start += length
        return hidden_TV

    def logits(self, hidden_TV: Tensor) -> Tensor:
        return hidden_TV + self.prior_V


def test_distances_are_what_they_say(probes: list[RecallProbe], fact_tokenizer: DialogueTokenizer) -> None:
    assert len(probes) == SECTION.n_items * len(SECTION.distances)
    for probe in probes:
        assert abs(probe.distance - probe.wanted_distance) <= max(8, probe.wanted_distance // 8)
        n = len(probe.candidates[0])
        stated = len(probe.prompts[0]) - probe.distance
        for prompt, candidate in zip(probe.prompts, probe.candidates, strict=False):
            assert prompt[stated : stated + n] == candidate
            assert candidate[0] not in prompt[stated + n :]
        first, second = (np.array(prompt) for prompt in probe.prompts)
        assert np.flatnonzero(first != second).tolist() == list(range(stated, stated + n))


def test_a_fact_is_stated_asked_and_answered(probes: list[RecallProbe], fact_tokenizer: DialogueTokenizer) -> None:
    kind = next(kind for kind in FACT_KINDS if kind.name == probes[0].kind)
    text = fact_tokenizer.decode(list(probes[0].prompts[1]))
    value = probes[0].values[1]
    wording = next(w for w in kind.wordings if w.statement.format(value=value) in text)
    speaker, other = text.split(":")[0], "Sam" if text.startswith("Alex") else "Alex"
    assert text.startswith(f"{speaker}: {wording.statement.format(value=value)}{speaker}")
    assert text.endswith(f"{speaker}: {wording.question}{other}: {wording.answer}")


def test_every_fact_is_asked_at_every_distance_in_its_own_dialogue(probes: list[RecallProbe]) -> None:
    facts = [probes[i : i + 3] for i in range(0, len(probes), 3)]
    assert len({fact[0].dialogue_id for fact in facts}) == len(facts)
    for fact in facts:
        assert len({(probe.dialogue_id, probe.kind, probe.values) for probe in fact}) == 1
        assert [probe.wanted_distance for probe in fact] == [32, 64, 96]
    assert len({fact[0].kind for fact in facts}) > 1


def test_a_model_that_copies_gains_what_it_copies(probes: list[RecallProbe], fact_tokenizer: DialogueTokenizer) -> None:
    assert all(len(candidate) == 1 for probe in probes for candidate in probe.candidates)
    everywhere = candidate_logprobs(Copying(fact_tokenizer.vocab_size, 10**6), probes, 4096)
    assert gains(everywhere) == pytest.approx(STRENGTH, abs=1e-4)
    assert first_ranks(everywhere) == pytest.approx(1.0)
    # a window that has exactly the stated value in it, and one that has just lost it
    probe = probes[4]
    sees, blind = (
        candidate_logprobs(Copying(fact_tokenizer.vocab_size, window), [probe], 4096)
        for window in (probe.distance, probe.distance - 1)
    )
    assert gains(sees)[0] == pytest.approx(STRENGTH, abs=1e-4)
    assert gains(blind)[0] == pytest.approx(0.0, abs=1e-6)
    assert first_ranks(blind)[0] == pytest.approx(1 / SECTION.n_candidates)


def test_what_a_model_likes_anyway_is_no_gain(probes: list[RecallProbe], fact_tokenizer: DialogueTokenizer) -> None:
    """The normaliser's change cancels between the two values, so the gain is the same with any prior."""
    biased = candidate_logprobs(Copying(fact_tokenizer.vocab_size, 10**6, prior=1.0), probes, 4096)
    assert gains(biased) == pytest.approx(STRENGTH, abs=1e-4)
    assert first_ranks(biased).mean() < 1  # while the rank shows it


def test_a_window_shows_in_the_summary(probes: list[RecallProbe], fact_tokenizer: DialogueTokenizer) -> None:
    models = {"all": Copying(fact_tokenizer.vocab_size, 10**6), "window": Copying(fact_tokenizer.vocab_size, 48)}
    logprobs = {name: candidate_logprobs(model, probes, 4096) for name, model in models.items()}
    figures = summarize_recall(probes, logprobs, "all", Bootstrap(n_resamples=50))
    assert figures["chance"] == 1 / 4 and sum(figures["kinds"].values()) == SECTION.n_items
    near, _, far = figures["distances"]
    assert near["models"]["window"]["gain"].value == pytest.approx(STRENGTH, abs=1e-4)
    assert far["models"]["window"]["gain"].value == pytest.approx(0, abs=1e-6)
    assert far["models"]["window"]["difference"].value == pytest.approx(-STRENGTH, abs=1e-4)
    assert far["models"]["all"]["difference"] is None and far["models"]["all"]["accuracy"].value == 1
    assert far["n"] == SECTION.n_items and far["distance"]["least"] <= 96 <= far["distance"]["most"] + 12


def test_values_of_several_tokens_are_summed(probes: list[RecallProbe], fact_tokenizer: DialogueTokenizer) -> None:
    model = Copying(fact_tokenizer.vocab_size, 10**6)
    longer = [replace(p, candidates=tuple((*c, fact_tokenizer.end_id) for c in p.candidates)) for p in probes[:2]]
    found = candidate_logprobs(model, longer, 4096)
    prompt, candidate = longer[1].prompts[1], longer[1].candidates[3]
    assert found[1, 1, 3] == pytest.approx(reply_logprobs(model, [(prompt, candidate)], 4096)[0].sum())
    single = candidate_logprobs(model, probes[:2], 4096)
    alone = reply_logprobs(model, [(probes[1].prompts[1], probes[1].candidates[3])], 4096)
    assert single[1, 1, 3] == pytest.approx(float(alone[0][0]), abs=1e-5)


def test_the_seed_decides(dialogues: list[Dialogue], fact_tokenizer: DialogueTokenizer) -> None:
    again, other = (build_probes(dialogues, fact_tokenizer, SECTION, seed) for seed in (3, 4))
    assert again == build_probes(dialogues, fact_tokenizer, SECTION, 3) != other


def test_candidates_have_one_length_and_are_not_said(fact_tokenizer: DialogueTokenizer) -> None:
    for kind in FACT_KINDS:
        values = usable_values(fact_tokenizer, kind, 4)
        assert len({len(tokens) for tokens in values.values()}) <= 1
    colors = next(kind for kind in FACT_KINDS if kind.name == "color").values
    text = " ".join(colors[1:])  # every color but one is mentioned: too few are left
    talk = [Dialogue(f"d{i}", (Message("A", text), Message("B", "yes"), Message("A", "no")), "A") for i in range(60)]
    found = build_probes(talk, fact_tokenizer, RecallSection(n_items=5, n_candidates=2, distances=(60,)), 0)
    assert "color" not in {probe.kind for probe in found}


def test_what_cannot_be_built_is_told(dialogues: list[Dialogue], fact_tokenizer: DialogueTokenizer) -> None:
    with pytest.raises(ValueError, match=r"recall.n_items: 500 facts asked for, the 40 held-out dialogues"):
        build_probes(dialogues, fact_tokenizer, SECTION.model_copy(update={"n_items": 500}), 0)
    with pytest.raises(ValueError, match=r"recall.n_candidates: 99 values asked for"):
        build_probes(dialogues, fact_tokenizer, SECTION.model_copy(update={"n_candidates": 99}), 0)
