"""The kept weights are those of the best evaluation, through kills, and training stops when nothing improves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.transformer import Transformer
from model.weights import load_model
from recipes.loader import RecipeError, load_recipe
from train.checkpoint.best import Best, BestWeights, BestWeightsError, FigureError, KeepBest, best_of, json_of
from train.deepspeed.world import World
from train.pretrain import PretrainRecipe

ROOT = Path(__file__).parents[3]
ALONE = World(0, 1, torch.device("cpu"))
LOWER = KeepBest(figure="heldout_loss", better="lower")


def write(directory: Path) -> None:
    directory.mkdir(parents=True)


@given(st.lists(st.one_of(st.integers(0, 5).map(float), st.just(math.nan)), min_size=1, max_size=12), st.booleans())
def test_the_first_best_figure_is_kept(values: list[float], lower: bool) -> None:
    settings = KeepBest(figure="f", better="lower" if lower else "higher")
    with tempfile.TemporaryDirectory() as folder:
        kept = BestWeights(settings, None, Path(folder), ALONE, write, None)
        for step, value in enumerate(values):
            kept.record(step, {"f": value})
        numbers = [value for value in values if not math.isnan(value)]
        expected = values.index((min if lower else max)(numbers)) if numbers else 0
        assert kept.best is not None
        assert kept.best.step == expected
        assert kept.best.evaluations_since == len(values) - 1 - expected
        assert [path.name for path in (Path(folder) / "best").iterdir()] == [f"step_{expected:08d}"]
        assert repr(best_of(json.loads(json.dumps(json_of(kept.best), allow_nan=False)))) == repr(kept.best)


def test_it_ends_after_so_many_evaluations_without_a_better_one(tmp_path: Path) -> None:
    kept = BestWeights(LOWER, 2, tmp_path, ALONE, write, None)
    over = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.0, 1.0, 1.5]):
        kept.record(step, {"heldout_loss": loss})
        over.append(kept.is_over)
    assert over == [False, False, False, False, False, True]


def test_a_run_that_takes_all_its_steps_has_not_stopped_early(tmp_path: Path) -> None:
    kept = BestWeights(LOWER, 2, tmp_path, ALONE, write, None)
    assert kept.figures(6, 6) == {}
    kept.record(3, {"heldout_loss": 1.0})
    assert kept.figures(6, 6) == {"kept_step": 3, "last_step": 6, "stopped_early": False}
    assert kept.figures(5, 6)["stopped_early"]


def test_rank_0_decides_what_is_better(tmp_path: Path) -> None:
    """The ranks' figures may differ in the last bits, and saving takes all of them."""

    class OnlyOurs(World):
        def sum(self, values: list[float]) -> list[float]:
            return values

    kept = BestWeights(LOWER, None, tmp_path, OnlyOurs(1, 2, torch.device("cpu")), write, None)
    kept.best = Best(1, {"heldout_loss": 2.0})
    kept.record(2, {"heldout_loss": 1.0})
    assert kept.best == Best(1, {"heldout_loss": 2.0}, evaluations_since=1)


def test_models_that_checkpoints_name_stay(tmp_path: Path) -> None:
    kept = BestWeights(LOWER, None, tmp_path, ALONE, write, None)
    kept.record(0, {"heldout_loss": 3.0})
    checkpoint = tmp_path / "checkpoints" / "step_00000000" / "state.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps({"best": json_of(kept.to_save())}))
    kept.record(1, {"heldout_loss": 2.0})
    kept.to_save()  # a checkpoint that is being written
    kept.record(2, {"heldout_loss": 1.5})
    kept.record(3, {"heldout_loss": 1.0})
    there = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "best").iterdir())
    assert there == [0, 1, 3]


def test_errors_say_what_there_is(tmp_path: Path, pretrain_recipe: Path) -> None:
    kept = BestWeights(KeepBest(figure="heldout_auc", better="higher"), None, tmp_path, ALONE, write, None)
    with pytest.raises(FigureError, match="found heldout_auc, this stage computes heldout_loss"):
        kept.record(0, {"heldout_loss": 1.0})
    with pytest.raises(BestWeightsError, match="step_00000004 is missing"):
        BestWeights(LOWER, None, tmp_path, ALONE, write, Best(4, {"heldout_loss": 1.0}))
    for overrides, message in (
        (["loop.stop_after=2"], "stop_after compares the figure of keep_best"),
        (
            ["loop.keep_best={figure: heldout_auc, better: higher}"],
            "found heldout_auc, this stage computes heldout_loss",
        ),
        (["loop.keep_best={figure: heldout_loss, better: higher}"], "found higher, but a lower heldout_loss is better"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(PretrainRecipe, pretrain_recipe, overrides)


def test_a_run_ends_with_the_weights_and_figures_of_its_best_evaluation(pretrain_recipe: Path, tmp_path: Path) -> None:
    """With such a learning rate the loss rises, so that the lowest is that of the drawn weights."""
    overrides = ["loop.keep_best={figure: heldout_loss, better: lower}", "loop.stop_after=2", "loop.evaluate_every=2"]
    overrides.append("optimizer.lr=100.0")
    words = [sys.executable, "-m", "train.pretrain", str(pretrain_recipe), *overrides]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "done.json").read_text())
    figures = told["figures"]
    assert (figures["kept_step"], figures["last_step"], figures["stopped_early"]) == (0, 4, True)
    assert told["key_figure"].endswith("step 0 of 4 kept")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line for line in lines if "heldout_loss" in line}
    assert figures["heldout_loss"] == pytest.approx(evaluated[0]["heldout_loss"], abs=1e-6)
    assert [line["best_step"] for line in evaluated.values()] == [0, 0, 0]
    recipe = load_recipe(PretrainRecipe, pretrain_recipe)
    assert recipe.model is not None
    drawn = Transformer(recipe.model, "auto", recipe.seed).state_dict()
    found = load_model(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(found[name], drawn[name]) for name in drawn)
