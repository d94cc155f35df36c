"""Compare the scorer, which predicts whether the partner writes again, with text-free baselines."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt

from data.packed.batch import PackedBatch, collate
from data.packed.shards import PackedDataset
from eval.scoring import OnProgress, hidden_states, sigmoid, silent, spread_rows
from eval.statistics import Bootstrap
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

UNLABELED = -1
N_CALIBRATION_BINS = 10
N_BASELINE_BINS = 12


class EngagementSection(Section):
    """Number of held-out rows to score and of training rows to fit the baselines on, both evenly spread."""

    heldout_rows: PositiveInt
    training_rows: PositiveInt


@dataclass(frozen=True)
class LabeledTurns:
    """N character turns with a label (1: the partner wrote again) and the features of the text-free baselines."""

    label_N: IntArray
    length_N: IntArray  # tokens of the turn's last message without <|message|>
    turn_N: IntArray  # 1-based number of the message in its dialogue
    dialogue_N: IntArray
    position_N: IntArray  # of the turn's <|end|> in its batch

    @classmethod
    def concatenate(cls, parts: Sequence["LabeledTurns"]) -> "LabeledTurns":
        empty = [np.empty(0, np.int64)]
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts] or empty) for f in fields(cls)))


def labeled_turns(batch: PackedBatch, message_id: int) -> LabeledTurns:
    """The labeled turns of a batch."""
    label_T, tokens_T = batch.label_T.numpy(), batch.tokens_T.numpy()
    documents, lengths = batch.documents, batch.documents["length"].astype(np.int64)
    start_T = np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_message_T = tokens_T == message_id
    place_T = np.arange(tokens_T.size)
    # start of the current message, or of a document that starts inside a message
    began_T = np.maximum(np.maximum.accumulate(np.where(is_message_T, place_T, -1)), start_T)
    number_T = np.cumsum(is_message_T)
    # the first token that is not repeated belongs to message `first_message`, counted from 0
    own_D = np.cumsum(lengths) - lengths + np.minimum(np.maximum(documents["n_repeated"], 1), lengths - 1)
    before_D = number_T[own_D] - documents["first_message"] - 1
    at_N = np.flatnonzero(label_T != UNLABELED)
    document_T = np.repeat(np.arange(lengths.size), lengths)
    return LabeledTurns(
        label_T[at_N].astype(np.int64),
        at_N - began_T[at_N],
        number_T[at_N] - before_D[document_T[at_N]],
        documents["dialogue"][document_T[at_N]].astype(np.int64),
        at_N,
    )


def training_turns(dataset: PackedDataset, message_id: int, n_rows: int) -> LabeledTurns:
    """Labeled turns of the training rows, for the baselines."""
    batch = collate(dataset, spread_rows(dataset.n_rows, n_rows))
    return labeled_turns(batch, message_id)


@torch.inference_mode()
def score_turns(
    scorer: tuple[Transformer, ScalarHead],
    dataset: PackedDataset,
    message_id: int,
    rows: IntArray,
    batch_tokens: int,
    on_progress: OnProgress = silent,
) -> tuple[LabeledTurns, FloatArray]:
    """The labeled held-out turns and the scorer's logit at each."""
    model, head = scorer
    parts: list[LabeledTurns] = []
    logits: list[FloatArray] = []
    for batch, hidden_TD in hidden_states(model, dataset, rows, batch_tokens, on_progress):
        turns = labeled_turns(batch, message_id)
        parts.append(turns)
        logits.append(head(hidden_TD[torch.from_numpy(turns.position_N).to(hidden_TD.device)]).float().cpu().numpy())
    return LabeledTurns.concatenate(parts), np.concatenate(logits).astype(np.float64)


