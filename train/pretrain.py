"""Pre-train a decoder on packed shards: `python -m train.pretrain recipes/demo/pretrain.yaml`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from rich.console import Console
from rich.table import Table

from data.packed.batch import PackedBatch
from data.packed.mixture import MixtureData
from data.packed.shards import PackedDataset
from data.packed.synthetic import SyntheticData
from eval.parts.ngram import ngram_losses
from eval.scoring import spread_rows
from model.config import ModelConfig
from model.transformer import Transformer
from recipes.run_identity import Location
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.initial_model import check_same_architecture, find_initial_model, initial_model
from train.loop import Loss, Outcome
from train.losses import next_token_loss
from train.memory.report import Summary
from train.run import run_stage
from train.stage import (
    Job,
    LossModule,
    TrainingRecipe,
    data_directories,
    documents_of,
    open_data,
    packed_stage,
)
from train.summary import summarize
from train.targets import Targets

TOKENS = Targets(
    lambda batch: {"next tokens to predict": int(batch.has_target_T.sum())},
    lambda dialogue, within: {"next tokens to predict": len(dialogue.messages)},
    "Prepare data with documents of two tokens or more",
)


class PretrainRecipe(TrainingRecipe):
    """A pre-training run on a data directory, a mixture of several, or synthetic tokens."""

    targets: ClassVar = TOKENS

    stage: Literal["pretrain"]
    data: Location | Annotated[SyntheticData | MixtureData, Field(discriminator="kind")]
    evaluation_rows: PositiveInt
    ngram_baselines: bool = True
    z_loss: NonNegativeFloat = 0.0
    init_from: Location | None = None
    """A run or an exported bundle whose weights to start from, with a new optimizer; null: random weights."""
    model: ModelConfig | None = None
    """null: the architecture of `init_from`."""

    @model_validator(mode="after")
    def _has_an_architecture(self) -> PretrainRecipe:
        if self.model is None and self.init_from is None:
            raise ValueError("model: missing; give the architecture, or init_from with a run or bundle that has one")
        return self

    @model_validator(mode="after")
    def _baselines_have_a_corpus(self) -> PretrainRecipe:
        if self.ngram_baselines and not isinstance(self.data, str):
            raise ValueError("ngram_baselines=true needs one data directory to count n-grams in; set it to false")
        return self


def language_model_loss(module: LossModule, batch: PackedBatch, z_loss: float = 0.0) -> Loss:
    """Next-token cross-entropy over all targets inside documents; in training, also the z-loss."""
    batch = batch.to(module.trunk.embed_tokens.weight.device)
    hidden_TD = module.trunk(batch.tokens_T, documents_of(batch))
    z_loss = z_loss if module.training else 0.0
    return Loss(next_token_loss(module.trunk, hidden_TD, batch.targets_T, batch.has_target_T, z_loss))


def architecture(recipe: PretrainRecipe) -> ModelConfig | None:
    """The architecture of `init_from` or of the recipe, which must agree; None while neither is known."""
    if recipe.init_from is None:
        return recipe.model
    initial = find_initial_model(recipe.init_from)
    if initial is None:
        return recipe.model
    config = initial.config()
    if recipe.model is not None:
        check_same_architecture(recipe.model, config, recipe.init_from)
    return config


def prepare(recipe: PretrainRecipe, world: World, console: Console) -> Job:
    """Data, model and baselines of a pre-training run."""
    initial = initial_model(recipe.init_from, world) if recipe.init_from is not None else None
    config = architecture(recipe)
    assert config is not None, "checked by the recipe and by initial_model"
    dataset, heldout = open_data(recipe.data, config)

    def finish(engine: TrainingEngine, outcome: Outcome, console: Console) -> tuple[str, dict[str, Any]]:
        loss = outcome.last_evaluation["heldout_loss"]
        if not recipe.ngram_baselines:
            return f"held-out loss {loss:.3f} nats/token", {"heldout_loss": loss}
        rows = spread_rows(heldout.n_rows, recipe.evaluation_rows)
        assert isinstance(dataset, PackedDataset) and isinstance(heldout, PackedDataset)
        baselines = ngram_losses(dataset, heldout, rows) if world.is_main else {}
        _print_comparison(loss, baselines, console)
        best = min(baselines, key=lambda name: baselines[name], default="")
        figure = f"held-out loss {loss:.3f} nats/token (best n-gram {baselines.get(best, 0):.3f}, {best})"
        return figure, {"heldout_loss": loss, "baselines": baselines}

    if initial:
        initial.check_tokenizer(data_directories(recipe.data).values())
        trunk = initial.load(recipe.attention, world.device, recipe.engine.dtype)
    else:
        with world.device:  # initialize on the device
            trunk = Transformer(config, recipe.attention, recipe.seed, recipe.engine.dtype)
    return Job(
        module=LossModule(trunk, partial(language_model_loss, z_loss=recipe.z_loss)),
        stage=packed_stage(
            dataset, heldout, recipe.evaluation_rows, recipe.loop.rows_per_micro_batch, world,
            TOKENS,
        ),
        tokenizer=next((Path(path) / "tokenizer.model" for path in data_directories(recipe.data).values()), None),
        finish=finish,
    )  # fmt: skip


def _print_comparison(loss: float, baselines: dict[str, float], console: Console) -> None:
    table = Table("model of the held-out tokens", "nats/token", "ours is better by", title="against n-gram models")
    for name, value in baselines.items():
        color = "green" if loss < value else "red"
        table.add_row(name, f"{value:.3f}", f"[{color}]{value - loss:+.3f}[/]")
    table.add_row("[bold]this model[/]", f"[bold]{loss:.3f}[/]", "")
    console.print(table)


def main() -> int:
    """Entry point."""

    def summary(recipe: PretrainRecipe) -> Summary:
        return summarize(recipe, recipe.data, architecture(recipe))

    return run_stage(PretrainRecipe, __doc__, summary, prepare)


if __name__ == "__main__":
    sys.exit(main())
