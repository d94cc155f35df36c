"""Every recipe in the checkout loads with its stage's schema, and dumps to text that loads equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.loader import dump_recipe, load_recipe
from recipes.pipeline import PIPELINE_FILE, PipelineRecipe, plan, schema_of
from recipes.run_directory import inspect_run_directory, prepare_run_directory
from recipes.run_identity import identity
from recipes.stages import STAGES
from recipes.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
PIPELINES = [path.parent for path in FILES if path.name == PIPELINE_FILE]


def schema_for(path: Path) -> type:
    """The schema of a recipe file: of its stage, or the pipeline's."""
    if path.name == PIPELINE_FILE:
        return PipelineRecipe
    return schema_of(parse_yaml(path.read_text(encoding="utf-8"), str(path)).data["stage"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_loads_and_dumps_equal(path: Path, tmp_path: Path) -> None:
    schema = schema_for(path)
    recipe = load_recipe(schema, path)
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(schema, tmp_path / "dumped.yaml") == recipe


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda path: path.name)
def test_a_run_is_known_whatever_its_folder_is_called(folder: Path, tmp_path: Path) -> None:
    """Every key that is a path is a `Location`: a recipe in two places has one identity."""
    pairs = zip(plan(folder, str(tmp_path / "runs"), []), plan(folder, "../elsewhere", []), strict=True)
    for planned, moved in pairs:
        assert identity(planned.recipe) == identity(moved.recipe), planned.name
        assert [text for text in strings(identity(planned.recipe)) if str(tmp_path) in text] == [], planned.name
        with prepare_run_directory(planned.run_dir, planned.recipe, {}):
            pass
        assert inspect_run_directory(planned.run_dir, moved.recipe, dict)[1] == [], planned.name


def test_every_stage_has_a_schema() -> None:
    for name in STAGES:
        assert "run_dir" in schema_of(name).model_fields


def strings(node: object) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in strings(value)]
    return [node] if isinstance(node, str) else []
