"""What is known of a data directory before a stage reads it: from its manifest, or from the recipe that makes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from data.clean.ledger import Ledger
from data.clean.records import CleanError
from data.format.dialogue import Dialogue
from data.format.dialogue_json import read_dialogues
from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import MANIFEST_FILE
from data.pipeline.executor import LocalSettings
from data.pipeline.progress import Steps
from data.pipeline.read import UnitResults
from data.pipeline.recipe import DataRecipe
from data.pipeline.select import SELECT, SIDES, Selection
from data.pipeline.tokenizer_stage import TOKENIZER, TrainedTokenizer
from data.prepare import prepare_until

READ_AT_MOST_BYTES = 256 << 20
"""Larger sources are not read for a plan: they have enough data, and preparation reports bad records early."""


@dataclass(frozen=True)
class DataFacts:
    """Facts of one data directory; None where unknown."""

    run_dir: str
    vocab_size: int | None
    row_length: int
    heldout: list[Dialogue] | None
    prompt_template: str | None = None
    train: list[Dialogue] | None = None
    """None for a prepared directory, whose rows can be read."""
    continue_within_seconds: float | None = None

    def misfits(self, vocab_size: int, max_length: int) -> list[str]:
        """Why a model of these sizes cannot be trained or evaluated on it, and what would fit."""
        found = []
        if self.vocab_size is not None and self.vocab_size != vocab_size:
            found.append(
                f"the model has vocab_size {vocab_size}, the tokenizer of {self.run_dir} {self.vocab_size} pieces; "
                f"set model.vocab_size to {self.vocab_size}, or tokenizer.vocab_size of the data to {vocab_size}"
            )
        if self.row_length > max_length:
            found.append(
                f"rows of {self.run_dir} have {self.row_length} tokens, the model's max_length is {max_length}; set "
                f"model.max_length to {self.row_length} or more, or row_length of the data to {max_length} or less"
            )
        return found


@dataclass(frozen=True)
class Selected:
    """The dialogues that preparation would keep."""

    ledgers: dict[str, Ledger]
    train: list[Dialogue]
    heldout: list[Dialogue]


def facts_of_run(run_dir: str) -> DataFacts | None:
    """Facts of a prepared directory; None if there is none."""
    path = Path(run_dir)
    if not (path / MANIFEST_FILE).is_file():
        return None
    manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    heldout = path / "dialogues" / "heldout.jsonl"
    is_small = heldout.is_file() and heldout.stat().st_size <= READ_AT_MOST_BYTES
    return DataFacts(
        run_dir, manifest["vocab_size"], manifest["row_length"], list(read_dialogues(heldout)) if is_small else None
    )


def facts_of_recipe(recipe: DataRecipe) -> DataFacts:
    """Facts of a directory that is not prepared yet, from its recipe alone."""
    vocab_size: int | None
    if isinstance(recipe.tokenizer, TrainedTokenizer):
        vocab_size = recipe.tokenizer.vocab_size
    else:
        path = Path(recipe.tokenizer.path)
        vocab_size = DialogueTokenizer.load(path).vocab_size if path.exists() else None
    template = recipe.prompt_template.path if recipe.prompt_template else None
    return DataFacts(
        recipe.run_dir, vocab_size, recipe.row_length, None, template,
        continue_within_seconds=recipe.continue_within_seconds,
    )  # fmt: skip


def sides_of_recipe(recipe: DataRecipe) -> tuple[Selected | None, list[str]]:
    """The dialogues of a directory that is not prepared yet, and the errors that preparation would raise. The dialogues
    are None if the sources are too large or give none."""
    if _size(recipe) > READ_AT_MOST_BYTES:
        return None, []
    last = TOKENIZER if isinstance(recipe.tokenizer, TrainedTokenizer) else SELECT
    lenient = recipe.model_copy(update={"max_bad_fraction": 1.0})
    selected, problems = None, list[str]()
    for tried, until in ((recipe, last), (lenient, last), (lenient, SELECT)):
        try:
            selected = select_dialogues(tried, until)
            break
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return selected, list(dict.fromkeys(problems))


def _size(recipe: DataRecipe) -> int:
    return sum(path.stat().st_size for path in recipe.inputs().values() if path.is_file())


def select_dialogues(recipe: DataRecipe, until: str = SELECT) -> Selected:
    """Read, clean, deduplicate and split the sources with the steps of preparation, in a temporary folder. `until`: the
    last stage to run."""
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "data"
        run_dir.mkdir()
        settings = {"run_dir": str(run_dir), "executor": LocalSettings(kind="local"), "tasks": None}
        try:
            with Steps(Console(quiet=True)) as steps:
                work, n_units = prepare_until(recipe.model_copy(update=settings), steps, until)
        except CleanError as error:
            raise CleanError(str(error).replace(f"; all are in {run_dir}.quarantine.jsonl", "")) from None
        selection = Selection(work)
        sides: dict[str, list[Dialogue]] = {side: [] for side in SIDES}
        for unit in range(n_units):
            for side, dialogue in zip(selection.sides(unit), UnitResults(work, unit).read_dialogues(), strict=True):
                for name, number in SIDES.items():
                    if side == number:
                        sides[name].append(dialogue)
        return Selected(selection.ledgers(), **sides)
