"""Stage select: choose the dialogues to keep, and the side of each, from numbers and hashes."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data.clean.ledger import Ledger
from data.clean.records import CleanError, check_bad_fraction, check_times_for_labels
from data.clean.split import DROPPED, HELDOUT, TRAIN, FractionSplit, SplitError, SplitRecords, TimeSplit, split
from data.clean.split_warnings import Measure, is_too_large, side_measures, side_warnings, strongest_link
from data.pipeline.item_step import ItemStep
from data.pipeline.minhash import near_duplicates
from data.pipeline.read import UNITS_FILE, UnitResults
from data.pipeline.unit import read_units
from data.pipeline.work_folder import WorkFolder
from recipes.files import atomic_file, write_json

SELECT = "select"
SIDES = {"train": TRAIN, "heldout": HELDOUT}
QUARANTINE_FILE = "quarantine.jsonl"
_WARNINGS_FILE = "warnings.json"
_SIDES_FILE, _EDGES_FILE, _LEDGERS_FILE, _N_BEFORE_FILE = "sides.npy", "edges.npy", "ledgers.json", "n_before.npy"
_LEFT_OUT = -1


class SelectDialogues(ItemStep):
    """One item: keep the first of duplicates in source order, then split.

    The split sees every dialogue that was read, so that participants of a held-out session are not trained on, even if
    filters drop that session. A record is counted under the first reason to leave it out.
    """

    stage = SELECT
    counted = "step"

    def __init__(
        self,
        work: WorkFolder,
        source_names: Sequence[str],
        n_units: int,
        rule: TimeSplit | FractionSplit,
        max_bad_fraction: float,
        drops_near_duplicates: bool,
        continue_within_seconds: float | None,
    ) -> None:
        super().__init__(work)
        self.source_names, self.n_units = tuple(source_names), n_units
        self.rule, self.max_bad_fraction, self.drops_near_duplicates = rule, max_bad_fraction, drops_near_duplicates
        self.continue_within_seconds = continue_within_seconds

    def do(self, number: int, folder: Path) -> None:
        units = [UnitResults(self.work, unit) for unit in range(self.n_units)]
        ledgers, source_of_unit = self._ledgers(units)
        self._check_quarantine(units, ledgers)
        self._check_characters(Ledger.total(ledgers.values()))
        rows = [unit.column("rows") for unit in units]
        edges = np.cumsum([0, *map(len, rows)])
        source = np.repeat(source_of_unit, np.diff(edges))
        keys = np.concatenate([unit_rows["content_key"] for unit_rows in rows])
        is_duplicate = _repeats(keys)
        repeated_ids = _warning_of_repeated_ids(units, edges, is_duplicate)
        try:
            sides, warnings = self._split(units, source_of_unit)
        except SplitError as error:
            raise SplitError(f"{error}; {repeated_ids}" if repeated_ids else str(error)) from None
        is_near = near_duplicates(self.work) if self.drops_near_duplicates else np.zeros(len(keys), bool)
        is_near &= ~is_duplicate
        is_single = ~is_duplicate & ~is_near
        is_dropped = np.isin(sides, list(DROPPED))
        for name, ledger in ledgers.items():
            of_source = source == self.source_names.index(name)
            ledger.duplicates = int(np.count_nonzero(is_duplicate & of_source))
            ledger.near_duplicates = int(np.count_nonzero(is_near & of_source))
            for side, reason in DROPPED.items():
                if count := int(np.count_nonzero((sides == side) & is_single & of_source)):
                    ledger.filtered[reason] += count
            ledger.kept = int(np.count_nonzero(is_single & ~is_dropped & of_source))
            ledger.balance()
        sides[~is_single | is_dropped] = _LEFT_OUT
        total = Ledger.total(ledgers.values())
        _check_sides(sides, total)
        check_times_for_labels(total, self.continue_within_seconds)
        warnings += [repeated_ids] if repeated_ids else []
        write_json(folder / _WARNINGS_FILE, [*warnings, *side_warnings(_measures(units, rows), sides)])
        np.save(folder / _SIDES_FILE, sides)
        np.save(folder / _EDGES_FILE, edges)
        np.save(folder / _N_BEFORE_FILE, _n_before(sides, edges))
        write_json(folder / _LEDGERS_FILE, {name: ledger.to_dict() for name, ledger in ledgers.items()})

    def _ledgers(self, units: Sequence[UnitResults]) -> tuple[dict[str, Ledger], np.ndarray]:
        parts = [unit.ledger() for unit in units]
        ledgers = {
            name: Ledger.total(ledger for source, ledger in parts if source == name) for name in self.source_names
        }
        return ledgers, np.array([self.source_names.index(source) for source, _ in parts], np.int64)

    def _check_quarantine(self, units: Sequence[UnitResults], ledgers: dict[str, Ledger]) -> None:
        """Concatenate the quarantine; raises CleanError, and keeps the file, if too much of a source is in it."""
        path = self.work.run_dir / QUARANTINE_FILE
        with atomic_file(path) as file:
            for unit in units:
                file.write(unit.quarantine.read_bytes())
        kept_as = path.parent.with_name(f"{path.parent.name}.{QUARANTINE_FILE}")
        check_bad_fraction(ledgers, self.max_bad_fraction, path, kept_as)

    def _check_characters(self, total: Ledger) -> None:
        if unknown := [name for name in self.rule.characters if name not in total.of_characters]:
            raise SplitError(
                f"split.characters: {unknown[0]!r} takes part in no dialogue; expected ids of participants as the "
                "sources have them"
            )

    def _split(self, units: Sequence[UnitResults], source_of_unit: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The sides of all rows, and warnings about participants that link too many."""
        records = [unit.column("records") for unit in units]
        columns = {name: np.concatenate([part[name] for part in records]) for name in records[0].dtype.names or ()}
        is_kept = columns.pop("is_kept")
        source = np.repeat(source_of_unit, [len(part) for part in records])
        participants = np.concatenate([unit.column("participants") for unit in units])
        all_records = SplitRecords(source=source, participants=participants, **columns)
        link = strongest_link(all_records) if self.rule.by_participant else None
        warning = link.warning(self._name_of(link.participant, units)) if link and is_too_large(link, self.rule) else ""
        try:
            return split(all_records, self.rule)[is_kept], [warning] if warning else []
        except SplitError as error:
            is_undated = isinstance(self.rule, TimeSplit) and bool(np.isnan(all_records.start_time).all())
            raise SplitError(f"{error}; {warning}" if warning and not is_undated else str(error)) from None

    def _name_of(self, participant: int, units: Sequence[UnitResults]) -> str:
        """The participant with this hash as named in its dialogues, and the place of one: scrubbing hashes names."""
        for unit, results in zip(read_units(self.work.path / UNITS_FILE), units, strict=True):
            if found := _first_kept(participant, results):
                name, dialogue = found
                files = " to ".join(dict.fromkeys(Path(file).name for file in (unit.files[0], unit.files[-1])))
                return f"{name!r} (of dialogue {dialogue!r} in {files})"
        return "(whose dialogues are all left out)"


