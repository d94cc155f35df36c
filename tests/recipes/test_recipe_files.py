"""Every recipe in the checkout loads with its stage's schema, and dumps to text that loads equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.loader import dump_recipe, load_recipe
from recipes.pipeline import PIPELINE_FILE, PipelineRecipe, plan, schema_of
from recipes.run_directory import inspect_run_directory, prepare_run_directory
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
def test_the_stages_of_a_pipeline_read_what_earlier_ones_write(folder: Path) -> None:
    """A path under the pipeline's runs folder is the run directory of an earlier stage, or inside it."""
    runs = load_recipe(PipelineRecipe, folder / PIPELINE_FILE).runs
    written: list[str] = []
    for planned in plan(folder, None, []):
        run_dir = planned.run_dir.as_posix()
        assert run_dir.startswith(f"{runs}/"), planned.name
        assert run_dir not in written, planned.name
        for value in strings(planned.written):
            if value.startswith(f"{runs}/") and value != run_dir:
                assert any(f"{value}/".startswith(f"{earlier}/") for earlier in written), (planned.name, value)
        written.append(run_dir)


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda path: path.name)
def test_a_run_is_recognised_without_its_schema(folder: Path, tmp_path: Path) -> None:
    """The pipeline compares plain data: what a stage records must be what the file (and overrides) say."""
    for planned in plan(folder, str(tmp_path / "runs"), []):
        recipe = load_recipe(schema_of(planned.written["stage"]), planned.recipe_path, planned.overrides)
        with prepare_run_directory(planned.run_dir, recipe, {}):
            pass
        assert inspect_run_directory(planned.run_dir, planned.written)[1] == [], planned.name


def test_every_stage_has_a_schema() -> None:
    for name in STAGES:
        assert "run_dir" in schema_of(name).model_fields


def strings(node: object) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in strings(value)]
    return [node] if isinstance(node, str) else []
