"""Pre-train a decoder on packed shards: `torchrun --standalone -m train.pretrain recipes/demo/pretrain.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt
from rich.console import Console
from rich.table import Table

from data.batch import PackedBatch
from eval.ngram import ngram_losses
from eval.scoring import spread_rows
from model.config import ModelConfig
from model.transformer import Transformer
from recipes.loader import parse_command_line
from train.engine import Engine, World
from train.loop import Loss, Outcome
from train.losses import next_token_loss
from train.stage import (
    Job,
    LossModule,
    TrainingRecipe,
    documents_of,
    open_data,
    packed_stage,
    run_stage,
    summarize,
)


class PretrainRecipe(TrainingRecipe):
    """Everything of a pre-training run: the data directory, the architecture, and how to train it."""

    stage: Literal["pretrain"]
    data: str
    evaluation_rows: PositiveInt
    ngram_baselines: bool = True
    model: ModelConfig


def language_model_loss(module: LossModule, batch: PackedBatch) -> Loss:
    """Next-token cross-entropy over every target inside a document."""
    device = module.trunk.embed_tokens.weight.device
    hidden_TD = module.trunk(batch.tokens_T.to(device), documents_of(batch, device))
    return Loss(next_token_loss(module.trunk, hidden_TD, batch.targets_T.to(device), batch.trained_T.to(device)))


def prepare(recipe: PretrainRecipe, world: World, console: Console) -> Job:
    """Data, model and baselines of a pre-training run."""
    dataset, heldout = open_data(recipe.data, recipe.model)

    def finish(engine: Engine, outcome: Outcome, console: Console) -> tuple[str, dict[str, Any]]:
        loss = outcome.last_evaluation["heldout_loss"]
        if not recipe.ngram_baselines:
            return f"held-out loss {loss:.3f} nats/token", {"heldout_loss": loss}
        rows = spread_rows(heldout.n_rows, recipe.evaluation_rows)
        baselines = ngram_losses(dataset, heldout, rows) if world.is_main else {}
        _print_comparison(loss, baselines, console)
        best = min(baselines, key=lambda name: baselines[name], default="")
        figure = f"held-out loss {loss:.3f} nats/token (best n-gram {baselines.get(best, 0):.3f}, {best})"
        return figure, {"heldout_loss": loss, "baselines": baselines}

    return Job(
        module=LossModule(Transformer(recipe.model, recipe.attention, recipe.seed), language_model_loss),
        stage=packed_stage(
            dataset, heldout, recipe.evaluation_rows, recipe.loop.rows_per_micro_batch, world,
            count=lambda batch: int(batch.trained_T.sum()),
        ),
        tokenizer=Path(recipe.data) / "tokenizer.model",
        finish=finish,
    )  # fmt: skip


def _print_comparison(loss: float, baselines: dict[str, float], console: Console) -> None:
    table = Table("model of the held-out tokens", "nats/token", "ours is better by", title="against n-gram models")
    for name, value in baselines.items():
        colour = "green" if loss < value else "red"
        table.add_row(name, f"{value:.3f}", f"[{colour}]{value - loss:+.3f}[/]")
    table.add_row("[bold]this model[/]", f"[bold]{loss:.3f}[/]", "")
    console.print(table)


def main() -> int:
    """Entry point."""
    command = parse_command_line(PretrainRecipe, description=__doc__)
    recipe: PretrainRecipe = command.recipe
    summary = summarize(recipe, recipe.data, recipe.model)
    return run_stage(command, {"data": recipe.data}, lambda world, console: prepare(recipe, world, console), summary)


if __name__ == "__main__":
    sys.exit(main())
