"""The keys of records and messages, with their aliases in logs and published formats."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from data.format.dialogue import LABEL_KEY, TRAINED_KEY, DialogueError

RECORD_ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("conversation_id",),
    "messages": ("conversations", "conversation"),
    "system": ("system_prompt", "system_message"),
}
"""Key of a record: its aliases."""

MESSAGE_ALIASES: dict[str, tuple[str, ...]] = {
    "speaker": ("name",),
    "role": ("from",),
    "text": ("content", "value"),
    "time": ("timestamp", "created_at"),
}
"""Key of a message: its aliases."""

TRAINED_FLAGS = ("trained", "weight", "train", "training", "trainable", "loss")
"""Keys of a record, a message or its metadata that say (0 or 1, false or true) whether it is trained."""
_NOT_TRAINED_FLAG = "masked"  # the same, inverted

_EMPTY: tuple[Any, ...] = (None, "", [], {}, ())
_TOOLS = "tools are not rendered"
_MEDIA = "only text is rendered"
_PART = "only whole messages are left out of the loss, by weight: 0"
_PART_OF_RECORD = dict.fromkeys(("loss_scale", "loss_weight", "loss_mask", "mask"), _PART)
_UNLISTED_FLAGS = dict.fromkeys(
    (
        "is_trained", "is_train", "is_trainable", "train_on", "train_on_turn", "train_on_input", "do_train", "no_train",
        "learnable", "learn", "no_loss", "has_loss", "use_loss", "compute_loss", "calculate_loss", "include_in_loss",
        "ignore_loss", "mask_loss", "is_masked", "skip_loss", "supervised", "untrained", "ignore", "ignored", "skip",
        "exclude", "excluded", "exclude_from_training",
    ),
    "it looks like a training flag; write trained: 0 or 1",
)  # fmt: skip
_PART_OF_MESSAGE = {**dict.fromkeys(("train_detail", "training_detail"), _PART), **_PART_OF_RECORD}
REFUSED_IN_MESSAGE = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), _TOOLS),
    **dict.fromkeys(("audio", "image", "images", "video", "videos", "audios"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning is not rendered"),
    "refusal": "a refusal is not rendered; write it as content",
    **_PART_OF_MESSAGE,
    **_UNLISTED_FLAGS,
}
"""Unsupported keys that change the meaning of a message, with the reason; they may be null or empty."""

_PAIR = "a preference pair, which train.dpo reads, is no dialogue"
_LISTED = "it takes the place of messages; give one of them"
_BESIDE = "messages are the whole conversation; write it as a message, or as the record's system prompt"
_DEFINES = "put it into system if the model is to read it, otherwise into metadata"
_LABELS_RECORD = f"it labels one reply; put {LABEL_KEY} into the metadata of that reply's message"
REFUSED_IN_RECORD = {
    **dict.fromkeys(("tools", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PAIR),
    "kto_tag": "a rating of the reply; leave bad replies out by weight: 0",
    **_PART_OF_RECORD,
    **_UNLISTED_FLAGS,
    "train_on_inputs": "only the character is trained",
    "completion": _LISTED,
    **dict.fromkeys(("instruction", "instructions", "input", "output", "history"), _BESIDE),
    **dict.fromkeys(("persona", "personas", "scenario"), _DEFINES),
    LABEL_KEY: _LABELS_RECORD,
}
"""Unsupported keys that change the meaning of a record, with the reason; they may be null or empty."""


def _names(aliases: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    return (name for key, others in aliases.items() for name in (key, *others))


_FLAGS = (*TRAINED_FLAGS, _NOT_TRAINED_FLAG)
MESSAGE_KEYS = frozenset((*_names(MESSAGE_ALIASES), *_FLAGS, *REFUSED_IN_MESSAGE, "metadata", LABEL_KEY))
RECORD_KEYS = frozenset((*_names(RECORD_ALIASES), *_FLAGS, *REFUSED_IN_RECORD, "metadata", "participants", "prompt"))
"""All keys with a meaning: no other key may differ from one of them in case and punctuation only."""


def take(
    record: dict[str, Any],
    key: str,
    aliases: Mapping[str, tuple[str, ...]],
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """Remove a key of `aliases` and its aliases from the record; returns its value, or None.

    Raises DialogueError if two of them have different values. They are compared as converted by `read`; values that it
    rejects with a ValueError, and all values without `read`, are compared with their types: 0 is neither false nor 0.0.
    """
    found: dict[str, Any] = {}
    for name in (key, *aliases[key]):
        value = record.pop(name, None)
        if value is not None:
            found[name] = value
    values = list(found.values())
    if len(values) > 1 and any(_meaning(value, read) != _meaning(values[0], read) for value in values[1:]):
        names = [f"{name} {repr(value)[:40]}" for name, value in found.items()]
        raise DialogueError(f"{' and '.join(names)} differ, and mean the same key {key}; give one of them")
    return values[0] if values else None


def _meaning(value: Any, read: Callable[[Any], Any] | None) -> tuple[bool, Any]:
    """The value to compare by, and whether `read` accepted it."""
    if read is not None:
        try:
            return True, read(value)
        except ValueError:
            pass
    return False, json.dumps(value, sort_keys=True, default=repr)


def rename(
    record: dict[str, Any],
    keys: Mapping[str, Callable[[Any], Any]],
    aliases: Mapping[str, tuple[str, ...]],
) -> None:
    """Rename aliases in the record to their keys; `keys` maps each key to the `read` of `take`. Raises DialogueError as
    `take` does."""
    for key, read in keys.items():
        if not record.keys().isdisjoint(aliases[key]) and (value := take(record, key, aliases, read)) is not None:
            record[key] = value


def name_in(record: Mapping[str, Any], key: str, aliases: Mapping[str, tuple[str, ...]]) -> str:
    """The name under which the record has a key of `aliases`; the key itself if it is absent."""
    return next((name for name in (key, *aliases[key]) if record.get(name) is not None), key)


def speaks_of_training(metadata: Mapping[str, Any]) -> bool:
    """Whether a key of a record's or a message's metadata is a training flag."""
    return not metadata.keys().isdisjoint(_OF_TRAINING)


def take_trained(record: dict[str, Any]) -> bool | None:
    """Remove the TRAINED_FLAGS from a record or a message and from its metadata; returns whether it is trained, or None
    without a flag. The metadata is replaced, not modified; TRAINED_KEY as a boolean stays in it, and so do values that
    cannot be a flag: a weight of 60 is somebody's.

    Raises DialogueError for a flag that is not a boolean, for contradictory flags, and for partial training in the
    metadata.
    """
    found = _take_flags(record, "")
    metadata = record.get("metadata")
    if isinstance(metadata, dict) and speaks_of_training(metadata):
        own = {key: value for key, value in metadata.items() if key == TRAINED_KEY and value in (None, False, True)}
        record["metadata"] = metadata = dict(metadata)
        others = _AMBIGUOUS & metadata.keys()
        kept = {key: metadata.pop(key) for key in others if not _may_be_flag(metadata[key])}
        found |= _take_flags(metadata, "metadata.")
        refuse(metadata, {**_PART_OF_MESSAGE, **_UNLISTED_FLAGS}, "metadata.")
        metadata |= {key: None if value is None else bool(value) for key, value in own.items()} | kept
    if len(set(found.values())) > 1:
        raise DialogueError(f"{' and '.join(found)} contradict each other on what is trained; give one of them")
    return next(iter(found.values()), None)


_AMBIGUOUS = frozenset((*_FLAGS, *_UNLISTED_FLAGS)) - {TRAINED_KEY}  # in metadata
_OF_TRAINING = frozenset((*_FLAGS, *_PART_OF_MESSAGE, *_UNLISTED_FLAGS))


def _may_be_flag(value: Any) -> bool:
    """Whether a training flag may have this value: a boolean, a weight from 0 to 1, or one of them as text."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return True
    try:
        return 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return value is None


