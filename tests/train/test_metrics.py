"""The loss plot's smoothed line is a mean of the losses so far, from the first step on."""

from __future__ import annotations

import pytest

from train.metrics import _smooth


def test_a_constant_loss_is_drawn_as_it_is() -> None:
    assert _smooth((3.0,) * 5) == pytest.approx([3.0] * 5)


def test_later_losses_weigh_more() -> None:
    losses = (4.0, 1.0, 2.0)
    weights = (0.81, 0.9, 1.0)
    expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert _smooth(losses)[-1] == pytest.approx(expected)
