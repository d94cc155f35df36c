"""What all stages share around the loop: recipe sections, start-up, resume, signals, the final model directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt, ValidationInfo, field_validator
from rich.console import Console
from torch import nn

from data.batch import PackedBatch, PackedRows, collate
from data.mixture import MixtureData, MixtureRows, open_mixture
from data.sampler import Rows
from data.shards import PackedDataset
from data.synthetic import SyntheticData, SyntheticRows
from eval.scoring import spread_rows
from model.attention_ops import Backend, Documents, choose_backend
from model.config import ModelConfig
from model.execution import shape_blocks
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from model.weights import load_model, save_model
from recipes.loader import CommandLine, Section, dump_recipe, tell_error
from recipes.run_directory import MayChange, RunState, finish_run, prepare_run_directory
from train.background import on_main
from train.checkpoint import CheckpointError, Checkpoints, CheckpointState, Write
from train.elastic import universal_form
from train.engine import Engine, EngineConfig, World, join_world
from train.hashed_file import file_hash
from train.loop import LoopConfig, LoopError, Loss, Outcome, Stage, no_grad_sum, train
from train.memory_report import Summary
from train.metrics import Metrics, WandbConfig, plot_metrics
from train.optim import Muon, Optimizer
from train.schedule import Schedule
from train.skipping import TrainingError
from train.snapshot import Snapshot
from train.stopping import StopRequest, die_with_parent
from train.throughput import Throughput
from train.watchdog import EXIT_CODE, Watchdog


class TrainingRecipe(Section):
    """Sections every training stage has."""

    run_dir: str
    seed: NonNegativeInt = 0
    attention: MayChange[Backend] = "auto"
    loop: LoopConfig
    optimizer: Optimizer
    schedule: Schedule
    engine: EngineConfig
    wandb: MayChange[WandbConfig] = WandbConfig()
    threads: MayChange[PositiveInt | None] = None
    """CPU threads a rank; left out, what torchrun or the system gives. The same number gives the same bits."""

    @field_validator("engine")
    @classmethod
    def _fits_optimizer(cls, engine: EngineConfig, others: ValidationInfo) -> EngineConfig:
        optimizer = others.data.get("optimizer")
        if isinstance(optimizer, Muon) and (obstacle := optimizer.obstacle(engine.precision, engine.zero_stage)):
            raise ValueError(obstacle)
        return engine


class LossModule(nn.Module):
    """A trunk (and a head, where the stage has one) whose forward is the stage's loss.

    The loss is inside the module so that DeepSpeed's hooks see every use of every parameter.
    """

    def __init__(self, trunk: Transformer, loss: Callable[[LossModule, Any], Loss], head: ScalarHead | None = None):
        super().__init__()
        self.trunk, self.head, self._loss = trunk, head, loss

    def forward(self, batch: Any) -> Loss:
        return self._loss(self, batch)


@dataclass(frozen=True)
class Job:
    """A stage ready to be trained. `finish` runs after the last step and returns the key figure and figures to keep.

    tokenizer: the file to put beside the weights (None: the tokens are made up).
    """

    module: LossModule
    stage: Stage
    tokenizer: Path | None
    finish: Callable[[Engine, Outcome, Console], tuple[str, dict[str, Any]]]


def documents_of(batch: PackedBatch) -> Documents:
    """The boundaries of a packed batch, as attention takes them, on the batch's device."""
    return Documents.on_device(batch.document_lengths, len(batch.tokens_T), batch.row_length, batch.row_length)


def open_data(data: str | SyntheticData | MixtureData, config: ModelConfig) -> tuple[PackedRows, PackedRows]:
    """Training and held-out rows of a data directory, of several or made up, checked to fit the model."""
    dataset: PackedRows
    heldout: PackedRows
    shards: PackedDataset | MixtureRows
    if isinstance(data, SyntheticData):
        other_seed = data.model_copy(update={"seed": data.seed + 1})
        dataset, heldout = (SyntheticRows(settings, config.vocab_size) for settings in (data, other_seed))
    else:
        if isinstance(data, MixtureData):
            shards, heldout = open_mixture(data, "train"), open_mixture(data, "heldout")
        else:
            shards, heldout = PackedDataset(Path(data) / "train"), PackedDataset(Path(data) / "heldout")
        dataset = shards
        if shards.vocab_size != config.vocab_size:
            raise LoopError(
                f"the model has vocab_size {config.vocab_size}, the tokenizer of {described(data)} "
                f"{shards.vocab_size} pieces"
            )
    if dataset.row_length > config.max_length:
        raise LoopError(
            f"rows of {described(data)} have {dataset.row_length} tokens, the model's max_length is {config.max_length}"
        )
    return dataset, heldout


