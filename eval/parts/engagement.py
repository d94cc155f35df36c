"""How well the scorer foretells that the partner writes again, beside baselines that never read a word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt

from data.packed.batch import PackedBatch, collate
from data.packed.shards import PackedDataset
from eval.scoring import OnProgress, sigmoid, silent, spread_rows
from eval.statistics import Bootstrap
from model.attention_ops import Documents
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

UNLABELLED = -1
N_CALIBRATION_BINS = 10
N_BASELINE_BINS = 12


class EngagementSection(Section):
    """How many held-out rows are scored, and on how many training rows the baselines are fitted; both evenly spread."""

    heldout_rows: PositiveInt
    training_rows: PositiveInt


@dataclass(frozen=True)
class LabelledTurns:
    """Character turns N with a known outcome: label 1 where the partner wrote again, and what can be seen unread."""

    label_N: IntArray
    length_N: IntArray  # tokens of the turn's last message, without the speaker's name tag's <|message|>
    turn_N: IntArray  # number of the message in its dialogue, from 1
    dialogue_N: IntArray
    position_N: IntArray  # of the turn's <|end|> in the batch it came from

    @classmethod
    def concatenate(cls, parts: Sequence["LabelledTurns"]) -> "LabelledTurns":
        names = ("label_N", "length_N", "turn_N", "dialogue_N", "position_N")
        empty = [np.empty(0, np.int64)]
        return cls(*(np.concatenate([getattr(p, name) for p in parts] or empty) for name in names))


def labelled_turns(batch: PackedBatch, message_id: int) -> LabelledTurns:
    """The labelled turns of a batch."""
    label_T, tokens_T = batch.label_T.numpy(), batch.tokens_T.numpy()
    documents, lengths = batch.documents, batch.documents["length"].astype(np.int64)
    start_T = np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_message_T = tokens_T == message_id
    place_T = np.arange(tokens_T.size)
    # Where the current message began; a document cut in the middle of a message begins one too.
    began_T = np.maximum(np.maximum.accumulate(np.where(is_message_T, place_T, -1)), start_T)
    number_T = np.cumsum(is_message_T)
    # the first token of a document's own belongs to message `first_message`, counted from 0
    own_D = np.cumsum(lengths) - lengths + np.minimum(np.maximum(documents["n_repeated"], 1), lengths - 1)
    before_D = number_T[own_D] - documents["first_message"] - 1
    at_N = np.flatnonzero(label_T != UNLABELLED)
    document_T = np.repeat(np.arange(lengths.size), lengths)
    return LabelledTurns(
        label_T[at_N].astype(np.int64),
        at_N - began_T[at_N],
        number_T[at_N] - before_D[document_T[at_N]],
        documents["dialogue"][document_T[at_N]].astype(np.int64),
        at_N,
    )


def training_turns(dataset: PackedDataset, message_id: int, n_rows: int) -> LabelledTurns:
    """Labelled turns of the training rows, for the baselines."""
    batch = collate(dataset, spread_rows(dataset.n_rows, n_rows))
    return labelled_turns(batch, message_id)


@torch.inference_mode()
def score_turns(
    scorer: tuple[Transformer, ScalarHead],
    dataset: PackedDataset,
    message_id: int,
    rows: IntArray,
    batch_tokens: int,
    on_progress: OnProgress = silent,
) -> tuple[LabelledTurns, FloatArray]:
    """The labelled held-out turns and the scorer's logit at each."""
    model, head = scorer
    device = model.embed_tokens.weight.device
    step = max(1, batch_tokens // dataset.row_length)
    parts: list[LabelledTurns] = []
    logits: list[FloatArray] = []
    for start in range(0, len(rows), step):
        batch = collate(dataset, rows[start : start + step])
        turns = labelled_turns(batch, message_id)
        documents = Documents.from_lengths(batch.document_lengths, batch.row_length, device)
        hidden_TD = model(batch.tokens_T.to(device), documents)
        parts.append(turns)
        logits.append(head(hidden_TD[torch.from_numpy(turns.position_N).to(device)]).float().cpu().numpy())
        on_progress(min(start + step, len(rows)), len(rows))
    return LabelledTurns.concatenate(parts), np.concatenate(logits).astype(np.float64)


def binned_rate(
    train_features: Sequence[IntArray], train_label_N: IntArray, features: Sequence[IntArray]
) -> FloatArray:
    """Predict the label's training rate in the feature's quantile bin (or cell of bins), smoothed to the base rate.

    A baseline without a shape of its own: it can use any dependence on length or turn, rising, falling or neither.
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
    base, weight = float(train_label_N.mean()), 10.0  # a cell weighs as much as the base rate from 10 turns on
    return np.asarray(((ones + weight * base) / (seen + weight))[cells])


def calibration(
    probability_N: FloatArray, label_N: IntArray, bootstrap: Bootstrap, clusters_N: IntArray
) -> dict[str, Any]:
    """Predicted against observed rate in bins of equal size, expected calibration error, Brier score and skill."""
    order = np.argsort(probability_N, kind="stable")
    bins = []
    error = 0.0
    for part in np.array_split(order, min(N_CALIBRATION_BINS, label_N.size)):
        observed = bootstrap.proportion(label_N[part] == 1, clusters_N[part])
        predicted = float(probability_N[part].mean())
        assert observed.value is not None
        error += abs(observed.value - predicted) * part.size / label_N.size
        bins.append({"predicted": predicted, "observed": observed})
    brier = float(np.mean((probability_N - label_N) ** 2))
    base_brier = float(label_N.mean() * (1 - label_N.mean()))
    return {
        "bins": bins,
        "expected_calibration_error": error,
        "brier": brier,
        "brier_of_base_rate": base_brier,
        "brier_skill": 1 - brier / base_brier if base_brier > 0 else None,
    }


def summarise_scorer(
    turns: LabelledTurns, logit_N: FloatArray, train: LabelledTurns, bootstrap: Bootstrap
) -> dict[str, Any]:
    """AUC of the scorer and of unread baselines, their differences, calibration and base rate.

    With one class only the AUCs are undefined and say so in their `note`.
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
    """False and true positive rates, thinned to `n_points`; None with one class only."""
    positives, negatives = int((label_N == 1).sum()), int((label_N == 0).sum())
    if not positives or not negatives:
        return None
    order = np.argsort(-score_N, kind="stable")
    last_of_ties = np.concatenate([score_N[order][1:] != score_N[order][:-1], [True]])
    true_rate = np.concatenate([[0.0], np.cumsum(label_N[order] == 1)[last_of_ties] / positives])
    false_rate = np.concatenate([[0.0], np.cumsum(label_N[order] == 0)[last_of_ties] / negatives])
    keep = np.unique(np.linspace(0, true_rate.size - 1, n_points).round().astype(int))
    return {"false_positive_rate": false_rate[keep].tolist(), "true_positive_rate": true_rate[keep].tolist()}
