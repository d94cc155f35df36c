"""Tests of eval/training_curve.py."""

import json
from pathlib import Path

import pytest

from eval.training_curve import MAX_POINTS, MetricsError, training_curves


def write(directory: Path, lines: list[str]) -> None:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("\n".join(lines))


def test_curves_of_the_stages_that_have_them(tmp_path: Path) -> None:
    write(
        tmp_path / "sft", ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0, "heldout_loss": 2.5}', '{"step": 2}']
    )
    write(tmp_path / "empty", ['{"step": 1, "tokens_per_second": 9}'])
    curves = training_curves({name: str(tmp_path / name) for name in ("sft", "empty", "absent")})
    assert curves == {"sft": {"step": [1, 2], "loss": [3, 2], "heldout_step": [2], "heldout_loss": [2.5]}}


def test_long_curves_are_thinned_by_averaging(tmp_path: Path) -> None:
    write(tmp_path / "long", [json.dumps({"step": s, "loss": float(s % 2)}) for s in range(1, 5 * MAX_POINTS)])
    curve = training_curves({"long": str(tmp_path / "long")})["long"]
    assert len(curve["step"]) <= MAX_POINTS and curve["step"][-1] == 5 * MAX_POINTS - 1
    assert all(0.3 < loss < 0.7 for loss in curve["loss"])


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    write(tmp_path / "bad", ['{"step": 1, "loss": 3.0}', "half a li"])
    with pytest.raises(MetricsError, match=r"metrics.jsonl:2"):
        training_curves({"bad": str(tmp_path / "bad")})
