"""The package chitchat-dataset: 7,168 conversations of students, with timestamps and ratings (the demo's corpus)."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.clean.stable_hash import pseudonym
from data.format.dialogue import NARRATOR, Dialogue, Message, check_times
from data.sources.character import any_speaker
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource, json_of
from data.sources.first_names import first_names
from data.sources.record import RecordError, SourceError
from data.sources.unix_time import TimeError, unix_seconds
from recipes.run_identity import Location

_SLIDER_DEFAULT = 5  # 5 is the slider's default


class ChitchatSource(RecordSource):
    """One dialogue per session; consecutive messages of one sender are not merged. The character is one of the senders,
    chosen by a hash of the session's id. The participants are the hashed senders."""

    suffixes: ClassVar = (".json",)

    kind: Literal["chitchat"]
    path: Location | None = None  # type: ignore[assignment]  # a dataset.json; null takes the installed package's
    # Senders are ids: first_names gives each a stable first name, ids the hash of the participant.
    names: Literal["first_names", "ids"] = "first_names"
    topic_as_scene: bool = True  # the topic shown to both becomes a first message by the narrator

    @property
    def end_means_partner_left(self) -> bool:
        return True  # people talked as long as they liked

    def files(self) -> list[Path]:
        if self.path is not None:
            if not Path(self.path).is_file():
                raise SourceError(f"source path {self.path}: no such file; expected a chitchat dataset.json")
            return [Path(self.path)]
        found = importlib.util.find_spec("chitchat_dataset")
        if found is None or found.origin is None:
            raise SourceError(
                "source.kind chitchat needs the package chitchat-dataset, which is not installed; "
                'install it with: pip install -e ".[demo]"'
            )
        path = Path(found.origin).parent / "dataset.json"
        if not path.is_file():
            raise SourceError(
                f"{path}: missing; install the package again: pip install --force-reinstall chitchat-dataset"
            )
        return [path]

    def records(self, file: CorpusFile) -> Iterator[tuple[str, Any]]:
        return iter(json_of(file, dict).items())

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, Any]) -> Dialogue:
        identity = str(place)
        sent = [
            (message["sender"], message["text"], _unix_seconds(message["timestamp"]))
            for group in record["messages"]
            for message in group
        ]
        if not sent:
            raise RecordError("no messages")
        senders = sorted({sender for sender, _, _ in sent})
        hashes = {sender: pseudonym("chitchat", sender) for sender in senders}
        names = first_names(senders) if self.names == "first_names" else hashes
        topic = record.get("prompt") or ""
        scene = (Message(NARRATOR, topic),) if self.topic_as_scene and topic.strip() else ()
        ratings = {name: value for name, value in (record.get("ratings") or {}).items() if value != _SLIDER_DEFAULT}
        messages = tuple(Message(names[sender], text, time) for sender, text, time in sent)
        check_times(messages)
        return Dialogue(
            id=identity,
            messages=scene + messages,
            character=names[any_speaker(identity, senders)],
            participants=tuple(hashes.values()),
            metadata={"topic": topic, "ratings": ratings},
        )


def _unix_seconds(timestamp: str) -> float:
    try:
        return unix_seconds(timestamp)
    except TimeError as error:
        raise RecordError(f"timestamp is {error}") from None
