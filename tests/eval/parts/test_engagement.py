"""Tests of eval/parts/engagement.py."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.format.dialogue import Dialogue, continuation_labels
from data.format.encode import encode_message
from data.format.tokenizer import DialogueTokenizer
from data.packed.batch import collate
from data.packed.shards import PackedDataset
from eval.parts.engagement import (
    LabeledTurns,
    binned_rate,
    calibration,
    labeled_turns,
    roc_points,
    score_turns,
    summarize_scorer,
)
from eval.scoring import score_conversations
from eval.statistics import Bootstrap
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from tests.eval.estimates import excludes

BOOTSTRAP = Bootstrap(n_resamples=100)
Pack = Callable[[list[Dialogue]], Path]


def test_turns_have_the_features_of_their_messages(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, dataset_of: Pack
) -> None:
    dataset = PackedDataset(dataset_of(dialogues[:5]))
    turns = labeled_turns(collate(dataset, np.arange(dataset.n_rows)), tokenizer.message_id)
    found = sorted(zip(turns.label_N.tolist(), turns.turn_N.tolist(), turns.length_N.tolist(), strict=True))
    expected = sorted(
        (label, i + 1, len(encode_message(tokenizer, d.messages[i])) - 1)
        for d in dialogues[:5]
        for i, label in enumerate(continuation_labels(d))
        if label >= 0
    )
    assert found == expected
    assert np.unique(turns.dialogue_N).size == 5


def test_scores_are_those_of_each_conversation_alone(
    dialogues: list[Dialogue],
    tokenizer: DialogueTokenizer,
    dataset_of: Pack,
    scorer: tuple[Transformer, ScalarHead],
) -> None:
    dataset = PackedDataset(dataset_of(dialogues[:5]))
    rows = np.arange(dataset.n_rows)
    turns, logit_N = score_turns(scorer, dataset, tokenizer.message_id, rows, batch_tokens=dataset.row_length)
    batch = collate(dataset, rows)
    together = labeled_turns(batch, tokenizer.message_id)
    assert turns.label_N.tolist() == together.label_N.tolist()
    assert np.unique(turns.dialogue_N).size == np.unique(together.dialogue_N).size
    starts = np.cumsum(batch.document_lengths.numpy()) - batch.document_lengths.numpy()
    tokens = batch.tokens_T.tolist()
    places = together.position_N.tolist()
    alone = [tokens[int(starts[np.searchsorted(starts, p, "right") - 1]) : p + 1] for p in places]
    np.testing.assert_allclose(logit_N, score_conversations(scorer, alone, 1000), atol=1e-5)


def turns_of(label_N: np.ndarray, length_N: np.ndarray, turn_N: np.ndarray) -> LabeledTurns:
    n = label_N.size
    return LabeledTurns(label_N, length_N, turn_N, np.arange(n) // 4, np.arange(n))


def test_baseline_finds_a_dependence_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    length_N, turn_N = rng.integers(1, 40, 2000), rng.integers(1, 20, 2000)
    label_N = (np.abs(length_N - 20) < 8).astype(np.int64)  # neither short nor long: no straight line finds it
    rate = binned_rate([length_N[:1000]], label_N[:1000], [length_N[1000:]])
    assert BOOTSTRAP.auc(rate, label_N[1000:], np.arange(1000)).value > 0.9  # type: ignore[operator]
    useless = binned_rate([turn_N[:1000]], label_N[:1000], [turn_N[1000:]])
    assert abs(BOOTSTRAP.auc(useless, label_N[1000:], np.arange(1000)).value - 0.5) < 0.1  # type: ignore[operator]


def test_scorer_that_only_knows_length_gains_nothing_over_length() -> None:
    rng = np.random.default_rng(1)
    length_N, turn_N = rng.integers(1, 30, 800), rng.integers(1, 9, 800)
    probability = 1 / (1 + np.exp(-(length_N - 15) / 6))
    label_N = (rng.random(800) < probability).astype(np.int64)
    turns = turns_of(label_N, length_N, turn_N)
    figures = summarize_scorer(turns, np.log(probability / (1 - probability)), turns, BOOTSTRAP)
    assert excludes(figures["auc"], 0.5)
    assert not excludes(figures["baselines"]["length"]["scorer_minus_baseline"], 0.0)
    assert excludes(figures["baselines"]["turn_number"]["scorer_minus_baseline"], 0.0)
    assert figures["calibration"]["brier_skill"] > 0.1
    assert figures["calibration"]["expected_calibration_error"] < 0.1
    assert figures["base_rate"].value == pytest.approx(label_N.mean())


def test_one_class_and_no_turns_are_said_not_hidden() -> None:
    ones = turns_of(np.ones(8, np.int64), np.arange(8), np.arange(8))
    figures = summarize_scorer(ones, np.arange(8.0), ones, BOOTSTRAP)
    assert figures["auc"].value is None and "one class" in figures["auc"].note and figures["roc"] is None
    none = turns_of(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    assert summarize_scorer(none, np.empty(0), none, BOOTSTRAP)["calibration"] is None


def test_calibration_of_an_overconfident_scorer() -> None:
    rng = np.random.default_rng(2)
    label_N = (rng.random(1000) < 0.7).astype(np.int64)
    certain = calibration(np.full(1000, 0.99), label_N, BOOTSTRAP, np.arange(1000))
    honest = calibration(np.full(1000, 0.7), label_N, BOOTSTRAP, np.arange(1000))
    assert certain["expected_calibration_error"] > 0.2 > honest["expected_calibration_error"]
    assert certain["brier_skill"] < 0 and abs(honest["brier_skill"]) < 0.02


def test_roc_ends_in_its_corners() -> None:
    points = roc_points(np.array([0.1, 0.9, 0.5, 0.5]), np.array([0, 1, 1, 0]))
    assert points is not None
    assert points["false_positive_rate"] == [0.0, 0.0, 0.5, 1.0]
    assert points["true_positive_rate"] == [0.0, 0.5, 1.0, 1.0]