def _first_kept(participant: int, unit: UnitResults) -> tuple[str, str] | None:
    """The name of the participant with this hash in the unit's first dialogue with it, and that dialogue's id."""
    records, participants = unit.column("records"), unit.column("participants")
    edges = np.append(0, np.cumsum(records["n_participants"], dtype=np.int64))
    for place in np.flatnonzero(participants == participant):
        number = int(np.searchsorted(edges, place, "right")) - 1
        if records["is_kept"][number]:
            row = int(np.count_nonzero(records["is_kept"][:number]))
            dialogue = next(islice(unit.read_dialogues(), row, row + 1))
            return dialogue.participants[place - edges[number]], dialogue.id
    return None


def _warning_of_repeated_ids(units: Sequence[UnitResults], edges: np.ndarray, is_duplicate: np.ndarray) -> str:
    """The warning about dialogues of different content with the same id; empty if there are none."""
    records = [unit.column("records") for unit in units]
    hashes = np.concatenate([part["heldout_hash"][part["is_kept"]] for part in records])
    ids, counts = np.unique(hashes[~is_duplicate], return_counts=True)
    if not len(ids) or counts.max() < 2:
        return ""
    number = int(np.flatnonzero(hashes == ids[np.argmax(counts)])[0])
    unit = int(np.searchsorted(edges, number, "right")) - 1
    row = number - int(edges[unit])
    dialogue = next(islice(units[unit].read_dialogues(), row, row + 1))
    n_repeats = int(counts.sum()) - len(ids)
    return (
        f"{n_repeats:,} dialogue{'s have' if n_repeats > 1 else ' has'} the id of another one, such as {dialogue.id!r} "
        f"({counts.max():,} dialogues): they count as pieces of one conversation, which is on one side of the split; "
        "if they are different conversations, give each its own id"
    )


