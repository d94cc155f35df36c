"""`recipes.new` finds the reader, writes recipes that fit the data, and the README's three commands run to a bundle."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from data.format.dialogue import Dialogue, Message
from data.inspect import folder as look
from data.inspect.folder import LookError, find_source
from data.prepare import main as prepare
from data.sources.registry import AnySource
from recipes import new_recipes
from recipes.new import main
from recipes.pipeline import main as pipeline

ROOT = Path(__file__).parents[2]
WORDS = ("tea", "rain", "music", "garden", "train", "book", "river", "coffee", "winter", "dog", "story", "city")
# A model and steps so small that the README's pipeline takes a minute.
TINY = [
    "pretrain.model.d_model=32", "pretrain.model.n_heads=2", "pretrain.model.d_head=16", "pretrain.model.d_ff=64",
    *(f"{stage}.loop.max_steps={n}" for stage, n in (("pretrain", 8), ("sft", 4))),
    *(f"{stage}.schedule.warmup_steps=1" for stage in ("pretrain", "sft")),
    "eval.bootstrap.n_resamples=50", "eval.replies.max_new_tokens=4", "export.n_parity_conversations=3",
]  # fmt: skip


def conversations(n: int, times: bool = False) -> list[dict[str, Any]]:
    rng = random.Random(0)
    made = []
    for number in range(n):
        now, messages = 1.7e9 + number * 1e5, []
        for place in range(rng.choice((3, 4, 5, 6, 7, 8))):
            now += rng.choice((5, 30, 60, 900)) if times else 0
            text = f"I like {rng.choice(WORDS)} and {rng.choice(WORDS)}, what of the {rng.choice(WORDS)} {number}?"
            speaker = ("Tom" if number % 3 else "Ann", "Mia")[place % 2]
            messages.append({"speaker": speaker, "text": text, **({"time": now} if times else {})})
        made.append({"id": f"c{number}", "character": "Mia", "messages": messages})
    return made


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def recipe(folder: Path, name: str) -> Any:
    return YAML(typ="safe").load(folder / f"{name}.yaml")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def as_roles(record: dict[str, Any], list_key: str, role_key: str, text_key: str, names: tuple[str, str]) -> Any:
    said = record["messages"]
    turns = [{role_key: names[place % 2], text_key: message["text"]} for place, message in enumerate(said)]
    return {list_key: turns}


def test_feedback_events_are_read_and_all_their_stages_planned(work: Path, make_feedback_log: Any) -> None:
    write_lines(work / "logs/a.jsonl", make_feedback_log(1, 40).events)
    assert find_source(Path("logs")).kind == "feedback_events"
    assert main(["mine", "--data", "logs"]) == 0
    assert {"engagement.yaml", "dpo.yaml"} <= {file.name for file in (work / "mine").iterdir()}
    assert pipeline(["mine", "--dry-run"]) == 0


@pytest.mark.parametrize("kind", ["chat_jsonl", "openai_messages", "sharegpt", "preference_pairs", "hh_rlhf"])
def test_the_reader_is_found(work: Path, kind: str) -> None:
    records = conversations(20)
    said = {
        "chat_jsonl": records,
        "openai_messages": [as_roles(r, "messages", "role", "content", ("user", "assistant")) for r in records],
        "sharegpt": [as_roles(r, "conversations", "from", "value", ("human", "gpt")) for r in records],
        "preference_pairs": [
            {**r, "messages": r["messages"][:1], "chosen": "Yes, I do.", "rejected": "No."} for r in records
        ],
        "hh_rlhf": [
            {side: f"\n\nHuman: What of {r['id']}?\n\nAssistant: {side} it is" for side in ("chosen", "rejected")}
            for r in records
        ],
    }
    write_lines(work / "logs" / "a.jsonl", said[kind])
    found = find_source(Path("logs"))
    read_alike = {"sharegpt": "openai_messages"}  # both take either's keys
    assert (found.kind, len(found.dialogues), found.bad) == (read_alike.get(kind, kind), 20, [])
    if kind in ("openai_messages", "sharegpt"):
        assert found.names.commonest() == ("User", "Assistant")


def test_columns_are_read_as_the_format_they_hold(work: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [as_roles(r, "messages", "role", "content", ("user", "assistant")) for r in conversations(20)]
    (work / "logs").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(records), work / "logs" / "a.parquet")
    found = find_source(Path("logs"))
    assert (found.source["kind"], len(found.dialogues)) == ("datasets", 20)
    assert found.names.commonest() == ("User", "Assistant")


def test_the_recipes_fit_the_data(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs" / "a.jsonl", [*conversations(300, times=True), {"id": 3}])
    assert main(["runs/mine", "--data", "logs"]) == 0
    output = capfd.readouterr().out
    lengths = [int(n) for n in re.findall(r"19 of 20 dialogues have (\d+) tokens or less", output)]
    assert len(lengths) == 1 and 128 <= lengths[0] <= 256, "a long one, for the row length of 256"
    assert "301: 300 dialogues, 1 bad" in output and "bad: logs/a.jsonl:301: " in output
    folder = work / "runs" / "mine"
    data, pretrain = recipe(folder, "data"), recipe(folder, "pretrain")
    assert data["sources"] == [{"kind": "chat_jsonl", "path": "logs"}]
    assert data["tokenizer"]["vocab_size"] == pretrain["model"]["vocab_size"] < 2048
    assert data["continue_within_seconds"] == 600
    assert data["max_bad_fraction"] == 0.01, "as in the demo: 1 of 301 is fewer"
    demo = YAML(typ="safe").load(ROOT / "recipes" / "demo" / "pretrain.yaml")
    assert 20 <= pretrain["loop"]["max_steps"] <= demo["loop"]["max_steps"]
    assert recipe(folder, "export")["names"] == {"user": "Tom", "character": "Mia"}
    assert recipe(folder, "pipeline")["runs"] == "runs/mine"
    text = "".join(file.read_text() for file in folder.glob("*.yaml"))
    assert "# keys a local layer sees" in text, "comments stay"
    assert "runs/demo" not in text and "recipes/demo" not in text and "chitchat" not in text
    assert pipeline(["runs/mine", "--dry-run"]) == 0
    output = capfd.readouterr().out
    assert "asked for" not in output, "no count has to be lowered"
    # what is there is not written over
    assert main(["runs/mine", "--data", "logs"]) == 2
    assert "runs/mine exists and is not empty" in capfd.readouterr().err


def test_with_times_all_seven_stages_are_written(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs/a.jsonl", conversations(60, times=True))
    assert main(["mine", "--data", "logs"]) == 0
    assert [entry["recipe"] for entry in recipe(work / "mine", "pipeline")["stages"]] == [
        "data.yaml", "pretrain.yaml", "sft.yaml", "engagement.yaml", "dpo.yaml", "eval.yaml", "export.yaml",
    ]  # fmt: skip
    assert recipe(work / "mine", "dpo")["pairs"][0]["n_contexts"] <= 60
    capfd.readouterr()
    assert pipeline(["mine", "--dry-run"]) == 0
    assert "asked for" not in capfd.readouterr().out, "no count has to be lowered"


def test_a_closed_pipe_leaves_whole_recipes(work: Path) -> None:
    write_lines(work / "logs/a.jsonl", conversations(60))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recipes.new", "mine", "--data", "logs"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=work, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr
    stages = [entry["recipe"] for entry in recipe(work / "mine", "pipeline")["stages"]]
    assert {file.name for file in (work / "mine").iterdir()} == {"pipeline.yaml", *stages}


def test_large_sources_are_sampled_and_that_is_told(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    records = [*conversations(10), {"id": 3}, *conversations(300)]
    for place, record in enumerate(records):
        record["id"] = f"c{place}"
        record["participants"] = ["everybody"]
    path = write_lines(work / "logs/a.jsonl", records)
    monkeypatch.setattr(look, "READ_AT_MOST_BYTES", path.stat().st_size - 1)
    monkeypatch.setattr(look, "_SAMPLE", 100)
    tried, read = [], look._read

    def reading(source: Any, settings: Any, at_most: int | None) -> Any:
        tried.append(settings["kind"])
        return read(source, settings, at_most)

    monkeypatch.setattr(look, "_read", reading)
    found = find_source(Path("logs"))
    assert (found.kind, found.is_sample, found.n_records, len(found.bad)) == ("chat_jsonl", True, 100, 1)
    assert set(tried) == {"chat_jsonl"}, "readers that may hold a whole file are not tried where another reads most"
    assert main(["mine", "--data", "logs"]) == 0
    printed = capfd.readouterr().out
    assert "the first 100 records" in printed and "(not tried: only a sample was read)" in printed
    assert recipe(work / "mine", "data")["split"]["by_participant"] is True
    assert recipe(work / "mine", "data")["tokenizer"]["vocab_size"] > 384, "the rest has more text"
    n_rows = [int(n.replace(",", "")) for n in re.findall(r"epochs of ([\d,]+) rows", printed)]
    sampled = sum(look.token_lengths(found.dialogues, look.fit_tokenizer(found.dialogues, 512))) / 256
    assert 2 * sampled < n_rows[0] < 6 * sampled, "100 of 311 records were read"


@pytest.mark.parametrize("number", range(12))
def test_participants_that_link_too_much_do_not_split(work: Path, number: int) -> None:
    """Somebody takes part in most dialogues, which are then all trained, and too few are left to hold out."""
    records = conversations(120)
    for place, record in enumerate(records):
        record["participants"] = [f"hub{number}" if place % 20 else f"u{place}"]
    write_lines(work / "logs/a.jsonl", records)
    assert main(["mine", "--data", "logs"]) == 0
    split = recipe(work / "mine", "data")["split"]
    assert split == {"kind": "fraction", "heldout": 0.2, "by_participant": False}


def test_participants_of_few_dialogues_split(work: Path) -> None:
    records = conversations(120)
    for place, record in enumerate(records):
        record["participants"] = [f"u{place // 2}"]
    write_lines(work / "logs/a.jsonl", records)
    assert main(["mine", "--data", "logs"]) == 0
    assert recipe(work / "mine", "data")["split"]["by_participant"] is True


def test_a_scorer_needs_both_labels_on_both_sides() -> None:
    def side(*labels: int) -> list[Dialogue]:
        return [
            Dialogue(f"{place}", (Message("Tom", "a"), Message("Mia", "b", None, {"engagement_label": label})), "Mia")
            for place, label in enumerate(labels)
        ]

    both, ones = side(*[0, 1] * 20), side(*[1] * 40)
    for train, heldout, has_scorer in ((both, both, True), (ones, both, False), (both, ones, False)):
        found: Any = SimpleNamespace(dialogues=[*train, *heldout], kind="chat_jsonl", source={}, has_times=False)
        choices = new_recipes.read_recipes(ROOT / "recipes/demo", "mine")
        new_recipes._choose_labels(choices, found, SimpleNamespace(train=train, heldout=heldout))
        assert ("engagement" in choices.recipes) == has_scorer


def test_steps_are_those_of_some_epochs_and_never_more_than_the_templates() -> None:
    def with_rows(n_rows: int) -> tuple[Any, list[str]]:
        choices = new_recipes.read_recipes(ROOT / "recipes/demo", "mine")
        new_recipes._choose_steps(choices, n_rows * 256, 10**6, 256)
        return choices.recipes["pretrain"], choices.reasons

    demo = new_recipes.read_recipes(ROOT / "recipes/demo", "mine").recipes["pretrain"]
    large, reasons = with_rows(10**6)
    assert large == demo and not reasons
    loop, schedule = demo["loop"], demo["schedule"]
    steps = loop["max_steps"] // 2
    half, _ = with_rows(steps * loop["rows_per_step"] // 8)
    assert half["loop"]["max_steps"] == pytest.approx(steps, abs=1)
    for key in ("evaluate_every", "save_every"):
        assert half["loop"][key] == pytest.approx(min(steps, loop[key] / 2), abs=1)
    for longest, row_length in ((100, 128), (300, 512), (5000, 512)):
        assert (
            new_recipes._row_length(new_recipes.read_recipes(ROOT / "recipes/demo", "mine"), [longest] * 9, look)
            == row_length
        )
    assert half["schedule"]["warmup_steps"] == pytest.approx(schedule["warmup_steps"] / 2, abs=1)


def test_stages_that_the_data_cannot_support_are_left_out(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs" / "a.jsonl", conversations(60))
    assert main(["mine", "--data", "logs/a.jsonl"]) == 0
    output = capfd.readouterr().out
    assert "no engagement stage: the messages have no times and no labels" in output
    assert "no dpo stage: " in output
    steps = r"sft: loop.max_steps: 20 \(the minimum; 2 epochs of \d+ rows of 256 tokens would be \d+\)"
    assert re.search(steps, output)
    assert [entry["recipe"] for entry in recipe(work / "mine", "pipeline")["stages"]] == [
        "data.yaml", "pretrain.yaml", "sft.yaml", "eval.yaml", "export.yaml",
    ]  # fmt: skip
    assert recipe(work / "mine", "data")["continue_within_seconds"] is None
    evaluation = recipe(work / "mine", "eval")
    assert list(evaluation["models"]) == ["pretrain", "sft"]
    assert not {"scorer", "engagement", "preference"} & evaluation.keys()
    assert recipe(work / "mine", "export")["init_from"] == "mine/sft"
    assert pipeline(["mine", "--dry-run"]) == 0


def test_pairs_are_trained_as_pairs(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    replies = {"rejected": "No."}
    pairs = [{**r, **replies, "messages": r["messages"][:1], "chosen": f"Yes, {r['id']}."} for r in conversations(60)]
    file = write_lines(work / "pairs" / "a.jsonl", pairs)
    assert main(["mine", "--data", "pairs"]) == 0
    dpo = recipe(work / "mine", "dpo")
    assert dpo["pairs"] == [{"kind": "file", "path": str(file.relative_to(work)), "format": "jsonl"}]
    assert recipe(work / "mine", "export")["init_from"] == "mine/dpo"
    assert pipeline(["mine", "--dry-run"]) == 0, capfd.readouterr()


def test_without_two_contexts_held_out_there_is_no_evaluation(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs/a.jsonl", conversations(5))
    assert main(["mine", "--data", "logs"]) == 0
    printed = capfd.readouterr().out
    assert "no eval stage: 1 of 1 held-out dialogues have such a late reply, at least 2 are needed" in printed
    assert not (work / "mine/eval.yaml").exists()
    assert pipeline(["mine", "--dry-run"]) == 0


def test_counts_of_tiny_data_are_lowered_each_with_its_reason(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs/a.jsonl", conversations(25))
    assert main(["mine", "--data", "logs"]) == 0
    printed = capfd.readouterr().out
    assert "eval: ranking.n_contexts: 4 (4 of 5 held-out dialogues have such a late reply)" in printed
    assert "eval: ranking.n_distractors: 3 (the replies of the other contexts)" in printed
    assert "export: n_parity_conversations: 5 (5 dialogues are held out)" in printed
    (n_rows, n_tokens), *_ = re.findall(r"pretrain: evaluation_rows: (\d+) \(([\d,]+) tokens are held out\)", printed)
    row_length = recipe(work / "mine", "data")["row_length"]
    assert int(n_rows) == max(1, int(n_tokens.replace(",", "")) // row_length)


def test_most_heldout_dialogues_have_a_context_to_reply_to(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs/a.jsonl", conversations(300))
    assert main(["mine", "--data", "logs"]) == 0
    evaluation, printed = recipe(work / "mine", "eval"), capfd.readouterr().out
    found = re.findall(r"(\d+) of (\d+) held-out dialogues have such a late reply", printed)
    assert found and all(int(n) >= 0.8 * int(of) for n, of in found)
    assert evaluation["contexts"]["min_messages"] == 1, "a fifth has 3 messages, of which the second is the reply"


def test_more_text_gives_more_pieces_and_bad_records_are_allowed_for(work: Path) -> None:
    rng, records = random.Random(1), conversations(300)
    for record in records:
        for message in record["messages"]:
            message["text"] = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 4))) for _ in range(35))
    write_lines(work / "logs/a.jsonl", [*records, *({"id": n} for n in range(20))])
    assert main(["mine", "--data", "logs"]) == 0
    data = recipe(work / "mine", "data")
    assert data["tokenizer"]["vocab_size"] == 1024
    assert data["max_bad_fraction"] == 0.08, "20 of 320 are bad"
    assert data["filters"] == {"min_speakers": 2, "min_messages": 2}
    assert data["split"]["heldout"] == 0.2
    for stage in ("pretrain", "sft"):
        loop = recipe(work / "mine", stage)["loop"]
        assert 1 <= loop["evaluate_every"] <= loop["max_steps"] and loop["save_every"] <= loop["max_steps"]
    assert pipeline(["mine", "--dry-run"]) == 0


@pytest.mark.parametrize("rarer", [0, 1, 30])
def test_labels_of_metadata_make_a_scorer_where_both_are_there(work: Path, rarer: int) -> None:
    records = conversations(60)
    for number, record in enumerate(records):
        for message in record["messages"][1::2]:
            message["metadata"] = {"engagement_label": int(number >= rarer)}
    write_lines(work / "logs/a.jsonl", records)
    assert main(["mine", "--data", "logs"]) == 0
    assert (work / "mine/engagement.yaml").exists() == (rarer == 30)


def test_pairs_in_columns_are_no_file_of_pairs(work: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pairs = [{**r, "messages": r["messages"][:1], "chosen": "Yes.", "rejected": "No."} for r in conversations(40)]
    (work / "logs").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(pairs), work / "logs/a.parquet")
    assert find_source(Path("logs")).kind == "preference_pairs"
    assert main(["mine", "--data", "logs"]) == 0
    assert not (work / "mine/dpo.yaml").exists()


def test_a_write_that_fails_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(work / "logs/a.jsonl", conversations(20))
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError(28, "no space", str(self))))
    assert main(["mine", "--data", "logs"]) == 2
    assert [file.name for file in work.iterdir()] == ["logs"]


def test_times_count_where_most_dialogues_have_them(work: Path) -> None:
    for n_timed in (9, 11):
        mixed = [*conversations(n_timed, times=True), *conversations(20)[n_timed:]]
        assert find_source(write_lines(work / f"{n_timed}.jsonl", mixed)).has_times == (n_timed == 11)
    assert [look.quantile([5, 1, 4, 2, 3], share) for share in (0.0, 0.5, 0.95)] == [1, 3, 5]


def test_an_id_in_every_dialogue_does_not_link_them(work: Path) -> None:
    """The bot's: the people are held out whole all the same."""
    logs = [one | {"participants": ["bot", f"user {i // 2}"]} for i, one in enumerate(conversations(40))]
    write_lines(work / "logs" / "a.jsonl", logs)
    assert main(["mine", "--data", "logs"]) == 0
    split = recipe(work / "mine", "data")["split"]
    assert (split["by_participant"], split["characters"]) == (True, ["bot"])


