"""The data that a model was trained on, and whether a bundle can render the prompts of its training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.loader import read_document


def check_no_prompt_template(init_from: str, data: str) -> None:
    """Raise ValueError if `data`, or training data of `init_from` or of a run that it was initialized from, was
    prepared with a prompt template. A bundle renders prompts without it, so they would differ from training."""
    for directory in (data, *_trained_on(init_from)):
        if template := _recipe(directory).get("prompt_template"):
            raise ValueError(template_refused(directory, template["path"]))


def template_refused(directory: str, path: str) -> str:
    """The message for data with a prompt template."""
    return (
        f"{directory} was prepared with prompt_template {path}: a bundle does not render prompts with a template, so "
        "the model would be served other prompts than it was trained on; train on data without prompt_template to "
        "export a model"
    )


def _trained_on(run_dir: str) -> Iterator[str]:
    seen: set[str] = set()
    while run_dir not in seen:
        seen.add(run_dir)
        recipe = _recipe(run_dir)
        data = recipe.get("data")
        if isinstance(data, str):
            yield data
        elif isinstance(data, dict):
            yield from (part["path"] for part in data.get("parts", ()))
        run_dir = recipe.get("init_from") or run_dir


def _recipe(run_dir: str) -> dict[str, Any]:
    """The recipe of a run; empty without recipe.yaml, as for a model directory."""
    path = Path(run_dir) / "recipe.yaml"
    if not path.is_file():
        return {}
    found = read_document(path).data
    return found if isinstance(found, dict) else {}
