"""data.feedback end to end: files that the stages read, counts that add up, bytes that no partition changes."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.feedback import __main__ as feedback
from data.feedback.__main__ import OUTPUTS, main
from data.format.dialogue import Dialogue, continuation_labels
from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import PackedDataset
from data.prepare import main as prepare
from data.sources.chat_jsonl import ChatJsonlSource
from data.sources.preferences import read_pairs

MakeLog = Callable[..., Any]
RECIPE = """\
stage: feedback
run_dir: {run_dir}
seed: 0
events: {events}
pairs:
  rules:
    - {{kind: edit_over_original}}
    - {{kind: more_stars, min_difference: 1}}
    - {{kind: kept_over_regenerated, wrote_again_within_seconds: 5000, min_seen_seconds: 0.5}}
  max_length_ratio: 8.0
  max_per_user: 6
labels: {{within_seconds: 300, max_per_user: 40}}
max_context_messages: 12
max_bad_fraction: 0.2
"""


@pytest.fixture
def log(make_feedback_log: MakeLog) -> Any:
    return make_feedback_log(3, 30)


@pytest.fixture
def recipe(tmp_path: Path, log: Any) -> Path:
    """A recipe, and events in two files, the second one compressed."""
    folder = tmp_path / "events"
    folder.mkdir()
    lines = [json.dumps(event, ensure_ascii=number % 2 == 0) for number, event in enumerate(log.events)]
    half = len(lines) // 2
    (folder / "day1.jsonl").write_text("\n".join(lines[:half]) + "\n", encoding="utf-8", newline="\n")
    (folder / "day2.jsonl.gz").write_bytes(gzip.compress("\r\n\n".join(lines[half:]).encode()))
    path = tmp_path / "feedback.yaml"
    path.write_text(RECIPE.format(run_dir=tmp_path / "run", events=folder))
    return path


def outputs(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in OUTPUTS}


def read_chats(path: Path) -> list[Dialogue]:
    records = list(ChatJsonlSource(kind="chat_jsonl", path=str(path)).read())
    assert all(isinstance(record, Dialogue) for record in records)
    return records  # type: ignore[return-value]


def test_what_it_writes_is_what_the_stages_read(recipe: Path, tmp_path: Path, log: Any) -> None:
    assert main([str(recipe)]) == 0
    run_dir = tmp_path / "run"
    report = json.loads((run_dir / "report.json").read_text())
    assert report["lines"] == {
        "read": len(log.events), "quarantined": 0, "repeated": 0, "excluded": {}, "used": len(log.events)
    }  # fmt: skip
    pairs = read_pairs(run_dir / "pairs.jsonl")
    for rule, figures in report["pairs"].items():
        assert figures["found"] == figures["written"] + sum(figures["excluded"].values())
        assert figures["written"] == sum(pair.metadata["rule"] == rule for pair in pairs) > 0
    shown = {candidate["text"] for event in log.events for candidate in event["candidates"]}
    edits = {event["edit"]["text"] for event in log.events if "edit" in event}
    assert all(pair.rejected in shown and pair.chosen in shown | edits for pair in pairs)
    assert any("<|end|>" in pair.chosen + pair.rejected for pair in pairs)

    whole, replies = (read_chats(run_dir / f"{name}.jsonl") for name in ("dialogues", "replies"))
    assert len(whole) == report["conversations"] == len({(e["user"], e["conversation"]) for e in log.events})
    found = [label for dialogue in (*whole, *replies) for label in continuation_labels(dialogue) if label >= 0]
    labels = report["labels"]
    assert (found.count(1), found.count(0)) == (labels["positive"], labels["negative"])
    assert min(labels["positive"], labels["negative"]) > 0
    assert labels["replies_shown"] == len(log.shown_after) == len(found) + sum(labels["unlabeled"].values())
    said = {message["text"] for event in log.events for message in event["messages"]}
    assert {m.text for d in (*whole, *replies) for m in d.messages} <= shown | edits | said
    assert (run_dir / "quarantine.jsonl").read_bytes() == b""


def test_no_number_of_parts_and_no_order_of_lines_changes_a_byte(recipe: Path, tmp_path: Path, log: Any) -> None:
    assert main([str(recipe)]) == 0
    expected = outputs(tmp_path / "run")
    for parts in (1, 3, 97):
        assert main([str(recipe), f"run_dir={tmp_path / f'run{parts}'}", f"parts={parts}"]) == 0
        assert outputs(tmp_path / f"run{parts}") == expected
    shuffled = tmp_path / "shuffled.jsonl"
    lines = [json.dumps(event) + "\n" for event in log.events]
    random.Random(1).shuffle(lines)
    shuffled.write_text("".join(lines))
    assert main([str(recipe), f"run_dir={tmp_path / 'other'}", f"events={shuffled}"]) == 0
    assert outputs(tmp_path / "other") == expected


def test_bad_lines_are_quarantined_and_counted(recipe: Path, tmp_path: Path, log: Any) -> None:
    events = tmp_path / "events" / "day3.jsonl"
    orphan = {**log.events[0], "conversation": "begun long ago", "turn": "t99", "after": "t98"}
    bad = [b"{", json.dumps({**log.events[0], "kept": 99}).encode(), b'{"user": 3}', json.dumps(orphan).encode()]
    events.write_bytes(b"\n".join([*bad, json.dumps(log.events[5]).encode()]) + b"\n")
    assert main([str(recipe)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())["lines"]
    assert (report["read"], report["quarantined"], report["repeated"]) == (len(log.events) + 5, 3, 1)
    assert report["excluded"] == {"what it continues is not in the log, or is quarantined": 1}
    assert report["used"] == len(log.events)
    quarantined = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    found = {(record["file"], record["line"]): record["reason"] for record in quarantined}
    assert set(found) == {(str(events), line) for line in (1, 2, 3)}
    assert "not JSON" in found[str(events), 1]
    assert "kept is 99" in found[str(events), 2]
    assert "missing conversation" in found[str(events), 3]


def test_personal_data_is_scrubbed_before_pairs_are_made(recipe: Path, tmp_path: Path, log: Any) -> None:
    assert main([str(recipe), f"run_dir={tmp_path}/plain"]) == 0
    private = {"address": "ann.smith@example.com", "user": "worker-77", "turn": "+14155550132"}
    for event in log.events:
        event["user"] = f"{private['user']}-{event['user']}"
        event["turn"] = f"{private['turn']}/{event['turn']}"
        event["after"] = event["after"] and f"{private['turn']}/{event['after']}"
        for said in (*event["messages"], *event["candidates"], *filter(None, [event.get("edit")])):
            said["text"] += f" write to {private['address']}"
        for message in event["messages"]:
            if message["speaker"] != "narrator":
                message["speaker"] += f" {private['address']}"
    lines = [json.dumps(event) for event in log.events]
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join([*lines, lines[0].replace('"kept"', '"keeps"'), lines[1][:200]]) + "\n")
    given = [str(recipe), f"events={folder}", "scrub={ids: {salt: a secret word}}"]
    assert main(given) == 0
    for name, content in outputs(tmp_path / "run").items():
        assert not [value for value in private.values() if value.encode() in content], name
    report, plain = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "plain"))
    assert report["scrubbed"]["email"] > len(log.events)
    assert plain["scrubbed"] == {}
    assert report["lines"]["quarantined"] == plain["lines"]["quarantined"] + 2
    found = {rule: of_rule["found"] for rule, of_rule in report["pairs"].items()}
    assert found == {rule: of_rule["found"] for rule, of_rule in plain["pairs"].items()}
    pairs = read_pairs(tmp_path / "run" / "pairs.jsonl")
    assert all(pair.chosen.endswith(" write to [email]") for pair in pairs)
    assert {m.speaker for pair in pairs for m in pair.messages if "[email]" in m.speaker}
    assert len(read_chats(tmp_path / "run" / "dialogues.jsonl")) == plain["conversations"]


def test_too_many_bad_lines_stop_it(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events" / "day3.jsonl").write_text("nothing\n")
    assert main([str(recipe), "max_bad_fraction=0"]) == 2
    message = capsys.readouterr().err
    assert "1 of" in message and "day3.jsonl:1: not JSON" in message and "run.quarantine.jsonl" in message
    assert not set(OUTPUTS) & {path.name for path in (tmp_path / "run").iterdir()}
    (tmp_path / "events" / "day3.jsonl").unlink()
    assert main([str(recipe)]) == 0  # the directory can be used again


def test_a_finished_run_is_kept_and_a_damaged_one_made_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe)]) == 0
    expected = outputs(tmp_path / "run")
    capsys.readouterr()
    assert main([str(recipe)]) == 0
    assert "is finished: " in capsys.readouterr().out
    (tmp_path / "run" / "pairs.jsonl").unlink()
    assert main([str(recipe)]) == 0
    assert "pairs.jsonl is missing" in capsys.readouterr().out
    assert outputs(tmp_path / "run") == expected
    assert main([str(recipe), "seed=1"]) == 2
    assert "seed: there 0, here 1" in capsys.readouterr().err


@pytest.mark.parametrize("at_user", [0, 7])
def test_an_interrupted_run_is_repeated(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_user: int
) -> None:
    assert main([str(recipe), f"run_dir={tmp_path / 'whole'}"]) == 0
    convert_user = feedback._convert_user
    calls = iter(range(1000))

    def interrupt(*arguments: Any) -> None:
        if next(calls) == at_user:
            raise KeyboardInterrupt
        convert_user(*arguments)

    monkeypatch.setattr(feedback, "_convert_user", interrupt)
    assert main([str(recipe)]) == 130
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {*OUTPUTS, "parts", "done.json"} and not any(name.endswith(".partial") for name in left)
    monkeypatch.undo()
    (tmp_path / "run" / "parts").mkdir()  # as a kill would leave it
    (tmp_path / "run" / "parts" / "000").write_text("garbage")
    (tmp_path / "run" / ".pairs.jsonl.partial").write_text("garbage")
    assert main([str(recipe)]) == 0
    assert outputs(tmp_path / "run") == outputs(tmp_path / "whole")
    assert not (tmp_path / "run" / "parts").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("events={tmp}/event", "did you mean"),
        ("pairs.rules.0.kind=edit_over_orignal", "did you mean edit_over_original?"),
        ("pairs.max_lenght_ratio=2.0", "did you mean max_length_ratio?"),
        ("labels.not_kept_are=positive", "expected 'negative' or 'unlabeled'"),
        ("parts=0", "parts"),
        ("pairs.rules=[]", "pairs.rules"),
        ("pairs.rules=[{{kind: edit_over_original}}, {{kind: edit_over_original}}]", "edit_over_original twice"),
    ],
)
def test_what_a_user_gets_wrong_is_one_message(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    try:
        code = main([str(recipe), override.format(tmp=tmp_path)])
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert message in captured.err


def test_a_log_without_a_usable_turn_is_an_error(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: Any
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main([str(recipe), f"events={tmp_path / 'empty.jsonl'}"]) == 2
    assert "no usable turn in 0 lines; check" in capsys.readouterr().err
    first = log.events[0]
    lines = [json.dumps({**first, "turn": f"t{number}", "after": "lost"}) for number in range(3)]
    (tmp_path / "orphans.jsonl").write_text("\n".join(lines))
    assert main([str(recipe), f"events={tmp_path / 'orphans.jsonl'}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "no usable turn in 3 lines (3 what it continues is not in the log, or is quarantined); check" in error


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: Any) -> None:
    (tmp_path / "events" / "day3.jsonl").write_text("nothing\n")
    assert main([str(recipe), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(log.events) + 1:,} lines in 3 file(s), 1 bad" in printed
    assert "day3.jsonl:1: not JSON" in printed
    assert not (tmp_path / "run").exists()


def test_prepare_packs_the_labels(recipe: Path, tmp_path: Path, tokenizer: DialogueTokenizer) -> None:
    """From events to shards: as many labels as data.feedback counted, and nothing thrown away is trained."""
    assert main([str(recipe)]) == 0
    run_dir = tmp_path / "run"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    sources = [{"kind": "chat_jsonl", "path": str(run_dir / f"{name}.jsonl")} for name in ("dialogues", "replies")]
    data_recipe = {
        "stage": "data", "run_dir": str(tmp_path / "data"), "seed": 0, "sources": sources, "row_length": 512,
        "split": {"kind": "fraction", "heldout": 0.2, "by_participant": True}, "continue_within_seconds": None,
        "tokenizer": {"kind": "file", "path": str(tmp_path / "tokenizer")},
        "filters": {"min_messages": 1, "min_speakers": 1},
    }  # fmt: skip
    (tmp_path / "data.yaml").write_text(json.dumps(data_recipe))
    assert prepare([str(tmp_path / "data.yaml")]) == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    report = json.loads((run_dir / "report.json").read_text())["labels"]
    # what is written twice (the same text after the same texts) is packed once
    assert manifest["records"]["duplicates"] <= 5
    for key, name in (("n_partner_continues", "positive"), ("n_partner_leaves", "negative")):
        packed = sum(manifest[side][key] for side in ("train", "heldout"))
        assert report[name] - 5 <= packed <= report[name]
    thrown = {d.messages[-1].text for d in read_chats(run_dir / "replies.jsonl")}
    kept = {m.text for d in read_chats(run_dir / "dialogues.jsonl") for m in d.messages}
    (some, *_) = sorted(thrown - kept, key=len, reverse=True)
    found = False
    for side in ("train", "heldout"):
        dataset = PackedDataset(tmp_path / "data" / side)
        for number in range(len(dataset)):
            row = dataset.row(number)
            found |= some in tokenizer.decode(row.tokens_L.tolist())
            trained = tokenizer.decode(row.tokens_L[row.loss_mask_L == 1].tolist())
            assert some not in trained
    assert found
