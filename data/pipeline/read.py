"""Stage read: parse and clean records; write dialogues, their numeric columns, and the texts to encode."""

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.clean.ledger import Ledger
from data.clean.quarantine import Quarantine
from data.clean.records import Filters, passing, scrubbed, without_bad
from data.clean.scrub import Scrub
from data.format.dialogue import Dialogue, without_end_label
from data.format.dialogue_json import from_json, to_json
from data.format.encode import MESSAGE_COLUMNS, RenderedDialogues, render
from data.packed.dialogue_table import table_of_columns
from data.pipeline.item_step import ItemStep
from data.pipeline.record import RECORD, ROW, participants_of, records_of, rows_of
from data.pipeline.unit import read_units
from data.pipeline.work_folder import WorkFolder
from data.prompt.training import TrainingTemplate
from data.prompt.values import PromptError
from data.sources.record import rejected
from data.sources.source import DialogueSource
from recipes.files import write_json

READ = "read"
UNITS_FILE = "units.json"
_DIALOGUES, _QUARANTINE, _LEDGER = "dialogues.jsonl", "quarantine.jsonl", "ledger.json"
_COLUMNS = {
    "records": RECORD,
    "participants": np.dtype("<u8"),
    "rows": ROW,
    "messages": MESSAGE_COLUMNS,
    "texts": np.dtype("u1"),
    "ids": np.dtype("u1"),
}
_DIALOGUES_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """What the dialogues of a unit depend on besides its files."""

    filters: Filters
    scrub: Scrub | None
    prompt_template: TrainingTemplate | None
    seed: int
    continue_within_seconds: float | None
    characters: tuple[str, ...]  # participants that do not link dialogues


class ReadUnits(ItemStep):
    """Items are units."""

    stage = READ

    def __init__(self, work: WorkFolder, sources: Mapping[str, DialogueSource], settings: ReadSettings) -> None:
        super().__init__(work)
        self.sources, self.settings = dict(sources), settings

    def n_items(self) -> int:
        return len(read_units(self.work.path / UNITS_FILE))

    def do(self, number: int, folder: Path) -> None:
        unit = read_units(self.work.path / UNITS_FILE)[number]
        prefix = f"{unit.source}/" if len(self.sources) > 1 else ""
        ledger = Ledger()
        with open(folder / _QUARANTINE, "w", encoding="utf-8", newline="\n") as file:
            quarantine = Quarantine(file, unit.source, ledger, self.settings.scrub)
            good = without_bad(unit.read(self.sources[unit.source]), quarantine)
            if not self.sources[unit.source].end_means_partner_left:
                good = map(without_end_label, good)
            named = (
                Dialogue(prefix + d.id, d.messages, d.character, self._people(d, ledger), d.metadata, unit.source)
                for d in good
            )
            with _rare_collections():
                _write(folder, named, quarantine, self.settings)
        write_json(folder / _LEDGER, {"source": unit.source, **ledger.to_dict()})

    def _people(self, dialogue: Dialogue, ledger: Ledger) -> tuple[str, ...]:
        """The participants without the characters, which are counted."""
        if not self.settings.characters:
            return dialogue.participants
        for name in {*dialogue.participants} & {*self.settings.characters}:
            ledger.of_characters[name] += 1
        return tuple(name for name in dialogue.participants if name not in self.settings.characters)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage less often: the many new dialogues have no reference cycles."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _write(folder: Path, dialogues: Iterable[Dialogue], quarantine: Quarantine, settings: ReadSettings) -> None:
    """Write all files of a unit except quarantine and ledger, a batch of dialogues at a time."""
    with ExitStack() as opened:
        lines_file = opened.enter_context(open(folder / _DIALOGUES, "wb"))
        columns = {name: opened.enter_context(open(folder / f"{name}.bin", "wb")) for name in _COLUMNS}
        for given in _batches(dialogues):
            cleaned = [_cleaned(dialogue, settings, quarantine) for dialogue in given]
            kept = [dialogue for dialogue in cleaned if dialogue is not None]
            quarantine.ledger.untrained_replies += sum(
                not message.is_trained for dialogue in kept for message in dialogue.messages if message.metadata
            )
            lines = [to_json(dialogue) + b"\n" for dialogue in kept]
            rendered = render(kept, settings.continue_within_seconds)
            rows = rows_of(kept, settings.seed)
            text_edges = np.append(0, np.cumsum(rendered.n_bytes))
            rows["text_bytes"] = np.diff(text_edges[2 * np.append(0, np.cumsum(rendered.n_messages))])
            rows["line_bytes"] = [len(line) for line in lines]
            ids = [dialogue.id.encode() for dialogue in kept]
            rows["id_bytes"] = [len(name) for name in ids]
            columns["ids"].write(b"".join(ids))
            records_of(given, [dialogue is not None for dialogue in cleaned], settings.seed).tofile(columns["records"])
            participants_of(given).tofile(columns["participants"])
            rows.tofile(columns["rows"])
            rendered.messages.tofile(columns["messages"])
            rendered.texts_B.tofile(columns["texts"])
            lines_file.write(b"".join(lines))


