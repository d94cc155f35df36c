"""The arms of the ablation differ in their architecture alone, and have equally many parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.loader import load_recipe
from recipes.pipeline import schema_of
from recipes.sweep import Variation, plan

FOLDER = Path(__file__).parents[2] / "recipes" / "ablation"
ARMS = ("mha", "gqa4", "mqa", "mqa_windows", "mqa_windows_tail", "mqa_adjacent")
ARCHITECTURE = {"n_kv_heads", "d_ff", "layers", "window", "kv_sharing"}


@pytest.fixture(scope="module")
def arms() -> dict[str, dict]:
    schema = schema_of("pretrain")
    return {name: load_recipe(schema, FOLDER / f"{name}.yaml").model_dump() for name in ARMS}


def test_the_arms_have_equally_many_parameters() -> None:
    schema = schema_of("pretrain")
    counts = [load_recipe(schema, FOLDER / f"{name}.yaml").model.n_parameters for name in ARMS]
    assert max(counts) / min(counts) < 1.005, dict(zip(ARMS, counts, strict=True))


def test_only_the_architecture_differs(arms: dict[str, dict]) -> None:
    def rest(recipe: dict) -> dict:
        model = {key: value for key, value in recipe["model"].items() if key not in ARCHITECTURE}
        return {**recipe, "model": model, "run_dir": None}

    for name in ARMS:
        assert rest(arms[name]) == rest(arms["mha"]), name
    assert len({str(arms[name]["model"]) for name in ARMS}) == len(ARMS)


def test_the_architectures_are_the_ones_the_names_say() -> None:
    models = {name: load_recipe(schema_of("pretrain"), FOLDER / f"{name}.yaml").model for name in ARMS}
    cost = {name: model.kv_bytes_per_token() for name, model in models.items()}
    assert cost["mha"] == 3 * cost["gqa4"] == 12 * cost["mqa"] == 24 * cost["mqa_adjacent"]
    assert cost["mqa_windows"] == cost["mqa"] == 2 * cost["mqa_windows_tail"]
    assert models["mqa_windows"].layer_kinds.count("G") == 2
    # every global layer of the tail reads a global layer's cache
    assert models["mqa_windows_tail"].kv_layers == (0, 1, 2, 3, 4, 5)


def test_every_step_is_logged_and_the_rows_are_used_once(arms: dict[str, dict]) -> None:
    loop = arms["mha"]["loop"]
    assert loop["log_every"] == 1
    assert 19_234 - loop["rows_per_step"] < loop["max_steps"] * loop["rows_per_step"] <= 19_234


def test_the_evaluation_reads_what_the_sweep_writes() -> None:
    runs, _ = plan(sorted(FOLDER.glob("*.yaml")), [Variation("optimizer.lr", ("1e-3", "2e-3", "4e-3"))], [])
    recipe = load_recipe(schema_of("ablation"), FOLDER / "eval.yaml")
    assert {path for paths in recipe.arms.values() for path in paths} == {str(run.planned.run_dir) for run in runs}
    assert tuple(recipe.arms) == ARMS