def binned_rate(
    train_features: Sequence[IntArray], train_label_N: IntArray, features: Sequence[IntArray]
) -> FloatArray:
    """Predict the label rate of training turns in the same quantile bin (or cell of bins), smoothed to the base rate.

    It can represent any dependence on length or turn, monotonic or not.
    """
    n_bins = N_BASELINE_BINS if len(features) == 1 else N_BASELINE_BINS // 2
    cells_train, cells = np.zeros(train_label_N.size, np.int64), np.zeros(features[0].size, np.int64)
    for train_feature, feature in zip(train_features, features, strict=True):
        edges = np.unique(np.quantile(train_feature, np.linspace(0, 1, n_bins + 1)[1:-1]))
        cells_train = cells_train * (n_bins + 1) + np.searchsorted(edges, train_feature, side="right")
        cells = cells * (n_bins + 1) + np.searchsorted(edges, feature, side="right")
    size = (n_bins + 1) ** len(features)
    ones = np.bincount(cells_train, weights=train_label_N, minlength=size)
    seen = np.bincount(cells_train, minlength=size)
    base, weight = float(train_label_N.mean()), 10.0  # with 10 turns a cell weighs as much as the base rate
    return np.asarray(((ones + weight * base) / (seen + weight))[cells])


def calibration(
    probability_N: FloatArray, label_N: IntArray, bootstrap: Bootstrap, clusters_N: IntArray
) -> dict[str, Any]:
    """Predicted and observed rates in bins of equal size, expected calibration error, Brier score and skill."""
    order = np.argsort(probability_N, kind="stable")
    bins = []
    error = 0.0
    for part in np.array_split(order, min(N_CALIBRATION_BINS, label_N.size)):
        observed = bootstrap.proportion(label_N[part] == 1, clusters_N[part])
        predicted = float(probability_N[part].mean())
        assert observed.value is not None
        error += abs(observed.value - predicted) * part.size / label_N.size
        bins.append({"predicted": predicted, "observed": observed})
    brier = bootstrap.share((probability_N - label_N) ** 2, clusters_N)
    assert brier.value is not None
    base_brier = float(label_N.mean() * (1 - label_N.mean()))
    return {
        "bins": bins,
        "expected_calibration_error": error,
        "brier": brier,
        "brier_of_base_rate": base_brier,
        "brier_skill": 1 - brier.value / base_brier if base_brier > 0 else None,
    }


def summarize_scorer(
    turns: LabeledTurns, logit_N: FloatArray, train: LabeledTurns, bootstrap: Bootstrap
) -> dict[str, Any]:
    """AUC of the scorer and of text-free baselines, their differences, calibration and base rate.

    With only one class the AUCs are undefined, and their `note` says so.
    """
    label_N, clusters = turns.label_N, turns.dialogue_N
    result: dict[str, Any] = {
        "n_turns": int(label_N.size),
        "n_dialogues": int(np.unique(clusters).size),
        "base_rate": bootstrap.share(label_N.astype(np.float64), clusters),
        "auc": bootstrap.auc(logit_N, label_N, clusters),
        "baselines": {},
    }
    if label_N.size == 0:
        return result | {"calibration": None, "roc": None}
    if train.label_N.size:
        features = {
            "length": ([train.length_N], [turns.length_N]),
            "turn_number": ([train.turn_N], [turns.turn_N]),
            "length_and_turn_number": ([train.length_N, train.turn_N], [turns.length_N, turns.turn_N]),
        }
        for name, (fitted, asked) in features.items():
            baseline_N = binned_rate(fitted, train.label_N, asked)
            result["baselines"][name] = {
                "auc": bootstrap.auc(baseline_N, label_N, clusters),
                "scorer_minus_baseline": bootstrap.auc(logit_N, label_N, clusters, minus_N=baseline_N),
            }
    probability_N = sigmoid(logit_N)
    result["calibration"] = calibration(probability_N, label_N, bootstrap, clusters)
    result["roc"] = roc_points(logit_N, label_N)
    return result


def roc_points(score_N: FloatArray, label_N: IntArray, n_points: int = 101) -> dict[str, list[float]] | None:
    """False and true positive rates, thinned to `n_points`; None with only one class."""
    positives, negatives = int((label_N == 1).sum()), int((label_N == 0).sum())
    if not positives or not negatives:
        return None
    order = np.argsort(-score_N, kind="stable")
    last_of_ties = np.concatenate([score_N[order][1:] != score_N[order][:-1], [True]])
    true_rate = np.concatenate([[0.0], np.cumsum(label_N[order] == 1)[last_of_ties] / positives])
    false_rate = np.concatenate([[0.0], np.cumsum(label_N[order] == 0)[last_of_ties] / negatives])
    keep = np.unique(np.linspace(0, true_rate.size - 1, n_points).round().astype(int))
    return {"false_positive_rate": false_rate[keep].tolist(), "true_positive_rate": true_rate[keep].tolist()}