def _take_flags(record: dict[str, Any], place: str) -> dict[str, bool]:
    """The meaning of each training flag, by its name."""
    found: dict[str, bool] = {}
    for name in _FLAGS:
        value = record.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DialogueError(
                f"{place}{name} is {repr(value)[:40]}: expected 0 or 1, false or true, for whether it is trained"
            )
        found[place + name] = bool(value) != (name == _NOT_TRAINED_FLAG)
    return found


def refuse(record: dict[str, Any], refused: Mapping[str, str], place: str = "") -> None:
    """Remove unsupported keys without a value. Raises DialogueError with the first that has one."""
    if refused.keys().isdisjoint(record):
        return  # most records
    for key in [key for key in refused if key in record]:
        if record[key] not in _EMPTY:
            raise DialogueError(f"{place}{key} is not read: {refused[key]}; found {repr(record[key])[:40]}")
        del record[key]


def refuse_in_record(record: dict[str, Any]) -> None:
    """`refuse` of a record's keys, of misspelled ones, and of an engagement label in its metadata, which no reply would
    get. Raises DialogueError."""
    refuse(record, REFUSED_IN_RECORD)
    refuse_misspelled(record, RECORD_KEYS)
    metadata = record.get("metadata")
    if isinstance(metadata, dict):
        refuse(dict(metadata), {LABEL_KEY: _LABELS_RECORD}, "metadata.")


def refuse_misspelled(record: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise DialogueError for a key with a value that differs from a `known` one in case and punctuation only."""
    for key in record:
        if key not in known and record[key] not in _EMPTY and (meant := _by_spelling(known).get(_spelling(key))):
            raise DialogueError(f"{key[:80]} is not read: it differs from {meant} in spelling only; write {meant}")


@lru_cache
def _by_spelling(known: frozenset[str]) -> dict[str, str]:
    return {_spelling(key): key for key in sorted(known)}


@lru_cache(4096)
def _spelling(key: str) -> str:
    return "".join(filter(str.isalnum, key.casefold()))