def _batches(dialogues: Iterable[Dialogue]) -> Iterator[list[Dialogue]]:
    batch: list[Dialogue] = []
    for dialogue in dialogues:
        batch.append(dialogue)
        if len(batch) == _DIALOGUES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _cleaned(dialogue: Dialogue, settings: ReadSettings, quarantine: Quarantine) -> Dialogue | None:
    """The cleaned dialogue, or None if it was counted as left out or bad."""
    ledger = quarantine.ledger
    clean = scrubbed([dialogue], settings.scrub, ledger) if settings.scrub else [dialogue]
    kept = next(passing(clean, settings.filters, ledger), None)
    if kept is None or settings.prompt_template is None:
        return kept
    try:
        return settings.prompt_template.apply(kept)
    except PromptError as error:
        quarantine.add(rejected(dialogue.source, dialogue.id, str(error), to_json(kept)))
        return None


class UnitResults:
    """The results of reading a unit; arrays are memory-mapped."""

    def __init__(self, work: WorkFolder, number: int) -> None:
        self._folder = work.item(READ, number)
        self.quarantine, self.dialogues = self._folder / _QUARANTINE, self._folder / _DIALOGUES

    def ledger(self) -> tuple[str, Ledger]:
        """The name of its source, and the counts of its records."""
        counts = json.loads((self._folder / _LEDGER).read_text(encoding="utf-8"))
        return counts.pop("source"), Ledger.from_dict(counts)

    def column(self, name: str) -> np.ndarray:
        """One of `records`, `participants`, `rows`, `messages`, `texts`, `ids`."""
        path = self._folder / f"{name}.bin"
        if not path.stat().st_size:
            return np.zeros(0, _COLUMNS[name])
        return np.memmap(path, _COLUMNS[name], mode="r")

    def rendered(self, text_bytes_at_once: int) -> Iterator[tuple[slice, RenderedDialogues]]:
        """Its rows in batches: a slice, and the rendered dialogues."""
        rows, messages, texts = self.column("rows"), self.column("messages"), self.column("texts")
        text_edges = np.append(0, np.cumsum(rows["text_bytes"]))
        message_edges = np.append(0, np.cumsum(rows["n_messages"]))
        first = 0
        while first < len(rows):
            end = max(first + 1, int(np.searchsorted(text_edges, text_edges[first] + text_bytes_at_once, "right")) - 1)
            yield (
                slice(first, end),
                RenderedDialogues(
                    np.array(texts[text_edges[first] : text_edges[end]]),
                    np.array(messages[message_edges[first] : message_edges[end]]),
                    np.array(rows["n_messages"][first:end]),
                ),
            )
            first = end

    def participants(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of participants of each row, and the concatenated hashes of all."""
        records, participants = self.column("records"), self.column("participants")
        of_row = np.repeat(records["is_kept"], records["n_participants"])
        return records["n_participants"][records["is_kept"]], participants[of_row]

    def dialogue_table(self, is_kept: np.ndarray, people: np.ndarray) -> pa.Table:
        """Ids and participants of the rows of a mask; a participant's number is its hash's index in `people`."""
        rows, (n_participants, participants) = self.column("rows"), self.participants()
        numbers = np.minimum(np.searchsorted(people, participants), len(people) - 1)
        return table_of_columns(rows["id_bytes"], self.column("ids"), n_participants, numbers, is_kept)

    def texts(self) -> "RowTexts":
        """Random access to the rendered texts of its rows."""
        return RowTexts(self.column("rows"), self.column("messages"), self.column("texts"))

    def read_dialogues(self) -> Iterator[Dialogue]:
        """The dialogues of its rows."""
        with open(self.dialogues, encoding="utf-8") as file:
            yield from map(from_json, file)


class RowTexts:
    """Random access to the rendered texts of rows."""

    def __init__(self, rows: np.ndarray, messages: np.ndarray, texts: np.ndarray) -> None:
        self._messages, self._texts = messages, texts
        self._text_edges = np.append(0, np.cumsum(rows["text_bytes"]))
        self._message_edges = np.append(0, np.cumsum(rows["n_messages"]))

    def of(self, row: int) -> list[str]:
        """Prefix and body of each message."""
        messages = self._messages[self._message_edges[row] : self._message_edges[row + 1]]
        sizes = np.stack([messages["prefix_bytes"], messages["body_bytes"]], axis=1).ravel()
        edges = np.append(0, np.cumsum(sizes, dtype=np.int64))
        text = self._texts[self._text_edges[row] : self._text_edges[row + 1]].tobytes()
        return [text[first:end].decode() for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
