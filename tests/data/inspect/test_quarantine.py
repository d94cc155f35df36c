"""Reasons of the quarantine in groups: what differs only in its values is one group, and every record is counted."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from data.inspect.quarantine import general_reason, group_reasons, print_quarantine
from data.packed.shards import ShardError


def quarantine(tmp_path: Path, *reasons: tuple[str, str]) -> Path:
    path = tmp_path / "quarantine.jsonl"
    records = [
        {"source": source, "file": "a.jsonl", "line": number, "reason": reason, "record": f"r{number}\x1b[2J\nnext"}
        for number, (source, reason) in enumerate(reasons, start=1)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("reason", "general"),
    [
        ("id is 3: expected a string", "id is N: expected a string"),
        ("message 12: speaker 'a:\\'b' contains ':' or", "message N: speaker '..' contains '..' or"),
        ('user is "it\'s"', "user is '..'"),
        ("it begins at 1700000004.500, before", "it begins at N, before"),
        ("not UTF-8 in c81", "not UTF-8 in c81"),
    ],
)
def test_values_are_taken_out(reason: str, general: str) -> None:
    assert general_reason(reason) == general


def test_groups_are_counted_and_shown_with_examples(tmp_path: Path) -> None:
    path = quarantine(tmp_path, ("x", "not JSON"), *(("x", f"id is {n}") for n in range(5)), ("y", "id is 7"))
    groups = group_reasons(path)
    assert [(g.count, g.source, g.reason) for g in groups] == [
        (5, "x", "id is N"),
        (1, "x", "not JSON"),
        (1, "y", "id is N"),
    ]
    console = Console(width=200)
    with console.capture() as captured:
        print_quarantine(path, console)
    printed = captured.get()
    assert "quarantined: 7 records" in printed
    assert "a.jsonl:2: id is 0" in printed and "a.jsonl:3: id is 1" in printed and "a.jsonl:4" not in printed
    assert "\x1b[2J" not in printed and "r2\u241b[2J next" in printed


def test_many_groups_are_cut_and_counted(tmp_path: Path) -> None:
    path = quarantine(tmp_path, *(("x", f"reason {'a' * n}") for n in range(1, 26)))
    console = Console(width=200)
    with console.capture() as captured:
        print_quarantine(path, console)
    assert captured.get().count("x: reason") == 20
    assert "5  for 5 other reasons" in captured.get()


def test_a_damaged_quarantine_names_the_line(tmp_path: Path) -> None:
    path = quarantine(tmp_path, ("x", "not JSON"))
    path.write_text(path.read_text() + '{"source": 1}\n')
    with pytest.raises(ShardError, match=r"quarantine\.jsonl:2: not a quarantined record"):
        group_reasons(path)
