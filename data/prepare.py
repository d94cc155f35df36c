"""Prepare training data: dialogue logs to a tokenizer, packed token shards and a manifest.

python -m data.prepare recipes/demo/data.yaml
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from data.format.dialogue import Dialogue
from data.format.tokenizer import MODEL_FILE, DialogueTokenizer, TokenizerError
from data.packed.shards import FORMAT, MANIFEST_FILE, FormatError, PackedDataset, ShardError
from data.pipeline.executor import RECIPE_ERRORS, DataStage, run_stage
from data.pipeline.item_step import ItemStep
from data.pipeline.merge import DIALOGUES, MergeResults, read_manifest_of
from data.pipeline.minhash import minhash_stages, texts_read
from data.pipeline.pack import PackGroups
from data.pipeline.progress import Steps
from data.pipeline.read import UNITS_FILE, ReadSettings, ReadUnits
from data.pipeline.recipe import DataRecipe
from data.pipeline.report import key_figure, print_report, print_unread
from data.pipeline.select import QUARANTINE_FILE, SIDES, SelectDialogues
from data.pipeline.tokenize import TokenizeUnits
from data.pipeline.tokenizer_stage import MakeTokenizer
from data.pipeline.unit import units_of, write_units
from data.pipeline.work_folder import StageError, WorkFolder
from data.sources.record import LeftOut
from data.sources.registry import named_sources
from recipes.run_directory import RunDirectoryError
from recipes.stage_command import Made, StageCommand


def prepare(recipe: DataRecipe, steps: Steps) -> dict[str, Any]:
    """Write all outputs of the recipe below its run_dir, except done.json; returns the manifest.

    An interrupted run is resumed, with byte-identical results.
    """
    prepare_until(recipe, steps)
    return read_manifest_of(Path(recipe.run_dir))


def prepare_until(recipe: DataRecipe, steps: Steps, last: str | None = None) -> tuple[WorkFolder, int]:
    """Run the stages up to `last`, or all; returns their results, and the number of units."""
    work = WorkFolder(Path(recipe.run_dir))
    units = units_of(named_sources(recipe.sources), recipe.unit_bytes)
    write_units(work.path / UNITS_FILE, units)
    if recipe.executor.kind == "local":
        work.remove_leftovers()
    with recipe.executor.open() as run:
        for stage in stages(recipe, work, len(units)):
            logs = work.logs(stage.name, stage.n_tasks)
            with steps.following(stage.name, *_progress(stage, work, logs)):
                run_stage(run, stage, logs)
            if stage.name == last:
                break
    return work, len(units)


def _progress(stage: DataStage, work: WorkFolder, logs: Path) -> tuple[str, Callable[[], int], Callable[[], int]]:
    """The counted items of a stage, a function for the number done, and one for the total."""
    first = stage.pipeline[0]
    if isinstance(first, ItemStep):
        return first.counted, lambda: work.n_done(stage.name), first.n_items
    return "tasks", lambda: len(list((logs / "completions").glob("*"))), lambda: stage.n_tasks


def stages(recipe: DataRecipe, work: WorkFolder, n_units: int) -> list[DataStage]:
    """All stages in order."""
    sources, n = named_sources(recipe.sources), recipe.n_tasks
    settings = ReadSettings(
        recipe.filters, recipe.scrub, recipe.prompt_template, recipe.seed, recipe.continue_within_seconds,
        recipe.split.characters,
    )  # fmt: skip
    near = recipe.near_duplicates
    minhash = minhash_stages(work, texts_read(work), n_units, near, n) if near else []
    select = SelectDialogues(
        work, list(sources), n_units, recipe.split, recipe.max_bad_fraction, near is not None,
        recipe.continue_within_seconds,
    )  # fmt: skip
    row_length, rows_per_shard = recipe.row_length, recipe.rows_per_shard
    shared_out = (
        ReadUnits(work, sources, settings),
        TokenizeUnits(work, n_units, row_length, recipe.context_tokens),
        PackGroups(work, n_units, row_length, rows_per_shard, recipe.pack_tokens),
    )
    read, tokenize, pack = (DataStage(step.stage, [step], n) for step in shared_out)
    select_, tokenizer, merge = (
        DataStage(step.stage, [step], 1)
        for step in (select, MakeTokenizer(work, recipe.tokenizer), MergeResults(work, row_length, rows_per_shard))
    )
    return [read, *minhash, select_, tokenizer, tokenize, pack, merge]


def _dry_run(recipe: DataRecipe, console: Console) -> None:
    for name, source in named_sources(recipe.sources).items():
        files = source.files()
        good = left_out = bad = messages = 0
        for record in source.read():
            if isinstance(record, Dialogue):
                good, messages = good + 1, messages + len(record.messages)
            elif isinstance(record, LeftOut):
                left_out += 1
            else:
                bad += 1
        console.print(
            f"{name}: {good + left_out + bad:,} records in {len(files)} file(s): {good:,} dialogues, "
            f"{messages:,} messages, {left_out:,} left out, {bad:,} bad"
        )
    print_unread(named_sources(recipe.sources), console)


def _is_whole(run_dir: Path) -> bool:
    """Whether the outputs of a finished run are intact. Raises RunDirectoryError if another version wrote them: its
    inputs may be gone, so they are not made again without confirmation."""
    try:
        for side in ("train", "heldout"):
            PackedDataset(run_dir / side)
        DialogueTokenizer.load(run_dir)
    except FormatError:
        raise RunDirectoryError(
            f"{run_dir}: its data is intact, but has another format than this version ({FORMAT}); set "
            "another run_dir, or remove this one to prepare it again"
        ) from None
    except (ShardError, TokenizerError):
        return False
    return all((run_dir / "dialogues" / f"{side}.jsonl").is_file() for side in ("train", "heldout"))


def _make(recipe: DataRecipe, console: Console) -> Made:
    with Steps(console) as steps:
        manifest = prepare(recipe, steps)

    def report(seconds: float, console: Console) -> None:
        print_unread(named_sources(recipe.sources), console)
        print_report(Path(recipe.run_dir), manifest, seconds, console)

    figures = {"fingerprint": manifest["train"]["fingerprint"]}
    return Made(key_figure({side: manifest[side] for side in SIDES}), report, figures)


COMMAND = StageCommand(
    DataRecipe,
    __doc__,
    make=_make,
    dry_run=_dry_run,
    is_whole=_is_whole,
    files=("train", "heldout", DIALOGUES, "plots", MANIFEST_FILE, MODEL_FILE, QUARANTINE_FILE),  # plots: data.inspect's
    outputs=(MANIFEST_FILE, MODEL_FILE, DIALOGUES),
    by_size=tuple(SIDES),
    recipe_errors=RECIPE_ERRORS,
    other_errors=(StageError,),
    after_interrupt="run the same command again to continue",
    remove_work=lambda run_dir: WorkFolder(run_dir).remove(),
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
