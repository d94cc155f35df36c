"""Run a training stage: command line, errors as one message, resume, signals, and the final model directory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from data.packed.sampler import Rows
from model.attention_ops import choose_backend
from model.execution import shape_blocks, what_slows
from model.weights import copy_model, save_model
from recipes.interrupt import EXIT_CODE as INTERRUPTED
from recipes.interrupt import print_interrupt
from recipes.loader import parse_command_line, print_error, print_recipe
from recipes.plan_check import check_alone
from recipes.run_directory import RunState, finish_run, prepare_run_directory
from recipes.stage_errors import USER_ERROR, print_os_error, run_entry
from train.checkpoint.best import BestWeights
from train.checkpoint.checkpoint import CheckpointError, Checkpoints, CheckpointState, Write
from train.checkpoint.hashed_file import file_hash
from train.deepspeed.background import on_main
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.snapshot import Snapshot
from train.deepspeed.universal import universal_form
from train.deepspeed.world import World, check_launch, join_world
from train.health.rank_messages import rank_0_speaks
from train.health.skipping import TrainingError
from train.health.stopping import StopRequest, die_with_parent
from train.health.watchdog import Watchdog
from train.loop import Outcome, train
from train.memory.report import Summary
from train.metrics import Metrics, plot_metrics
from train.stage import Job, TrainingRecipe
from train.throughput import Throughput

R = TypeVar("R", bound=TrainingRecipe)
TRAINING_FAILED = 1


def run_stage(
    schema: type[R],
    description: str | None,
    summarize: Callable[[R], Summary],
    prepare: Callable[[R, World, Console], Job],
) -> int:
    """Run the training stage of the command line's recipe; the exit code.

    summarize: what to print before the ranks join (and by --dry-run). SIGTERM saves and exits 0; Ctrl-C saves and exits
    130; user errors print one message and exit 2; training that cannot continue and files that cannot be written exit
    1; a rank that has failed exits 3.
    """
    with rank_0_speaks():
        command = parse_command_line(schema, description=description)
        recipe = command.recipe
        summaries: list[Summary] = []

        def plan() -> None:
            if not command.dry_run:
                check_launch()
            summaries.append(summarize(recipe))

        if code := run_entry(plan, recipe.run_dir):
            sys.exit(code)
        (summary,) = summaries
        if command.dry_run:
            console = Console()
            print_recipe(recipe, console)
            summary.print(console)
            summary.print_memory(console)
            n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
            return run_entry(lambda: check_alone(recipe, command.recipe_path, console, n_ranks), recipe.run_dir)
    return _run_ranks(recipe, summary, partial(prepare, recipe))


def _run_ranks(recipe: TrainingRecipe, summary: Summary, prepare: Callable[[World, Console], Job]) -> int:
    die_with_parent()
    stop = StopRequest()
    world = join_world(recipe.engine.timeout_minutes)
    console = Console(quiet=not world.is_main)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with Watchdog(world, 60 * recipe.engine.timeout_minutes) as watchdog:
            try:
                try:
                    return _run(recipe, summary, prepare, world, console, stop)
                finally:
                    stop.end()  # the launcher sends SIGTERM after another rank's failure: it would replace the error
            except KeyboardInterrupt:
                code = INTERRUPTED if stop.by_keyboard else 0
                return watchdog.end(code, partial(print_interrupt, "the same command continues"))
            except (TrainingError, CheckpointError) as error:
                return watchdog.end(TRAINING_FAILED, partial(print_error, error))
            except RuntimeError as error:
                if not watchdog.explains(error):
                    raise
                return watchdog.code()
            except OSError as error:
                # a missing file is a user error; a full or broken disk is not, and the last checkpoint is intact
                code = USER_ERROR if isinstance(error, FileNotFoundError) else TRAINING_FAILED
                return watchdog.end(code, partial(print_os_error, error, recipe.run_dir))
            except ValueError as error:
                return watchdog.end(USER_ERROR, partial(print_error, error))
    finally:
        torch.distributed.destroy_process_group()


def _run(
    recipe: TrainingRecipe, summary: Summary, prepare: Callable[[World, Console], Job], world: World, console: Console,
    stop: StopRequest,
) -> int:  # fmt: skip
    began, inputs = time.monotonic(), recipe.inputs()
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
        engine = TrainingEngine(job.module, recipe.engine, recipe.optimizer, world)
        steps = recipe.loop.max_steps
        checkpoints = Checkpoints(
            run_dir / "checkpoints", recipe.loop.keep, world, console, steps, recipe.schedule.stable_steps
        )
        world.progress.at("looking for a checkpoint")
        start = resume(checkpoints, engine, job.stage.rows, console)
        best = BestWeights(
            recipe.loop.keep_best, recipe.loop.stop_after, run_dir, world, partial(_save_weights, engine, job),
            start.best if start else None,
        )  # fmt: skip
        metrics = None
        if world.is_main:
            first = start.step if start else -1
            metrics = Metrics(run_dir, console, recipe.wandb, recipe.model_dump(), first, steps)
        throughput = Throughput(job.module.trunk.config, world)
        with metrics or nullcontext(), stop.polled():
            outcome = train(
                job.stage, engine, recipe.loop, recipe.schedule, recipe.seed, start,
                checkpoints, partial(_snapshot, engine, job), metrics, stop.requested, run_dir, throughput, best,
            )  # fmt: skip
        if not outcome.finished:
            kept = "with a checkpoint; the same command continues from it"
            if recipe.loop.save_every is None:
                kept = "without a checkpoint (loop.save_every: null)"
            console.print(f"stopped at step {outcome.step} {kept}")
            return INTERRUPTED if stop.by_keyboard else 0
        summary.compare(console, world)
        key_figure, figures = _write_results(engine, job, best, outcome, run_dir, console)
        if world.is_main:
            figures |= best.figures(outcome.step, steps)
            plot_metrics(run_dir, figures.get("baselines"), figures.get("kept_step"))
            seconds = time.monotonic() - began
            figures["skipped_steps"] = outcome.skipped_steps
            finish_run(run_dir, recipe, inputs, key_figure, seconds, figures, outputs=("model",))
            console.print(f"[bold]{key_figure}[/]  -> {run_dir / 'model'}", highlight=False)
        world.barrier()
    return 0


def _write_results(
    engine: TrainingEngine, job: Job, best: BestWeights, outcome: Outcome, run_dir: Path, console: Console
) -> tuple[str, dict[str, Any]]:
    """Write the final model; the key figure and the figures of the run (called on every rank)."""
    world = engine.world
    world.progress.at("writing the model", may_last=True)
    if best.best:
        of_best = best.directory(best.best.step)
        _write(world, run_dir / "model", lambda: copy_model(of_best, run_dir / "model"))
    else:
        _save_weights(engine, job, run_dir / "model")
    world.progress.at("finishing", may_last=True)
    key_figure, figures = job.finish(engine, outcome, console)
    if best.best:
        key_figure += f", step {best.best.step} of {outcome.step} kept"
    return key_figure, figures


def _set_up_blocks(job: Job, recipe: TrainingRecipe, world: World, console: Console) -> None:
    """Choose fused or plain blocks, and print the choice."""
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
    slow = what_slows(recipe.attention, backend, settings.blocks, execution, world.device, settings.dtype)
    for sentence in slow if world.is_main else ():
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)


def resume(checkpoints: Checkpoints, engine: TrainingEngine, rows: Rows, console: Console) -> CheckpointState | None:
    """Load the newest intact checkpoint into `engine`; None when there is none.

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


