"""Inspects a folder of conversations: which reader fits, and what its records support."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.format.dialogue import LABEL_KEY, Dialogue, continuation_labels
from data.format.dialogue_json import to_json
from data.format.encode import encode_dialogue, texts_of
from data.format.speaker_names import SpeakerNames, count_names
from data.format.tokenizer import DialogueTokenizer, TokenizerError, train_tokenizer
from data.packed.planned import READ_AT_MOST_BYTES, select_dialogues
from data.pipeline.recipe import DataRecipe
from data.sources.folder_files import describe_unread, is_packed, unread_files
from data.sources.hub import DatasetsSource
from data.sources.json_source import JsonSource
from data.sources.openai_messages import OpenaiMessagesSource
from data.sources.record import LeftOut, Rejected, SourceError
from data.sources.record_keys import RECORD_ALIASES, take
from data.sources.registry import SOURCES, AnySource
from data.sources.source import DialogueSource

_TRIED = 200  # records that each reader is tried on
_NEARLY_ALL = 0.95  # share of the dialogues
_SAMPLE = 20_000  # records read of large sources
_TOKENIZER_CHARACTERS = 2_000_000
_OWN_FORMATS = ("chat_jsonl", "openai_messages", "sharegpt", "preference_pairs", "hh_rlhf", "feedback_events")
"""Tried before the published corpora, whose readers accept more."""
PAIRS = {"preference_pairs": "jsonl", "hh_rlhf": "hh_rlhf"}
"""Source kinds that train.dpo reads too, with its names of their formats."""


_REMEDY = (
    'Write one JSON object a line into a .jsonl file: {"id": "c1", "messages": [{"speaker": "Tom", "text": "hi"}, ...]}'
    "; the README's table lists what each kind reads"
)


class LookError(ValueError):
    """Data that no reader accepts, or that is insufficient."""


@dataclass(frozen=True)
class Found:
    """A source and the outcomes of its records. `is_sample`: only the first records were read."""

    source: dict[str, Any]
    files: list[Path]
    n_bytes: int
    n_records: int
    bad: list[Rejected]
    n_left_out: int
    dialogues: list[Dialogue]
    is_sample: bool
    unread: list[str] = field(default_factory=list)  # files of the folder, relative to it
    why_no_departures: str | None = None  # why the end of a dialogue is no label, where another reader takes it for one

    @property
    def kind(self) -> str:
        """The kind of the records; for files in columns, that of their format."""
        return str(self.source.get("format", self.source)["kind"])

    @property
    def has_times(self) -> bool:
        """Whether most dialogues have a time for each message."""
        timed = sum(all(message.time is not None for message in dialogue.messages) for dialogue in self.dialogues)
        return timed > len(self.dialogues) / 2

    @property
    def names(self) -> SpeakerNames:
        """The speakers."""
        return count_names(self.dialogues)


def find_source(path: Path) -> Found:
    """The source that reads most of `path`. Raises LookError with each reader's error if none reads half."""
    if not path.exists():
        raise SourceError(f"--data {path}: no such file or directory")
    tried: list[tuple[float, Found]] = []
    reasons: list[tuple[str, str]] = []
    for settings in _candidates(path):
        try:
            source: DialogueSource = TypeAdapter(AnySource).validate_python(settings)
            source.files()
        except (ValidationError, SourceError):
            continue  # it reads no file here
        try:
            found = _read(source, settings, _TRIED)
        except (SourceError, OSError) as error:
            reasons.append((settings["kind"], str(error)))
            continue
        share = len(found.dialogues) / max(1, found.n_records)
        tried.append((share, found))
        if found.n_records > 1 and (share == 1.0 or (share >= 0.5 and found.n_bytes > READ_AT_MOST_BYTES)):
            break  # readers of published corpora come last; they may read a whole file into memory
    best = max(tried, key=lambda one: one[0], default=None)
    if best is None or best[0] < 0.5:
        raise _nothing_fits(path, [found for _, found in tried], reasons)
    settings, why = _without_departures(best[1])
    source = TypeAdapter(AnySource).validate_python(settings)
    found = _read(source, settings, _SAMPLE if best[1].n_bytes > READ_AT_MOST_BYTES else None)
    return replace(found, why_no_departures=why)


