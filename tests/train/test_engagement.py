"""The held-out AUC of the scorer."""

import itertools

import numpy as np
import pytest

from train.engagement import roc_auc


def test_area_is_the_share_of_pairs_in_order() -> None:
    score, label = np.array([0.1, 0.4, 0.4, 0.9, 0.2]), np.array([0, 1, 0, 1, 0])
    pairs = list(itertools.product(score[label == 1], score[label == 0]))
    in_order = sum((positive > negative) + 0.5 * (positive == negative) for positive, negative in pairs)
    assert roc_auc(score, label) == pytest.approx(in_order / len(pairs))
    assert in_order / len(pairs) > 0.9
