"""QMSum (MIT): transcripts of meetings of product designers, researchers and parliaments, with their topics."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from data.clean.stable_hash import pseudonym
from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.character import most_talkative
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource, json_of

_MARK = re.compile(r" *\{[a-z]+\} *")  # {vocalsound}, {disfmarker}, ...: the transcriber's annotations
_SERIES = re.compile(r"([A-Z]{2}\d{4})[a-z]|([A-Za-z]+?)_?\d+")  # ES2002a, Bro011, covid_9


class QmsumSource(RecordSource):
    """One dialogue per meeting, with speakers by name or role; the narrator begins with its topics. The character
    speaks most often. A participant is a name in a series of meetings (ES2002a to d, all of Bro), since the same role
    elsewhere is another person. Queries and summaries are in the metadata."""

    suffixes: ClassVar = (".json",)

    kind: Literal["qmsum"]

    def records(self, file: CorpusFile) -> Iterator[tuple[int, Any]]:
        yield 1, json_of(file, dict)

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, Any]) -> Dialogue:
        said = [
            Message(turn["speaker"], _MARK.sub(" ", turn["content"]).strip()) for turn in record["meeting_transcripts"]
        ]
        topics = [topic["topic"] for topic in record["topic_list"]]
        matched = _SERIES.fullmatch(file.stem)
        series = (matched[1] or matched[2]) if matched else file.stem
        return Dialogue(
            id=file.stem,
            messages=(Message(NARRATOR, "\n".join(["A meeting.", *topics])), *said),
            character=most_talkative(said),
            participants=tuple(sorted(pseudonym("qmsum", series, name) for name in {turn.speaker for turn in said})),
            metadata={
                "topics": record["topic_list"],
                "queries": record["general_query_list"] + record["specific_query_list"],
            },
        )