def _nothing_fits(path: Path, tried: Sequence[Found], reasons: Sequence[tuple[str, str]]) -> LookError:
    """The error of a path that no reader reads, with the first bad record of each; `reasons`: kinds of readers that
    could not read a file, and why."""
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    if not files:
        unread = f"; {describe_unread(others)}" if (others := unread_files(str(path), ())) else ""
        return LookError(f"{path}: found no files{unread}; expected conversations. {_REMEDY}")
    packed = [file.name for file in files if is_packed(file.name)]
    if len(packed) == len(files):
        return LookError(f"{path}: {describe_unread(packed)}; compression with gzip is read")
    first_of: dict[str, str] = {}
    errors = [(f.kind, f"{f.bad[0].file}:{f.bad[0].line}: {f.bad[0].reason}") for f in tried if f.bad]
    for kind, reason in [*errors, *reasons]:
        first_of.setdefault(kind, reason)
    kinds_of: dict[str, list[str]] = {}
    for kind, reason in first_of.items():
        kinds_of.setdefault(reason, []).append(kind)
    if not kinds_of:
        names = [file.name if file == path else file.relative_to(path).as_posix() for file in files]
        why = "the files hold no records" if tried else "no reader reads such files"
        return LookError(f"{path}: {why} ({describe_unread(names)}). {_REMEDY}")
    lines = [f"  {', '.join(kinds)}: {reason[:200]}" for reason, kinds in kinds_of.items()][:8]
    suffixes = ", ".join(sorted({file.suffix or "no suffix" for file in files}))
    return LookError(
        "\n".join([
            f"{path}: no reader reads half of the records ({suffixes} found); each on its first bad record or file:",
            *lines,
            *([f"not tried: {describe_unread(packed)}"] if packed else []),
            _REMEDY,
        ])
    )  # fmt: skip


class _KeysOfLines(OpenaiMessagesSource):
    """Gives the keys of each record and of its messages as the reason to leave it out."""

    def dialogue(self, place: str, record: dict[str, Any]) -> LeftOut:  # type: ignore[override]
        return _keys_of(record)


class _KeysOfRows(DatasetsSource):
    """The same, for files in columns."""

    def dialogue(self, place: str, record: dict[str, Any]) -> LeftOut:
        return _keys_of(record)


def _keys_of(record: dict[str, Any]) -> LeftOut:
    said = take(record, "messages", RECORD_ALIASES)
    messages = [message for message in said if isinstance(message, dict)] if isinstance(said, list) else []
    return LeftOut(json.dumps([sorted(record), sorted(set().union(*messages))]))


def _without_departures(found: Found) -> tuple[dict[str, Any], str | None]:
    """The settings to read with, so that the end of a dialogue is no engagement label where the data do not show that
    a partner left there; the reason, if they differ from those found.

    Records of chat_jsonl whose messages have roles and no key of its own are the published formats (OpenAI, ShareGPT):
    files of examples, which end with the assistant by construction.
    """
    if found.kind != "chat_jsonl":
        return found.source, None
    reader: JsonSource = (
        _KeysOfRows.model_validate(found.source)
        if "format" in found.source
        else _KeysOfLines(kind="openai_messages", path=found.source["path"])
    )
    read = [json.loads(one.reason) for one in islice(reader.read(), _TRIED) if isinstance(one, LeftOut)]
    keys = {key for _, of_messages in read for key in of_messages}
    if keys.isdisjoint(("role", "from")):
        return found.source, None
    if keys.isdisjoint(("speaker", "text")) and not any("character" in of_record for of_record, _ in read):
        settings = _with_kind(found.source, {"kind": "openai_messages"})
        tried = _read(TypeAdapter(AnySource).validate_python(settings), settings, _TRIED)
        if len(tried.dialogues) >= _NEARLY_ALL * len(found.dialogues):
            return settings, "messages have roles, as in published examples, which end by construction"
    at_end = sum(dialogue.messages[-1].speaker == dialogue.character for dialogue in found.dialogues)
    if at_end < _NEARLY_ALL * len(found.dialogues):
        return found.source, None
    settings = _with_kind(found.source, {"kind": "chat_jsonl", "ends_when_partner_leaves": False})
    return settings, "messages have roles, and nearly every dialogue ends with the assistant, as in published examples"


