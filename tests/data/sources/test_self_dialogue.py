"""Rows of one worker as dialogues of two: order of sentences, topic, blocked workers, the id that must not show."""

import csv
from pathlib import Path

from data.format.dialogue import NARRATOR, Dialogue
from data.format.dialogue_json import to_json
from data.sources.record import LeftOut, Rejected
from data.sources.self_dialogue import SelfDialogueSource


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    path = folder / "corpus" / "board_games" / "batch.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (folder / "blocked_workers.txt").write_text("WBLOCKED\nWOTHER\n")


def row(worker: str = "WALICE", sentences: int = 12) -> dict[str, str]:
    """Columns in the order of the corpus: 1, 10, 11, 12, 2, ..."""
    numbers = sorted(range(1, 13), key=str)
    said = {f"Answer.sentence{n}": f"line {n},\nand more" if n <= sentences else "" for n in numbers}
    return {"WorkerId": worker, "WorkTimeInSeconds": "61"} | said


def read(folder: Path) -> list[Dialogue | LeftOut | Rejected]:
    return list(SelfDialogueSource(kind="self_dialogue", path=str(folder)).read())


def test_rows_become_dialogues(tmp_path: Path) -> None:
    write(tmp_path, [row(), row(sentences=3), row(worker="WBOB")])
    first, second, third = read(tmp_path)
    assert isinstance(first, Dialogue)
    assert isinstance(second, Dialogue)
    assert isinstance(third, Dialogue)
    scene, *said = first.messages
    assert (scene.speaker, scene.text) == (NARRATOR, "A conversation about board games.")
    assert [message.text for message in said] == [f"line {n},\nand more" for n in range(1, 13)]
    assert len({message.speaker for message in said[::2]}) == len({message.speaker for message in said[1::2]}) == 1
    assert said[0].speaker != said[1].speaker
    assert len(second.messages) == 4
    assert first.metadata == {"topic": "board games", "work_seconds": 61}
    assert first.participants == second.participants != third.participants
    assert b"WALICE" not in to_json(first)


def test_blocked_workers_are_left_out_and_empty_rows_rejected(tmp_path: Path) -> None:
    write(tmp_path, [row(worker="WBLOCKED"), row(sentences=0), row()])
    blocked, empty, good = read(tmp_path)
    assert blocked == LeftOut("written by a blocked worker")
    assert isinstance(empty, Rejected)
    assert empty.file.endswith("batch.csv")
    assert empty.line == 3
    assert "sentence1 is empty" in empty.reason
    assert isinstance(good, Dialogue)


def test_one_file_is_read_without_a_list(tmp_path: Path) -> None:
    write(tmp_path, [row(worker="WBLOCKED")])
    (dialogue,) = read(tmp_path / "corpus" / "board_games" / "batch.csv")
    assert isinstance(dialogue, Dialogue)
    assert dialogue.metadata["topic"] == "board games"
