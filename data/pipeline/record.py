"""The in-memory columns of dialogues for selection: numbers and hashes, no texts."""

from collections.abc import Sequence

import numpy as np

from data.clean.records import content_key
from data.clean.split import time_span
from data.clean.stable_hash import stable_hash
from data.format.dialogue import NARRATOR, Dialogue

RECORD = np.dtype(
    [("start_time", "<f8"), ("end_time", "<f8"), ("heldout_hash", "<u8"), ("n_participants", "<u4"), ("is_kept", "?")]
)
"""A dialogue that was read, including filtered ones: their participants may be held out. Missing times are nan."""

ROW = np.dtype(
    [
        ("content_key", "<u8", 2),
        ("sample_hash", "<u8"),  # the order of the tokenizer's sample
        ("n_characters", "<i8"),
        ("n_messages", "<i8"),
        ("n_speakers", "<i4"),  # without the narrator
        ("id_bytes", "<i4"),
        ("text_bytes", "<i8"),  # rendered
        ("line_bytes", "<i8"),
    ]
)
"""A dialogue that passed the filters."""


def records_of(dialogues: Sequence[Dialogue], is_kept: Sequence[bool], seed: int) -> np.ndarray:
    """Dialogues as RECORDs."""
    records = np.empty(len(dialogues), RECORD)
    times = np.array([time_span(dialogue) for dialogue in dialogues]).reshape(-1, 2)
    records["start_time"], records["end_time"] = times.T
    records["heldout_hash"] = [stable_hash("heldout", seed, dialogue.id) for dialogue in dialogues]
    records["n_participants"] = [len(dialogue.participants) for dialogue in dialogues]
    records["is_kept"] = is_kept
    return records


def participants_of(dialogues: Sequence[Dialogue]) -> np.ndarray:
    """The concatenated hashes of the participants of all dialogues, uint64."""
    hashes = [stable_hash("participant", p) for dialogue in dialogues for p in dialogue.participants]
    return np.array(hashes, "<u8")


def rows_of(dialogues: Sequence[Dialogue], seed: int) -> np.ndarray:
    """Dialogues as ROWs, without their byte counts."""
    rows = np.zeros(len(dialogues), ROW)
    keys = b"".join(content_key(dialogue) for dialogue in dialogues)
    rows["content_key"] = np.frombuffer(keys, "<u8").reshape(-1, 2)
    rows["sample_hash"] = [stable_hash(seed, "tokenizer", dialogue.id) for dialogue in dialogues]
    rows["n_characters"] = [sum(len(message.text) for message in dialogue.messages) for dialogue in dialogues]
    rows["n_messages"] = [len(dialogue.messages) for dialogue in dialogues]
    rows["n_speakers"] = [len({m.speaker for m in dialogue.messages} - {NARRATOR}) for dialogue in dialogues]
    return rows
