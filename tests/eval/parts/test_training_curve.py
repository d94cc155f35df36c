"""Tests of eval/parts/training_curve.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.parts.training_curve import (
    MAX_POINTS,
    MetricsError,
    Spikes,
    SpikeSection,
    find_spikes,
    spikes_of_run,
    training_curves,
)


def write(directory: Path, lines: list[str]) -> None:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("\n".join(lines))


def test_curves_of_the_stages_that_have_them(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0, "heldout_loss": 2.5}', '{"step": 2}']
    write(tmp_path / "sft", [*lines, '{"step": 3, "loss": null, "not_finite": {"loss": "nan"}}'])
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


def test_spikes_of_a_made_up_series() -> None:
    rng = np.random.default_rng(0)
    values = 3 + 0.1 * rng.normal(size=400)
    calm = find_spikes(values.tolist(), SpikeSection())
    assert (calm.n_steps, calm.count) == (272, 0)
    assert calm.max_ratio is not None and calm.max_ratio < 1.2
    values[[50, 200, 300]] = 6.0  # the first has no whole window before it
    values[350] = float("inf")
    found = find_spikes(values.tolist(), SpikeSection())
    assert found.count == 3
    assert found.max_ratio == pytest.approx(2, abs=0.05)
    # a falling curve has none, nor a series shorter than the window
    assert find_spikes(np.linspace(9, 3, 300).tolist(), SpikeSection()).count == 0
    assert find_spikes([1.0] * 128, SpikeSection()) == Spikes(0, 0, None)


def test_spikes_are_read_from_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "heldout_loss": 9.0}]
    lines += [
        {"step": i, "loss": 3.0 + 0.01 * (i % 3), "gradient_norm": 50.0 if i == 90 else 0.5} for i in range(1, 100)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = spikes_of_run(path, SpikeSection(window=20, sigma=6.0))
    assert (found["loss"].count, found["gradient_norm"].count, found["loss"].n_steps) == (0, 1, 79)
    assert found["gradient_norm"].max_ratio == pytest.approx(100)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[::2]))
    with pytest.raises(MetricsError, match="log_every=1"):
        spikes_of_run(path, SpikeSection(window=20))
