"""Inspects a folder of conversations: which reader fits, and what its records support."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from data.sources.record import LeftOut, Rejected, SourceError
from data.sources.registry import SOURCES, AnySource
from data.sources.source import DialogueSource

_TRIED = 200  # records that each reader is tried on
_SAMPLE = 20_000  # records read of large sources
_TOKENIZER_CHARACTERS = 2_000_000
_OWN_FORMATS = ("chat_jsonl", "openai_messages", "sharegpt", "preference_pairs", "hh_rlhf", "feedback_events")
"""Tried before the published corpora, whose readers accept more."""
PAIRS = {"preference_pairs": "jsonl", "hh_rlhf": "hh_rlhf"}
"""Source kinds that train.dpo reads too, with its names of their formats."""


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
    reasons = []
    for settings in _candidates(path):
        try:
            source: DialogueSource = TypeAdapter(AnySource).validate_python(settings)
            found = _read(source, settings, _TRIED)
        except (ValidationError, SourceError, OSError) as error:
            if isinstance(error, OSError):
                reasons.append(f"{settings['kind']}: {error}")
            continue
        share = len(found.dialogues) / max(1, found.n_records)
        tried.append((share, found))
        if found.n_records > 1 and (share == 1.0 or (share >= 0.5 and found.n_bytes > READ_AT_MOST_BYTES)):
            break  # readers of published corpora come last; they may read a whole file into memory
    best = max(tried, key=lambda one: one[0], default=None)
    if best is None or best[0] < 0.5:
        errors = [f"{f.kind}: {f.bad[0].file}:{f.bad[0].line}: {f.bad[0].reason}" for _, f in tried if f.bad]
        files = path.rglob("*") if path.is_dir() else [path]
        suffixes = sorted({file.suffix for file in files if file.is_file()})
        if not suffixes:
            raise LookError(f"{path}: found no files; expected conversations, such as JSON lines (see the README)")
        raise LookError(
            f"{path}: no reader reads half of the records ({', '.join(suffixes)} found); each on its "
            "first bad record:\n" + "\n".join(f"  {line[:200]}" for line in [*errors, *reasons][:8])
            + "\nthe README's table lists what each kind reads"
        )  # fmt: skip
    source = TypeAdapter(AnySource).validate_python(best[1].source)
    return _read(source, best[1].source, _SAMPLE if best[1].n_bytes > READ_AT_MOST_BYTES else None)


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
    return Found(settings, files, n_bytes, n, bad, n_left_out, dialogues, is_sample)


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