def _measures(units: Sequence[UnitResults], rows: Sequence[np.ndarray]) -> tuple[Measure, ...]:
    """The measures in which the two sides should agree, of all rows."""
    labels = [np.zeros((0, 2), np.int64)]
    for unit, own in zip(units, rows, strict=True):
        of_message, number = unit.column("messages")["label"], np.repeat(np.arange(len(own)), own["n_messages"])
        counts = [np.bincount(number[of_message == label], minlength=len(own)) for label in (1, 0)]
        labels.append(np.stack(counts, axis=1))
    stays, leaves = np.concatenate(labels).T
    known = {name: np.concatenate([own[name] for own in rows]) for name in ("n_speakers", "n_messages", "n_characters")}
    return side_measures(**known, n_stay=stays, n_leave=leaves)


def _n_before(sides: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The number of dialogues of each of SIDES before each unit, (units + 1, sides)."""
    of_side = [np.append(0, np.cumsum(sides == side))[edges] for side in SIDES.values()]
    return np.stack(of_side, axis=1)


def _repeats(keys: np.ndarray) -> np.ndarray:
    """A mask of the keys (n, 2) that repeat an earlier one."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable, so that the first of equal keys comes first
    ordered = keys[order]
    is_repeat = np.zeros(len(keys), bool)
    is_repeat[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return is_repeat


def _check_sides(sides: np.ndarray, total: Ledger) -> None:
    for name, side in SIDES.items():
        if not (sides == side).any():
            reasons = {
                "quarantined": total.quarantined,
                **total.filtered,
                "duplicates": total.duplicates,
                "near-duplicates": total.near_duplicates,
            }
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            raise CleanError(
                f"no {'training' if name == 'train' else 'held-out'} dialogue remains of {total.read:,} records "
                f"({counts or 'the sources are empty'}); check sources and filters"
            )


class Selection:
    """The results of stage select."""

    def __init__(self, work: WorkFolder) -> None:
        self._folder = work.item(SELECT, 0)
        self._edges = np.load(self._folder / _EDGES_FILE)
        self._sides = np.load(self._folder / _SIDES_FILE, mmap_mode="r")
        self._n_before = np.load(self._folder / _N_BEFORE_FILE)

    def sides(self, unit: int) -> np.ndarray:
        """The side of each row of a unit, or another number if it is left out."""
        return np.array(self._sides[self._edges[unit] : self._edges[unit + 1]])

    def numbers(self, unit: int) -> np.ndarray:
        """The number of each row of a unit in its side, i.e. its line in dialogues/<side>.jsonl; int32."""
        of_unit, numbers = self.sides(unit), np.full(len(self.sides(unit)), -1, np.int32)
        for place, side in enumerate(SIDES.values()):
            is_ours = of_unit == side
            numbers[is_ours] = self._n_before[unit, place] + np.arange(np.count_nonzero(is_ours))
        return numbers

    def rows_of(self, side: str) -> tuple[np.ndarray, np.ndarray]:
        """For all rows of a side in order: the unit, and the row number in it."""
        places = np.flatnonzero(self._sides == SIDES[side])
        unit = np.searchsorted(self._edges, places, "right") - 1
        return unit, places - self._edges[unit]

    def warnings(self) -> list[str]:
        """Warnings about the split, for the report."""
        warnings: list[str] = json.loads((self._folder / _WARNINGS_FILE).read_text(encoding="utf-8"))
        return warnings

    def ledgers(self) -> dict[str, Ledger]:
        """The counts of the records of each source."""
        counts = json.loads((self._folder / _LEDGERS_FILE).read_text(encoding="utf-8"))
        return {name: Ledger.from_dict(ledger) for name, ledger in counts.items()}
