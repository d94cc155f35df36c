"""The summary of a training recipe: model cost, tokens, epochs, and memory per rank."""

from __future__ import annotations

from pathlib import Path

from data.packed.mixture import MixtureData, MixtureOrder, open_mixture
from data.packed.shards import PackedDataset
from data.packed.synthetic import SyntheticData
from model.config import ModelConfig
from model.portability import describe
from train.initial_model import find_initial_model
from train.memory.estimate import Load, LossKind
from train.memory.report import Summary
from train.stage import TrainingRecipe, data_directories, described


def summarize(
    recipe: TrainingRecipe,
    data: str | SyntheticData | MixtureData,
    config: ModelConfig | None = None,
    loss: LossKind = "every token",
    row_tokens: int | None = None,
) -> Summary:
    """What is printed before training and by --dry-run.

    config: the recipe's architecture, or None if it is that of `init_from`. row_tokens: maximum tokens of a row, if
    rows are not those of `data`.
    """
    if config is None:
        init_from = getattr(recipe, "init_from")  # noqa: B009 (only some stages have it)
        initial = find_initial_model(init_from)
        config = initial.config() if initial else None
    lines = describe(config) if config else [("model", f"not there yet: {init_from}")]
    size = size_of(data)
    lines += _data_lines(recipe, data, size)
    rows, bound = recipe.loop.rows_per_micro_batch, ""
    if row_tokens:
        bound = f"at most: every row of {row_tokens:,} tokens"
    elif size:
        row_tokens = size[1]
    elif config:
        row_tokens, bound = config.max_length, f"at most: rows as long as max_length, {config.max_length:,}"
    load = None
    if config and row_tokens:
        load = Load(config, recipe.engine, recipe.optimizer.kind, rows * row_tokens, loss)
    return Summary([f"{name:<24}{value}" for name, value in lines], load, rows, bound)


def _data_lines(
    recipe: TrainingRecipe, data: str | SyntheticData | MixtureData, size: tuple[int, int] | None
) -> list[tuple[str, str]]:
    steps, rows_per_step = recipe.loop.max_steps, recipe.loop.rows_per_step
    if size is None:
        return [("data", f"not there yet: {described(data)}; run python -m data.prepare first")]
    n_rows, row_length = size
    tokens = rows_per_step * row_length
    lines = [
        ("data", f"{n_rows:,} rows of {row_length} tokens in {described(data)}"),
        ("tokens a step", f"{tokens:,} ({rows_per_step} rows)"),
    ]
    in_all = f"{tokens * steps:,} in {steps} steps"
    if not isinstance(data, MixtureData):
        return [*lines, ("tokens in all", f"{in_all}, {rows_per_step * steps / n_rows:.2f} epochs")]
    rows = open_mixture(data, "train", verify="sizes")
    counts = MixtureOrder.of(rows, recipe.seed).counts(rows_per_step * steps)
    for part, opened, count in zip(data.parts, rows.parts, counts, strict=True):
        lines.append((f"  {part.path}", f"{count:,} rows: {count / opened.n_rows:.2f} epochs"))
    return [*lines, ("tokens in all", in_all)]


def size_of(data: str | SyntheticData | MixtureData) -> tuple[int, int] | None:
    """(rows, tokens per row) of training data; None when it does not exist yet."""
    if isinstance(data, SyntheticData):
        return data.n_rows, data.row_length
    directories = [Path(path) / "train" for path in data_directories(data).values()]
    if not all((directory / "manifest.json").exists() for directory in directories):
        return None
    parts = [PackedDataset(directory, verify="sizes") for directory in directories]
    return sum(part.n_rows for part in parts), parts[0].row_length