def test_a_folder_without_files_is_told(work: Path) -> None:
    (work / "logs").mkdir()
    with pytest.raises(LookError, match="logs: found no files"):
        find_source(work / "logs")
    (work / "logs" / "inner").symlink_to(work)
    with pytest.raises(LookError, match=r"found no files; 1 file not read: inner \(a link to a folder; give it as"):
        find_source(work / "logs")


def test_a_larger_template_keeps_its_own_stages(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines(work / "logs" / "a.jsonl", conversations(300))
    assert main(["mine", "--data", "logs", "--like", "mqa_1b"]) == 0
    assert [entry["recipe"] for entry in recipe(work / "mine", "pipeline")["stages"]] == ["data.yaml", "pretrain.yaml"]
    assert recipe(work / "mine", "pipeline")["runs"] == "mine"
    assert pipeline(["mine", "--dry-run"]) == 0, capfd.readouterr()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": 1}\n{"question": 2}\n', "no reader reads half of the records (.jsonl found)"),
        ("a.bin", "x", "logs: no reader reads such files (1 file not read: a.bin). Write one JSON object a line"),
        (".a.jsonl", "{}", "no reader reads such files (1 file not read: .a.jsonl)"),
        ("a.jsonl", "\n \n", "the files hold no records (1 file not read: a.jsonl)"),
        (
            "a.jsonl.gz",
            "{}",
            "  chat_jsonl, openai_messages, sharegpt, preference_pairs, hh_rlhf, feedback_events, datasets: "
            "logs/a.jsonl.gz: cannot be read (Not a gzipped file",
        ),
        ("a.jsonl", "[\n", "feedback_events: logs/a.jsonl:1: not JSON: "),
        (None, "", "--data logs: no such file or directory"),
        ("a.jsonl", "\n".join(json.dumps(r) for r in conversations(1)), "split: of 1 dialogues none is held-out"),
    ],
)
def test_data_that_will_not_do_is_told_and_nothing_is_written(
    work: Path, capfd: pytest.CaptureFixture[str], name: str | None, text: str, message: str
) -> None:
    if name is not None:
        (work / "logs").mkdir()
        (work / "logs" / name).write_text(text)
    assert main(["mine", "--data", "logs"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (work / "mine").exists()
    if name == "a.bin":
        with pytest.raises(LookError):
            find_source(Path("logs"))


def test_the_readme_s_three_commands_lead_to_a_bundle(work: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
    block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]
    assert len(commands) == 3
    write_lines(work / "logs" / "a.jsonl", conversations(300))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in commands:
        tiny = TINY if words[2] == "recipes.pipeline" else []
        done = subprocess.run(
            [sys.executable, *words[1:], *tiny], cwd=work, env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    serving = json.loads((work / "runs" / "mine" / "export" / "dramatis.json").read_text())
    assert "Mia" in serving.values() and "Tom" in serving.values()
    assert (work / "runs" / "mine" / "export" / "manifest.json").is_file()


def examples(n: int, **keys: str) -> list[dict[str, Any]]:
    """Published examples with ids and times: every conversation ends with the assistant."""
    role, text, user, assistant = (keys[key] for key in ("role", "text", "user", "assistant"))
    made = []
    for record in conversations(n, times=True):
        messages = record["messages"][: len(record["messages"]) // 2 * 2]
        made.append({
            "id": record["id"],
            keys["messages"]: [
                {role: (user, assistant)[place % 2], text: message["text"], "timestamp": message["time"]}
                for place, message in enumerate(messages)
            ],
        })  # fmt: skip
    return made


SHAREGPT = {"messages": "conversations", "role": "from", "text": "value", "user": "human", "assistant": "gpt"}
OPENAI = {"messages": "messages", "role": "role", "text": "content", "user": "user", "assistant": "assistant"}


def departures(found: look.Found) -> int:
    source = TypeAdapter(AnySource).validate_python(found.source)
    return len(found.dialogues) if source.end_means_partner_left else 0


@pytest.mark.parametrize("keys", [SHAREGPT, OPENAI])
@pytest.mark.parametrize("in_columns", [False, True])
def test_the_end_of_an_example_is_no_evidence(
    work: Path, keys: dict[str, str], in_columns: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    records = examples(60, **keys)
    if in_columns:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        (work / "logs").mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(records), work / "logs" / "a.parquet")
    else:
        write_lines(work / "logs" / "a.jsonl", records)
    found = find_source(Path("logs"))
    assert (found.kind, len(found.dialogues), found.has_times) == ("openai_messages", 60, True)
    assert found.source["kind"] == ("datasets" if in_columns else "openai_messages")
    assert departures(found) == 0
    assert main(["mine", "--data", "logs"]) == 0
    assert "- data: the end of a dialogue gives no engagement label (messages have roles" in capfd.readouterr().out


@pytest.mark.parametrize("own", ["speaker", "text", "character"])
def test_own_keys_with_roles_stay_own_logs_without_departures(work: Path, own: str) -> None:
    records = examples(60, **{**OPENAI, "text": "text" if own == "text" else "content"})
    for record in records:
        if own == "character":
            record["character"] = "Mia"
        for message in record["messages"]:
            if own != "text":
                message["speaker" if own == "speaker" else "name"] = "Mia" if message["role"] == "assistant" else "Tom"
    write_lines(work / "logs" / "a.jsonl", records)
    found = find_source(Path("logs"))
    assert found.source == {"kind": "chat_jsonl", "path": "logs", "ends_when_partner_leaves": False}
    # dialogues that end with either side are logs of people who came and left
    for record in records[: len(records) // 2]:
        record["messages"].pop()
    write_lines(work / "logs" / "a.jsonl", records)
    assert find_source(Path("logs")).source == {"kind": "chat_jsonl", "path": "logs"}


def test_own_logs_without_roles_keep_their_departures(work: Path) -> None:
    write_lines(work / "logs" / "a.jsonl", conversations(60, times=True))
    found = find_source(Path("logs"))
    assert found.source == {"kind": "chat_jsonl", "path": "logs"} and departures(found) == 60


def test_two_speakers_who_are_each_the_character_are_a_warning(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = conversations(60)
    for record in records:
        del record["character"]
    write_lines(work / "logs" / "a.jsonl", records)
    assert main(["mine", "--data", "logs"]) == 0
    warning = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1
    assert re.match(
        r"warning: Mia is the character in \d+ dialogues with Tom, Tom in \d+ with Mia: .*"
        r"set sources\.0\.character in data\.yaml .* names\.user and names\.character in export\.yaml",
        warning[0],
    )
    write_lines(work / "logs" / "a.jsonl", conversations(60))
    assert main(["named", "--data", "logs"]) == 0
    assert "warning: " not in capfd.readouterr().out


def test_files_that_are_not_read_are_named(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = [json.dumps(record) + "\n" for record in conversations(60)]
    for number, name in enumerate(("a.jsonl", "b.ndjson", "c.JSONL")):
        (work / "logs").mkdir(exist_ok=True)
        (work / "logs" / name).write_text("".join(records[number * 20 : number * 20 + 20]))
    for name in ("d.jsonl.bz2", "e.txt", "f.json", ".hidden.jsonl"):
        (work / "logs" / name).write_text("Tom:\nHi\n\nMia:\nYo\n" if name == "e.txt" else "".join(records[:20]))
    assert main(["mine", "--data", "logs"]) == 0
    printed = capfd.readouterr().out
    assert "60: 60 dialogues, 0 bad" in printed
    unread = "4 files not read: d.jsonl.bz2, e.txt, f.json, .hidden.jsonl; decompress .bz2 files to have them read"
    assert unread in printed
    assert prepare(["mine/data.yaml", "--dry-run"]) == 0
    assert f"logs: {unread}" in capfd.readouterr().out
    # one that another source of the recipe reads is not named; the report names the others too
    two = "sources=[{kind: chat_jsonl, path: logs}, {kind: shakespeare, path: logs}]"
    assert prepare(["mine/data.yaml", two, "--dry-run"]) == 0
    assert "3 files not read: d.jsonl.bz2, f.json, .hidden.jsonl; " in capfd.readouterr().out
    assert prepare(["mine/data.yaml"]) == 0
    assert f"logs: {unread}" in capfd.readouterr().out


def test_only_compressed_files_are_refused_by_name(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "logs").mkdir()
    (work / "logs" / "d.jsonl.bz2").write_bytes(b"BZh9")
    for data in ("logs", "logs/d.jsonl.bz2"):
        assert main(["mine", "--data", data]) == 2
        assert re.search(rf"{data}: 1 file not read: d\.jsonl\.bz2; decompress \.bz2", capfd.readouterr().err)


def test_a_full_file_system_names_the_folder_and_what_to_do(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lines(work / "logs" / "a.jsonl", conversations(30))

    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["mine", "--data", "logs"]) == 2
    assert "mine: No space left on device; make room, then run the same command again" in capfd.readouterr().err
    assert not (work / "mine").exists() and not list(work.glob(".mine*"))


def test_pairs_of_trl_are_read_and_trained_as_pairs(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [
        {"prompt": r["messages"][0]["text"], "chosen": f"Yes, {r['id']}.", "rejected": "No."} for r in conversations(60)
    ]
    write_lines(work / "pairs" / "a.jsonl", pairs)
    assert main(["mine", "--data", "pairs"]) == 0
    assert recipe(work / "mine", "dpo")["pairs"][0]["format"] == "jsonl"
    assert recipe(work / "mine", "export")["names"] == {"user": "User", "character": "Assistant"}
    assert pipeline(["mine", "--dry-run"]) == 0, capfd.readouterr()


def test_each_reader_gives_its_error_once(work: Path) -> None:
    write_lines(work / "logs" / "a.jsonl", [{"question": "Tea?", "answer": "Yes."}] * 20)
    with pytest.raises(LookError) as raised:
        find_source(Path("logs"))
    lines = str(raised.value).splitlines()
    assert len(lines) == len(set(lines))
    assert sum("preference_pairs" in line for line in lines) == 1
