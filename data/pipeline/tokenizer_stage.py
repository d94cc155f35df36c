"""Stage tokenizer: train a tokenizer on a sample of the training side, or load an existing one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data.format.tokenizer import MODEL_FILE, DialogueTokenizer, train_tokenizer
from data.pipeline.item_step import ItemStep
from data.pipeline.read import UnitResults
from data.pipeline.select import Selection
from data.pipeline.work_folder import WorkFolder
from recipes.loader import Section
from recipes.run_identity import Location

TOKENIZER = "tokenizer"


class TrainedTokenizer(Section):
    """Train a SentencePiece BPE on the training side."""

    kind: Literal["train"]
    vocab_size: int = Field(gt=261)
    # Characters of the sample, dialogues in hash order.
    sample_characters: int = Field(default=10_000_000, gt=0)
    # Share of the characters that get their own piece; others are encoded as bytes.
    character_coverage: float = Field(default=0.9995, ge=0.98, le=1)  # SentencePiece's range


class TokenizerFile(Section):
    """Use a tokenizer made by an earlier data.prepare."""

    kind: Literal["file"]
    path: Location


TokenizerRule = Annotated[TrainedTokenizer | TokenizerFile, Field(discriminator="kind")]


class MakeTokenizer(ItemStep):
    """One item."""

    stage = TOKENIZER
    counted = "step"

    def __init__(self, work: WorkFolder, rule: TrainedTokenizer | TokenizerFile) -> None:
        super().__init__(work)
        self.rule = rule

    def do(self, number: int, folder: Path) -> None:
        self._tokenizer().save(folder)

    def _tokenizer(self) -> DialogueTokenizer:
        if isinstance(self.rule, TokenizerFile):
            return DialogueTokenizer.load(self.rule.path)
        return train_tokenizer(
            _texts_in_hash_order(self.work),
            None,
            self.rule.vocab_size,
            sample_characters=self.rule.sample_characters,
            character_coverage=self.rule.character_coverage,
        )


def made_tokenizer(work: WorkFolder) -> DialogueTokenizer:
    """The tokenizer of the run, after the stage."""
    return DialogueTokenizer.load(work.item(TOKENIZER, 0) / MODEL_FILE)


def _texts_in_hash_order(work: WorkFolder) -> Iterator[str]:
    """The rendered texts of the training side, whole dialogues in hash order, read from disk one by one."""
    unit_of, row_of = Selection(work).rows_of("train")
    units = {unit: UnitResults(work, unit) for unit in np.unique(unit_of).tolist()}
    hashes = np.concatenate(
        [np.zeros(0, np.uint64), *(u.column("rows")["sample_hash"][row_of[unit_of == n]] for n, u in units.items())]
    )
    texts = {number: unit.texts() for number, unit in units.items()}
    for place in np.argsort(hashes, kind="stable").tolist():
        yield from texts[int(unit_of[place])].of(int(row_of[place]))