def described(data: str | SyntheticData | MixtureData) -> str:
    """What to call training data in a sentence."""
    if isinstance(data, MixtureData):
        return " + ".join(f"{part.path} ({part.weight:g})" for part in data.parts)
    return data if isinstance(data, str) else "made-up tokens"


def data_directories(data: str | SyntheticData | MixtureData) -> dict[str, str]:
    """The directories that training data is read from, each under the recipe's key for it."""
    if isinstance(data, MixtureData):
        return {f"data.parts.{number}": part.path for number, part in enumerate(data.parts)}
    return {"data": data} if isinstance(data, str) else {}


def load_trunk(run_dir: str, attention: Backend) -> Transformer:
    """The finished model of an earlier stage, to be trained on."""
    return load_model(Path(run_dir) / "model", attention=attention).train()


def packed_stage(
    dataset: PackedRows,
    heldout: PackedRows,
    evaluation_rows: int,
    rows_per_micro_batch: int,
    world: World,
    count: Callable[[PackedBatch], int],
    extra: Callable[[Engine, list[PackedBatch]], dict[str, float]] = lambda engine, batches: {},
) -> Stage:
    """A stage over packed shards, evaluated on `evaluation_rows` evenly spread held-out rows (also by `extra`)."""
    if isinstance(heldout, MixtureRows):
        numbers = heldout.spread(evaluation_rows)
    else:
        numbers = spread_rows(heldout.n_rows, evaluation_rows)
    parts = [numbers[at : at + rows_per_micro_batch] for at in range(0, len(numbers), rows_per_micro_batch)]
    if len(parts) < world.size:
        raise LoopError(f"{len(numbers)} held-out rows are too few for {world.size} ranks; raise evaluation_rows")
    mine = [collate(heldout, part) for part in parts[world.rank :: world.size]]
    return Stage(
        rows=dataset,
        collate=lambda rows: collate(dataset, rows),
        count=count,
        evaluate=lambda engine: {**no_grad_sum(engine, mine, count), **extra(engine, mine)},
    )


def run_stage(
    command: CommandLine, inputs: Mapping[str, str], prepare: Callable[[World, Console], Job], summary: Summary
) -> int:
    """Run one training stage of a recipe to its end; the exit code.

    SIGTERM saves and exits 0; Ctrl-C saves and exits 130; user errors print one message and exit 2; a training that
    cannot go on and files that cannot be written exit 1, a rank that has failed exits 3.
    """
    recipe: TrainingRecipe = command.recipe
    console = Console()
    if command.dry_run:
        console.print(dump_recipe(recipe), highlight=False, markup=False)
        summary.print(console)
        summary.print_memory(console)
        return 0
    die_with_parent()
    stop = StopRequest()
    world = join_world(recipe.engine.timeout_minutes)
    if not world.is_main:
        console = Console(quiet=True)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with Watchdog(world, 60 * recipe.engine.timeout_minutes) as watchdog:
            try:
                return _run(recipe, dict(inputs), prepare, summary, world, console, stop)
            except RuntimeError as error:
                if isinstance(error, TrainingError | CheckpointError) or not watchdog.explains(error):
                    raise
                return EXIT_CODE
    except (ValueError, FileNotFoundError) as error:
        tell_error(error)
        return 2
    except OSError as error:  # a full disk, or a broken one, where files are written that are no checkpoint
        tell_error(error)
        Console(stderr=True).print("the same command continues from the last checkpoint, once that is mended")
        return 1
    except (TrainingError, CheckpointError) as error:  # raised on every rank alike, so told once
        if world.is_main:
            tell_error(error)
        return 1
    finally:
        torch.distributed.destroy_process_group()