def _with_kind(source: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    return {**source, "format": changed} if "format" in source else {**source, **changed}


def _candidates(path: Path) -> list[dict[str, Any]]:
    own = [{"kind": kind, "path": str(path)} for kind in _OWN_FORMATS]
    columns = [{"kind": "datasets", "path": str(path), "format": {"kind": kind}} for kind in _OWN_FORMATS[:-1]]
    others = [{"kind": kind, "path": str(path)} for kind in SOURCES if kind not in (*_OWN_FORMATS, "datasets")]
    return [*own, *columns, *others]


def _read(source: DialogueSource, settings: dict[str, Any], at_most: int | None) -> Found:
    files = source.files()
    bad, dialogues, n_left_out, n = list[Rejected](), list[Dialogue](), 0, 0
    records = source.read()
    for record in islice(records, at_most):
        n += 1
        if isinstance(record, Dialogue):
            dialogues.append(record)
        elif isinstance(record, LeftOut):
            n_left_out += 1
        else:
            bad.append(record)
    is_sample = at_most is not None and next(records, None) is not None
    n_bytes = sum(file.stat().st_size for file in source.inputs())
    return Found(settings, files, n_bytes, n, bad, n_left_out, dialogues, is_sample, source.unread())


@dataclass(frozen=True)
class Sides:
    """The dialogues of both sides after cleaning and splitting, or a sample of them."""

    train: list[Dialogue]
    heldout: list[Dialogue]


def split_found(found: Found, recipe: DataRecipe) -> Sides:
    """Both sides, as preparation makes them. Raises the errors that it would raise."""
    if found.is_sample:
        n_heldout = max(2, len(found.dialogues) // 50)
        return Sides(found.dialogues[n_heldout:], found.dialogues[:n_heldout])
    selected = select_dialogues(recipe)
    return Sides(selected.train, selected.heldout)


def count_labels(dialogues: Iterable[Dialogue], within_seconds: float | None) -> Counter[int]:
    """The number of turns with each continuation label."""
    return Counter(label for d in dialogues for label in continuation_labels(d, within_seconds) if label >= 0)


def n_bytes_of(dialogues: Iterable[Dialogue]) -> int:
    """Their size as lines of JSON, for an estimate of how many of their kind a file holds."""
    return sum(len(to_json(dialogue)) + 1 for dialogue in dialogues)


def fit_tokenizer(dialogues: Sequence[Dialogue], vocab_size: int) -> DialogueTokenizer:
    """A tokenizer of these dialogues with at most `vocab_size` pieces, or as many as the texts support."""
    texts = texts_of(dialogues)
    while True:
        try:
            return train_tokenizer(texts, None, vocab_size, sample_characters=_TOKENIZER_CHARACTERS)
        except TokenizerError as error:
            largest = error.largest_vocab_size
            if largest is None or largest >= vocab_size:
                raise
            vocab_size = int(largest * 0.95)  # a run's sample may support slightly fewer


def token_lengths(dialogues: Sequence[Dialogue], tokenizer: DialogueTokenizer) -> list[int]:
    """The number of tokens of each dialogue."""
    return [len(encode_dialogue(tokenizer, dialogue).tokens) for dialogue in dialogues]


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that is not exceeded by at least this share of `values`."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[int]) -> float:
    """Of a non-empty sequence."""
    return statistics.median(values)


def labels_of_metadata(dialogues: Iterable[Dialogue]) -> int:
    """The number of messages with an explicit label."""
    return sum((m.metadata or {}).get(LABEL_KEY) is not None for d in dialogues for m in d.messages)
