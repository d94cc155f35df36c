"""Stage tokenize: texts of each unit to documents of tokens, in separate files for each side."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from data.format.encode import add_control_tokens
from data.format.tokenize import BulkEncoder
from data.packed.cut import CutRule, cut_all
from data.packed.packing import DOCUMENT, EncodedCorpus, token_dtype
from data.pipeline.item_step import ItemStep
from data.pipeline.read import UnitResults
from data.pipeline.select import SIDES, Selection
from data.pipeline.tokenizer_stage import made_tokenizer
from data.pipeline.work_folder import WorkFolder
from recipes.files import write_json

TOKENIZE = "tokenize"
_FIGURES = "figures.json"
_TEXT_BYTES_AT_ONCE = 2 << 20


@dataclass
class Figures:
    """Counts of a side of a unit; addable."""

    n_dialogues: int = 0
    n_messages: int = 0
    n_characters: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    n_repeated_tokens: int = 0
    n_answer_tokens: int = 0
    n_partner_leaves: int = 0
    n_partner_continues: int = 0
    n_openings_not_repeated: int = 0  # dialogues that are split and have an opening longer than half a row

    def add(self, other: "Figures") -> None:
        """Add the counts of another."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class TokenizeUnits(ItemStep):
    """Items are units."""

    stage = TOKENIZE

    def __init__(self, work: WorkFolder, n_units: int, row_length: int, context_tokens: int) -> None:
        super().__init__(work)
        self.n_units, self.row_length, self.context_tokens = n_units, row_length, context_tokens
        self._encoder: BulkEncoder | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_encoder": None}

    def n_items(self) -> int:
        return self.n_units

    def do(self, number: int, folder: Path) -> None:
        if self._encoder is None:
            self._encoder = BulkEncoder(made_tokenizer(self.work))
        tokenizer = self._encoder.tokenizer
        rule = CutRule(self.row_length, self.context_tokens, tokenizer.inside_character())
        selection = Selection(self.work)
        unit, side_of_row = UnitResults(self.work, number), selection.sides(number)
        number_in_side = selection.numbers(number)
        n_characters = np.array(unit.column("rows")["n_characters"])
        figures = {name: Figures() for name in SIDES}
        with ExitStack() as opened:
            files = {
                name: {array: opened.enter_context(open(_array(folder, name, array), "wb")) for array in _ARRAYS}
                for name in SIDES
            }
            for rows, rendered in unit.rendered(_TEXT_BYTES_AT_ONCE):
                is_kept = np.isin(side_of_row[rows], list(SIDES.values()))
                rendered = rendered.of(is_kept)
                ids, n_ids = self._encoder.encode(rendered.texts_B, rendered.n_bytes)
                encoded = add_control_tokens(tokenizer, rendered, ids, n_ids)
                corpus, without_opening = cut_all(encoded, rule, tokenizer.vocab_size)
                origin = corpus.documents["dialogue"].copy()
                corpus.documents["dialogue"] = number_in_side[rows][is_kept][origin]
                side, characters = side_of_row[rows][is_kept], n_characters[rows][is_kept]
                for name, value in SIDES.items():
                    part = corpus.of_documents(side[origin] == value)
                    _write(files[name], part)
                    counts = _counts(part)
                    counts.n_dialogues = int(np.count_nonzero(side == value))
                    counts.n_messages = int(rendered.n_messages[side == value].sum())
                    counts.n_characters = int(characters[side == value].sum())
                    counts.n_openings_not_repeated = int(np.count_nonzero(side[without_opening] == value))
                    figures[name].add(counts)
        write_json(folder / _FIGURES, {name: asdict(counts) for name, counts in figures.items()})


_ARRAYS = tuple(field.name for field in fields(EncodedCorpus))


def _array(folder: Path, side: str, array: str) -> Path:
    return folder / f"{side}.{array}.bin"


def _write(files: Mapping[str, IO[bytes]], corpus: EncodedCorpus) -> None:
    for array, file in files.items():
        getattr(corpus, array).tofile(file)


def _counts(corpus: EncodedCorpus) -> Figures:
    labels = np.bincount(corpus.label[corpus.label >= 0], minlength=2)
    return Figures(
        n_documents=len(corpus.documents),
        n_tokens=len(corpus.tokens),
        n_repeated_tokens=int(corpus.documents["n_repeated"].sum(dtype=np.int64)),
        n_answer_tokens=int(np.count_nonzero(corpus.loss_mask)),
        n_partner_leaves=int(labels[0]),
        n_partner_continues=int(labels[1]),
    )


def figures_of(work: WorkFolder, unit: int) -> dict[str, Figures]:
    """The counts of each side of a unit."""
    counts = json.loads((work.item(TOKENIZE, unit) / _FIGURES).read_text(encoding="utf-8"))
    return {side: Figures(**of_side) for side, of_side in counts.items()}


def encoded_unit(work: WorkFolder, unit: int, side: str, vocab_size: int) -> EncodedCorpus:
    """The documents of one side of a unit, memory-mapped."""
    dtypes: dict[str, npt.DTypeLike] = {
        "tokens": token_dtype(vocab_size),
        "loss_mask": np.uint8,
        "label": np.int8,
        "documents": DOCUMENT,
    }
    arrays = {}
    for name in _ARRAYS:
        path = _array(work.item(TOKENIZE, unit), side, name)
        is_empty = path.stat().st_size == 0  # empty files cannot be mapped
        arrays[name] = np.zeros(0, dtypes[name]) if is_empty else np.memmap(path, dtypes[name], mode="r")
    return EncodedCorpus(**arrays)
