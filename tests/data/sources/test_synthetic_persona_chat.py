"""The character's persona is the narrator's, the partner's is not; the rows' variants of "User 1:" are all read."""

import csv
from pathlib import Path

from data.format.dialogue import NARRATOR, Dialogue
from data.sources.record import Rejected
from data.sources.synthetic_persona_chat import SyntheticPersonaChatSource

COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
ONE, TWO = "I paint boats.\nI live alone.", "I am a vet."


def read(tmp_path: Path, *conversations: str) -> list[Dialogue | Rejected]:
    with open(tmp_path / "some.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *([ONE, TWO, text] for text in conversations)])
    source = SyntheticPersonaChatSource(kind="synthetic_persona_chat", path=str(tmp_path))
    return [record for record in source.read() if isinstance(record, Dialogue | Rejected)]


def test_a_row_becomes_a_dialogue(tmp_path: Path) -> None:
    text = (
        "User 1: Hi, I'm [User 1's name].\n\n* * User 2: * * Hello, user 1!\nOne more line.\n[Later]\n"
        "(User 2 leaves.)\nUser 1: Bye * * *"
    )
    (dialogue,) = read(tmp_path, text)
    assert isinstance(dialogue, Dialogue)
    one, two = (name for name in dialogue.metadata["personas"])
    assert [(message.speaker, message.text) for message in dialogue.messages[1:]] == [
        (one, f"Hi, I'm {one}."),
        (two, f"Hello, {one}!\nOne more line."),
        (NARRATOR, "Later"),
        (NARRATOR, f"{two} leaves."),
        (one, "Bye"),
    ]
    persona = {one: "I paint boats. I live alone.", two: "I am a vet."}[dialogue.character]
    assert dialogue.messages[0].speaker == NARRATOR
    assert dialogue.messages[0].text == f"About {dialogue.character}: {persona}"
    assert dialogue.metadata["personas"] == {one: ONE.split("\n"), two: [TWO]}


def test_both_are_trained_and_monologues_are_rejected(tmp_path: Path) -> None:
    dialogues = read(tmp_path, *["User 1: Hi\nUser 2: Ho"] * 40)
    assert {isinstance(d, Dialogue) and d.character == d.messages[1].speaker for d in dialogues} == {True, False}
    (bad,) = read(tmp_path, "Once upon a time")
    assert isinstance(bad, Rejected)
    assert bad.line == 1
    assert "begins with 'Once upon a time'" in bad.reason