def _run(
    recipe: TrainingRecipe,
    inputs: dict[str, str],
    prepare: Callable[[World, Console], Job],
    summary: Summary,
    world: World,
    console: Console,
    stop: StopRequest,
) -> int:
    began = time.monotonic()
    run_dir = Path(recipe.run_dir)
    held = prepare_run_directory(run_dir, recipe, inputs) if world.is_main else nullcontext(RunState.NEW)
    with held as state:
        (finished,) = world.sum([float(state is RunState.FINISHED)])
        if finished:
            console.print(f"{run_dir} is finished already, with this recipe and these inputs")
            return 0
        summary.print(console)
        summary.warn(console, world)
        world.progress.at("preparing data and model")
        job = prepare(world, console)
        _set_up_blocks(job, recipe, world, console)
        engine = Engine(job.module, recipe.engine, recipe.optimizer, world)
        checkpoints = Checkpoints(run_dir / "checkpoints", recipe.loop.keep, world, console)
        world.progress.at("looking for a checkpoint")
        start = resume(checkpoints, engine, job.stage.rows, console)
        metrics = None
        if world.is_main:
            first = start.step if start else -1
            metrics = Metrics(run_dir, console, recipe.wandb, recipe.model_dump(), first, recipe.loop.max_steps)
        flops_per_token = job.module.trunk.config.flops_per_token(job.stage.rows.row_length)
        throughput = Throughput(flops_per_token, world.device, world.size)
        with metrics or nullcontext():
            outcome = train(
                job.stage, engine, recipe.loop, recipe.schedule, recipe.seed, start,
                checkpoints, partial(_snapshot, engine, job), metrics, stop.requested, run_dir, throughput,
            )  # fmt: skip
        if not outcome.finished:
            kept = "with a checkpoint; the same command continues from it"
            if recipe.loop.save_every is None:
                kept = "without a checkpoint (loop.save_every: null)"
            console.print(f"stopped at step {outcome.step} {kept}")
            return 130 if stop.by_keyboard else 0
        summary.compare(console, world)
        world.progress.at("writing the model", may_last=True)
        _save_weights(engine, job, run_dir)
        world.progress.at("finishing", may_last=True)
        key_figure, figures = job.finish(engine, outcome, console)
        if world.is_main:
            plot_metrics(run_dir, figures.get("baselines"))
            seconds = time.monotonic() - began
            figures["skipped_steps"] = outcome.skipped_steps
            finish_run(run_dir, recipe, inputs, key_figure, seconds, figures)
            console.print(f"[bold]{key_figure}[/]  -> {run_dir / 'model'}", highlight=False)
        world.barrier()
    return 0


def _set_up_blocks(job: Job, recipe: TrainingRecipe, world: World, console: Console) -> None:
    """Choose how blocks are run, and say so."""
    backend = choose_backend(recipe.attention, world.device, recipe.engine.dtype)
    settings = recipe.engine
    execution = shape_blocks(
        job.module.trunk.blocks, settings.blocks, settings.recompute, settings.recompute_blocks, world.device
    )
    console.print(
        f"attention {backend}, {execution} blocks, {world.size} rank(s), {torch.get_num_threads()} thread(s) each, "
        f"{settings.precision}, ZeRO-{settings.zero_stage}",
        highlight=False,
    )


def resume(checkpoints: Checkpoints, engine: Engine, rows: Rows, console: Console) -> CheckpointState | None:
    """Load the newest sound checkpoint into `engine`; None when there is none.

    Raises CheckpointError when it was trained on data with another fingerprint.
    """
    found = checkpoints.newest()
    checkpoints.tidy(found[0] if found else None)
    if found is None:
        return None
    path, state = found
    if state.position.fingerprint != rows.fingerprint:
        raise CheckpointError(
            f"{path} was trained on data with fingerprint {state.position.fingerprint[:16]}, the data now has "
            f"{rows.fingerprint[:16]}: the corpus has changed. Restore it, or train in another run_dir"
        )
    if state.world_size == engine.world.size:
        engine.load(path)
    else:
        with universal_form(path, engine.world, console) as universal:
            engine.load(path, universal)
    tokens = f"{state.position.tokens_consumed:,} tokens consumed"
    console.print(f"resuming from {path}: {tokens}", highlight=False, soft_wrap=True)
    return state


def _snapshot(engine: Engine, job: Job) -> Write:
    """Copy all that a checkpoint holds; the function that writes this rank's share of it below a directory."""
    state = engine.snapshot()
    weights = engine.weights(state)
    state.finish()

    def write_model(directory: Path) -> dict[Path, str]:
        if not engine.world.is_main:
            return {}
        state.wait()
        _write_model(job, weights, directory)
        return {path: file_hash(path) for path in directory.iterdir()}

    def write(directory: Path, abandoned: threading.Event) -> dict[Path, str]:
        try:
            with ThreadPoolExecutor(1) as beside:
                model = beside.submit(write_model, directory / "model")
                return {**state.write(directory, abandoned), **model.result()}
        finally:
            state.release()

    return write


def _save_weights(engine: Engine, job: Job, run_dir: Path) -> None:
    """Write the finished model."""
    snapshot = Snapshot(engine.host_memory)
    weights = engine.weights(snapshot)
    snapshot.finish()
    snapshot.wait()
    _, failure = on_main(engine.world, lambda: _write_model(job, weights, run_dir / "model"))
    if failure:
        raise CheckpointError(
            f"{run_dir / 'model'} could not be written: {failure}. The last step's checkpoint is there; run the same "
            "command again once there is room"
        )


def _write_model(job: Job, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    parts: dict[str, dict[str, torch.Tensor]] = {"trunk": {}, "head": {}}
    for name, tensor in weights.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    config = job.module.trunk.config
    beside = {"tokenizer.model": job.tokenizer} if job.tokenizer else {}
    save_model(directory, config, parts["trunk"], parts["head"] or None, beside)


