"""Stage merge: write the outputs of the run from the results of all units and groups, the manifest last."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.clean.ledger import Ledger
from data.format.tokenizer import MODEL_FILE, DialogueTokenizer
from data.packed.shards import MANIFEST_FILE, join_groups
from data.pipeline.item_step import ItemStep
from data.pipeline.pack import packed_groups
from data.pipeline.read import UNITS_FILE, UnitResults
from data.pipeline.select import SIDES, Selection
from data.pipeline.tokenize import Figures, figures_of
from data.pipeline.tokenizer_stage import made_tokenizer
from data.pipeline.unit import read_units
from data.pipeline.work_folder import WorkFolder
from recipes.files import atomic_file, write_json

MERGE = "merge"
FORMAT = "dramatis-data-2"
DIALOGUES = "dialogues"


class MergeResults(ItemStep):
    """One item, repeated after an interruption: shards that were already moved are kept."""

    stage = MERGE
    counted = "step"

    def __init__(self, work: WorkFolder, row_length: int, rows_per_shard: int) -> None:
        super().__init__(work)
        self.row_length, self.rows_per_shard = row_length, rows_per_shard

    def do(self, number: int, folder: Path) -> None:
        run_dir, units = self.work.run_dir, read_units(self.work.path / UNITS_FILE)
        tokenizer, selection = made_tokenizer(self.work), Selection(self.work)
        with atomic_file(run_dir / MODEL_FILE) as file:
            file.write(tokenizer.model_bytes)
        (run_dir / DIALOGUES).mkdir(exist_ok=True)
        sides = {}
        for side in SIDES:
            with atomic_file(run_dir / DIALOGUES / f"{side}.jsonl") as file:
                for unit in range(len(units)):
                    _copy_lines(UnitResults(self.work, unit), selection.sides(unit) == SIDES[side], file)
            sides[side] = self._merge_side(side, [unit.source for unit in units], tokenizer, selection)
        ledgers = selection.ledgers()
        total = Ledger.total(ledgers.values())
        assert total.kept == sum(figures["n_dialogues"] for figures in sides.values()), "kept dialogues are lost"
        fingerprints = [figures["fingerprint"] for figures in sides.values()]
        manifest = {
            "format": FORMAT,
            "fingerprint": hashlib.sha256("\n".join([FORMAT, *fingerprints]).encode()).hexdigest(),
            "tokenizer_sha256": _sha256(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "row_length": self.row_length,
            "warnings": selection.warnings(),
            "records": total.to_dict(),
            "sources": {name: ledger.to_dict() for name, ledger in ledgers.items()},
            **sides,
        }
        write_json(run_dir / MANIFEST_FILE, manifest)

    def _merge_side(
        self, side: str, source_of_unit: Sequence[str], tokenizer: DialogueTokenizer, selection: Selection
    ) -> dict[str, Any]:
        """Write shards and manifest of one side; returns its figures for the run's manifest."""
        total = Figures()
        of_source: dict[str, Figures] = {}
        for unit, source in enumerate(source_of_unit):
            figures = figures_of(self.work, unit)[side]
            total.add(figures)
            of_source.setdefault(source, Figures()).add(figures)
        groups = packed_groups(self.work, side)
        n_rows = sum(group["n_rows"] for _, group in groups)
        statistics = _statistics(total, n_rows * self.row_length)
        statistics["sources"] = {
            source: {"n_dialogues": figures.n_dialogues, "n_tokens": figures.n_tokens}
            for source, figures in of_source.items()
            if figures.n_dialogues
        }
        units = [UnitResults(self.work, unit) for unit in range(len(source_of_unit))]
        is_ours = [selection.sides(unit) == SIDES[side] for unit in range(len(units))]
        people = _people(units, is_ours)
        manifest = join_groups(
            self.work.run_dir / side,
            groups,
            (unit.dialogue_table(is_kept, people) for unit, is_kept in zip(units, is_ours, strict=True)),
            row_length=self.row_length,
            vocab_size=tokenizer.vocab_size,
            rows_per_shard=self.rows_per_shard,
            tokenizer_sha256=_sha256(tokenizer),
            statistics=statistics,
        )
        assert manifest["n_tokens"] == total.n_tokens, "packing lost tokens"
        assert manifest["n_dialogues"] == total.n_dialogues, "the table of dialogues lacks some"
        return {**{key: manifest[key] for key in ("fingerprint", "n_rows", "n_tokens")}, **statistics}


def _people(units: Sequence[UnitResults], is_ours: Sequence[np.ndarray]) -> np.ndarray:
    """The sorted hashes of all participants in these rows (a mask for each unit)."""
    hashes = [np.zeros(0, np.uint64)]
    for unit, is_kept in zip(units, is_ours, strict=True):
        n_participants, participants = unit.participants()
        hashes.append(np.unique(participants[np.repeat(is_kept, n_participants)]))
    return np.unique(np.concatenate(hashes))


def _statistics(figures: Figures, n_positions: int) -> dict[str, Any]:
    counts = asdict(figures)
    n_tokens = counts.pop("n_tokens")
    n_own = n_tokens - figures.n_repeated_tokens
    return {
        **counts,
        "density": round(n_tokens / n_positions, 4) if n_positions else 0.0,
        "characters_per_token": round(figures.n_characters / n_own, 3) if n_own else 0.0,
    }


def _copy_lines(unit: UnitResults, is_kept: np.ndarray, file: IO[bytes]) -> None:
    """Append the lines of the rows of a mask; adjacent ones are copied together."""
    edges = np.append(0, np.cumsum(unit.column("rows")["line_bytes"]))
    with open(unit.dialogues, "rb") as lines:
        for first, end in _runs(is_kept):
            lines.seek(int(edges[first]))
            left = int(edges[end] - edges[first])
            while left:
                chunk = lines.read(min(left, 1 << 22))
                assert chunk, f"{unit.dialogues} is shorter than its index says"
                file.write(chunk)
                left -= len(chunk)


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    yield from zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)


def _sha256(tokenizer: DialogueTokenizer) -> str:
    return hashlib.sha256(tokenizer.model_bytes).hexdigest()


def read_manifest_of(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run after its merge."""
    manifest: dict[str, Any] = json.loads((run_dir / MANIFEST_FILE).read_text(encoding="utf-8"))
    return manifest