def _snapshot(engine: TrainingEngine, job: Job) -> Write:
    """Copy the state of a checkpoint; returns the function that writes this rank's share below a directory."""
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
            with ThreadPoolExecutor(1) as thread:
                model = thread.submit(write_model, directory / "model")
                return {**state.write(directory, abandoned), **model.result()}
        finally:
            state.release()

    return write


def _save_weights(engine: TrainingEngine, job: Job, directory: Path) -> None:
    """Write the current model (called on every rank)."""
    snapshot = Snapshot(engine.host_memory)
    weights = engine.weights(snapshot)
    snapshot.finish()
    snapshot.wait()
    try:
        _write(engine.world, directory, lambda: _write_model(job, weights, directory))
    finally:
        snapshot.release()


def _write(world: World, directory: Path, action: Callable[[], None]) -> None:
    """Run `action`, which writes `directory`, on rank 0. Raises CheckpointError on every rank when it fails."""
    _, failure = on_main(world, action)
    if failure:
        raise CheckpointError(
            f"{directory} could not be written: {failure}. The last checkpoint is intact; make room and run the same "
            "command again"
        )


def _write_model(job: Job, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    parts: dict[str, dict[str, torch.Tensor]] = {"trunk": {}, "head": {}}
    for name, tensor in weights.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    config = job.module.trunk.config
    files = {"tokenizer.model": job.tokenizer} if job.tokenizer else {}
    save_model(directory, config, parts["trunk"], parts["head"] or None, files)
