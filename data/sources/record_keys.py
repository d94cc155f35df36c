"""The keys of records and messages, with their aliases in logs and published formats."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from data.format.dialogue import TRAINED_KEY, DialogueError

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
_PART_OF_MESSAGE = {**dict.fromkeys(("train_detail", "training_detail"), _PART), **_PART_OF_RECORD}
REFUSED_IN_MESSAGE = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), _TOOLS),
    **dict.fromkeys(("audio", "image", "images", "video", "videos", "audios"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning is not rendered"),
    "refusal": "a refusal is not rendered; write it as content",
    **_PART_OF_MESSAGE,
}
"""Unsupported keys that change the meaning of a message, with the reason; they may be null or empty."""

_PAIR = "a preference pair, which train.dpo reads, is no dialogue"
_LISTED = "it takes the place of messages; give one of them"
REFUSED_IN_RECORD = {
    **dict.fromkeys(("tools", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PAIR),
    "kto_tag": "a rating of the reply; leave bad replies out by weight: 0",
    **_PART_OF_RECORD,
    "train_on_inputs": "only the character is trained",
    "completion": _LISTED,
}
"""Unsupported keys that change the meaning of a record, with the reason; they may be null or empty."""


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
        others = {*TRAINED_FLAGS[1:], _NOT_TRAINED_FLAG} & metadata.keys()  # TRAINED_KEY has this one meaning
        kept = {key: metadata.pop(key) for key in others if not _may_be_flag(metadata[key])}
        found |= _take_flags(metadata, "metadata.")
        refuse(metadata, _PART_OF_MESSAGE, "metadata.")
        metadata |= {key: None if value is None else bool(value) for key, value in own.items()} | kept
    if len(set(found.values())) > 1:
        raise DialogueError(f"{' and '.join(found)} contradict each other on what is trained; give one of them")
    return next(iter(found.values()), None)


_OF_TRAINING = frozenset((*TRAINED_FLAGS, _NOT_TRAINED_FLAG, *_PART_OF_MESSAGE))


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
    for name in (*TRAINED_FLAGS, _NOT_TRAINED_FLAG):
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
    for key in [key for key in refused if key in record]:
        if record[key] not in _EMPTY:
            raise DialogueError(f"{place}{key} is not read: {refused[key]}; found {repr(record[key])[:40]}")
        del record[key]
