"""Training on a mixture: stopped and continued with the same bits, its parts told before, a changed share refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.files import file_sha256

ROOT = Path(__file__).parents[2]
STOP_AFTER = str(Path(__file__).with_name("stop_after.py"))
PRETRAIN = ["-m", "train.pretrain"]


def run(program: list[str], recipe: Path, *overrides: str, code: int = 0) -> str:
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *program, str(recipe), *overrides], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def mixture_recipe(pretrain_recipe: Path, data_dir: Path, tmp_path: Path) -> Path:
    """Training on the tiny data three times as often as on its held-out side."""
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    shutil.rmtree(other / "train")
    shutil.copytree(data_dir / "heldout", other / "train")
    parts = f"[{{path: {data_dir}, weight: 3}}, {{path: {other}, weight: 1}}]"
    text = pretrain_recipe.read_text()
    pretrain_recipe.write_text(
        text.replace(f"data: {data_dir}", f"data: {{kind: mixture, parts: {parts}}}\nngram_baselines: false")
    )
    return pretrain_recipe


def test_stopped_and_continued_it_ends_with_the_same_bits(mixture_recipe: Path, tmp_path: Path) -> None:
    said = run(PRETRAIN, mixture_recipe, f"run_dir={tmp_path / 'whole'}")
    assert "rows:" in said and "epochs" in said
    run([STOP_AFTER, "5"], mixture_recipe)
    run(PRETRAIN, mixture_recipe)
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "run")]
    assert file_sha256(weights[0]) == file_sha256(weights[1])


def test_other_weights_of_the_parts_are_another_recipe(mixture_recipe: Path) -> None:
    run([STOP_AFTER, "3"], mixture_recipe)
    mixture_recipe.write_text(mixture_recipe.read_text().replace("weight: 3", "weight: 2"))
    assert "data" in run(PRETRAIN, mixture_recipe, code=2)


def test_a_part_that_is_not_there_is_named(mixture_recipe: Path) -> None:
    mixture_recipe.write_text(mixture_recipe.read_text().replace("other, weight", "othre, weight"))
    assert "othre" in run(PRETRAIN, mixture_recipe, code=2)
