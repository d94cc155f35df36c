"""The keys of a record and of its messages, by the names that logs and published formats give them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from data.format.dialogue import TRAINED_KEY, DialogueError

RECORD_ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("conversation_id",),
    "messages": ("conversations", "conversation"),
    "system": ("system_prompt", "system_message"),
}
"""Key of a record: its other names."""

MESSAGE_ALIASES: dict[str, tuple[str, ...]] = {
    "speaker": ("name",),
    "role": ("from",),
    "text": ("content", "value"),
    "time": ("timestamp", "created_at"),
}
"""Key of a message: its other names."""

TRAINED_FLAGS = ("trained", "weight", "train", "training", "trainable", "loss")
"""Keys of a record or a message, or of its metadata, that say, as 0 or 1, false or true, whether it is trained."""
_NOT_TRAINED_FLAG = "masked"  # the same, the other way round

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
"""Keys that change what a message means, and why they are not read; they may be null or empty."""

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
"""Keys that change what a record means, and why they are not read; they may be null or empty."""


def take(
    record: dict[str, Any],
    key: str,
    aliases: Mapping[str, tuple[str, ...]],
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """Remove a key of `aliases` and its other names from the record; its value, None where it has none.

    Raises DialogueError where two of the names have different values. They are compared as `read` reads them, and those
    that it refuses with a ValueError, or all without it, with their types: 0 is neither false nor 0.0.
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
    """What a value is compared by, and whether it was read."""
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
    """Give some keys of `aliases` that stand under other names in the record their own; `keys` maps each to what `take`
    compares its values by. Raises DialogueError as `take`."""
    for key, read in keys.items():
        if not record.keys().isdisjoint(aliases[key]) and (value := take(record, key, aliases, read)) is not None:
            record[key] = value


def name_in(record: Mapping[str, Any], key: str, aliases: Mapping[str, tuple[str, ...]]) -> str:
    """What the record calls a key of `aliases`; the key itself where it does not have it."""
    return next((name for name in (key, *aliases[key]) if record.get(name) is not None), key)


def speaks_of_training(metadata: Mapping[str, Any]) -> bool:
    """Whether some key of a record's or a message's metadata says what is trained."""
    return not metadata.keys().isdisjoint(_OF_TRAINING)


def take_trained(record: dict[str, Any]) -> bool | None:
    """Remove the flags of TRAINED_FLAGS from a record or a message and from its metadata: whether it is trained, None
    where none says so. The metadata is replaced, not changed; TRAINED_KEY, as true or false, stays in it.

    Raises DialogueError where a flag is no yes or no, where two differ, or where the metadata says that a part is
    trained.
    """
    found = _take_flags(record, "")
    metadata = record.get("metadata")
    if isinstance(metadata, dict) and speaks_of_training(metadata):
        own = {key: value for key, value in metadata.items() if key == TRAINED_KEY and value in (None, False, True)}
        record["metadata"] = metadata = dict(metadata)
        found |= _take_flags(metadata, "metadata.")
        refuse(metadata, _PART_OF_MESSAGE, "metadata.")
        metadata |= {key: None if value is None else bool(value) for key, value in own.items()}
    if len(set(found.values())) > 1:
        raise DialogueError(f"{' and '.join(found)} contradict each other on what is trained; give one of them")
    return next(iter(found.values()), None)


_OF_TRAINING = frozenset((*TRAINED_FLAGS, _NOT_TRAINED_FLAG, *_PART_OF_MESSAGE))


def _take_flags(record: dict[str, Any], place: str) -> dict[str, bool]:
    """By the name of each flag, after its place, whether it says that something is trained."""
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
    """Remove the keys that may be there without a value. Raises DialogueError naming the first that has one, after its
    place."""
    for key in [key for key in refused if key in record]:
        if record[key] not in _EMPTY:
            raise DialogueError(f"{place}{key} is not read: {refused[key]}; found {repr(record[key])[:40]}")
        del record[key]
