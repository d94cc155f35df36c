"""The recipe of an ablation's evaluation, and the trained runs of its arms, one or more for each learning rate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data.format.tokenizer import DialogueTokenizer
from eval.parts.ranking import RankingSection
from eval.parts.recall import RecallSection
from eval.parts.training_curve import METRICS, Spikes, SpikeSection, spikes_of_run
from eval.scoring import spread_rows
from eval.speed.decode import SpeedSection
from eval.workspace import BootstrapSection, ContextSection, EvalError, check_finished, check_tokenizer
from model.config import ModelConfig
from model.weights import load_config
from recipes.json_text import NOT_FINITE
from recipes.loader import Section, read_document
from recipes.run_directory import read_done
from recipes.run_identity import Location
from recipes.run_inputs import digest_inputs

IntArray = NDArray[np.int64]


class AblationRecipe(Section):
    """Arms (name: run directories, by learning rate and seed) to compare with the first arm, and what to measure."""

    stage: Literal["ablation"]
    run_dir: Location
    title: str
    data: Location
    arms: dict[str, Annotated[tuple[Location, ...], Field(min_length=1)]]
    seed: NonNegativeInt
    threads: PositiveInt | None = None
    batch_tokens: PositiveInt
    bootstrap: BootstrapSection = BootstrapSection()
    heldout_rows: PositiveInt
    contexts: ContextSection
    ranking: RankingSection
    recall: RecallSection
    spikes: SpikeSection = SpikeSection()
    speed: SpeedSection
    conversation_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> "AblationRecipe":
        if len(self.arms) < 2:
            raise ValueError(f"arms: found {len(self.arms)}, expected at least two to compare")
        paths = [path for runs in self.arms.values() for path in runs]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"arms: {', '.join(repeated)} given twice; a run belongs to one arm, once")
        return self

    @property
    def against(self) -> str:
        """The arm that the others are compared with, the first."""
        return next(iter(self.arms))

    def inputs(self) -> dict[str, str]:
        """The run directories that it reads, by name."""
        runs = {f"arms.{name}.{i}": path for name, paths in self.arms.items() for i, path in enumerate(paths)}
        return {"data": self.data, **runs}


@dataclass(frozen=True)
class TrainedRun:
    """One training run of an arm, from its run directory."""

    run_dir: str
    lr: float
    heldout_loss: float | None  # None: not finite
    spikes: dict[str, Spikes]
    evaluation_rows: int


@dataclass(frozen=True)
class Arm:
    """An architecture with its runs, in the order of their learning rates."""

    name: str
    config: ModelConfig
    runs: tuple[TrainedRun, ...]

    @property
    def best(self) -> TrainedRun:
        """The run with the lowest held-out loss."""
        return min(self.runs, key=lambda run: np.inf if run.heldout_loss is None else run.heldout_loss)

    @property
    def best_is_at_the_edge(self) -> bool:
        """Whether the best learning rate is the smallest or largest that was tried."""
        return self.best.lr in (self.runs[0].lr, self.runs[-1].lr)


def read_arms(recipe: AblationRecipe, tokenizer: DialogueTokenizer, longest: int) -> dict[str, Arm]:
    """The arms of a recipe. Raises EvalError, RunDirectoryError or MetricsError naming what does not match.

    `longest`: tokens of the longest sequence that the models have to process.
    """
    data_digest = digest_inputs({"data": recipe.data})["data"]["sha256"]
    arms = {}
    for name, paths in recipe.arms.items():
        configs = []
        for number, path in enumerate(paths):
            where = f"arms.{name}.{number}"
            check_finished(where, path)
            check_tokenizer(where, path, tokenizer, recipe.data)
            if _data_of(path) != data_digest:
                raise EvalError(f"{where}: {path} was trained on other data than data: {recipe.data}; train it again")
            configs.append(load_config(Path(path) / "model"))
            if longest > configs[-1].max_length:
                raise EvalError(
                    f"{where}: max_length of {path} is {configs[-1].max_length} tokens, and {longest} are asked for "
                    "(rows of the data, contexts.max_prompt_tokens, recall.distances, speed.prompt_tokens)"
                )
        if any(config != configs[0] for config in configs):
            raise EvalError(
                f"arms.{name}: its runs have different architectures; they may differ in learning rate and seed"
            )
        runs = sorted((_read_run(path, recipe.spikes) for path in paths), key=lambda run: run.lr)
        arms[name] = Arm(name, configs[0], tuple(runs))
        if arms[name].best.heldout_loss is None:
            raise EvalError(f"arms.{name}: no run has a finite held-out loss; train it with a smaller learning rate")
    return arms


def _data_of(path: str) -> str | None:
    return ((read_done(path) or {}).get("inputs", {}).get("data") or {}).get("sha256")


def _read_run(path: str, spikes: SpikeSection) -> TrainedRun:
    done, recipe = read_done(path) or {}, read_document(Path(path) / "recipe.yaml").data
    figures = done.get("figures", {})
    loss = figures.get("heldout_loss")
    if not isinstance(loss, float) and "heldout_loss" not in figures.get(NOT_FINITE, {}):
        raise EvalError(
            f"{path}/done.json: figures.heldout_loss is {loss!r}, expected a number; was this a pretrain run?"
        )
    found = spikes_of_run(Path(path) / METRICS, spikes)
    return TrainedRun(path, float(recipe["optimizer"]["lr"]), loss, found, int(recipe["evaluation_rows"]))


def training_spread(arms: Iterable[Arm]) -> float | None:
    """The largest difference in held-out loss between runs of one arm with the same learning rate (in nats a token).

    It estimates how much another seed changes a loss. None if no learning rate of an arm has two runs.
    """
    spreads = []
    for arm in arms:
        losses: dict[float, list[float]] = {}
        for run in arm.runs:
            if run.heldout_loss is not None:
                losses.setdefault(run.lr, []).append(run.heldout_loss)
        spreads += [max(of_lr) - min(of_lr) for of_lr in losses.values() if len(of_lr) > 1]
    return max(spreads, default=None)


def unseen_rows(arms: Sequence[Arm], n_rows: int, wanted: int) -> IntArray:
    """Up to `wanted` held-out rows, evenly spread, that no learning rate was chosen on. Raises EvalError."""
    seen = {int(row) for arm in arms for run in arm.runs for row in spread_rows(n_rows, run.evaluation_rows)}
    others = np.array([row for row in range(n_rows) if row not in seen], dtype=np.int64)
    if others.size == 0:
        raise EvalError(
            f"the learning rates were chosen on all {n_rows} held-out rows, so none is left to report on; train with a "
            "smaller evaluation_rows"
        )
    return others[spread_rows(others.size, wanted)]


def describe_arm(arm: Arm, lengths: Sequence[int]) -> dict[str, Any]:
    """An arm in the report: its architecture, runs, and KV cache bytes (16-bit values)."""
    config = arm.config
    return {
        "n_parameters": config.n_parameters,
        "architecture": config.model_dump(mode="json"),
        "run_dir": arm.best.run_dir,
        "lr": arm.best.lr,
        "best_is_at_the_edge": arm.best_is_at_the_edge,
        "runs": arm.runs,
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "kv_bytes": {length: config.kv_bytes(length) for length in lengths},
    }
