"""Which data a model was trained on, and whether a bundle can render the prompts that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.loader import read_document


def check_no_prompt_template(init_from: str, data: str) -> None:
    """Raise ValueError where `data`, or any data that `init_from` or a run it began with was trained on, was prepared
    with a prompt template: a bundle renders prompts without it, so they would differ from those in training."""
    for directory in (data, *_trained_on(init_from)):
        if template := _recipe(directory).get("prompt_template"):
            raise ValueError(template_refused(directory, template["path"]))


def template_refused(directory: str, path: str) -> str:
    """Why a model of this data is not exported."""
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
    """The recipe of a run; nothing where there is none, as beside a model directory."""
    path = Path(run_dir) / "recipe.yaml"
    if not path.is_file():
        return {}
    found = read_document(path).data
    return found if isinstance(found, dict) else {}
